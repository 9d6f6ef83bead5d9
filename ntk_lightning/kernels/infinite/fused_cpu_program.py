r"""A convolutional network as operations on planes of covariances: what the compiled CPU kernel runs.

A plane holds the covariances K[p, p + D] of one offset D = (dy, dx); the compiled code,
:mod:`~ntk_lightning.kernels.infinite.fused_cpu_numba`, explains why it can be taken through a network on its own.
:func:`read` translates layers into *levels*, with pooling between them, each a list of operations on the planes in a few
*slots*. Residual sums need a second slot, in which the body is computed while the first one keeps the shortcut:

    a -> activation -> b,    b -> convolution -> b,    b -> convolution, added to -> a.

Which offsets are needed follows from the end: all of them for global average pooling, 0 for ``nn.Flatten``; before a
convolution of stride s the s-fold ones, before pooling those that meet a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, Activation
from ntk_lightning.kernels.infinite.architecture import Conv, Flatten, GlobalAvgPool, Layer, Linear, Pool, Sum

__all__ = [
    "ADD",
    "BOX",
    "CONV3",
    "COPY",
    "ERF",
    "EXP",
    "GELU",
    "IMAGES",
    "IMAGES3",
    "LINEAR",
    "NORM",
    "POINT",
    "RELU",
    "SIGN",
    "SIN",
    "COS",
    "Level",
    "Network",
    "Operation",
    "Unsupported",
    "Window",
    "read",
]

IMAGES, IMAGES3, COPY, CONV3, BOX, POINT, ADD = range(7)  # what an operation does
LINEAR, RELU, ERF, GELU, SIN, COS, EXP, SIGN, NORM = range(9)  # its activation
_KINDS = {"relu": RELU, "erf": ERF, "gelu": GELU, "sin": SIN, "cos": COS, "exp": EXP, "sign": SIGN}
_FEW = 16  # pixels from which on, and
_SMALL = 16  # part of the pixels of the images from which on, a level is always computed in float64: it costs little

Shape = tuple[int, int]


class Unsupported(Exception):  # noqa: N818 - it is told as a clause, not raised to the user
    """A layer that the compiled CPU kernel does not have."""


class Window(NamedTuple):
    """A filter or pooling window along one axis: pixels, zeros before and after the image, and its step."""

    size: int
    low: int = 0
    high: int = 0
    stride: int = 1

    def after(self, side: int) -> int:
        """Pixels that it leaves of ``side``."""
        return (side + self.low + self.high - self.size) // self.stride + 1


Windows = tuple[Window, Window]
_ONE = (Window(1), Window(1))


@dataclass(frozen=True)
class Operation:
    """One step on a plane.

    With S the sum over the windows, a convolution is K <- weight S(K) + bias, Theta <- weight S(Theta) + own_weight S(K)
    + own_bias. ``share`` is how many pixels of the level's beginning one pixel before the operation stands for.
    """

    code: int
    source: int
    target: int
    shape: Shape
    share: Shape = (1, 1)
    windows: Windows = _ONE
    weight: float = 1.0
    bias: float = 0.0
    own_weight: float = 0.0
    own_bias: float = 0.0
    kind: int = LINEAR
    odd: float = 0.0
    even: float = 0.0
    from_images: bool = False  # the NTK is zero before it
    accumulate: bool = False  # add to the target

    @property
    def after(self) -> Shape:
        """Pixels after it."""
        y, x = self.windows
        return y.after(self.shape[0]), x.after(self.shape[1])


@dataclass
class Level:
    """Operations between two poolings, and the pooling after them."""

    shape: Shape
    deep: bool
    operations: list[Operation] = field(default_factory=list)
    slots: int = 1
    after: Shape = (0, 0)
    share: Shape = (1, 1)  # pixels of its beginning that a pixel of its end stands for
    pooling: Windows = _ONE
    scale: float = 1.0  # of a sum of covariances over two windows


@dataclass(frozen=True)
class Network:
    """Levels, then a mean over equal pixels (``flat``) or over all pairs of pixels, then a head on vectors."""

    levels: tuple[Level, ...]
    flat: bool
    head: tuple[Linear | Activation, ...]


def read(layers: Sequence[Layer], shape: Sequence[int]) -> Network:
    """Translate layers.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.architecture.parse`, with shapes checked.
        shape: (H, W) of the images in pixels.

    Returns:
        The network.

    Raises:
        Unsupported: The compiled kernel does not have a layer, or not where it stands.

    Example:
        >>> from ntk_lightning.kernels.infinite.architecture import parse
        >>> from ntk_lightning.networks import MyrtleCNN
        >>> [len(level.operations) for level in read(parse(MyrtleCNN(depth=5)), (8, 8)).levels]
        [3, 2, 2]
    """
    ends = [i for i, layer in enumerate(layers) if isinstance(layer, GlobalAvgPool | Flatten | Linear)]
    if not ends or isinstance(layers[ends[0]], Linear):
        raise Unsupported("it ends in neither global average pooling nor nn.Flatten")
    body, end, head = layers[: ends[0]], layers[ends[0]], layers[ends[0] + 1 :]
    if not any(isinstance(layer, Conv | Sum) for layer in body):
        raise Unsupported("it has no convolution")
    reader = _Reader((shape[0], shape[1]))
    reader.read(body)
    for layer in head:
        if isinstance(layer, Activation):
            _check_compiled(layer)
        elif not isinstance(layer, Linear | Flatten | GlobalAvgPool):
            raise Unsupported(f"{layer} stands behind the pixels")
    vectors = tuple(layer for layer in head if isinstance(layer, Linear | Activation))
    return Network(tuple(reader.levels), isinstance(end, Flatten), vectors)


def _check_compiled(layer: Activation) -> None:
    if layer.name not in _KINDS or "cpu" not in ACTIVATIONS[layer.name].compiled:
        raise Unsupported(f"the cpu kernel does not have the activation {layer.name}")


def _windows(layer: Conv | Pool) -> Windows:
    pad = layer.pad if isinstance(layer, Conv) else 0
    window = Window(layer.kernel_size, pad, pad, layer.stride)
    return window, window


@dataclass
class _Value:
    """A plane while a network is read: its slot, its pixels, and whether its NTK is still zero."""

    slot: int
    shape: Shape
    share: Shape = (1, 1)
    from_images: bool = False


class _Reader:
    """Turns layers into levels."""

    def __init__(self, shape: Shape) -> None:
        self.images = shape
        self.levels = [Level(shape, False, [Operation(IMAGES, 0, 0, shape, from_images=True)])]

    @property
    def operations(self) -> list[Operation]:
        return self.levels[-1].operations

    def read(self, layers: Sequence[Layer]) -> None:
        value = _Value(0, self.images, from_images=True)
        for i, layer in enumerate(layers):
            following = layers[i + 1] if i + 1 < len(layers) else None
            if isinstance(layer, Pool):
                self._pool(value, _windows(layer), layer.kernel_size**-4)
                value = _Value(0, self.levels[-1].shape)
                continue
            if i and _fuses(layers[i - 1], layer):
                continue  # it belongs to the convolution before
            value = self._layer(layer, following, value, value.slot)
            if not isinstance(following, Pool) and i + 1 < len(layers) and self._is_deep(value.shape):
                if not self.levels[-1].deep and not (following and _fuses(layer, following)):
                    self._pool(value, _ONE, 1.0)
                    value = _Value(0, self.levels[-1].shape)
        level = self.levels[-1]
        level.after, level.share = value.shape, value.share
        if value.from_images:
            self._zero()

    def _is_deep(self, shape: Shape) -> bool:
        pixels, first = shape[0] * shape[1], self.images[0] * self.images[1]
        return pixels * _SMALL <= first or (pixels < first and pixels <= _FEW)

    def _pool(self, value: _Value, windows: Windows, scale: float) -> None:
        """End the level and begin the following one."""
        if value.from_images:
            self._zero()
        level = self.levels[-1]
        level.after, level.share, level.pooling, level.scale = value.shape, value.share, windows, scale
        shape = windows[0].after(value.shape[0]), windows[1].after(value.shape[1])
        self.levels.append(Level(shape, level.deep or self._is_deep(shape), [Operation(COPY, 0, 0, shape)]))

    def _zero(self) -> None:
        """Have the images' operation write that their NTK is zero, where it is not part of a convolution."""
        self.levels[0].operations[0] = replace(self.levels[0].operations[0], from_images=False)

    def _branch(self, layers: Sequence[Layer], value: _Value, target: int) -> _Value:
        """Run layers on a value; the first one writes to ``target``, which is the value's own slot or another one."""
        for i, layer in enumerate(layers):
            if i and _fuses(layers[i - 1], layer):
                continue
            value = self._layer(layer, layers[i + 1] if i + 1 < len(layers) else None, value, target)
        return value

    def _layer(self, layer: Layer, following: Layer | None, value: _Value, target: int) -> _Value:
        """Append what one layer does, together with the activation that follows it."""
        slot, shape, share = value.slot, value.shape, value.share
        match layer:
            case Conv():
                windows = _windows(layer)
                size = windows[0].size * windows[1].size
                weight, bias = layer.weight_std**2 / size, layer.bias_std**2
                same = all(window == Window(3, 1, 1, 1) for window in windows)
                operation = Operation(
                    CONV3 if same else BOX,
                    slot,
                    target,
                    shape,
                    share,
                    windows,
                    weight,
                    bias,
                    weight,
                    bias,
                    from_images=value.from_images,
                )
                if any(a > b for a, b in zip(operation.after, shape, strict=True)) or any(
                    max(window.low, window.high) >= window.size for window in windows
                ):
                    raise Unsupported(f"{layer} pads more than its filter keeps")
                if following is not None and _fuses(layer, following):
                    operation = replace(operation, **_kind(following))
                if same and self.operations[-1].code == IMAGES and slot == target:
                    self.operations.pop()
                    operation = replace(operation, code=IMAGES3)
                self.operations.append(operation)
                stride = share[0] * windows[0].stride, share[1] * windows[1].stride
                return _Value(target, operation.after, stride)
            case Activation():
                if value.from_images:
                    self._zero()
                self.operations.append(Operation(POINT, slot, target, shape, share, **_kind(layer)))
                return _Value(target, shape, share)
            case Sum():
                return self._sum(layer, value, target)
        raise Unsupported(f"it has {layer} between its convolutions")

    def _sum(self, layer: Sum, value: _Value, target: int) -> _Value:
        if target != value.slot:
            if value.from_images:
                self._zero()
            self.operations.append(Operation(COPY, value.slot, target, value.shape, value.share))
            value = replace(value, slot=target)
        begin, other = len(self.operations), target + 1
        self.levels[-1].slots = max(self.levels[-1].slots, other + 1)
        body = self._branch(layer.body, value, other)
        last = self.operations[-1]
        # The body's last convolution adds to the shortcut, where it does not read what the shortcut changes.
        adds = len(self.operations) > begin + 1 and last.code in (CONV3, BOX) and last.source == other
        if adds:
            self.operations.pop()
        shortcut = self._branch(layer.shortcut, value, target)
        if shortcut.from_images:
            self._zero()
        if adds:
            self.operations.append(replace(last, target=target, accumulate=True))
        else:
            self.operations.append(Operation(ADD, other, target, body.shape, body.share))
        return replace(shortcut, from_images=False)


def _fuses(layer: Layer, following: Layer) -> bool:
    """Whether an activation is computed along with the convolution before it."""
    return (
        isinstance(layer, Conv)
        and isinstance(following, Activation)
        and all(window == Window(3, 1, 1, 1) for window in _windows(layer))
    )


def _kind(layer: Activation) -> dict[str, float]:
    """What an operation knows of an activation."""
    _check_compiled(layer)
    slope = layer.negative_slope
    return {"kind": _KINDS[layer.name], "odd": ((1 + slope) / 2) ** 2, "even": ((1 - slope) / 2) ** 2}
