"""Compiled code that streams the covariances of pairs of images through a network, tile by tile.

For one pair of images and one vertical offset dy = y' - y, the covariances K[(y, x), (y + dy, x')] are a stack of
tiles, one a row y of the first image. A tile has a row for each pixel x of that row, and in it the pixels x' of row
y + dy of the second image:

                     x' = 0   1   2   3
            x = 0         a   .   .   .      One tile at width 4. A 3x3 convolution adds, to each entry b, its
                1         .   b   .   .      neighbours a and c on the tile's diagonal, (x - 1, x' - 1) and
                2         .   .   c   .      (x + 1, x' + 1), which is b's diagonal sum, and then the diagonal
                3         .   .   .   d      sums at the same place in the tiles of rows y - 1 and y + 1.

An activation is pointwise. So tiles stream through all layers between two poolings, a *level*, while they are in the
innermost cache, and 2x2 pooling adds four entries of a tile to one entry of a tile of the following level, which is all
that is ever stored: 1/16 of the covariance. The first covariance comes from the two images as it is needed.

A convolution gives row y when the diagonal sums of row y + 1 arrive, so each lags one row. At ``time`` t, the
convolution number ``stage`` takes in ``row`` t - stage and gives ``row - 1``, which is what the next one takes in.
With three rows and two convolutions:

    time    0     1     2     3     4
    row     0     1     2     -           comes into stage 0
            -     0     1     2           is given by stage 0 and comes into stage 1
                  -     0     1     2     is given by stage 1 and pooled

Of the tiles before the one that comes in, a stage keeps the diagonal sums: ``older`` of row - 2, ``newer`` of row - 1.
Having given row - 1, it writes those of row over the older ones; at the next time the two have changed roles.

In memory a row of a tile holds the pixels x' of one or more images of the second set side by side, as many as fill the
vectors, and then zeros up to the ``pitch``, a multiple of 16 entries. Where only offset 0 is needed, a tile is a single
row of pixels (x, x), and the neighbours lie in that row. A tile is named by the index of its first entry in one flat
buffer, ``work``; the NTK's tile lies a fixed gap behind the NNGP's. The records of levels and convolutions are laid
out, and their fields explained, in :mod:`ntk_lightning.kernels.infinite.fused_cpu`.

Longer than 300 lines, since Numba compiles these functions into one another and caches them by this file.
"""

# ruff: noqa: ANN401 - vectors and records exist in compiled code only, where they have no Python type
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from ntk_lightning.kernels.infinite.activations import less_its_sine
from ntk_lightning.kernels.infinite.fused_cpu_simd import (
    LANES,
    above,
    absolute,
    broadcast,
    copysign,
    even_odd,
    load,
    polynomial,
    positive,
    sqrt,
    store,
    zeros,
)

__all__ = ["ERF", "GELU", "LINEAR", "RELU", "Buffers", "Records", "run_block"]

RELU, ERF, GELU, LINEAR = 0, 1, 2, 3

Array = NDArray[Any]
Vector = Any
_compiled = njit(nogil=True, error_model="numpy")
_inlined = njit(nogil=True, error_model="numpy", forceinline=True)


class Buffers(NamedTuple):
    """Numbers of one precision: of the first levels in that of the inputs, of the deep ones in float64.

    Args:
        work: Tiles, (entries,).
        left: Of the first images, (images, entries): pixels, then for each activation two numbers a pixel.
        right: The same of the second images, (groups of images that lie side by side, entries).
    """

    work: Array
    left: Array
    right: Array


class Records(NamedTuple):
    """The network, one record a level and a convolution, and one of what all of them share."""

    levels: Array
    convolutions: Array
    run: Array


class _Run(NamedTuple):
    """The same, for one pair: whether it is an image with itself, and where its sums go, (images, 2)."""

    levels: Array
    convolutions: Array
    shared: Any
    itself: bool
    sums: Array


class _Tiles(NamedTuple):
    """Where a convolution finds and leaves its tiles in ``work``, and the pixels of its activation."""

    source: int  # the tile that comes in,
    source_gap: int  # and from there to that of the NTK
    target: int  # the tile that is given
    newer: int  # diagonal sums of the tile before the one that comes in,
    older: int  # and of the one before that
    left: int  # the activation's numbers of the first image's row, in ``left``,
    right: int  # and of the second images' rows, in ``right``


def _fit(function: Callable[[Any], Any]) -> Any:
    """Polynomials on [0, 1] that are right to the precision of each type."""
    fits = [Chebyshev.interpolate(function, degree, domain=[0, 1]) for degree in (6, 19)]
    single, double = (fit.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist() for fit in fits)
    return polynomial(single, double)


def _arccos(t: Any) -> Any:
    return (2 / np.pi) * np.arccos(t) / np.sqrt(1 - t)


def _arcsin_slope(t: Any) -> Any:
    root = np.sqrt(1 - t)
    return (1 / (1 + root) - (2 / np.pi) * np.arcsin(t) / t) / root


def _bow(t: Any) -> Any:
    angle = 2 * np.arcsin(np.sqrt((1 - t) / 2))  # arccos(t)
    difference = less_its_sine(*(torch.from_numpy(np.asarray(a)) for a in (angle, np.sin(angle), t)))
    return difference.numpy() / (1 - t) ** 1.5


# With t = |r| and one square root, root = sqrt(1 - t):
#     arcsin(t) = pi/2 (1 - root arc(t)),    sqrt(1 - r^2) + r arcsin(r) = pi/2 (t + root arc_integral(t)),
# without the cancellation at small t, arcsin(t) = pi/2 t (1 / (1 + root) - root arc_slope(t)),
# and without that at t near 1, arccos(t) - t sqrt(1 - t^2) = root^3 bow(t).
_arc = _fit(_arccos)
_arc_integral = _fit(lambda t: (2 / np.pi) * np.sqrt(1 + t) - t * _arccos(t))
_arc_slope = _fit(_arcsin_slope)
_arc_bow = _fit(_bow)


@_compiled
def _pixel_numbers(kind: int, even: float, variance: float) -> tuple[float, float]:
    """What an activation needs of a pixel; an overflow must not look like a correlation of 0."""
    deviation = math.sqrt(max(variance, 0.0))  # where pooling cancels, rounding may leave less
    inverse = 1 / deviation if deviation > 0 else 0.0
    if variance == math.inf:
        return math.nan, math.nan
    if kind == RELU:
        return inverse, math.sqrt(even) * deviation
    if kind == ERF:
        return 1 / math.sqrt(1 + 2 * variance), inverse
    return 1 / math.sqrt(1 + variance), deviation


@_inlined
def _activate(
    kind: int,
    odd: float,
    even: float,
    tiny: float,
    k: Vector,
    numbers1: tuple[Vector, Vector],
    numbers2: tuple[Vector, Vector],
) -> tuple[Vector, Vector]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)], the formulas of :mod:`~ntk_lightning.kernels.infinite.activations`.

    Args:
        kind: Number of the activation.
        odd: Of ReLU: phi(u) = sqrt(odd) u + sqrt(even) |u|.
        even: The same.
        tiny: Correlations within it of 1 count as 1, as those of equal pixels round.
        k: Covariances.
        numbers1: Of the pixels of the first image, from :func:`_pixel_numbers`.
        numbers2: Of those of the second one.

    Returns:
        Both, NaN for an unknown activation.
    """
    (first1, second1), (first2, second2) = numbers1, numbers2
    if kind == RELU:  # first: 1 / deviation; second: sqrt(even) deviation
        r = k * first2 * first1
        t = absolute(r)
        root = sqrt(above(1.0 - t, tiny, 0.0))
        mean = odd * k + even * absolute(k) + second1 * second2 * (root * _arc_integral(t))
        return mean, odd + even * copysign(1.0 - root * _arc(t), r)
    ab = first1 * first2  # of erf and GELU, first: a and b
    a2, b2 = first1 * first1, first2 * first2
    if kind == ERF:  # second: 1 / deviation
        t = absolute(k * second2 * second1)
        sine2 = a2 + (1.0 - a2) * (b2 + (1.0 - b2) * (above(1.0 - t, tiny, 0.0) * (1.0 + t)))
        cosine = 2.0 * (k * ab)
        t = absolute(cosine)
        root = sqrt(sine2 / (1.0 + t))  # of 1 - t, and arcsin to relative precision, for dark images
        arcsin = cosine * (1.0 / (1.0 + root) - root * _arc_slope(t))
        return arcsin, (4 / math.pi) * ab / sqrt(sine2)
    if kind == GELU:  # second: deviation
        scale = second1 * second2
        t = absolute(k) / above(scale, 0.0, 1.0)
        q = above(1.0 - t, tiny, 0.0) * (1.0 + t)
        p = scale * ab
        m = p * p * q
        sine2 = above(a2 + (1.0 - a2) * b2 + m, 0.0, 1.0)  # 0 in the zeros that fill a row only
        inverse = 1.0 / sqrt(sine2)
        cosine = k * ab
        t = absolute(cosine)
        u = sine2 / (1.0 + t)
        small = u * sqrt(u) * _arc_bow(t)
        bow = positive(cosine, math.pi - small, small)
        density = ab * inverse
        mean = p * scale * q * (sine2 * inverse) + k * bow + cosine * cosine * density
        slope = bow + cosine * (density * (ab + density * inverse) - m * inverse)
        return (0.5 / math.pi) * mean, (0.5 / math.pi) * slope
    nothing = k * math.nan
    return nothing, nothing


@_compiled
def _first_covariance(buffers: Any, level: Any, shared: Any, y1: int, y2: int) -> None:
    """Write the tile of the mean over channels of products of pixels, whose roots the images were divided by."""
    work, left, right = buffers
    rows, pitch, tile, channels, flat = level.rows, level.pitch, level.scratch, shared.channels, shared.flat
    at1, at2 = y1 * level.left_pitch, y2 * pitch
    gap1, gap2 = level.height * level.left_pitch, level.height * pitch  # from channel to channel
    for x in range(rows):
        for c in range(0, pitch, LANES):
            total = zeros(work)
            for channel in range(channels):
                at = at1 + channel * gap1
                pixel = load(left, at + c) if flat else broadcast(left, at + x)
                total = total + pixel * load(right, at2 + channel * gap2 + c)
            store(work, tile + x * pitch + c, total)


@_inlined
def _diagonal_sum(work: Array, at: int, neighbour: int, masks: int, pitch: int) -> Vector:
    """Add to an entry its neighbours on the tile's diagonal, where they are pixels of the same image."""
    before = load(work, at - neighbour) * load(work, masks)
    return load(work, at) + before + load(work, at + neighbour) * load(work, masks + pitch)


@_inlined
def _convolve(
    buffers: Any,
    level: Any,
    convolution: Any,
    tiles: Any,
    kind: int,
    coming: bool,
    going: bool,
    mode: int,
    flat: bool,
) -> None:
    """Take one tile into a convolution and, one row behind, give one tile out of its activation.

    Args:
        buffers: Of one pair.
        level: Its record.
        convolution: Its record.
        tiles: Where its tiles are.
        kind: Number of the activation; a constant where the loops are to have no branches, like the next four.
        coming: Whether a tile comes in.
        going: Whether one is given.
        mode: 0 for the NNGP alone, 1 for the first convolution, whose NTK is its NNGP, 2 for the others.
        flat: Whether tiles have a single row.
    """
    work, left, right = buffers
    rows, pitch, neighbour, masks, gap = level.rows, level.pitch, level.neighbour, level.masks, level.span
    tiny, weight, bias = level.tiny, convolution.weight, convolution.bias  # in loops, stores could change a record
    odd, even = convolution.odd, convolution.even
    source, older, newer, target = tiles.source, tiles.older, tiles.newer, tiles.target
    at1, second1 = tiles.left, tiles.left + level.height * level.left_pitch
    at2, second2 = tiles.right, tiles.right + level.height * pitch
    for x in range(rows):
        for c in range(0, pitch, LANES):
            at = x * pitch + c
            k = zeros(work)
            theta = zeros(work)
            if coming:  # diagonal sums of row
                k = _diagonal_sum(work, source + at, neighbour, masks + c, pitch)
                if mode == 2:
                    theta = _diagonal_sum(work, source + tiles.source_gap + at, neighbour, masks + c, pitch)
            if going:  # those of three rows make row - 1
                nngp = weight * (k + load(work, older + at) + load(work, newer + at)) + bias
                ntk = nngp
                if mode == 2:
                    ntk = nngp + weight * (theta + load(work, older + gap + at) + load(work, newer + gap + at))
                if kind != LINEAR:
                    if flat:
                        numbers1 = load(left, at1 + c), load(left, second1 + c)
                    else:
                        numbers1 = broadcast(left, at1 + x), broadcast(left, second1 + x)
                    numbers2 = load(right, at2 + c), load(right, second2 + c)
                    nngp, slope = _activate(kind, odd, even, tiny, nngp, numbers1, numbers2)
                    ntk = ntk * slope
                store(work, target + at, nngp)
                if mode > 0:
                    store(work, target + gap + at, ntk)
            if coming:  # written over those of row - 2
                store(work, older + at, k)
                if mode == 2:
                    store(work, older + gap + at, theta)


@_compiled
def _dispatch(
    buffers: Any,
    level: Any,
    convolution: Any,
    tiles: Any,
    coming: bool,
    going: bool,
    mode: int,
    flat: bool,
) -> None:
    """Run :func:`_convolve`, where it takes most of the time without a branch in its loops."""
    if not going:
        _convolve(buffers, level, convolution, tiles, LINEAR, True, False, mode, False)
    elif convolution.kind == RELU and not flat and coming and mode == 1:
        _convolve(buffers, level, convolution, tiles, RELU, True, True, 1, False)
    elif convolution.kind == RELU and not flat and coming and mode == 2:
        _convolve(buffers, level, convolution, tiles, RELU, True, True, 2, False)
    elif convolution.kind == RELU:
        _convolve(buffers, level, convolution, tiles, RELU, coming, True, mode, flat)
    else:
        _convolve(buffers, level, convolution, tiles, convolution.kind, coming, True, mode, flat)


@_compiled
def _write_pixel_numbers(buffers: Any, level: Any, convolution: Any, tiles: Any, coming: bool, flat: bool) -> None:
    """Write what the activation needs of every pixel of one row, from the covariance of an image with itself."""
    work, left, right = buffers
    pitch, neighbour, masks = level.pitch, level.neighbour, level.masks
    second1, second2 = level.height * level.left_pitch, level.height * pitch
    for x in range(level.width):
        at = x if flat else x * (pitch + 1)
        k = work[tiles.older + at] + work[tiles.newer + at]
        if coming:
            at += tiles.source
            k += work[at] + work[at - neighbour] * work[masks + x] + work[at + neighbour] * work[masks + pitch + x]
        variance = convolution.weight * k + convolution.bias
        first, second = _pixel_numbers(convolution.kind, convolution.even, variance)
        left[tiles.left + x] = right[tiles.right + x] = first
        left[tiles.left + second1 + x] = right[tiles.right + second2 + x] = second


@_compiled
def _pool(
    work: Array, source: int, gap: int, level: Any, work2: Array, target: int, following: Any, fields: int
) -> None:
    """Add each 2x2 entries of a tile, over 16, to an entry of a tile of the following level."""
    pitch = level.pitch
    for field in range(fields):
        for x in range(0, level.rows, 2):
            for c in range(0, following.pitch, LANES):
                at = source + field * gap + x * pitch + 2 * c
                first, second = load(work, at) + load(work, at + pitch), zeros(work)
                if 2 * c + LANES < pitch:
                    second = load(work, at + LANES) + load(work, at + pitch + LANES)
                to = target + field * following.store_gap + x // 2 * following.pitch + c
                store(work2, to, load(work2, to) + 0.0625 * even_odd(first, second))


@_compiled
def _add_up(work: Array, source: int, gap: int, level: Any, shared: Any, sums: Array) -> None:
    """Add a tile's entries, or those on its diagonal, to the sums of each image."""
    rows, pitch, width = level.rows, level.pitch, level.width
    for field in range(shared.fields):
        at = source + field * gap
        if shared.every:  # the sum of the tile's rows, written over what work begins with
            for c in range(0, pitch, LANES):
                total = load(work, at + c)
                for x in range(1, rows):
                    total = total + load(work, at + x * pitch + c)
                store(work, c, total)
        for image in range(sums.shape[0]):
            of_tile = 0.0  # of its own, so that few roundings are those of a large sum
            for x in range(width):
                column = image * width + x
                of_tile += work[column] if shared.every else work[at + x * pitch + column]
            sums[image, field] += of_tile


@_compiled
def _stream(buffers: Any, following_work: Array, run: Any, index: int) -> None:
    """Stream all tiles of a level through its convolutions, and pool them into the work of the following level."""
    work = buffers.work
    levels, convolutions, shared, itself, sums = run
    level, height = levels[index], levels[index].height
    for order in range(2 * level.window + 1):  # offsets 0, 1, -1, 2, ...: the variances come first
        dy = (order + 1) // 2 if order % 2 else -(order // 2)
        top, length = max(0, -dy), height - abs(dy)  # rows y from top on, for which y + dy is a row too
        for time in range(length + level.count):
            y, source, gap = top + time, level.scratch, level.span
            if index:  # stored by the pooling before
                source, gap = level.store + (y * height + y + dy) * (level.rows + 1) * level.pitch, level.store_gap
            elif time < length:
                _first_covariance(buffers, level, shared, y, y + dy)
            for stage in range(min(level.count, time + 1)):
                row = time - stage
                coming, going = row < length, 0 < row <= length
                # a stage's four spans: diagonal sums (NNGP, NTK) of even rows, then of odd ones
                slots = level.scratch + (4 + 4 * stage) * level.span
                older, newer = slots + 2 * (row % 2) * level.span, slots + 2 * ((row + 1) % 2) * level.span
                if row == 0:  # nothing lies above the first row
                    work[newer : newer + 2 * level.span] = 0
                convolution, y = convolutions[level.first + stage], top + row - 1
                target = level.scratch + 2 * ((stage + 1) % 2) * level.span
                at1, at2 = convolution.left + y * level.left_pitch, convolution.right + (y + dy) * level.pitch
                tiles = _Tiles(source, gap, target, newer, older, at1, at2)
                if itself and going and dy == 0 and convolution.kind != LINEAR:
                    _write_pixel_numbers(buffers, level, convolution, tiles, coming, shared.flat)
                mode = 0 if shared.fields == 1 else 1 if level.first + stage == 0 else 2
                if coming or going:
                    _dispatch(buffers, level, convolution, tiles, coming, going, mode, shared.flat)
                source, gap = target, level.span
            y = top + time - level.count
            if time >= level.count and index + 1 == len(levels):
                _add_up(work, source, gap, level, shared, sums)
            elif time >= level.count:
                following = levels[index + 1]
                tile = (y // 2) * following.height + (y + dy) // 2
                to = following.store + tile * (following.rows + 1) * following.pitch
                _pool(work, source, gap, level, following_work, to, following, shared.fields)


@_compiled
def _pair(buffers: Any, deep: Any, run: Any) -> None:
    """Add up NNGP and NTK over the pixels of the last level, of one image with the images in a row."""
    levels = run.levels
    for index in range(len(levels)):
        into_deep = index + 1 < len(levels) and levels[index + 1].deep
        if index + 1 < len(levels):  # the following level's tiles are added to: they begin as zeros
            begin = levels[index + 1].store - levels[index + 1].pitch - LANES
            end = begin + 2 * levels[index + 1].store_gap
            if into_deep:
                deep.work[begin:end] = 0
            else:
                buffers.work[begin:end] = 0
        if levels[index].deep:
            _stream(deep, deep.work, run, index)
        elif into_deep:
            _stream(buffers, deep.work, run, index)
        else:
            _stream(buffers, buffers.work, run, index)


def _run_block(buffers: Buffers, deep: Buffers, records: Records, itself: bool, triangle: bool, sums: Array) -> None:
    """Run all pairs of a block, those on and above the diagonal of one, or every image with itself.

    Args:
        buffers: Of the levels that are computed in the inputs' precision.
        deep: Of the levels that are computed in float64.
        records: The network.
        itself: Pair every left image with the right one of the same index, and fill in what activations need.
        triangle: The left and the right images are the same: leave out groups below the diagonal.
        sums: NNGP and NTK are added to it, (rows, images, 2).
    """
    groups = len(buffers.right)
    images = sums.shape[1] // (1 if itself else groups)
    for i in range(len(buffers.left)):
        first, end = (i, i + 1) if itself else (i // images if triangle else 0, groups)
        for group in range(first, end):
            part = sums[i] if itself else sums[i, group * images : (group + 1) * images]
            _pair(
                Buffers(buffers.work, buffers.left[i], buffers.right[group]),
                Buffers(deep.work, deep.left[i], deep.right[group]),
                _Run(records.levels, records.convolutions, records.run[0], itself, part),
            )


run_block: Callable[..., None] = njit(nogil=True, error_model="numpy", cache=True)(_run_block)
