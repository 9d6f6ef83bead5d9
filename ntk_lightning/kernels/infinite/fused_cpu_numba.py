"""Compiled code that streams the covariances of pairs of images through a network, tile by tile.

For one pair of images and one vertical offset dy = y' - y, the covariances K[(y, x), (y + dy, x')] are a stack of tiles
(x, x'), one a row y. A 3x3 convolution adds, to each entry, its neighbours on the tile's diagonal, (x - 1, x' - 1) and
(x + 1, x' + 1), and the same sums of the tiles above and below; an activation is pointwise. So tiles stream through all
layers between two poolings while they are in the innermost cache, and 2x2 pooling adds four entries of a tile to one
entry of a tile of the following level, which is all that is ever stored: 1/16 of the covariance. The first covariance
comes from the two images as it is needed.

A row of a tile holds the pixels x' of one or more images side by side, as many as fill the vectors. Where only offset 0
is needed, a tile is a single row of pixels (x, x), and the neighbours lie in that row.

A tile is named by the index of its first entry in one flat buffer, ``work``; the NTK's tile lies a fixed gap behind the
NNGP's. ``left`` has what belongs to the first image, ``right`` to the images in a row: pixels, then for each activation
two numbers a pixel. Records (levels, steps, run) are laid out by :mod:`ntk_lightning.kernels.infinite.fused_cpu`.

Longer than 300 lines, since Numba compiles these functions into one another and caches them by this file.
"""

# ruff: noqa: ANN401 - vectors and records exist in compiled code only, where they have no Python type
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import NDArray

from ntk_lightning.kernels.infinite.fused_cpu_simd import (
    LANES,
    above,
    absolute,
    broadcast,
    copysign,
    even_odd,
    load,
    polynomial,
    sqrt,
    store,
    zeros,
)

__all__ = ["ERF", "GELU", "LINEAR", "RELU", "run_block"]

RELU, ERF, GELU, LINEAR = 0, 1, 2, 3

Array = NDArray[Any]
Vector = Any
_compiled = njit(nogil=True, error_model="numpy")
_inlined = njit(nogil=True, error_model="numpy", forceinline=True)


def _fit(function: Callable[[Any], Any]) -> Any:
    """Polynomials on [0, 1] that are right to the precision of each type."""
    fits = [Chebyshev.interpolate(function, degree, domain=[0, 1]) for degree in (6, 15)]
    single, double = (fit.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist() for fit in fits)
    return polynomial(single, double)


def _arccos(t: Any) -> Any:
    return (2 / np.pi) * np.arccos(t) / np.sqrt(1 - t)


# With t = |r| and one square root, root = sqrt(1 - t):
#     arcsin(t) = pi/2 (1 - root arc(t)),    sqrt(1 - r^2) + r arcsin(r) = pi/2 (t + root arc_integral(t)),
# and, without the cancellation at small t, arcsin(t) = pi/2 t (1 / (1 + root) - root arc_slope(t)).
_arc = _fit(_arccos)
_arc_integral = _fit(lambda t: (2 / np.pi) * np.sqrt(1 + t) - t * _arccos(t))
_arc_slope = _fit(lambda t: (_arccos(t) - 1) / t)


@_inlined
def _arcsin(r: Vector, t: Vector, root: Vector) -> Vector:
    """2/pi arcsin(r) to relative precision, which the covariances of dark images need."""
    return r * (1.0 / (1.0 + root) - root * _arc_slope(t))


@_compiled
def _scales(kind: int, even: float, variance: float) -> tuple[float, float]:
    """What an activation needs of a pixel: a reciprocal standard deviation of its own kind, and a plain one."""
    if kind == RELU:
        return (1 / math.sqrt(variance), math.sqrt(even * variance)) if variance > 0 else (0.0, 0.0)
    if kind == ERF:
        return 1 / math.sqrt(1 + 2 * variance), 0.0
    return 1 / math.sqrt(1 + variance), math.sqrt(max(variance, 0.0))  # where pooling cancels, rounding may leave less


@_inlined
def _activate(
    kind: int,
    odd: float,
    even: float,
    tiny: float,
    k: Vector,
    inverse1: Vector,
    deviation1: Vector,
    inverse2: Vector,
    deviation2: Vector,
) -> tuple[Vector, Vector]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)]; correlations within ``tiny`` of 1 count as 1, as equal pixels round."""
    if kind == RELU:
        r = k * inverse2 * inverse1
        t = absolute(r)
        root = sqrt(above(1.0 - t, tiny, 0.0))
        mean = odd * k + even * absolute(k) + deviation1 * deviation2 * (root * _arc_integral(t))
        return mean, odd + even * copysign(1.0 - root * _arc(t), r)
    scale = inverse1 * inverse2
    if kind == ERF:
        r = 2.0 * (k * scale)
        t = absolute(r)
        u = above(1.0 - t, tiny, tiny)
        return _arcsin(r, t, sqrt(u)), (4 / math.pi) * scale / sqrt(u * (1.0 + t))
    r = k * scale
    t = absolute(r)
    u = above(1.0 - t, tiny, tiny)
    orthant = 0.25 + 0.25 * _arcsin(r, t, sqrt(u))
    determinant = u * (1.0 + t)
    density = (0.5 / math.pi) * scale / sqrt(determinant)
    tilt = k * (inverse1 * inverse1 + inverse2 * inverse2)
    product = deviation1 * deviation2
    mean = density * ((product - k) * (product + k) + k * tilt) + k * orthant
    return mean, orthant + density * (tilt + k * (scale * scale) / determinant)


@_compiled
def _first_covariance(
    work: Array, left: Array, right: Array, level: Any, channels: int, flat: bool, y1: int, y2: int
) -> None:
    """Write the tile of the mean over channels of products of pixels."""
    rows, lanes, tile = level.rows, level.lanes, level.scratch
    at1, at2 = y1 * level.lanes1, y2 * lanes
    gap1, gap2 = level.height * level.lanes1, level.height * lanes
    for x in range(rows):
        for c in range(0, lanes, LANES):
            total = zeros(work)
            for channel in range(channels):
                at = at1 + channel * gap1
                pixel = load(left, at + c) if flat else broadcast(left, at + x)
                total = total + pixel * load(right, at2 + channel * gap2 + c)
            store(work, tile + x * lanes + c, total)


@_inlined
def _diagonal_sum(work: Array, at: int, neighbour: int, cut: int, lanes: int) -> Vector:
    """Add to an entry its neighbours on the tile's diagonal, where they are pixels of the same image."""
    before = load(work, at - neighbour) * load(work, cut)
    return load(work, at) + before + load(work, at + neighbour) * load(work, cut + lanes)


@_inlined
def _step(
    work: Array,
    left: Array,
    right: Array,
    level: Any,
    step: Any,
    where: tuple[int, ...],
    kind: int,
    coming: bool,
    going: bool,
    mode: int,
    flat: bool,
) -> None:
    """Take one tile into a convolution and, one row behind, give one tile out of the activation.

    ``older`` and ``newer`` hold the diagonal sums of the last two tiles; this one's replace the older. ``mode`` is 0
    for the NNGP alone, 1 for the first convolution, whose NTK is its NNGP, and 2 for the others.
    """
    source, source_gap, target, newer, older, at1, at2 = where
    rows, lanes, neighbour, cut, gap = level.rows, level.lanes, level.neighbour, level.cut, level.span
    tiny, weight, bias, odd, even = level.tiny, step.weight, step.bias, step.odd, step.even
    next1, next2 = level.height * level.lanes1, level.height * lanes
    for x in range(rows):
        for c in range(0, lanes, LANES):
            at = x * lanes + c
            k = zeros(work)
            theta = zeros(work)
            if coming:
                k = _diagonal_sum(work, source + at, neighbour, cut + c, lanes)
                if mode == 2:
                    theta = _diagonal_sum(work, source + source_gap + at, neighbour, cut + c, lanes)
            if going:
                nngp = weight * (k + load(work, older + at) + load(work, newer + at)) + bias
                ntk = nngp
                if mode == 2:
                    ntk = nngp + weight * (theta + load(work, older + gap + at) + load(work, newer + gap + at))
                if kind != LINEAR:
                    if flat:
                        inverse1, deviation1 = load(left, at1 + c), load(left, at1 + next1 + c)
                    else:
                        inverse1, deviation1 = broadcast(left, at1 + x), broadcast(left, at1 + next1 + x)
                    inverse2, deviation2 = load(right, at2 + c), load(right, at2 + next2 + c)
                    nngp, slope = _activate(kind, odd, even, tiny, nngp, inverse1, deviation1, inverse2, deviation2)
                    ntk = ntk * slope
                store(work, target + at, nngp)
                if mode > 0:
                    store(work, target + gap + at, ntk)
            if coming:
                store(work, older + at, k)
                if mode == 2:
                    store(work, older + gap + at, theta)


@_compiled
def _dispatch(
    work: Array,
    left: Array,
    right: Array,
    level: Any,
    step: Any,
    where: tuple[int, ...],
    coming: bool,
    going: bool,
    mode: int,
    flat: bool,
) -> None:
    """Run :func:`_step`, where it takes most of the time without a branch in its loops."""
    usual = coming and going and not flat and step.kind == RELU
    if usual and mode == 1:
        _step(work, left, right, level, step, where, RELU, True, True, 1, False)
    elif usual and mode == 2:
        _step(work, left, right, level, step, where, RELU, True, True, 2, False)
    else:
        _step(work, left, right, level, step, where, step.kind, coming, going, mode, flat)


@_compiled
def _pixel_scales(
    work: Array,
    left: Array,
    right: Array,
    level: Any,
    step: Any,
    where: tuple[int, ...],
    coming: bool,
    flat: bool,
) -> None:
    """Write what the activation needs of every pixel of one row, from the covariance of an image with itself."""
    source, _, _, newer, older, at1, at2 = where
    lanes, neighbour, cut = level.lanes, level.neighbour, level.cut
    next1, next2 = level.height * level.lanes1, level.height * lanes
    for x in range(level.width):
        at = x if flat else x * (lanes + 1)
        k = work[older + at] + work[newer + at]
        if coming:
            at += source
            k += work[at] + work[at - neighbour] * work[cut + x] + work[at + neighbour] * work[cut + lanes + x]
        inverse, deviation = _scales(step.kind, step.even, step.weight * k + step.bias)
        left[at1 + x] = right[at2 + x] = inverse
        left[at1 + next1 + x] = right[at2 + next2 + x] = deviation


@_compiled
def _pool(
    work: Array, source: int, gap: int, level: Any, work2: Array, target: int, following: Any, fields: int
) -> None:
    """Add each 2x2 entries of a tile, over 16, to an entry of a tile of the following level."""
    lanes = level.lanes
    for field in range(fields):
        for x in range(0, level.rows, 2):
            for c in range(0, following.lanes, LANES):
                at = source + field * gap + x * lanes + 2 * c
                first, second = load(work, at) + load(work, at + lanes), zeros(work)
                if 2 * c + LANES < lanes:
                    second = load(work, at + LANES) + load(work, at + lanes + LANES)
                to = target + field * following.store_gap + x // 2 * following.lanes + c
                store(work2, to, load(work2, to) + 0.0625 * even_odd(first, second))


@_compiled
def _add_up(work: Array, source: int, gap: int, level: Any, every: bool, fields: int, sums: Array) -> None:
    """Add a tile's entries, or those on its diagonal, to the sums of each image."""
    rows, lanes, width = level.rows, level.lanes, level.width
    for field in range(fields):
        at = source + field * gap
        if every:
            for c in range(0, lanes, LANES):
                total = load(work, at + c)
                for x in range(1, rows):
                    total = total + load(work, at + x * lanes + c)
                store(work, c, total)
        for image in range(sums.shape[0]):
            for x in range(width):
                column = image * width + x
                sums[image, field] += work[column] if every else work[at + x * lanes + column]


@_compiled
def _stream(
    work: Array,
    left: Array,
    right: Array,
    work2: Array,
    levels: Array,
    steps: Array,
    run: Any,
    index: int,
    itself: bool,
    sums: Array,
) -> None:
    """Stream all tiles of a level through its layers, and pool them into the following level's ``work2``."""
    level, height = levels[index], levels[index].height
    for order in range(2 * level.window + 1):  # offsets 0, 1, -1, 2, ...: the variances come first
        dy = (order + 1) // 2 if order % 2 else -(order // 2)
        top, length = max(0, -dy), height - abs(dy)
        for time in range(length + level.count):
            y, source, gap = top + time, level.scratch, level.span
            if index:
                source, gap = level.store + (y * height + y + dy) * (level.rows + 1) * level.lanes, level.store_gap
            elif time < length:
                _first_covariance(work, left, right, level, run.channels, run.flat, y, y + dy)
            for stage in range(min(level.count, time + 1)):
                row = time - stage
                coming, going = row < length, 0 < row <= length
                slots = level.scratch + (4 + 4 * stage) * level.span
                older, newer = slots + 2 * (row % 2) * level.span, slots + 2 * ((row + 1) % 2) * level.span
                if row == 0:
                    work[newer : newer + 2 * level.span] = 0
                step, y = steps[level.first + stage], top + row - 1
                target = level.scratch + 2 * ((stage + 1) % 2) * level.span
                at1, at2 = step.at1 + y * level.lanes1, step.at2 + (y + dy) * level.lanes
                where = (source, gap, target, newer, older, at1, at2)
                if itself and going and dy == 0 and step.kind != LINEAR:
                    _pixel_scales(work, left, right, level, step, where, coming, run.flat)
                mode = 0 if run.fields == 1 else 1 if level.first + stage == 0 else 2
                if coming or going:
                    _dispatch(work, left, right, level, step, where, coming, going, mode, run.flat)
                source, gap = target, level.span
            y = top + time - level.count
            if time >= level.count and index + 1 == len(levels):
                _add_up(work, source, gap, level, run.every, run.fields, sums)
            elif time >= level.count:
                following = levels[index + 1]
                tile = (y // 2) * following.height + (y + dy) // 2
                target = following.store + tile * (following.rows + 1) * following.lanes
                _pool(work, source, gap, level, work2, target, following, run.fields)


@_compiled
def _pair(
    work: Array,
    left: Array,
    right: Array,
    deep_work: Array,
    deep_left: Array,
    deep_right: Array,
    levels: Array,
    steps: Array,
    run: Any,
    itself: bool,
    sums: Array,
) -> None:
    """Add up NNGP and NTK over the pixels of the last level, of one image with the images in a row."""
    for index in range(len(levels)):
        into_deep = index + 1 < len(levels) and levels[index + 1].deep
        if index + 1 < len(levels):
            begin = levels[index + 1].store - levels[index + 1].lanes - LANES
            end = begin + 2 * levels[index + 1].store_gap
            if into_deep:
                deep_work[begin:end] = 0
            else:
                work[begin:end] = 0
        if levels[index].deep:
            _stream(deep_work, deep_left, deep_right, deep_work, levels, steps, run, index, itself, sums)
        elif into_deep:
            _stream(work, left, right, deep_work, levels, steps, run, index, itself, sums)
        else:
            _stream(work, left, right, work, levels, steps, run, index, itself, sums)


def _run_block(
    work: Array,
    left: Array,
    right: Array,
    deep_work: Array,
    deep_left: Array,
    deep_right: Array,
    levels: Array,
    steps: Array,
    runs: Array,
    itself: bool,
    triangle: bool,
    sums: Array,
) -> None:
    """Run all pairs of a block, those on and above the diagonal of one, or every image with itself.

    Args:
        work: Buffer of the levels that are computed in the inputs' precision.
        left: Entries of the first images, (rows, ...).
        right: Entries of the second images, (groups of images that lie side by side, ...).
        deep_work: Buffer of the levels that are computed in float64.
        deep_left: As ``left``, for those levels.
        deep_right: As ``right``, for those levels.
        levels: Records, one a level.
        steps: Records, one a convolution.
        runs: One record, of what all levels share.
        itself: Pair every left image with the right one of the same index, and fill in what activations need.
        triangle: The left and the right images are the same: leave out groups below the diagonal.
        sums: NNGP and NTK are added to it, (rows, images, 2).
    """
    images = sums.shape[1] // (1 if itself else len(right))
    for i in range(len(left)):
        first, end = (i, i + 1) if itself else (i // images if triangle else 0, len(right))
        for group in range(first, end):
            part = sums[i] if itself else sums[i, group * images : (group + 1) * images]
            _pair(
                work,
                left[i],
                right[group],
                deep_work,
                deep_left[i],
                deep_right[group],
                levels,
                steps,
                runs[0],
                itself,
                part,
            )


run_block: Callable[..., None] = njit(nogil=True, error_model="numpy", cache=True)(_run_block)
