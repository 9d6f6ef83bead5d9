"""Taylor expansion of a network in its weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

__all__ = ["taylor_expansion"]

_Weights = dict[str, Tensor]
_Derivatives = Callable[[_Weights], tuple[Tensor, ...]]  # w -> (f, f', ..., f^(j))


def taylor_expansion(
    net: nn.Module, w0: _Weights, displacement: _Weights, x: Tensor, order: int = 1, include_f0: bool = False
) -> Tensor:
    """Expand a network around weights w0 up to an order k, along a displacement d.

    g_k = sum_{j=1..k} (1/j!) D^j f(w0, x)[d, ..., d], by nested Jacobian-vector products; order 1 is the linearized
    network of Lee et al. (2019, arXiv 1902.06720), higher orders are in Bai and Lee (2020, arXiv 1910.01619). Order k
    costs about 2^k evaluations of the network. Ordinary backward differentiates the result with respect to d. Works
    under :func:`torch.no_grad` and :func:`torch.inference_mode` too.

    Args:
        net: Maps (n, ...) to (n,) or (n, C); gives the structure, the buffers and the weights that ``w0`` leaves out.
        w0: Weights to expand around, by their names in ``net.named_parameters()``.
        displacement: The direction d = w - w0; names missing here are held at w0.
        x: Inputs (n, ...).
        order: The highest order k, at least 1.
        include_f0: Add f(w0, x), which makes it the Taylor polynomial of f itself.

    Returns:
        The expansion, of the shape of ``net(x)``.

    Raises:
        ValueError: The order is below 1, or a displacement has no weight of its name and shape.

    Example:
        >>> cube = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> ones = {name: torch.ones(1, 1) for name, _ in cube.named_parameters()}
        >>> [taylor_expansion(cube, ones, ones, torch.ones(1, 1), order=k).item() for k in (1, 2, 3)]
        [3.0, 6.0, 7.0]
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}: order 0 is f(w0, x), call the network.")
    for name, direction in displacement.items():
        if name not in w0 or w0[name].shape != direction.shape:
            expected = f"shape {tuple(w0[name].shape)}" if name in w0 else f"a name out of {sorted(w0)}"
            raise ValueError(
                f"displacement {name!r} of shape {tuple(direction.shape)} does not fit w0: use {expected}."
            )
    with torch.inference_mode(False), torch.set_grad_enabled(torch.is_grad_enabled()):
        w0, displacement = _usable(w0), _usable(displacement)
        x = x.clone() if x.is_inference() else x
        moved = {name: w0[name] for name in displacement}

        def f(w: _Weights) -> tuple[Tensor, ...]:
            return (functional_call(net, {**w0, **w}, (x,)),)

        derivatives: _Derivatives = f
        for _ in range(order):
            derivatives = _append_derivative(derivatives, displacement)
        values = derivatives(moved)
        terms = [value / math.factorial(j) for j, value in enumerate(values)]
    return torch.stack(terms[0 if include_f0 else 1 :]).sum(0)


def _append_derivative(derivatives: _Derivatives, direction: _Weights) -> _Derivatives:
    """Go one derivative along a fixed direction further."""

    def extended(w: _Weights) -> tuple[Tensor, ...]:
        values, tangents = jvp(derivatives, (w,), (direction,))[:2]
        return (*values, tangents[-1])

    return extended


def _usable(weights: _Weights) -> _Weights:
    """Replace inference tensors, which autograd refuses, by copies."""
    return {name: weight.clone() if weight.is_inference() else weight for name, weight in weights.items()}
