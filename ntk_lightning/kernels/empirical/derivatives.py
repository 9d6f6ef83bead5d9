"""Directional derivatives that are those of reverse mode, whatever the network does.

Forward mode is the cheaper way to J d, the derivative of a network in a direction d of its weights. But it
differentiates through ``torch.no_grad()``, takes the separate ``jvp`` of a ``torch.autograd.Function``, passes by
backward hooks, and has no formula for some operations. The gradients that a network is trained by are those of reverse
mode. Where the two can differ, J d is reverse mode applied twice: u -> J^T u is linear, its transpose maps d to J d.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.kernels.empirical.network_state import Weights

__all__ = ["ForwardModeWatch", "at_size_one", "differentiable_attention", "dot", "is_adjoint", "jvp_by_reverse"]


class ForwardModeWatch(TorchFunctionMode):
    """While active around forward mode, notice what reverse mode differentiates otherwise.

    Attributes:
        found: What was noticed, in words, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run an operation, and look at it."""
        if getattr(func, "__name__", "") == "custom_function_call":
            self.found = "a torch.autograd.Function"
        elif func is F.embedding and kwargs and kwargs.get("padding_idx") is not None:
            if bool((_values(args[0]) == kwargs["padding_idx"] % len(args[1])).any()):
                self.found = "the padding token of an embedding"  # whose row gets no gradient
        elif not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            tensors = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            # unpacking is no operation of the network, so it is not looked at
            if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
                self.found = "torch.no_grad() or torch.inference_mode()"
        return func(*args, **(kwargs or {}))


def _values(tensor: Tensor) -> Tensor:
    """The values of all samples, which a transform of torch.func works on one by one."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def jvp_by_reverse(f: Callable[[Weights], Tensor], weights: Weights, like: Tensor) -> Callable[[Weights], Tensor]:
    """Linearize f at some weights by reverse mode alone.

    Args:
        f: A function of weights that torch.func can transform.
        weights: Where the Jacobian J is taken.
        like: A tensor of the shape and dtype of f's values.

    Returns:
        The function that multiplies J with a direction d of the weights' shapes; J d has the shape of f's values.
    """

    def transposed(u: Tensor) -> Weights:  # u -> J^T u
        pulled: Weights = vjp(f, weights)[1](u)[0]
        return pulled

    pull = vjp(transposed, torch.zeros_like(like))[1]

    def push(direction: Weights) -> Tensor:
        product: Tensor = pull(direction)[0]
        return product

    return push


def dot(a: Weights, b: Weights) -> Tensor:
    """Inner product of two directions of the weights, in float64; a complex entry counts as its two parts."""
    total = torch.zeros((), dtype=torch.float64)
    for name, value in a.items():
        left, right = (torch.view_as_real(t) if t.is_complex() else t for t in (value, b[name]))
        total += (left.double() * right.double()).sum().cpu()
    return total


def at_size_one(cotangent: Tensor) -> tuple[Tensor, float]:
    """Split a cotangent into one of largest entry 1, and its size."""
    # a network that rounds to float32 within rounds the gradient of 2 f otherwise than that of f: so f is taken
    size = float(cotangent.abs().max())
    return (cotangent / size, size) if size > 0 else (cotangent, 1.0)


def is_adjoint(
    direction: Weights, product: Tensor, cotangent: Tensor, gradient: Weights, dtype: torch.dtype | None = None
) -> bool:
    """Test on one pair of vectors that a product J d belongs to the transposed products of reverse mode.

    <u, J d> = <J^T u, d> for all u and d; random ones tell two different Jacobians apart with probability one.

    Args:
        direction: d.
        product: J d, as computed.
        cotangent: u, of its shape.
        gradient: J^T u by reverse mode.
        dtype: The coarsest precision in which they were computed, or None for that of the product.

    Returns:
        Whether both sides are equal to rounding, or not finite.
    """
    left, right = dot({"": cotangent}, {"": product}), dot(gradient, direction)
    if not torch.isfinite(left + right):
        return True  # the kernel's own check speaks of that
    size = dot({"": cotangent}, {"": cotangent}) * dot({"": product}, {"": product})
    size += dot(gradient, gradient) * dot(direction, direction)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype or product.dtype, 0.1)
    return bool((left - right).abs() <= tolerance * size.sqrt())


_attention_lock = threading.Lock()
_attention_users = 0
_attention_before = ExitStack()


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Let attention run in plain operations, which have all derivatives.

    The fused kernels of ``scaled_dot_product_attention`` and the fast path of ``nn.MultiheadAttention`` have no forward
    mode and no second derivative. Both switches belong to the process: the first thread that comes in turns them, and
    the last one that leaves turns them back.

    Yields:
        Nothing.
    """
    global _attention_users
    with _attention_lock:
        if _attention_users == 0:
            _attention_before.callback(
                torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
            )
            torch.backends.mha.set_fastpath_enabled(False)
            _attention_before.enter_context(sdpa_kernel(SDPBackend.MATH))
        _attention_users += 1
    try:
        yield
    finally:
        with _attention_lock:
            _attention_users -= 1
            if _attention_users == 0:
                _attention_before.close()
