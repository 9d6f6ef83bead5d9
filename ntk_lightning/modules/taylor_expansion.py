"""Taylor expansion of a network in its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.derivatives import (
    ForwardModeWatch,
    differentiable_attention,
    is_adjoint,
)
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_by_layer import is_chain
from ntk_lightning.kernels.empirical.network_function import Output
from ntk_lightning.kernels.empirical.network_state import Weights, functional_call, preserved, usable
from ntk_lightning.kernels.empirical.rows import AllocationMeter
from ntk_lightning.kernels.empirical.standard_layers import is_standard
from ntk_lightning.modules.gradient_product import by_gradients
from ntk_lightning.modules.output_gradient import by_output_gradient
from ntk_lightning.modules.taylor_mode import nested_derivatives, taylor_coefficients
from ntk_lightning.precision import own_precision

__all__ = ["taylor_expansion"]

_Function = Callable[[Weights], Tensor]  # w -> f
_Way = Literal["forward", "reverse", "gradients"]

_log = logging.getLogger(__name__)
_BY_GRADIENTS = "%s is linearized by the gradients of all outputs, one sample at a time. %s"
_not_one_output: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()  # which selections and inputs
_ways: WeakKeyDictionary[nn.Module, dict[Hashable, _Way]] = WeakKeyDictionary()  # what was found, for each network


def taylor_expansion(
    net: nn.Module,
    w0: Weights,
    displacement: Weights,
    x: Any,  # noqa: ANN401 - whatever the network takes
    order: int = 1,
    include_f0: bool = False,
    output: Output = None,
) -> Tensor:
    """Expand a network around weights w0 up to an order k, along a displacement d.

    g_k = sum_{j=1..k} (1/j!) D^j f(w0, x)[d, ..., d]; order 1 is the linearized network of Lee et al. (2019, arXiv
    1902.06720), higher orders are in Bai and Lee (2020, arXiv 1910.01619). The derivatives are those of reverse mode,
    by which networks are trained. Chains (``nn.Sequential``, ``Residual``) of the package's and PyTorch's usual layers
    carry Taylor coefficients from layer to layer, which costs about k evaluations of the network, or, for one output at
    order 1, take the gradient of that output in what the layers give. Other networks take nested Jacobian-vector
    products, about 2^k evaluations; or, where forward mode would differ (``torch.no_grad()`` within the network) or has
    no formula, reverse mode applied twice for each order; or, at order 1 where that differs too (a backward that cannot
    be differentiated), the gradient of every output of every sample. Ordinary backward differentiates the result with
    respect to d. Works under :func:`torch.no_grad` and :func:`torch.inference_mode` too. The network's buffers do not
    change.

    Args:
        net: Maps (n, ...) to (n,) or (n, C), or to what ``output`` takes; gives the structure, the buffers and the
            weights that ``w0`` leaves out.
        w0: Weights to expand around, by their names in ``net.named_parameters()``.
        displacement: The direction d = w - w0; names missing here are held at w0.
        x: Inputs (n, ...): a tensor, a tuple or list of arguments, or a mapping of keywords.
        order: The highest order k, at least 1.
        include_f0: Add f(w0, x), which makes it the Taylor polynomial of f itself.
        output: The one output to expand, as (n, 1); a function of what the network returns; or None for all it returns.

    Returns:
        The expansion, of the shape of ``net(x)``, or of what ``output`` makes of it.

    Raises:
        ValueError: The order is below 1, a displacement has no weight of its name and shape, or the network cannot be
            differentiated as often as that.

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
    training = torch.is_grad_enabled()
    inputs = Inputs.of(x)
    standard = is_standard(net) and not callable(output)
    with torch.inference_mode(False), torch.enable_grad(), nullcontext() if standard else _untouched(net):
        inputs = inputs.with_leaves(map(usable, inputs.leaves))
        fixed = {name: usable(weight) for name, weight in w0.items()}
        along = {name: usable(d) if training else usable(d).detach() for name, d in displacement.items()}
        moved = {name: fixed[name] for name in along}

        def outputs(inputs: Inputs) -> _Function:
            def f(w: Weights) -> Tensor:
                buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}  # which it may write into
                return _selected(output, functional_call(net, {**buffers, **fixed, **w}, *inputs.arguments()))

            return f

        if standard and is_chain(net, inputs) and not _differentiated_otherwise(fixed, along, inputs):
            terms = _by_layers(net, fixed, along, inputs, order, output, training)
        else:
            if standard:
                values = nested_derivatives(outputs(inputs), moved, along, order)
            else:
                values = _forward_or_reverse(net, outputs, inputs, moved, along, order, output)
            terms = [value / math.factorial(j) for j, value in enumerate(values)]
        expansion = torch.stack(terms[0 if include_f0 else 1 :]).sum(0)
    return expansion if training else expansion.detach()


def _differentiated_otherwise(w0: Weights, direction: Weights, inputs: Inputs) -> bool:
    """Whether the result will be differentiated in more than the direction, or by transforms of torch.func."""
    fixed = (*w0.values(), *inputs.leaves)
    wrapped = map(torch._C._functorch.is_functorch_wrapped_tensor, (*fixed, *direction.values()))
    return any(tensor.requires_grad for tensor in fixed) or any(wrapped)


def _by_layers(
    net: nn.Module, w0: Weights, direction: Weights, inputs: Inputs, order: int, output: Output, training: bool
) -> list[Tensor]:
    """Taylor coefficients of a chain of standard layers: the cheapest way to a training step, or to values alone."""
    x, known, key = (
        inputs.arguments()[0][0],
        _not_one_output.setdefault(net, set()),
        (output, inputs.leaves[0].shape[1:]),
    )
    number = None if callable(output) else output
    # One backward pass of f is the cheapest for one output, but keeps activations and forms small numbers: only where a
    # backward pass follows, and not in half precision.
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    if order == 1 and training and exact and key not in known:
        found = by_output_gradient(net, w0, direction, x, number)
        if found is not None:
            return list(found)
        known.add(key)
    return [_selected(output, value) for value in taylor_coefficients(net, w0, direction, x, order)]


@contextmanager
def _untouched(net: nn.Module) -> Iterator[None]:
    """Differentiate what a network of any kind does, and leave its attributes as they are."""
    with differentiable_attention(), preserved(net):
        yield


def _forward_or_reverse(
    net: nn.Module,
    outputs: Callable[[Inputs], _Function],
    inputs: Inputs,
    w: Weights,
    direction: Weights,
    order: int,
    output: Output,
) -> tuple[Tensor, ...]:
    """Derivatives (f, f', ..., f^(k)) along the direction: by forward mode, unless the network needs reverse mode."""
    modes = tuple(module.training for module in net.modules())
    shapes = tuple((leaf.dtype, leaf.shape[1:]) for leaf in inputs.leaves)
    known, key = _ways.setdefault(net, {}), (order, output, modes, inputs.paths, shapes)
    f = outputs(inputs)
    if key not in known:
        with own_precision(inputs.device.type):
            known[key] = _try(net, outputs(inputs[:2]), w, order, inputs.device)
    if known[key] == "forward":
        with ForwardModeWatch() as watch:
            values = nested_derivatives(f, w, direction, order)
        if watch.found is None:
            return values
        known[key] = "reverse"  # a branch of the network that the trial did not see
    if known[key] == "reverse":
        return _by_reverse_mode(f, w, direction, order)
    return by_gradients([outputs(sample) for sample in inputs.split(1)], w, direction)


def _try(net: nn.Module, f: _Function, w: Weights, order: int, device: torch.device) -> _Way:
    """Compare J d of two samples with J^T u of reverse mode, on random d and u and with the same random numbers."""
    w = {name: weight.detach() for name, weight in w.items()}
    refused: dict[str, str] = {}
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        direction = {name: torch.randn_like(weight).requires_grad_() for name, weight in w.items()}
        leaves = {name: weight.clone().requires_grad_() for name, weight in w.items()}
    along = {name: d.detach() for name, d in direction.items()}
    meter = AllocationMeter()
    with torch.random.fork_rng(cuda), meter:
        value = f(leaves)
    rounded = meter.rounded(value.dtype)
    if rounded and order == 1 and value.dtype == torch.float64:  # in float64 all digits are wanted
        reasons = f"It computes in {', '.join(map(str, rounded))} within."
        _log.info(_BY_GRADIENTS, type(net).__name__, reasons)
        return "gradients"
    u = torch.linspace(1, 2, value.numel()).to(value).reshape(value.shape)
    try:
        found = torch.autograd.grad(value, list(leaves.values()), u, materialize_grads=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise ValueError(
            f"{type(net).__name__} computes activations again in its backward pass, then without the weights that it "
            "is expanded at: turn checkpointing off, in transformers by net.gradient_checkpointing_disable()."
        ) from error
    gradient = {n: g.to_dense() if g.is_sparse else g for n, g in zip(leaves, found, strict=True)}
    ways: dict[_Way, Callable[..., tuple[Tensor, ...]]] = {"forward": nested_derivatives, "reverse": _by_reverse_mode}
    for way, derivatives in ways.items():
        watch = ForwardModeWatch()
        try:
            with torch.random.fork_rng(cuda), watch if way == "forward" else nullcontext():
                product = derivatives(f, w, direction, 1)[1]
            if order == 1:  # training goes back through the product, which not every graph allows
                torch.autograd.grad(product, list(direction.values()), u, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an operation without this derivative, in whatever way it says so
            refused[way] = f"{type(error).__name__}: {error}"
            continue
        if watch.found is None and is_adjoint(along, product.detach(), u, gradient, rounded[0] if rounded else None):
            if refused:
                _log.info("%s is expanded by reverse mode: %s", type(net).__name__, refused["forward"])
            return way
        refused[way] = f"it meets {watch.found}" if watch.found else "it is another derivative than backward"
    reasons = f"Forward mode: {refused['forward']}. Reverse mode applied twice: {refused['reverse']}."
    if order == 1:
        _log.info(
            "%s is linearized by the gradients of all outputs, one sample at a time. %s", type(net).__name__, reasons
        )
        return "gradients"
    raise ValueError(
        f"{type(net).__name__} cannot be expanded to order {order}. {reasons} Write the backward of its functions in "
        "differentiable operations, or use order=1."
    )


def _by_reverse_mode(f: _Function, w: Weights, direction: Weights, order: int) -> tuple[Tensor, ...]:
    """Derivatives of phi(t) = f(w + t d) at t = 0: u^T phi' is linear in u, and its derivative in u is phi'."""
    t = torch.zeros((), device=next(iter(w.values())).device, requires_grad=True)
    values = [f({name: weight + t * direction[name] for name, weight in w.items()})]
    for _ in range(order):
        phi = values[-1]
        u = torch.zeros_like(phi, requires_grad=True)
        slope = torch.autograd.grad(phi, t, u, create_graph=True, allow_unused=True)[0] if phi.requires_grad else None
        if slope is None or not slope.requires_grad:
            values.append(torch.zeros_like(phi))
        else:
            values.append(torch.autograd.grad(slope, u, create_graph=True)[0])
    return tuple(values)


def _selected(output: Output, returned: Any) -> Tensor:  # noqa: ANN401 - whatever the network returns
    """What is expanded, out of what the network returns."""
    out = output(returned) if callable(output) else returned
    if not isinstance(out, Tensor):
        raise ValueError(
            f"What is expanded must be a tensor, got {type(out).__name__}: choose by output=..., such as "
            "output=lambda out: out.logits[:, -1]."
        )
    if isinstance(output, int):
        if not 0 <= output < out.shape[-1]:
            raise ValueError(f"output must be one of the network's {out.shape[-1]}; got {output}.")
        out = out[..., output : output + 1]
    return out
