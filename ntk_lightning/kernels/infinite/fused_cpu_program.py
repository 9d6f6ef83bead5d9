r"""A convolutional network as operations on planes of covariances: what the compiled CPU kernel runs.

A plane holds the covariances K[p, p + D] of one offset D = (dy, dx); the compiled code,
:mod:`~ntk_lightning.kernels.infinite.fused_cpu_numba`, explains why it can be taken through a network on its own.
:func:`read` translates layers into *levels*, with pooling between them, each a list of operations on the planes in
few *slots*. Residual sums need a second slot, in which the body is computed while the first one keeps the shortcut:

    a -> activation -> b,    b -> convolution -> b,    b -> convolution, added to -> a.

Longer than 300 lines, since what the operations mean and what becomes of each layer belong together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, Activation
from ntk_lightning.kernels.infinite.architecture import (
    Conv,
    Flatten,
    GlobalAvgPool,
    GlobalSumPool,
    Graph,
    Layer,
    Linear,
    Norm,
    Pool,
    Scale,
    Sum,
    Window,
)

__all__ = [
    "ADD",
    "BOX",
    "CONV3",
    "COPY",
    "COS",
    "ERF",
    "EXP",
    "FEW",
    "GELU",
    "IMAGES",
    "IMAGES3",
    "LINEAR",
    "NORM",
    "POINT",
    "RELU",
    "SIGN",
    "SIN",
    "Head",
    "Level",
    "Network",
    "Operation",
    "Unsupported",
    "read",
]

IMAGES, IMAGES3, COPY, CONV3, BOX, POINT, ADD = range(7)  # what an operation does
LINEAR, RELU, ERF, GELU, SIN, COS, EXP, SIGN, NORM = range(9)  # its activation
_KINDS = {"relu": RELU, "erf": ERF, "gelu": GELU, "sin": SIN, "cos": COS, "exp": EXP, "sign": SIGN}
FEW = 16  # pixels from which on, and
_SMALL = 16  # part of the pixels of the images from which on, a level is always computed in float64: it costs little

Shape = tuple[int, int]
Head = Linear | Activation | Norm | Scale  # what may follow on vectors


class Unsupported(Exception):
    """A layer that the compiled CPU kernel does not have: a clause that names it."""


Windows = tuple[Window, Window]
_ONE, _THREE = Window(1, 0, 0, 1), Window(3, 1, 1, 1)


def _slid(windows: Windows, shape: Shape) -> Shape:
    """Pixels that windows leave."""
    height, width = (
        (side + window.low + window.high - window.size) // window.stride + 1
        for side, window in zip(shape, windows, strict=True)
    )
    return height, width


@dataclass(frozen=True)
class Operation:
    """One step on a plane.

    With S the sum over the windows, a convolution is K <- weight S(K) + bias and
    Theta <- weight S(Theta) + own_weight S(K) + own_bias.
    ``share`` is how many pixels of the level's beginning one pixel before the operation stands for.
    """

    code: int
    source: int
    target: int
    shape: Shape
    share: Shape = (1, 1)
    windows: Windows = (_ONE, _ONE)
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
        return _slid(self.windows, self.shape)


@dataclass
class Level:
    """Operations between two poolings, and the pooling after them."""

    shape: Shape
    deep: bool
    operations: list[Operation] = field(default_factory=list)
    slots: int = 1
    after: Shape = (0, 0)
    share: Shape = (1, 1)  # pixels of its beginning that a pixel of its end stands for
    pooling: Windows = (_ONE, _ONE)
    scale: float = 1.0  # of a sum of covariances over two windows


@dataclass(frozen=True)
class Network:
    """Levels, then a mean over equal pixels (``flat``) or all pairs of them, or a sum, then a head on vectors."""

    levels: tuple[Level, ...]
    flat: bool
    sums: bool
    head: tuple[Head, ...]

    @property
    def pixels(self) -> int:
        """What sums over pixels are divided by."""
        pixels = self.levels[-1].after[0] * self.levels[-1].after[1]
        return 1 if self.sums else pixels if self.flat else pixels**2


def read(layers: Sequence[Layer], shape: Sequence[int]) -> Network:
    """Translate layers.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.lift.parse`, with shapes checked.
        shape: (H, W) of the images in pixels, (L,) of sequences, which are images of height 1.

    Returns:
        The network.

    Raises:
        Unsupported: The compiled kernel does not have a layer, or not where it stands.

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import MyrtleCNN
        >>> [len(level.operations) for level in read(parse(MyrtleCNN(depth=5)), (8, 8)).levels]
        [2, 2, 2]
    """
    ends = [i for i, layer in enumerate(layers) if isinstance(layer, GlobalAvgPool | GlobalSumPool | Flatten | Linear)]
    if any(isinstance(layer, Graph) for layer in layers):
        raise Unsupported("its branches meet in a product or a concatenation")
    if not ends or isinstance(layers[ends[0]], Linear):
        raise Unsupported("it ends in neither global pooling nor nn.Flatten")
    body, end, head = layers[: ends[0]], layers[ends[0]], layers[ends[0] + 1 :]
    if not any(isinstance(layer, Conv | Sum) for layer in body):
        raise Unsupported("it has no convolution")
    reader = _Reader((shape[0], shape[1]) if len(shape) == 2 else (1, shape[0]))
    reader.read(body)
    for layer in head:
        if isinstance(layer, Activation):
            _check_compiled(layer)
        elif not isinstance(layer, Head | Flatten | GlobalAvgPool | GlobalSumPool):
            raise Unsupported(f"{layer} stands behind the pixels")
    vectors = tuple(layer for layer in head if isinstance(layer, Head))
    return Network(tuple(reader.levels), isinstance(end, Flatten), isinstance(end, GlobalSumPool), vectors)


def _check_compiled(layer: Activation) -> None:
    if layer.name not in _KINDS or "cpu" not in ACTIVATIONS[layer.name].compiled:
        raise Unsupported(f"the cpu kernel does not have the activation {layer.name}")


def _windows(layer: Conv | Pool) -> Windows:
    windows = layer.windows
    return (windows[0], windows[1]) if len(windows) == 2 else (_ONE, windows[0])


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
                if any(window.low or window.high for window in layer.windows) and not layer.count_pad:
                    raise Unsupported(f"{layer} divides by fewer pixels at the border")
                pixels = layer.divisor or math.prod(window.size for window in layer.windows)
                self._pool(value, _windows(layer), 1 / pixels**2)
                value = _Value(0, self.levels[-1].shape)
                continue
            if i and _fuses(layers[i - 1], layer):
                continue  # it belongs to the convolution before
            value = self._layer(layer, following, value, value.slot, 1)
            goes_on = following is not None and not isinstance(following, Pool) and not _fuses(layer, following)
            if goes_on and self._is_deep(value.shape) and not self.levels[-1].deep:
                self._pool(value, (_ONE, _ONE), 1.0)
                value = _Value(0, self.levels[-1].shape)
        level = self.levels[-1]
        level.after, level.share = value.shape, value.share
        if value.from_images:
            self._zero()

    def _is_deep(self, shape: Shape) -> bool:
        pixels, first = shape[0] * shape[1], self.images[0] * self.images[1]
        return pixels * _SMALL <= first or (pixels < first and pixels <= FEW)

    def _pool(self, value: _Value, windows: Windows, scale: float) -> None:
        """End the level and begin the following one."""
        if value.from_images:
            self._zero()
        level = self.levels[-1]
        level.after, level.share, level.pooling, level.scale = value.shape, value.share, windows, scale
        shape = _slid(windows, value.shape)
        self.levels.append(Level(shape, level.deep or self._is_deep(shape), [Operation(COPY, 0, 0, shape)]))

    def _zero(self) -> None:
        """Have the images' operation write that their NTK is zero, where it is not part of a convolution."""
        self.levels[0].operations[0] = replace(self.levels[0].operations[0], from_images=False)

    def _branch(self, layers: Sequence[Layer], value: _Value, target: int, free: int) -> _Value:
        """Run layers on a value; they write to ``target``, its own slot or another, and to slots from ``free`` on."""
        for i, layer in enumerate(layers):
            if i and _fuses(layers[i - 1], layer):
                continue
            value = self._layer(layer, layers[i + 1] if i + 1 < len(layers) else None, value, target, free)
        return value

    def _layer(self, layer: Layer, following: Layer | None, value: _Value, target: int, free: int) -> _Value:
        """Append what one layer does, together with the activation that follows it."""
        slot, shape, share = value.slot, value.shape, value.share
        match layer:
            case Conv():
                operation = self._convolution(layer, value, target)
                if following is not None and _fuses(layer, following):
                    operation = replace(operation, **_kind(following))
                if operation.code == CONV3 and self.operations[-1].code == IMAGES and slot == target:
                    self.operations.pop()
                    operation = replace(operation, code=IMAGES3)
                self.operations.append(operation)
                y, x = operation.windows
                return _Value(target, operation.after, (share[0] * y.stride, share[1] * x.stride))
            case Scale() | Activation("relu", 1.0):
                factor = layer.factor**2 if isinstance(layer, Scale) else 1.0
                self.operations.append(
                    Operation(BOX, slot, target, shape, share, weight=factor, from_images=value.from_images)
                )
                return _Value(target, shape, share)
            case Activation() | Norm():
                if value.from_images:
                    self._zero()
                self.operations.append(Operation(POINT, slot, target, shape, share, **_kind(layer)))
                return _Value(target, shape, share)
            case Sum():
                return self._sum(layer, value, target, free)
        raise Unsupported(f"{layer} stands before the last pooling")

    def _convolution(self, layer: Conv, value: _Value, target: int) -> Operation:
        """What a convolution does, without the activation after it."""
        if layer.circular:
            raise Unsupported(f"{layer} has circular padding")
        windows = _windows(layer)
        size = windows[0].size * windows[1].size
        weight, bias = layer.weight_std**2 / size, layer.bias_std**2
        own = (weight, bias) if layer.gradient is None else (layer.gradient[0] / size, layer.gradient[1])
        code = CONV3 if windows == (_THREE, _THREE) else BOX
        operation = Operation(
            *(code, value.slot, target, value.shape, value.share, windows, weight, bias, *own),
            from_images=value.from_images,
        )
        grows = any(a > b for a, b in zip(operation.after, value.shape, strict=True))
        if grows or any(max(window.low, window.high) >= window.size for window in windows):
            raise Unsupported(f"{layer} pads more than its filter keeps")
        return operation

    def _sum(self, layer: Sum, value: _Value, target: int, other: int) -> _Value:
        if target != value.slot:
            if value.from_images:
                self._zero()
            self.operations.append(Operation(COPY, value.slot, target, value.shape, value.share))
            value = replace(value, slot=target)
        begin = len(self.operations)
        self.levels[-1].slots = max(self.levels[-1].slots, other + 1)
        if not layer.body:
            raise Unsupported("it adds a value to itself")
        body = self._branch(layer.body, value, other, other + 1)
        last = self.operations[-1]
        # The body's last convolution adds to the shortcut, where it does not read what the shortcut changes.
        adds = (
            len(self.operations) > begin + 1
            and last.code in (CONV3, BOX)
            and last.kind == LINEAR
            and last.source == last.target == other
        )
        if adds:
            self.operations.pop()
        shortcut = self._branch(layer.shortcut, value, target, other + 1)
        if shortcut.from_images:
            self._zero()
        if adds:
            self.operations.append(replace(last, target=target, accumulate=True))
        else:
            self.operations.append(Operation(ADD, other, target, body.shape, body.share))
        return replace(shortcut, from_images=False)


def _fuses(layer: Layer, following: Layer) -> bool:
    """Whether an activation is computed along with the convolution before it."""
    if not isinstance(layer, Conv) or _windows(layer) != (_THREE, _THREE):
        return False
    return isinstance(following, Norm | Activation) and following != Activation("relu", 1.0)


def _kind(layer: Layer) -> dict[str, Any]:
    """What an operation knows of an activation, or of a normalization."""
    if isinstance(layer, Norm):
        return {"kind": NORM, "odd": float(layer.pixels), "even": layer.eps}
    assert isinstance(layer, Activation)
    _check_compiled(layer)
    slope = layer.negative_slope
    return {"kind": _KINDS[layer.name], "odd": ((1 + slope) / 2) ** 2, "even": ((1 - slope) / 2) ** 2}
