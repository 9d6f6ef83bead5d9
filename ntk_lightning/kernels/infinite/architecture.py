"""What an architecture means for its infinite-width kernel: layers without parameters, in a chain or a graph.

Widths vanish in the limit of the NTK parameterization, so two networks that differ only in width have the same layers.
Their ``repr`` names the architecture in the keys of stored Grams, so a field that has its default is left out of it:
what is added to a layer must not change the names of networks that do not use it.

A network is a tuple of layers, each fed with what the one before gives; a sum of two branches is one layer,
:class:`Sum`, that holds both. Any other way in which values meet is one layer too, a :class:`Graph`. The two forms turn
into each other in :mod:`~ntk_lightning.kernels.infinite.graphs`.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal, NamedTuple

from ntk_lightning.kernels.infinite.activations import Activation

__all__ = [
    "Activation",
    "Add",
    "Attention",
    "Concat",
    "Conv",
    "Dropout",
    "Flatten",
    "GlobalAvgPool",
    "GlobalSumPool",
    "Graph",
    "Layer",
    "Linear",
    "Node",
    "Norm",
    "Operation",
    "Pool",
    "Product",
    "Scale",
    "Sum",
    "Window",
]


@dataclass(frozen=True, repr=False)
class _Named:
    """Its ``repr`` leaves out fields that have their defaults."""

    def __repr__(self) -> str:
        shown = (
            f.name for f in fields(self) if f.repr and (f.default is MISSING or getattr(self, f.name) != f.default)
        )
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class _Affine(_Named):
    """Where an affine layer stands and what fits it; None where that is not known.

    Widths are no part of the limit, so none of this is part of a layer's ``repr`` or of its equality.

    ``gradient`` are the factors of K and of 1 that the layer's own parameters add to the NTK, where they are not
    weight_std^2 and bias_std^2: in the standard parameterization (fan-in, 1), and (fan-in, 0) without biases.
    """

    gradient: tuple[float, float] | None = None
    path: str = field(default="", repr=False, compare=False)
    fan_in: int | None = field(default=None, repr=False, compare=False)  # features or channels of its input
    fan_out: int | None = field(default=None, repr=False, compare=False)  # and of its output
    name: str = field(default="", repr=False, compare=False)  # of its class, for messages


@dataclass(frozen=True, repr=False)
class Linear(_Affine):
    """Fully connected layer: weight_std^2 K + bias_std^2."""

    weight_std: float
    bias_std: float


class Window(NamedTuple):
    """A filter or pooling window along one axis: pixels, pixels added before and after the image, and its step."""

    size: int
    low: int
    high: int
    stride: int


Sizes = int | tuple[int, ...]  # for all axes, or for each
Pads = int | tuple[int | tuple[int, int], ...]  # the same, or what is added before and after


def _windows(axes: int, size: Sizes, pad: Pads, stride: Sizes) -> tuple[Window, ...]:
    sizes, strides = (value if isinstance(value, tuple) else (value,) * axes for value in (size, stride))
    ends = (end if isinstance(end, tuple) else (end, end) for end in (pad if isinstance(pad, tuple) else (pad,) * axes))
    return tuple(Window(k, low, high, s) for k, (low, high), s in zip(sizes, ends, strides, strict=True))


@dataclass(frozen=True, repr=False)
class Conv(_Affine):
    """Convolution with ``pad`` pixels added on each side: zeros, or those of the opposite side where ``circular``."""

    kernel_size: Sizes
    pad: Pads
    stride: Sizes
    weight_std: float
    bias_std: float
    circular: bool = False
    axes: int = 2  # 1 for sequences

    @property
    def windows(self) -> tuple[Window, ...]:
        """The filter along each axis."""
        return _windows(self.axes, self.kernel_size, self.pad, self.stride)


@dataclass(frozen=True, repr=False)
class Pool(_Named):
    """Average pooling: the sum over the window, padded zeros included, over its pixels or over ``divisor``.

    Where not ``count_pad``, over those of its pixels that are in the image.
    """

    kernel_size: Sizes
    stride: Sizes
    pad: Sizes = 0
    divisor: int | None = None
    count_pad: bool = True
    axes: int = 2

    @property
    def windows(self) -> tuple[Window, ...]:
        """The window along each axis."""
        return _windows(self.axes, self.kernel_size, self.pad, self.stride)


@dataclass(frozen=True, repr=False)
class GlobalAvgPool(_Named):
    """Mean over all pixels; one pixel is left."""

    axes: int | None = field(default=None, repr=False, compare=False)  # that the inputs must have


@dataclass(frozen=True, repr=False)
class GlobalSumPool(_Named):
    """Sum over all pixels; one pixel is left."""

    axes: int | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Flatten:
    """All pixels become inputs of the next linear layer: the mean over equal pixels."""


@dataclass(frozen=True)
class Scale:
    """Product with a number."""

    factor: float


@dataclass(frozen=True, repr=False)
class Norm(_Named):
    """Layer normalization over channels, at each pixel or over ``pixels`` too: u / sqrt(mean of u^2 + eps)."""

    eps: float
    pixels: bool = False
    features: tuple[int, ...] | None = field(default=None, repr=False, compare=False)  # what it is made for
    path: str = field(default="", repr=False, compare=False)


@dataclass(frozen=True)
class Dropout:
    """Dropout in training mode: every entry is kept with probability ``keep`` and then divided by it."""

    keep: float


@dataclass(frozen=True, repr=False)
class Attention(_Named):
    """Self-attention over all pixels (Hron et al., 2020, arXiv 2006.10540)."""

    mechanism: Literal["softmax", "identity", "relu", "abs"]
    scaling: Literal["linear", "sqrt"]
    score_std: float  # of queries times that of keys
    value_std: float  # of values times that of outputs
    bias_std: float
    path: str = field(default="", repr=False, compare=False)
    fan_in: int | None = field(default=None, repr=False, compare=False)
    fan_out: int | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Sum:
    """Sum of two independent branches."""

    body: tuple[Layer, ...]
    shortcut: tuple[Layer, ...]


@dataclass(frozen=True)
class Add:
    """Sum of independent values, in a graph."""


@dataclass(frozen=True)
class Product:
    """Product of two independent values, entry by entry."""


@dataclass(frozen=True)
class Concat:
    """Concatenation of channels; ``widths`` are their numbers, None where they follow from the inputs."""

    widths: tuple[int | None, ...]


@dataclass(frozen=True)
class Node:
    """One operation of a graph on ``inputs``: 0 is the graph's own input, i what its node number i - 1 gives."""

    operation: Operation
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """Operations in an order in which they can be computed; the last one gives the output."""

    nodes: tuple[Node, ...]


Simple = (
    Linear | Conv | Activation | Pool | GlobalAvgPool | GlobalSumPool | Flatten | Scale | Norm | Dropout | Attention
)
Operation = Simple | Add | Product | Concat
Layer = Simple | Sum | Graph
