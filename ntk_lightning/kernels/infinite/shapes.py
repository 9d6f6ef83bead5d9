"""Sizes of values, followed through a network as the network itself would, before any kernel is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from ntk_lightning.kernels.infinite.architecture import (
    Add,
    Attention,
    Concat,
    Conv,
    Flatten,
    GlobalAvgPool,
    GlobalSumPool,
    Graph,
    Layer,
    Linear,
    Norm,
    Operation,
    Pool,
    Product,
    Window,
)
from ntk_lightning.kernels.infinite.graphs import to_graph

__all__ = ["Size", "check_shape", "follow"]


class Size(NamedTuple):
    """Of one value; None where it is not known.

    Args:
        shape: Spatial shape: (H, W) in pixels for images, (L,) for sequences, () for vectors.
        channels: Channels, or features of vectors.
    """

    shape: tuple[int, ...] | None
    channels: int | None


def check_shape(
    layers: Sequence[Layer], shape: tuple[int, ...] | None, channels: int | None = None
) -> tuple[int, ...] | None:
    """Follow one input through the layers, as the network would, and refuse what it would refuse.

    Args:
        layers: From :func:`~ntk_lightning.kernels.infinite.lift.parse`.
        shape: Spatial shape: (H, W) in pixels for images, (L,) for sequences, () for vectors; None where not known.
        channels: Channels of images or features of vectors; None where they are not known.

    Returns:
        The spatial shape after the layers, () for a vector, None where it is not known.

    Raises:
        ValueError: A layer cannot take what reaches it; the message gives what does.
    """
    return follow(to_graph(layers), Size(shape, channels))[-1].shape


def follow(graph: Graph, size: Size) -> list[Size]:
    """Sizes of all values of a graph.

    Args:
        graph: The network.
        size: Of its input.

    Returns:
        One for the input and one for each node.

    Raises:
        ValueError: An operation cannot take what reaches it; the message gives what does.
    """
    sizes = [size]
    for node in graph.nodes:
        sizes.append(_after(node.operation, [sizes[i] for i in node.inputs]))
    return sizes


def _after(operation: Operation, inputs: list[Size]) -> Size:
    shape, channels = inputs[0]
    match operation:
        case Linear(fan_out=fan_out, name=name):
            if shape:
                raise ValueError(f"{name} needs a vector, but {_pixels(shape)} reach it: add nn.Flatten.")
            _check_channels(operation, channels, "in_features", "features", "its inputs have another size")
            return Size((), fan_out)
        case Conv() | Pool() | GlobalAvgPool() | GlobalSumPool() | Attention() if shape == ():
            axes = getattr(operation, "axes", None)
            form = {1: "sequences (n, C, L)", 2: "inputs of shape (n, C, H, W)"}.get(axes or 2)
            kind = {1: "a sequence", 2: "an image"}.get(axes or 2)
            raise ValueError(f"{operation} needs {kind}, but a vector reaches it: give {form}.")
        case Conv():
            form = "images must be (n, C, H, W)" if operation.axes == 2 else "sequences must be (n, C, L)"
            _check_axes(operation, shape, operation.axes)
            _check_channels(operation, channels, "in_channels", "channels", form)
            return Size(_slid(operation, operation.windows, shape), operation.fan_out)
        case Pool():
            _check_axes(operation, shape, operation.axes)
            return Size(_slid(operation, operation.windows, shape), channels)
        case GlobalAvgPool(axes) | GlobalSumPool(axes):
            if axes is not None:
                _check_axes(operation, shape, axes)
            axes = axes if shape is None else len(shape)
            return Size(None if axes is None else (1,) * axes, channels)
        case Flatten():
            known = None if channels is None or shape is None else channels * math.prod(shape)
            return Size((), known)
        case Norm():
            _check_norm(operation, shape, channels)
        case Attention():
            _check_channels(operation, channels, "in_channels", "channels", "inputs must be (n, C, L) or (n, C, H, W)")
            return Size(shape, operation.fan_out)
        case Add() | Product():
            return _together(operation, inputs, [channels for _, channels in inputs])
        case Concat():
            counts = [channels for _, channels in inputs]
            total = None if None in counts else sum(count or 0 for count in counts)
            return Size(_together(operation, inputs, []).shape, total)
    return inputs[0]


def _slid(operation: Conv | Pool, windows: tuple[Window, ...], shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """How often windows fit; what is left over at the end is dropped, as in PyTorch."""
    if shape is None:
        return None
    out = tuple((n + w.low + w.high - w.size) // w.stride + 1 for n, w in zip(shape, windows, strict=True))
    if min(out) < 1:
        raise ValueError(
            f"{operation} leaves no pixel: the image is too small for this network, {_pixels(shape)} reach the layer."
        )
    if isinstance(operation, Conv) and operation.circular:
        for n, w in zip(shape, windows, strict=True):
            if max(w.low, w.high) > n:
                raise ValueError(f"{operation} wraps around more than once: {_pixels(shape)} reach it.")
    return out


def _together(operation: Operation, inputs: list[Size], channels: list[int | None]) -> Size:
    """Of values that must agree; along an axis where one has a single pixel, that is repeated."""
    name = {Add: "a sum (of a Residual, or +)", Product: "a product"}.get(type(operation), "a concatenation")
    counts = list(dict.fromkeys(count for count in channels if count is not None))
    if len(counts) > 1:
        raise ValueError(f"The branches of {name} end in different channels, {' and '.join(map(str, counts))}.")
    shapes = [shape for shape, _ in inputs if shape is not None]
    repeats = not isinstance(operation, Concat)
    for other in shapes[1:]:
        sides = list(zip(shapes[0], other, strict=False))
        if len(other) != len(shapes[0]) or any(a != b and not (repeats and 1 in (a, b)) for a, b in sides):
            raise ValueError(f"The branches of {name} end in different shapes, {shapes[0]} and {other}.")
    shape = tuple(map(max, zip(*shapes, strict=True))) if shapes else None
    return Size(shape, next(iter(counts), None))


def _check_channels(operation: Linear | Conv | Attention, given: int | None, name: str, unit: str, hint: str) -> None:
    if None not in (given, operation.fan_in) and given != operation.fan_in:
        raise ValueError(
            f"{operation.path} has {name}={operation.fan_in}, but {given} {unit} reach it: set {name}={given}, or "
            f"{hint}."
        )


def _check_axes(operation: Operation, shape: tuple[int, ...] | None, axes: int) -> None:
    if shape is not None and len(shape) != axes:
        wanted, form = {1: ("sequences", "(n, C, L)"), 2: ("images", "(n, C, H, W)")}[axes]
        raise ValueError(f"{operation} needs {wanted} {form}, but values of {len(shape)} spatial axes reach it.")


def _check_norm(norm: Norm, shape: tuple[int, ...] | None, channels: int | None) -> None:
    if norm.features is None or shape is None or channels is None:
        return
    given = (channels,) if norm.pixels and len(norm.features) == 1 else (channels, *shape)  # GroupNorm; LayerNorm
    if given != norm.features:
        raise ValueError(
            f"{norm.path} normalizes {norm.features}, but {given} reach it: give it that size, or take "
            "nn.GroupNorm(1, channels) for images and ChannelNorm for each of their pixels."
        )


def _pixels(shape: tuple[int, ...]) -> str:
    return f"{shape[0]}x{shape[1]} pixels" if len(shape) == 2 else f"{shape[0]} positions"
