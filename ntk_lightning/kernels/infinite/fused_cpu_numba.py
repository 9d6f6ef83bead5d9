"""Compiled code that takes the covariances of 16 pairs of images at once through a network, plane by plane.

For pairs of images, the covariances K[p, p + D] of one offset D = (dy, dx) are a *plane*: a row for each y, an entry
for each x for which p = (y, x) and p + D are pixels. An entry is one vector, of 16 pairs of images. No operation but
pooling mixes planes:

    convolution   sums over a window inside the plane; with stride s, plane D becomes plane D / s, and planes whose
                  offset s does not divide are never computed: s^2 times fewer;
    activation    pointwise, with two numbers of pixel p of the first image and two of pixel p + D of the second;
    sum           of two planes in two *slots* of ``work``;
    pooling       plane D is added to the planes D' of the following *level* with |D - stride D'| < window, which are
                  all that is ever stored.

A level is what lies between two poolings. Its *operations*, one record each, run one after the other on a plane, which
is small enough to stay in the cache. The *schedule* lists (level, dy) in the order in which what a level needs is
complete: planes of few rows dy are open at any time. Where slots, stored planes and pixels' numbers lie, and what the
fields of the records mean, stands in :mod:`~ntk_lightning.kernels.infinite.fused_cpu_records`. A slot holds the plane
of the NNGP and, a fixed gap behind it, that of the NTK; each is compact, row after row.

The first images of 16 pairs are one and the same (its numbers are broadcast), or 16 different ones (``paired``).

Longer than 300 lines, since Numba compiles these functions into one another and caches them by this file.
"""

# ruff: noqa: ANN401 - vectors and records exist in compiled code only, where they have no Python type
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import njit
from numpy.typing import NDArray

from ntk_lightning.kernels.infinite.fused_cpu_duals import duals, pixel_numbers
from ntk_lightning.kernels.infinite.fused_cpu_program import (
    ADD,
    BOX,
    COPY,
    IMAGES,
    IMAGES3,
    LINEAR,
    NORM,
    POINT,
    RELU,
)
from ntk_lightning.kernels.infinite.fused_cpu_simd import LANES, broadcast, load, store, zeros

__all__ = ["Buffers", "Records", "run_block"]

Array = NDArray[Any]
Vector = Any
_compiled = njit(nogil=True, error_model="numpy")
_inlined = njit(nogil=True, error_model="numpy", forceinline=True)


class Buffers(NamedTuple):
    """Numbers of one precision: of the first levels in that of the inputs, of the deep ones in float64.

    Args:
        work: Slots and stored planes, (entries,).
        left: Of the first images, (images, entries) or, paired, (groups of 16 images, entries x 16): pixels, then for
            each activation two numbers a pixel.
        right: The same of the second images, (groups of 16 images, entries x 16).
    """

    work: Array
    left: Array
    right: Array


class Records(NamedTuple):
    """The network: one record a level and an operation, tables of offsets, and the schedule."""

    levels: Array
    operations: Array
    offsets: Array  # dx of each level in order, then where in the store each dy and each dx lies
    schedule: Array  # (level, dy)


class _Plane(NamedTuple):
    """One plane before an operation: its offset, its first pixel, its rows and columns."""

    dy: int
    dx: int
    y: int
    x: int
    rows: int
    columns: int


@_inlined
def _plane(dy: int, dx: int, height: int, width: int) -> Any:
    return _Plane(dy, dx, max(0, -dy), max(0, -dx), max(0, height - abs(dy)), max(0, width - abs(dx)))


@_inlined
def _product(left: Array, right: Array, at1: int, at2: int, pixels: int, channels: int, paired: bool) -> Vector:
    """Mean over channels of products of pixels."""
    total = zeros(right)
    for _ in range(channels):
        pixel = load(left, at1) if paired else broadcast(left, at1)
        total = total + pixel * load(right, at2)
        at1 += pixels * LANES if paired else pixels
        at2 += pixels * LANES
    return total


@_compiled
def _images(buffers: Any, op: Any, plane: Any, paired: bool) -> None:
    """Write the mean over channels of products of pixels, by whose root the images were divided; the NTK is zero."""
    work, left, right = buffers
    at, width, pixels = op.target, op.width, op.height * op.width
    for y in range(plane.y, plane.y + plane.rows):
        for x in range(plane.x, plane.x + plane.columns):
            at1, at2 = y * width + x, ((y + plane.dy) * width + x + plane.dx) * LANES
            at1 = at1 * LANES if paired else at1
            store(work, at, _product(left, right, at1, at2, pixels, op.channels, paired))
            if op.mode == 2:
                store(work, at + op.gap, zeros(work))
            at += LANES


@_inlined
def _conv3(
    buffers: Any, op: Any, plane: Any, kind: int, mode: int, images: bool, paired: bool, own: bool, accumulate: bool
) -> None:
    """Run a 3x3 convolution of stride 1 that keeps the size, and its activation, row by row.

    The row sums k of each row of the plane, of three neighbours, are kept for two rows in a ring: having taken in row
    ``time`` it gives row ``time`` - 1, from ``older`` of row - 1, ``newer`` of row and those just made.

    Args:
        buffers: Of these pairs.
        op: The record.
        plane: Where it runs.
        kind: Number of the activation; a constant where the loop is to have no branches, like all that follow.
        mode: 0 for the NNGP alone, 1 where the NTK so far is zero, 2 else.
        images: Whether it convolves images, whose covariances are computed as they are needed.
        paired: Whether the first images differ.
        own: Whether the convolution's own part of the NTK is not its NNGP.
        accumulate: Whether to add to the target.
    """
    work, left, right = buffers
    weight, bias, odd, even, tiny, gap = op.weight, op.bias, op.odd, op.even, op.tiny, op.gap
    own_weight, own_bias = op.own_weight, op.own_bias
    columns = plane.columns
    line, step = columns * LANES, LANES if paired else 1
    span = 2 * op.width * LANES
    pixels = op.height * op.width
    half = op.width * LANES  # from the row sums of the NNGP to those of the NTK
    for c in range(0, line, LANES):  # nothing lies above the first row
        store(work, op.ring + span + c, zeros(work))
        store(work, op.ring + span + half + c, zeros(work))
    for time in range(plane.rows + 1):
        coming, going = time < plane.rows, time > 0
        older, newer = op.ring + (time % 2) * span, op.ring + ((time + 1) % 2) * span
        source, target = op.source + time * line, op.target + (time - 1) * line
        y = plane.y + time - 1
        at1 = op.numbers * step + (y * op.width + plane.x) * step
        at2 = op.numbers * LANES + ((y + plane.dy) * op.width + plane.x + plane.dx) * LANES
        before, here = zeros(work), zeros(work)
        before_t, here_t = zeros(work), zeros(work)
        pixel1 = (((y + 1) * op.width) + plane.x) * step
        pixel2 = ((y + 1 + plane.dy) * op.width + plane.x + plane.dx) * LANES
        if coming:
            here = _product(left, right, pixel1, pixel2, pixels, op.channels, paired) if images else load(work, source)
            if mode == 2:
                here_t = load(work, source + gap)
        for c in range(0, line, LANES):
            after, after_t = zeros(work), zeros(work)
            if coming and c + LANES < line:
                if images:
                    pixel1 += step
                    pixel2 += LANES
                    after = _product(left, right, pixel1, pixel2, pixels, op.channels, paired)
                else:
                    after = load(work, source + c + LANES)
                if mode == 2:
                    after_t = load(work, source + gap + c + LANES)
            k, theta = before + here + after, before_t + here_t + after_t
            if going:
                total = k + load(work, older + c) + load(work, newer + c)
                nngp = weight * total + bias
                ntk = nngp
                if own:
                    ntk = own_weight * total + own_bias
                if mode == 2:
                    ntk = ntk + weight * (theta + load(work, older + half + c) + load(work, newer + half + c))
                if kind != LINEAR:
                    if paired:
                        numbers1 = load(left, at1), load(left, at1 + pixels * LANES)
                    else:
                        numbers1 = broadcast(left, at1), broadcast(left, at1 + pixels)
                    numbers2 = load(right, at2), load(right, at2 + pixels * LANES)
                    nngp, slope = duals(kind, odd, even, tiny, nngp, numbers1, numbers2)
                    ntk = ntk * slope
                if accumulate:
                    nngp = nngp + load(work, target + c)
                    if mode > 0:
                        ntk = ntk + load(work, target + gap + c)
                store(work, target + c, nngp)
                if mode > 0:
                    store(work, target + gap + c, ntk)
                at1 += step
                at2 += LANES
            if coming:  # written over those of two rows before
                store(work, older + c, k)
                if mode == 2:
                    store(work, older + half + c, theta)
            before, here, before_t, here_t = here, after, here_t, after_t


@_compiled
def _convolve3(buffers: Any, op: Any, plane: Any, paired: bool, fused: bool) -> None:
    """Run :func:`_conv3` without activation or, in the cases that take most of the time, with the ReLU after it."""
    images, own, accumulate = op.code == IMAGES3, op.own > 0, op.accumulate > 0
    if not fused:
        _conv3(buffers, op, plane, LINEAR, op.mode, images, paired, own, accumulate)
    elif op.mode == 2:
        _conv3(buffers, op, plane, RELU, 2, False, False, False, False)
    elif op.mode == 1:
        _conv3(buffers, op, plane, RELU, 1, True, False, False, False)
    elif images:
        _conv3(buffers, op, plane, RELU, 0, True, False, False, False)
    else:
        _conv3(buffers, op, plane, RELU, 0, False, False, False, False)


@_compiled
def _box(buffers: Any, op: Any, plane: Any) -> None:
    """Run any convolution, without activation: sums over a window of each row, then over rows.

    Output pixel q of plane D / stride sums pixels p of plane D with 0 <= p - stride q + pad < size.
    """
    work = buffers.work
    after = _plane(plane.dy // op.stride_y, plane.dx // op.stride_x, op.out_height, op.out_width)
    line, out_line = plane.columns * LANES, after.columns * LANES
    half = op.out_width * LANES
    top, bottom, begin, end = plane.y, plane.y + plane.rows, plane.x, plane.x + plane.columns
    ready = top  # rows before it are summed, or not needed
    for q in range(after.y, after.y + after.rows):
        first, last = max(top, q * op.stride_y - op.pad_y), min(bottom, q * op.stride_y - op.pad_y + op.size_y)
        for y in range(max(ready, first), last):
            ring = op.ring + (y % op.size_y) * 2 * half
            for c in range(after.columns):
                left = (after.x + c) * op.stride_x - op.pad_x
                k, theta = zeros(work), zeros(work)
                for x in range(max(begin, left), min(end, left + op.size_x)):
                    at = op.source + (y - top) * line + (x - begin) * LANES
                    k = k + load(work, at)
                    if op.mode == 2:
                        theta = theta + load(work, at + op.gap)
                store(work, ring + c * LANES, k)
                store(work, ring + half + c * LANES, theta)
        ready = max(ready, last)
        target = op.target + (q - after.y) * out_line
        for c in range(0, out_line, LANES):
            k, theta = zeros(work), zeros(work)
            for y in range(first, last):
                ring = op.ring + (y % op.size_y) * 2 * half + c
                k, theta = k + load(work, ring), theta + load(work, ring + half)
            nngp = op.weight * k + op.bias
            ntk = op.weight * theta + op.own_weight * k + op.own_bias
            if op.accumulate:
                nngp = nngp + load(work, target + c)
                ntk = ntk + load(work, target + op.gap + c)
            store(work, target + c, nngp)
            if op.mode > 0:
                store(work, target + op.gap + c, ntk)


@_compiled
def _point(buffers: Any, op: Any, plane: Any, paired: bool, source: int) -> None:
    """Apply an activation, or a normalization, to a plane."""
    work, left, right = buffers
    pixels, step, at = op.height * op.width, LANES if paired else 1, 0
    kind, odd, even, tiny, target = op.kind, op.odd, op.even, op.tiny, op.target
    for y in range(plane.y, plane.y + plane.rows):
        at1 = (op.numbers + y * op.width + plane.x) * step
        at2 = (op.numbers + (y + plane.dy) * op.width + plane.x + plane.dx) * LANES
        for _ in range(plane.columns):
            if paired:
                numbers1 = load(left, at1), load(left, at1 + pixels * LANES)
            else:
                numbers1 = broadcast(left, at1), broadcast(left, at1 + pixels)
            numbers2 = load(right, at2), load(right, at2 + pixels * LANES)
            nngp, slope = duals(kind, odd, even, tiny, load(work, source + at), numbers1, numbers2)
            store(work, target + at, nngp)
            if op.mode > 0:
                store(work, target + op.gap + at, slope * load(work, source + op.gap + at))
            at1 += step
            at2 += LANES
            at += LANES


@_compiled
def _write_numbers(buffers: Any, op: Any, source: int) -> None:
    """Write what an activation needs of every pixel, from the covariances of images with themselves at offset 0."""
    work, left, right = buffers
    pixels = op.height * op.width
    at = op.numbers * LANES
    if op.kind == NORM and op.odd > 0:  # over all pixels: by the mean of their variances
        for lane in range(LANES):
            total = 0.0
            for i in range(lane, pixels * LANES, LANES):
                total += work[source + i]
            first, second = pixel_numbers(NORM, op.even, total / pixels)
            for i in range(at + lane, at + pixels * LANES, LANES):
                left[i] = right[i] = first
                left[i + pixels * LANES] = right[i + pixels * LANES] = second
        return
    for i in range(pixels * LANES):
        first, second = pixel_numbers(op.kind, op.even, work[source + i])
        left[at + i] = right[at + i] = first
        left[at + pixels * LANES + i] = right[at + pixels * LANES + i] = second


@_compiled
def _copy(work: Array, op: Any, source: int, gap: int, entries: int, clear: bool) -> None:
    """Copy a plane; clear what was copied."""
    for field in range(2 if op.mode > 0 else 1):
        for i in range(0, entries, LANES):
            store(work, op.target + field * op.gap + i, load(work, source + field * gap + i))
            if clear:
                store(work, source + field * gap + i, zeros(work))


@_compiled
def _add(work: Array, op: Any, entries: int) -> None:
    for field in range(2 if op.mode > 0 else 1):
        to, at = op.target + field * op.gap, op.source + field * op.gap
        for i in range(0, entries, LANES):
            store(work, to + i, load(work, to + i) + load(work, at + i))


@_inlined
def _add_windows(
    work: Array,
    at: int,
    line: int,
    stride: int,
    work2: Array,
    to: int,
    count: int,
    scale: float,
    rows: int,
    columns: int,
) -> None:
    """Add sums over windows, of which none is cut, to a row; the sizes of windows are constants."""
    for c in range(0, count * LANES, LANES):
        total = load(work, at)
        for x in range(1, columns):
            total = total + load(work, at + x * LANES)
        for y in range(1, rows):
            for x in range(columns):
                total = total + load(work, at + y * line + x * LANES)
        store(work2, to + c, load(work2, to + c) + scale * total)
        at += stride * LANES


@_compiled
def _pool(work: Array, level: Any, plane: Any, work2: Array, following: Any, offsets: Array, fields: int) -> None:
    """Add a plane to those planes of the following level whose windows it meets."""
    window_y, window_x, stride_y, stride_x = level.window_y, level.window_x, level.stride_y, level.stride_x
    line, scale = plane.columns * LANES, level.scale
    height, width = following.height, following.width
    # Offset D lies in the windows of D' = (D - d) / stride, where |d| < window; a and a + d are the places in both.
    for dy in range(-((window_y - 1 - plane.dy) // stride_y), (plane.dy + window_y - 1) // stride_y + 1):
        place_y = offsets[following.places_y + height - 1 + dy] if abs(dy) < height else -1
        for dx in range(-((window_x - 1 - plane.dx) // stride_x), (plane.dx + window_x - 1) // stride_x + 1):
            place_x = offsets[following.places_x + width - 1 + dx] if abs(dx) < width else -1
            if place_y < 0 or place_x < 0:
                continue
            after = _plane(dy, dx, height, width)
            to = following.store + place_y + place_x
            shift_y, shift_x = plane.dy - stride_y * dy, plane.dx - stride_x * dx
            low_y, high_y = max(0, -shift_y), min(window_y, window_y - shift_y)
            low_x, high_x = max(0, -shift_x), min(window_x, window_x - shift_x)
            inside = level.pad_y == 0 and level.pad_x == 0
            rows, columns = high_y - low_y, high_x - low_x
            for field in range(fields):
                at, there = level.result + field * level.gap, to + field * following.store_gap
                for q in range(after.y, after.y + after.rows):
                    top, left = (
                        q * stride_y + low_y - level.pad_y - plane.y,
                        after.x * stride_x + low_x - level.pad_x - plane.x,
                    )
                    if inside and rows == 1 and columns == 1:
                        _add_windows(
                            work,
                            at + top * line + left * LANES,
                            line,
                            stride_x,
                            work2,
                            there,
                            after.columns,
                            scale,
                            1,
                            1,
                        )
                    elif inside and rows == 1 and columns == 2:
                        _add_windows(
                            work,
                            at + top * line + left * LANES,
                            line,
                            stride_x,
                            work2,
                            there,
                            after.columns,
                            scale,
                            1,
                            2,
                        )
                    elif inside and rows == 2 and columns == 1:
                        _add_windows(
                            work,
                            at + top * line + left * LANES,
                            line,
                            stride_x,
                            work2,
                            there,
                            after.columns,
                            scale,
                            2,
                            1,
                        )
                    elif inside and rows == 2 and columns == 2:
                        _add_windows(
                            work,
                            at + top * line + left * LANES,
                            line,
                            stride_x,
                            work2,
                            there,
                            after.columns,
                            scale,
                            2,
                            2,
                        )
                    else:
                        first, last = max(0, top), min(plane.rows, top + rows)
                        for u in range(after.columns):
                            begin, end = max(0, left + u * stride_x), min(plane.columns, left + u * stride_x + columns)
                            total = zeros(work)
                            for y in range(first, last):
                                for x in range(begin, end):
                                    total = total + load(work, at + y * line + x * LANES)
                            store(work2, there + u * LANES, load(work2, there + u * LANES) + scale * total)
                    there += after.columns * LANES


@_compiled
def _add_up(work: Array, level: Any, plane: Any, work2: Array, fields: int, sums: Array) -> None:
    """Add a plane's entries to the sums of each pair, (NNGP and NTK, pairs)."""
    for field in range(fields):
        at, total = level.result + field * level.gap, zeros(work2)
        for _ in range(plane.rows):
            of_row = zeros(work)  # of its own, so that few roundings are those of a large sum
            for _ in range(plane.columns):
                of_row = of_row + load(work, at)
                at += LANES
            total = total + of_row
        store(sums, field * LANES, load(sums, field * LANES) + total)


@_compiled
def _operate(buffers: Any, op: Any, dy: int, dx: int, paired: bool, fill: bool) -> None:
    """Run one operation on the plane of an offset of its level's first pixels."""
    plane = _plane(dy // op.share_y, dx // op.share_x, op.height, op.width)
    if op.code == IMAGES:
        _images(buffers, op, plane, paired)
    elif op.code == BOX:
        _box(buffers, op, plane)
    elif op.code == ADD:
        _add(buffers.work, op, plane.rows * plane.columns * LANES)
    elif op.code == COPY:
        _copy(buffers.work, op, op.source, op.gap, plane.rows * plane.columns * LANES, False)
    else:
        source, fused = op.source, False
        if op.code != POINT:
            first = op.code == IMAGES3
            fused = (
                op.kind == RELU
                and op.own == 0
                and not paired
                and (op.mode != 1 or first)
                and (op.mode != 2 or not first)
            )
            _convolve3(buffers, op, plane, paired, fused)
            source = op.target
        if op.kind != LINEAR and not fused:
            if fill and dy == 0 and dx == 0:  # the activation's numbers come from this very plane
                _write_numbers(buffers, op, source)
            _point(buffers, op, plane, paired, source)


@_compiled
def _run_level(
    buffers: Any,
    following_work: Array,
    wide: Array,
    records: Any,
    index: int,
    dy: int,
    paired: bool,
    fill: bool,
    fields: int,
    sums: Array,
) -> None:
    """Run a level on all planes of one dy, and pool them into the work of the following level, or add them up."""
    levels, operations, offsets, _ = records
    level, work = levels[index], buffers.work
    for place in range(level.offsets, level.offsets + level.count_x):
        dx = offsets[place]
        if index > 0:  # what the pooling before has stored
            plane = _plane(dy, dx, level.height, level.width)
            source = (
                level.store
                + offsets[level.places_y + level.height - 1 + dy]
                + offsets[level.places_x + level.width - 1 + dx]
            )
            op = operations[level.first]
            _copy(work, op, source, level.store_gap, plane.rows * plane.columns * LANES, True)
        for number in range(level.first + (index > 0), level.first + level.count):
            _operate(buffers, operations[number], dy, dx, paired, fill)
        plane = _plane(dy // level.share_y, dx // level.share_x, level.out_height, level.out_width)
        if index + 1 == len(levels):
            _add_up(work, level, plane, wide, fields, sums)
        else:
            _pool(work, level, plane, following_work, levels[index + 1], offsets, fields)


@_compiled
def _run_group(buffers: Any, deep: Any, records: Any, paired: bool, fill: bool, fields: int, sums: Array) -> None:
    """Add up NNGP and NTK over the pixels of the last level, of 16 pairs."""
    levels = records.levels
    for step in range(len(records.schedule)):
        index, dy = records.schedule[step, 0], records.schedule[step, 1]
        into_deep = index + 1 < len(levels) and levels[index + 1].deep
        if levels[index].deep:
            _run_level(deep, deep.work, deep.work, records, index, dy, paired, fill, fields, sums)
        elif into_deep:
            _run_level(buffers, deep.work, deep.work, records, index, dy, paired, fill, fields, sums)
        else:
            _run_level(buffers, buffers.work, deep.work, records, index, dy, paired, fill, fields, sums)


def _run_block(
    buffers: Buffers,
    deep: Buffers,
    records: Records,
    paired: bool,
    fill: bool,
    fields: int,
    sums: Array,
) -> None:
    """Run every first image with every group of second ones or, paired, every group with that of the same index.

    Args:
        buffers: Of the levels that are computed in the inputs' precision.
        deep: Of the levels that are computed in float64.
        records: The network.
        paired: Whether the first images stand in groups too.
        fill: Fill in the numbers that activations need of pixels: every image is paired with itself.
        fields: 1 for the NNGP alone, 2 for both kernels.
        sums: NNGP and NTK are added to it, (first images or groups, groups or 1, 2 x 16).
    """
    for i in range(len(buffers.left)):
        for group in range(len(buffers.right)):
            if paired and group != i:
                continue
            _run_group(
                Buffers(buffers.work, buffers.left[i], buffers.right[group]),
                Buffers(deep.work, deep.left[i], deep.right[group]),
                records,
                paired,
                fill,
                fields,
                sums[i, 0 if paired else group],
            )


run_block: Callable[..., None] = njit(nogil=True, error_model="numpy", cache=True)(_run_block)
