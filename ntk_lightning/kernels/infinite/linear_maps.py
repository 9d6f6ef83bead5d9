r"""What linear layers do to covariances of pixels.

A covariance K[..., p, q] of all pairs of pixels has the spatial axes of p, then those of q, as its last dimensions;
of equal pixels alone, K[..., p], it has them once: its ``axes`` are the pairs ((-4, -2), (-3, -1)) of dimensions, or
((-2,), (-1,)) for images. A convolution with independent weights moves both pixels of a pair by the same offset,
pooling every pixel by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ntk_lightning.kernels.infinite.architecture import Pool, Window

__all__ = ["attend", "axes_of", "equal_pixels", "pool", "sum_over_window"]

Axes = tuple[tuple[int, ...], ...]


def axes_of(spatial: int, full: bool) -> Axes:
    """Dimensions of each spatial axis.

    Args:
        spatial: How many there are.
        full: Whether a covariance holds all pairs of pixels.

    Returns:
        For each axis its dimensions, counted from the last.

    Example:
        >>> axes_of(2, True), axes_of(2, False)
        (((-4, -2), (-3, -1)), ((-2,), (-1,)))
    """
    ends = (-2 * spatial, -spatial) if full else (-spatial,)
    return tuple(tuple(end + axis for end in ends) for axis in range(spatial))


def sum_over_window(k: Tensor, windows: Sequence[Window], circular: bool, axes: Axes) -> Tensor:
    """Sum over the pixels of a filter, moved by the same offset in both pixels of a pair.

    Args:
        k: Covariances.
        windows: The filter, for each spatial axis.
        circular: Whether added pixels are those of the opposite side, not zeros.
        axes: From :func:`axes_of`.

    Returns:
        Covariances after the filter.
    """
    for window, dims in zip(windows, axes, strict=True):
        if circular:
            for dim in dims:
                n = k.shape[dim]
                k = torch.cat([k.narrow(dim, n - window.low, window.low), k, k.narrow(dim, 0, window.high)], dim)
            window = window._replace(low=0, high=0)
        if window == (1, 0, 0, 1):
            continue
        k = _slide(k, window, dims)
    return k


def pool(k: Tensor, layer: Pool, axes: Axes) -> Tensor:
    """Mean over a window around each pixel of a pair.

    Args:
        k: Covariances of all pairs of pixels.
        layer: The pooling.
        axes: From :func:`axes_of`.

    Returns:
        Covariances of the pooled pixels.
    """
    for window, dims in zip(layer.windows, axes, strict=True):
        for dim in dims:
            n = k.shape[dim]
            k = _slide(k, window, (dim,))
            if layer.divisor is None and layer.count_pad:
                k = k / window.size
            elif layer.divisor is None:
                counts = _slide(torch.ones(n, dtype=k.dtype, device=k.device), window, (-1,))
                k = k / counts.view([-1 if d == dim else 1 for d in range(-k.dim(), 0)])
    return k if layer.divisor is None else k / layer.divisor**2


def equal_pixels(k: Tensor, spatial: int) -> Tensor:
    """Entries of equal pixels.

    Args:
        k: Covariances of all pairs of pixels, (..., H, W, H, W).
        spatial: Number of spatial axes.

    Returns:
        Covariances of equal pixels, (..., H, W).
    """
    for axis in range(spatial):  # takes the first of both, and puts the axis last
        k = k.diagonal(dim1=-2 * spatial + axis, dim2=-spatial)
    return k


def attend(k: Tensor, weights1: Tensor, weights2: Tensor, spatial: int) -> Tensor:
    """A K A'^T over pixels.

    Args:
        k: Covariances of all pairs of pixels, (n1, n2, H, W, H, W), or (n, H, W, H, W) of inputs with themselves.
        weights1: A of each first input, (n1, 1, P, P), or (n, P, P), for P pixels.
        weights2: A' of each second input, (n2, P, P).
        spatial: Number of spatial axes.

    Returns:
        Covariances of the same shape.
    """
    pixels = weights1.shape[-1]
    flat = k.reshape(*k.shape[: k.dim() - 2 * spatial], pixels, pixels)
    return (weights1 @ flat @ weights2.mT).reshape(k.shape)


def _slide(k: Tensor, window: Window, dims: tuple[int, ...]) -> Tensor:
    """Sum over a window that slides along several dimensions at once; pixels outside count as zero."""
    n = k.shape[dims[0]]
    out = (n + window.low + window.high - window.size) // window.stride + 1
    overlaps = sorted(_overlaps(n, out, window), key=lambda parts: parts[1] != slice(0, out))
    total = None
    for source, target in overlaps:
        part = _cut(k, dims, source)
        if total is None and target == slice(0, out):  # every window has this pixel of its
            total = part.clone(memory_format=torch.contiguous_format)
            continue
        if total is None:
            total = k.new_zeros([out if d - k.dim() in dims else size for d, size in enumerate(k.shape)])
        _cut(total, dims, target).add_(part)
    return k.new_zeros(()) if total is None else total


def _overlaps(n: int, out: int, window: Window) -> Iterator[tuple[slice, slice]]:
    """Of each pixel of the window, where it is inside of the image, and the windows for which it is."""
    for offset in range(window.size):
        first = max(0, -((offset - window.low) // window.stride))  # the window starts at first * stride - low
        last = min(out - 1, (n - 1 + window.low - offset) // window.stride)
        if first <= last:
            start = first * window.stride + offset - window.low
            yield slice(start, start + (last - first) * window.stride + 1, window.stride), slice(first, last + 1)


def _cut(k: Tensor, dims: tuple[int, ...], part: slice) -> Tensor:
    return k[tuple(part if d - k.dim() in dims else slice(None) for d in range(k.dim()))]
