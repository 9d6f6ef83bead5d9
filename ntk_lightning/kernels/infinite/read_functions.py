"""What the functions and methods that a forward calls mean for the kernel: one entry for every supported one."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ntk_lightning.kernels.infinite.architecture import Flatten, GlobalAvgPool, GlobalSumPool, Operation, Scale
from ntk_lightning.kernels.infinite.independence import Builder, Value
from ntk_lightning.kernels.infinite.read_modules import read_module
from ntk_lightning.networks import Erf, Pointwise

__all__ = ["FUNCTIONS", "METHODS", "NotSupported", "Sizes", "apply_module"]


class NotSupported(Exception):
    """An operation has no closed form; the argument says why, or is empty."""


@dataclass(frozen=True)
class Sizes:
    """The shape of a value, or the size of one of its dimensions: known when the network runs, not before."""

    of: Value
    dim: int | None = None


def apply_module(builder: Builder, module: nn.Module, value: Value, path: str = "") -> Value:
    """Feed a value to a module of a supported class.

    Args:
        builder: Of the graph.
        module: The module.
        value: What it is fed with.
        path: Where the module stands.

    Returns:
        Its output.

    Raises:
        NotSupported: The module's options have no closed form.
    """
    operations = read_module(module, path)
    if operations is None:
        raise NotSupported
    for operation in operations if isinstance(operations, tuple) else (operations,):
        value = builder.apply(operation, value)
    return value


def _module(kind: Callable[..., nn.Module]) -> Callable[..., Value]:
    """A function whose arguments after the first are those of a module's class."""

    def apply(builder: Builder, value: Value, *args: Any, **kwargs: Any) -> Value:  # noqa: ANN401
        kwargs.pop("inplace", None)
        return apply_module(builder, kind(*args, **kwargs), value)

    return apply


def _pointwise(function: Callable[..., torch.Tensor]) -> Callable[..., Value]:
    """A function of one number without options."""
    return _module(lambda: Pointwise(function))


def _add(builder: Builder, left: Value, right: Value, *, alpha: float = 1) -> Value:
    _check_values(left, right, "a constant that is added to a value shifts its mean: give the layer before a bias")
    return builder.add(left, _scaled(builder, right, alpha))


def _subtract(builder: Builder, left: Value, right: Value, *, alpha: float = 1) -> Value:
    return _add(builder, left, right, alpha=-alpha)


def _multiply(builder: Builder, left: Any, right: Any) -> Value:  # noqa: ANN401 - values or numbers
    if isinstance(left, Real):
        left, right = right, left
    if isinstance(right, Real):
        return _scaled(builder, left, float(right))
    _check_values(left, right, "values can be multiplied with numbers and with each other")
    return builder.multiply(left, right)


def _divide(builder: Builder, left: Value, right: Any) -> Value:  # noqa: ANN401
    if not isinstance(right, Real) or right == 0:
        raise NotSupported("values can be divided by numbers other than 0")
    return _scaled(builder, left, 1 / float(right))


def _scaled(builder: Builder, value: Value, factor: float) -> Value:
    return value if factor == 1 else builder.apply(Scale(float(factor)), value)


def _power(builder: Builder, value: Value, exponent: Any) -> Value:  # noqa: ANN401
    if exponent != 2:
        raise NotSupported("of powers only the square has a name: write others as Pointwise(function)")
    return apply_module(builder, Pointwise(torch.square), value)


def _cat(builder: Builder, tensors: Sequence[Value], dim: int = 0) -> Value:
    if not isinstance(tensors, list | tuple) or not all(isinstance(value, Value) for value in tensors):
        raise NotSupported("it must concatenate a list of values")
    vectors = all(value.axes == 0 for value in tensors)
    if dim != 1 and not (vectors and dim == -1):
        raise NotSupported("channels are concatenated with dim=1")
    return builder.concat(tensors)


def _flatten(builder: Builder, value: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    if (start_dim, end_dim) != (1, -1):
        raise NotSupported("all pixels are flattened with start_dim=1")
    return builder.apply(Flatten(), value)


def _view(builder: Builder, value: Value, *shape: Any) -> Value:  # noqa: ANN401
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], Sizes) or sizes[0].dim != 0:
        raise NotSupported("it may only flatten, as x.view(x.size(0), -1)")
    return builder.apply(Flatten(), value)


def _squeeze(builder: Builder, value: Value, *dims: Any) -> Value:  # noqa: ANN401
    given = set(dims[0] if len(dims) == 1 and isinstance(dims[0], list | tuple) else dims)
    if value.readout and value.axes == 0 and value.width == 1 and given in ({-1}, {1}):
        return value  # (n, 1) to (n,)
    all_axes = {1: ({-1}, {2}), 2: ({-1, -2}, {2, 3})}.get(value.axes or 0, ())
    if not value.pooled or given not in all_axes:
        raise NotSupported("it may only take away all spatial axes, after a global pooling: use x.flatten(1)")
    return builder.apply(Flatten(), value)


def _over_pixels(kinds: Callable[[int], Operation]) -> Callable[..., Value]:
    """A mean or a sum over all pixels."""

    def apply(builder: Builder, value: Value, dim: Any = None, keepdim: bool = False) -> Value:  # noqa: ANN401
        dims = {dim} if isinstance(dim, int) else set(dim) if isinstance(dim, list | tuple) else set()
        axes = {frozenset({2}): 1, frozenset({-1}): 1, frozenset({2, 3}): 2, frozenset({-1, -2}): 2}
        if axes.get(frozenset(dims)) not in ({1, 2} if value.axes is None else {value.axes}):
            raise NotSupported("it must be over all pixels: dim=(2, 3) of images, dim=2 of sequences")
        pooled = builder.apply(kinds(axes[frozenset(dims)]), value)
        return pooled if keepdim else builder.apply(Flatten(), pooled)

    return apply


def _dropout(builder: Builder, value: Value, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    return apply_module(builder, nn.Dropout(p).train(bool(training)), value, "F.dropout")


def _layer_norm(
    builder: Builder,
    value: Value,
    normalized_shape: list[int],
    weight: None = None,
    bias: None = None,
    eps: float = 1e-5,
) -> Value:
    if weight is not None or bias is not None:
        raise NotSupported("as a function it takes no weight and no bias: use nn.LayerNorm")
    return apply_module(builder, nn.LayerNorm(normalized_shape, eps, elementwise_affine=False), value, "F.layer_norm")


def _same(_: Builder, value: Value) -> Value:
    return value


def _size(_: Builder, value: Value, dim: int | None = None) -> Sizes:
    return Sizes(value, dim)


def _attribute(builder: Builder, value: Any, name: str) -> Any:  # noqa: ANN401
    if name != "shape" or not isinstance(value, Value):
        raise NotSupported
    return _size(builder, value)


def _item(_: Builder, value: Any, index: Any) -> Sizes:  # noqa: ANN401
    if not isinstance(value, Sizes) or value.dim is not None or not isinstance(index, int):
        raise NotSupported("a part of a value has no closed form here")
    return Sizes(value.of, index)


def _check_values(left: Any, right: Any, otherwise: str) -> None:  # noqa: ANN401
    if not isinstance(left, Value) or not isinstance(right, Value):
        raise NotSupported(otherwise)


_MEAN, _SUM = _over_pixels(GlobalAvgPool), _over_pixels(GlobalSumPool)
FUNCTIONS: dict[object, Callable[..., Any]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _add),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub), _subtract),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, torch.true_divide), _divide),
    **dict.fromkeys((operator.neg, torch.neg), lambda builder, value: _scaled(builder, value, -1.0)),
    **dict.fromkeys((operator.pow, torch.pow), _power),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
    torch.flatten: _flatten,
    torch.mean: _MEAN,
    torch.sum: _SUM,
    torch.reshape: _view,
    torch.squeeze: _squeeze,
    F.avg_pool1d: _module(nn.AvgPool1d),
    F.avg_pool2d: _module(nn.AvgPool2d),
    F.adaptive_avg_pool1d: _module(nn.AdaptiveAvgPool1d),
    F.adaptive_avg_pool2d: _module(nn.AdaptiveAvgPool2d),
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    F.relu: _module(nn.ReLU),
    torch.relu: _module(nn.ReLU),
    F.leaky_relu: _module(nn.LeakyReLU),
    F.gelu: _module(nn.GELU),
    **dict.fromkeys((torch.erf, torch.special.erf), _module(Erf)),
    **dict.fromkeys((torch.tanh, F.tanh), _module(nn.Tanh)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, torch.special.expit), _module(nn.Sigmoid)),
    F.silu: _module(nn.SiLU),
    F.mish: _module(nn.Mish),
    F.softplus: _module(nn.Softplus),
    F.logsigmoid: _module(nn.LogSigmoid),
    F.softsign: _module(nn.Softsign),
    F.tanhshrink: _module(nn.Tanhshrink),
    F.elu: _module(nn.ELU),
    F.celu: _module(nn.CELU),
    F.selu: _module(nn.SELU),
    F.hardtanh: _module(nn.Hardtanh),
    F.relu6: _module(nn.ReLU6),
    F.hardsigmoid: _module(nn.Hardsigmoid),
    F.hardswish: _module(nn.Hardswish),
    F.softshrink: _module(nn.Softshrink),
    **{
        function: _pointwise(function)
        for function in (torch.abs, torch.sin, torch.cos, torch.exp, torch.sign, torch.square, torch.atan, torch.expm1)
    },
    operator.abs: _pointwise(torch.abs),
    builtins.getattr: _attribute,
    operator.getitem: _item,
}

METHODS: dict[str, Callable[..., Any]] = {
    **{
        name: FUNCTIONS[getattr(torch, name)]
        for name in (
            *("add", "sub", "mul", "multiply", "div", "neg", "pow", "flatten", "mean", "sum", "reshape", "relu", "erf"),
            *("tanh", "sigmoid", "abs", "sin", "cos", "exp", "sign", "square", "atan", "expm1"),
        )
    },
    "view": _view,
    "squeeze": _squeeze,
    **dict.fromkeys(("contiguous", "clone"), _same),
    "size": _size,
}
