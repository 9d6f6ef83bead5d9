"""What an architecture means for its infinite-width kernel: a checked, parameter-free list of layers.

Widths vanish in the limit, so two networks that differ only in width have the same list; its ``repr`` names the
architecture in the keys of stored Grams.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, Activation, read_activation
from ntk_lightning.networks import NTKConv2d, NTKLinear, Residual

__all__ = ["Activation", "Conv", "Flatten", "GlobalAvgPool", "Layer", "Linear", "Pool", "Sum", "check_shape", "parse"]

_CLASSES = nn.Sequential, Residual, NTKLinear, NTKConv2d, nn.Identity, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Where an affine layer stands and what fits it; None where that is not known.

    Widths are no part of the limit, so none of this is part of a layer's ``repr`` or of its equality.
    """

    path: str = field(default="", repr=False, compare=False)
    fan_in: int | None = field(default=None, repr=False, compare=False)  # features or channels of its input
    fan_out: int | None = field(default=None, repr=False, compare=False)  # and of its output


@dataclass(frozen=True)
class Linear(_Sizes):
    """Fully connected layer: weight_std^2 K + bias_std^2."""

    weight_std: float
    bias_std: float


@dataclass(frozen=True)
class Conv(_Sizes):
    """Square convolution with ``pad`` zeros on each side."""

    kernel_size: int
    pad: int
    stride: int
    weight_std: float
    bias_std: float


@dataclass(frozen=True)
class Pool:
    """Square average pooling without padding."""

    kernel_size: int
    stride: int


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over all pixels."""


@dataclass(frozen=True)
class Flatten:
    """All pixels become inputs of the next linear layer: the mean over equal pixels."""


@dataclass(frozen=True)
class Sum:
    """Sum of two independent branches."""

    body: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]


Layer = Linear | Conv | Activation | Pool | GlobalAvgPool | Flatten | Sum


def parse(net: nn.Module) -> tuple[Layer, ...]:
    """Translate a network into its layers, or say why it has no infinite-width kernel here.

    Args:
        net: ``nn.Sequential`` of supported layers, or a single one. Layers without parameters may occur repeatedly.

    Returns:
        The layers in order, identities left out.

    Raises:
        TypeError: A layer has no closed form; the message names it and lists what is supported. Or what it computes is
            changed by a subclass, a hook or a parametrization, or weights are used twice.
        ValueError: The order of the layers has no closed form (an activation of something that is not Gaussian, say),
            or the network has no affine layer.
    """
    layers = tuple(_translate(net, "net", {}))
    _check_gaussian(layers, gaussian=False, flat=False)
    if not layers or not isinstance(layers[-1], Linear):
        raise ValueError("The network must end in an NTKLinear readout to have a scalar kernel per pair of inputs.")
    return layers


def _translate(module: nn.Module | None, path: str, owners: dict[int, str]) -> list[Layer]:
    """Translate one module; ``owners`` are the paths of the parameters found so far, by id."""
    module = _uncompiled(module, path)
    known = _known_class(module)
    if module is not None and known is not None:
        _check_unchanged(module, known, path)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in owners:
                raise TypeError(
                    f"{path} and {owners[id(parameter)]} share a parameter: the infinite-width limit with tied weights "
                    "is not supported. Give each layer its own."
                )
            owners[id(parameter)] = path
    match module:
        case nn.Sequential():
            children = module._modules.items()  # unlike named_children(), with every use of a module
            return [layer for name, child in children for layer in _translate(child, f"{path}.{name}", owners)]
        case NTKLinear(parameterization="ntk"):
            fans = module.in_features, module.out_features
            return [Linear(module.weight_std, module.bias_std, path=path, fan_in=fans[0], fan_out=fans[1])]
        case NTKConv2d(
            kernel_size=int(size), pad=int(pad), stride=int(stride), padding_mode="zeros", parameterization="ntk"
        ):
            scales, fans = (module.weight_std, module.bias_std), (module.in_channels, module.out_channels)
            return [Conv(size, pad, stride, *scales, path=path, fan_in=fans[0], fan_out=fans[1])]
        case nn.Module() if activation := read_activation(module):
            return [activation]
        case nn.Identity():
            return []
        case nn.AvgPool2d(padding=0 | (0, 0), ceil_mode=False, divisor_override=None):
            return [Pool(_square(module.kernel_size, path), _square(module.stride, path))]
        case nn.AdaptiveAvgPool2d(output_size=1 | (1, 1)):
            return [GlobalAvgPool()]
        case nn.Flatten(start_dim=1, end_dim=-1):
            return [Flatten()]
        case Residual():
            body, shortcut = (
                tuple(_translate(branch, f"{path}.{name}", owners))
                for name, branch in (("body", module.body), ("shortcut", module.shortcut))
            )
            return [Sum(body, shortcut)]
    raise TypeError(f"{path} is {module}, which has no infinite-width kernel here. Supported: {_supported()}.")


def _uncompiled(module: nn.Module | None, path: str) -> nn.Module | None:
    """The module in the wrapper of torch.compile, which computes the same."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded before something is compiled
    while dynamo is not None and isinstance(module, dynamo.OptimizedModule):
        _check_hooks(module, path, "compiled module")
        module = module._orig_mod
    return module


def _supported() -> str:
    """The supported layers in words."""
    return (
        f"NTKLinear, NTKConv2d, {', '.join(row.words for row in ACTIVATIONS.values())}, nn.Identity, nn.AvgPool2d "
        "without padding, nn.AdaptiveAvgPool2d(1), nn.Flatten, Residual and nn.Sequential of these"
    )


def _known_class(module: nn.Module | None) -> type[nn.Module] | None:
    """The supported class that a module is an instance of."""
    classes = (*_CLASSES, *(kind for row in ACTIVATIONS.values() for kind in row.modules))
    return next((kind for kind in classes if isinstance(module, kind)), None)


def _check_unchanged(module: nn.Module, known: type[nn.Module], path: str) -> None:
    """Check that a module computes what its supported class does."""
    if getattr(module.forward, "__func__", None) is not known.forward:
        raise TypeError(
            f"{path} is a {type(module).__name__} with a forward of its own, not that of {known.__name__}: its "
            f"infinite-width kernel is unknown. Build it of supported layers: {_supported()}."
        )
    _check_hooks(module, path, known.__name__)


def _check_hooks(module: nn.Module, path: str, kind: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or is_parametrized(module):
        raise TypeError(
            f"{path} has forward hooks or parametrizations, which can change what a {kind} computes: remove "
            "them, or make the kernel of a network without."
        )


def _square(size: int | tuple[int, int], path: str) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise TypeError(f"{path} pools {size}: only square windows and strides are supported.")
    if height < 1:
        raise ValueError(f"{path} pools {size}: windows and strides must be at least one pixel.")
    return height


def _check_gaussian(layers: Sequence[Layer], gaussian: bool, flat: bool) -> tuple[bool, bool]:
    """Check that activations see a Gaussian field, and not its pixels as a vector (flat); tell both of the output."""
    for layer in layers:
        match layer:
            case Linear() | Conv():
                gaussian, flat = True, False
            case Activation():
                if not gaussian:
                    raise ValueError(
                        f"{layer} has no closed form where it stands: its input must be Gaussian. Put an affine layer "
                        "(NTKLinear or NTKConv2d) before it."
                    )
                if flat:
                    raise ValueError(f"{layer} stands after nn.Flatten without an affine layer between: swap the two.")
                gaussian = False
            case Flatten():
                flat = True
            case Sum(body, shortcut):
                if not body or not isinstance(body[-1], Linear | Conv):
                    raise ValueError(
                        "The body of a Residual must end in an affine layer, so that its branches are independent."
                    )
                if shortcut and not isinstance(shortcut[-1], Linear | Conv):
                    raise ValueError("The shortcut of a Residual must be the identity or end in an affine layer.")
                _check_gaussian(body, gaussian, flat)
                gaussian, flat = _check_gaussian(shortcut, gaussian, flat)
    return gaussian, flat


def check_shape(
    layers: Sequence[Layer], shape: tuple[int, ...] | None, channels: int | None = None
) -> tuple[int, ...] | None:
    """Follow one input through the layers, as the network would, and refuse what it would refuse.

    Args:
        layers: From :func:`parse`.
        shape: Spatial shape: (H, W) in pixels for images, () for vectors; None where it is not known.
        channels: Channels of images or features of vectors; None where they are not known.

    Returns:
        The spatial shape after the layers, () for a vector, None where it is not known.

    Raises:
        ValueError: A layer cannot take what reaches it; the message gives what does.
    """
    return _follow(layers, shape, channels)[0]


def _follow(
    layers: Sequence[Layer], shape: tuple[int, ...] | None, channels: int | None
) -> tuple[tuple[int, ...] | None, int | None]:
    """Spatial shape and channels after the layers; None where one is not known."""
    for layer in layers:
        match layer:
            case Linear():
                if shape:
                    raise ValueError(
                        f"NTKLinear needs a vector, but {shape[0]}x{shape[1]} pixels reach it: add nn.Flatten."
                    )
                _check_fan_in(layer, channels, "in_features", "features", "its inputs have another size")
                shape, channels = (), layer.fan_out
            case Conv() | Pool() | GlobalAvgPool() if shape == ():
                raise ValueError(f"{layer} needs an image, but a vector reaches it: give inputs of shape (n, C, H, W).")
            case Conv(kernel_size, pad, stride):
                _check_fan_in(layer, channels, "in_channels", "channels", "images must be (n, C, H, W)")
                channels = layer.fan_out
                if shape is not None:
                    shape = tuple((side + 2 * pad - kernel_size) // stride + 1 for side in shape)
                    if min(shape) < 1:
                        raise ValueError(f"{layer} leaves no pixel: the image is too small for this network.")
            case Pool(kernel_size, stride) if shape is not None:
                if any(side < kernel_size or (side - kernel_size) % stride for side in shape):
                    raise ValueError(
                        f"Average pooling of {kernel_size}x{kernel_size} with stride {stride} does not divide the "
                        f"{shape[0]}x{shape[1]} pixels that reach it: resize or pad the images."
                    )
                shape = tuple((side - kernel_size) // stride + 1 for side in shape)
            case GlobalAvgPool():
                shape = (1, 1)
            case Flatten():
                channels = None if channels is None or shape is None else channels * math.prod(shape)
                shape = ()
            case Sum(body, shortcut):
                (shape1, channels1), (shape2, channels2) = (_follow(b, shape, channels) for b in (body, shortcut))
                for what, end1, end2 in (("shapes", shape1, shape2), ("channels", channels1, channels2)):
                    if None not in (end1, end2) and end1 != end2:
                        raise ValueError(f"The branches of a Residual end in different {what}, {end1} and {end2}.")
                shape = shape2 if shape1 is None else shape1
                channels = channels2 if channels1 is None else channels1
    return shape, channels


def _check_fan_in(layer: Linear | Conv, given: int | None, name: str, unit: str, hint: str) -> None:
    if None not in (given, layer.fan_in) and given != layer.fan_in:
        raise ValueError(
            f"{layer.path} has {name}={layer.fan_in}, but {given} {unit} reach it: set {name}={given}, or {hint}."
        )
