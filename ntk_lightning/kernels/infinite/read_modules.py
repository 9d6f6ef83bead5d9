"""What modules mean for the kernel: one reader for every supported class, and its name in messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ntk_lightning import networks
from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, read_activation
from ntk_lightning.kernels.infinite.architecture import (
    Attention,
    Conv,
    Dropout,
    Flatten,
    GlobalAvgPool,
    Linear,
    Norm,
    Operation,
    Pool,
)

__all__ = ["known_class", "read_module", "supported"]

_log = logging.getLogger(__name__)

_UNIT_FAN_IN = 3**-0.5  # standard deviation of PyTorch's initial weights at unit fan-in: U(-1, 1)


def _linear(module: Any, path: str) -> Linear:  # noqa: ANN401 - these read NTKLinear, nn.Linear and so on alike
    scales = _scales(module, module.in_features)
    return Linear(**scales, **_place(module, path, module.in_features, module.out_features))


def _conv(module: Any, path: str) -> Conv | None:  # noqa: ANN401
    axes = module.weight.dim() - 2
    if getattr(module, "groups", 1) != 1 or any(d != 1 for d in _each(getattr(module, "dilation", 1), axes)):
        return None
    mode = getattr(module, "padding_mode", "zeros")
    if mode not in ("zeros", "circular"):
        return None
    sizes = tuple(module.weight.shape[2:])
    pads: list[tuple[int, int]] = []
    for size, pad in zip(sizes, _each(module.padding, axes), strict=True):
        more = size - 1 if pad == "same" else 0 if pad == "valid" else 2 * pad
        pads.append((more // 2, more - more // 2))
    even = tuple(low if low == high else (low, high) for low, high in pads)
    return Conv(
        kernel_size=_one(sizes),
        pad=_one(even),
        stride=_one(_each(module.stride, axes)),
        **_scales(module, module.weight[0].numel()),
        circular=mode == "circular" and any(map(any, pads)),
        axes=axes,
        **_place(module, path, module.in_channels, module.out_channels),
    )


def _place(module: nn.Module, path: str, fan_in: int, fan_out: int) -> dict[str, Any]:
    return {"path": path, "fan_in": fan_in, "fan_out": fan_out, "name": type(module).__name__}


def _scales(module: Any, fan_in: int) -> dict[str, Any]:  # noqa: ANN401
    """Standard deviations of weights at unit fan-in and of biases, and what the gradient by them adds to the NTK."""
    if not hasattr(module, "weight_std"):  # PyTorch draws both from U(-1, 1) / sqrt(fan_in)
        bias_std = 0.0 if module.bias is None else _UNIT_FAN_IN / fan_in**0.5
        return {"weight_std": _UNIT_FAN_IN, "bias_std": bias_std, "gradient": (float(fan_in), float(bias_std > 0))}
    scales: dict[str, Any] = {"weight_std": module.weight_std, "bias_std": module.bias_std}
    if getattr(module, "parameterization", "ntk") == "standard":
        scales["gradient"] = float(fan_in), float(module.bias is not None)
    return scales


def _pool(module: Any, _: str) -> Pool | None:  # noqa: ANN401
    if module.ceil_mode:
        return None
    axes = 1 if isinstance(module, nn.AvgPool1d) else 2
    size, stride, pad = (_each(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    if min(size) < 1 or min(stride) < 1:
        raise ValueError(f"{module}: windows and strides must be at least one pixel.")
    if any(2 * p > s for p, s in zip(pad, size, strict=True)) or min(pad) < 0:
        raise ValueError(f"{module}: padding must be at least 0 and at most half of the window.")
    divisor = getattr(module, "divisor_override", None)
    if divisor == 0:
        raise ValueError(f"{module}: divisor_override must not be 0.")
    counted = module.count_include_pad or not any(pad) or divisor is not None
    return Pool(_one(size), _one(stride), _one(pad), divisor, counted, axes)


def _norm(module: Any, path: str) -> Norm | None:  # noqa: ANN401
    if isinstance(module, nn.GroupNorm):
        if module.num_groups != 1:
            return None
        features, pixels = (module.num_channels,), True
    else:
        features = tuple(module.normalized_shape)
        pixels = len(features) > 1
    trained = False
    for parameter, start in ((module.weight, 1), (getattr(module, "bias", None), 0)):
        if parameter is not None and not bool((parameter.detach() == start).all()):
            raise TypeError(
                f"{path} has gains other than 1 or biases other than 0: reset them, or take it without "
                "(elementwise_affine=False, affine=False)."
            )
        trained |= parameter is not None and parameter.requires_grad
    if trained:
        _log.warning(
            "%s has gains and biases that require gradients. The infinite-width kernel holds them at 1 and 0; to have "
            "the same of a finite network, take the layer without them or call %s.requires_grad_(False).",
            *(path, path),
        )
    return Norm(module.eps, pixels, features=features, path=path)


def _attention(module: Any, path: str) -> Attention | None:  # noqa: ANN401
    if module.scaling == "sqrt" and module.mechanism != "identity":
        return None
    stds = module.query_std * module.key_std, module.value_std * module.out_std, module.bias_std
    fans = {"fan_in": module.in_channels, "fan_out": module.out_channels}
    return Attention(module.mechanism, module.scaling, *stds, path=path, **fans)


def _dropout(module: Any, path: str) -> Dropout | tuple[()]:  # noqa: ANN401
    if not module.training or module.p == 0:
        return ()
    if module.p == 1:
        raise ValueError(f"{path} drops everything out: give it p < 1, or call .eval().")
    return Dropout(1 - module.p)


def _global_pool(module: Any, _: str) -> GlobalAvgPool | None:  # noqa: ANN401
    axes = 1 if isinstance(module, nn.AdaptiveAvgPool1d) else 2
    return GlobalAvgPool(axes) if all(n == 1 for n in _each(module.output_size, axes)) else None


def _flatten(module: Any, _: str) -> Flatten | None:  # noqa: ANN401
    return Flatten() if (module.start_dim, module.end_dim) == (1, -1) else None


_Reader = Callable[[Any, str], Operation | tuple[()] | None]  # () of what changes nothing, None without closed form
_READERS: dict[type[nn.Module], tuple[str, _Reader]] = {
    networks.NTKLinear: ("NTKLinear", _linear),
    networks.NTKConv1d: ("NTKConv1d", _conv),
    networks.NTKConv2d: ("NTKConv2d", _conv),
    networks.SelfAttention: ("SelfAttention", _attention),
    networks.ChannelNorm: ("ChannelNorm", lambda module, path: Norm(module.eps, path=path)),
    nn.Linear: ("nn.Linear", _linear),
    nn.Conv1d: ("nn.Conv1d", _conv),
    nn.Conv2d: ("nn.Conv2d without groups and dilation", _conv),
    nn.Identity: ("nn.Identity", lambda *_: ()),
    nn.AvgPool1d: ("nn.AvgPool1d", _pool),
    nn.AvgPool2d: ("nn.AvgPool2d without ceil_mode", _pool),
    nn.AdaptiveAvgPool1d: ("nn.AdaptiveAvgPool1d(1)", _global_pool),
    nn.AdaptiveAvgPool2d: ("nn.AdaptiveAvgPool2d(1)", _global_pool),
    nn.Flatten: ("nn.Flatten", _flatten),
    nn.Dropout: ("nn.Dropout", _dropout),
    nn.LayerNorm: ("nn.LayerNorm", _norm),
    nn.GroupNorm: ("nn.GroupNorm(1, channels)", _norm),
}


def supported() -> str:
    """The supported modules and operations in words.

    Returns:
        A list for messages.
    """
    activations = (row.words for row in ACTIVATIONS.values())
    return (
        f"{', '.join(words for words, _ in _READERS.values())}, {', '.join(activations)}, Residual, nn.Sequential and "
        "modules of these; in forward also +, -, *, torch.cat(..., 1), activations as functions, flatten, mean and sum "
        "over all pixels, F.avg_pool, F.dropout"
    )


def known_class(module: nn.Module) -> type[nn.Module] | None:
    """Find the supported class that a module is an instance of.

    Args:
        module: Any module.

    Returns:
        The class, or None.
    """
    classes = (*_READERS, *(kind for row in ACTIVATIONS.values() for kind in row.modules))
    return next((kind for kind in classes if isinstance(module, kind)), None)


def read_module(module: nn.Module, path: str) -> Operation | tuple[()] | None:
    """Translate a module of a supported class.

    Args:
        module: Of a supported class, with its forward.
        path: Where it stands, for messages.

    Returns:
        Its operation, () where it changes nothing, or None where its options have no closed form.

    Raises:
        TypeError: Gains are not 1, or a function is not pointwise.
        ValueError: Its options make no sense.

    Example:
        >>> read_module(nn.AvgPool2d(2), "net.3")
        Pool(kernel_size=2, stride=2)
    """
    for kind, (_, reader) in _READERS.items():
        if isinstance(module, kind):
            return reader(module, path)
    return read_activation(module)


def _each(value: Any, axes: int) -> tuple[Any, ...]:  # noqa: ANN401 - numbers or words
    return tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,) * axes


def _one(values: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """One number where all are equal."""
    return values[0] if len(set(values)) == 1 and isinstance(values[0], int) else values
