"""Flat records and buffers for the compiled CPU kernel: what :mod:`fused_cpu_numba` knows of a network.

Operations and levels, from :mod:`~ntk_lightning.kernels.infinite.fused_cpu_program`, become records of numbers; here it
is settled which offsets are needed, in which order planes are computed, and where everything lies.

Longer than 300 lines because the layout of the records, what fills them in and what runs them belong together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ntk_lightning.kernels.infinite import fused_cpu_numba
from ntk_lightning.kernels.infinite.activations import ROUNDING
from ntk_lightning.kernels.infinite.architecture import Window
from ntk_lightning.kernels.infinite.fused_cpu_program import LINEAR, Level, Network
from ntk_lightning.kernels.infinite.fused_cpu_simd import LANES

__all__ = ["Arrays", "Program", "packed", "unpacked"]

Arrays = tuple[NDArray[Any], NDArray[Any]]  # of the levels in the inputs' precision, and of the deep ones in float64

_CACHE_LINE = 64  # bytes


def _record(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


# What the compiled code knows of a level.
_LEVEL = np.dtype(
    _record("first count", np.int64)  # its operations
    + _record("height width", np.int64)  # pixels at its beginning
    + _record("out_height out_width share_y share_x", np.int64)  # pixels at its end, and what one of them stands for
    + _record("deep", np.int64)  # whether it is computed in float64, in a buffer of its own
    + _record("offsets count_x", np.int64)  # in the table of offsets: dx that are needed,
    + _record("places_y places_x", np.int64)  # and where planes of dy from 1 - height on, dx from 1 - width on, lie
    + _record("store store_gap", np.int64)  # in work: stored planes of the NNGP, and the way to those of the NTK
    + _record("result gap", np.int64)  # in work: the slot that holds the plane at its end, and the way to its NTK
    + _record("window_y window_x stride_y stride_x pad_y pad_x", np.int64)  # of the pooling after it
    + _record("scale", np.float64)  # of its sums
)
_OPERATION = np.dtype(
    _record("code kind accumulate own", np.int64)  # own: whether own_weight and own_bias are not weight and bias
    + _record("mode", np.int64)  # 0 for the NNGP alone, 1 where the NTK before is zero, 2 else
    + _record("source target gap ring", np.int64)  # in work: slots, the way to the NTK, and rows of sums
    + _record("height width out_height out_width share_y share_x", np.int64)
    + _record("size_y size_x stride_y stride_x pad_y pad_x", np.int64)
    + _record("channels", np.int64)  # of images
    + _record("numbers", np.int64)  # where the activation's numbers of pixels begin
    + _record("weight bias own_weight own_bias odd even tiny", np.float64)
)


class Program:
    """The first levels of a network at one image shape, as flat records and buffers for the compiled code.

    Args:
        network: From :func:`~ntk_lightning.kernels.infinite.fused_cpu_program.read`.
        shape: (C, H, W) of the images.
        dtype: Of the images.
        fields: 1 for the NNGP alone, 2 for both kernels.
        diagonal: Compute offset 0 at the end only, and those that lead to it.
        fill: Begin with offset 0, from which what activations need is filled in.
    """

    def __init__(
        self,
        network: Network,
        shape: Sequence[int],
        dtype: DTypeLike,
        fields: int,
        diagonal: bool,
        fill: bool = False,
    ) -> None:
        self.fields, self.channels = fields, shape[0]
        self.dtypes = np.dtype(dtype), np.dtype(np.float64)
        levels = network.levels
        needed = _needed(levels, diagonal)
        if fill:
            needed = [(sorted(rows, key=bool), sorted(columns, key=bool)) for rows, columns in needed]  # 0 first
        schedule, places = _level_by_level(needed) if fill else _schedule(levels, needed)
        # Of an image, the numbers in either precision: pixels, then two a pixel of each activation.
        self.entries, used = [math.prod(shape), 0], [0, 0]
        self.levels = np.zeros(len(levels), _LEVEL)
        self.operations = np.zeros(sum(len(level.operations) for level in levels), _OPERATION)
        offsets: list[int] = []
        first = 0
        for index, (level, record) in enumerate(zip(levels, self.levels, strict=True)):
            deep, (height, width) = int(level.deep), level.shape
            record["first"], record["count"], record["deep"] = first, len(level.operations), deep
            record["height"], record["width"] = level.shape
            record["out_height"], record["out_width"] = level.after
            record["share_y"], record["share_x"] = level.share
            record["scale"] = level.scale
            _write_windows(record, level.pooling, "window")
            # The needed dx, then the places of stored planes: -1 where none is.
            record["offsets"], record["count_x"] = len(offsets), len(needed[index][1])
            offsets += needed[index][1]
            columns = np.full(2 * width - 1, -1)
            at = 0
            for dx in sorted(needed[index][1]):
                columns[dx + width - 1], at = at, at + height * (width - abs(dx)) * LANES
            rows = np.full(2 * height - 1, -1)
            for dy, place in places[index].items():
                rows[dy + height - 1] = place * at
            record["places_y"] = len(offsets)
            record["places_x"] = len(offsets) + len(rows)
            offsets += [*rows.tolist(), *columns.tolist()]
            stored = at * (1 + max(places[index].values(), default=0)) if index else 0
            # Of work: stored planes, slots with both kernels' planes, rows of sums.
            slot = max(math.prod(op.shape) for op in level.operations) * LANES + 5 * LANES
            record["store"], record["store_gap"] = used[deep], stored
            slots = used[deep] + 2 * stored
            record["result"], record["gap"] = slots, slot
            ring = slots + 2 * slot * level.slots
            longest = 4 * width * LANES
            for op, to in zip(level.operations, self.operations[first:], strict=False):
                to["code"], to["kind"], to["accumulate"] = op.code, op.kind, op.accumulate
                to["own"] = (op.own_weight, op.own_bias) != (op.weight, op.bias)
                to["mode"] = 0 if fields == 1 else 1 if op.from_images else 2
                to["source"], to["target"] = slots + 2 * slot * op.source, slots + 2 * slot * op.target
                to["gap"], to["ring"], to["channels"] = slot, ring, self.channels
                (to["height"], to["width"]), (to["out_height"], to["out_width"]) = op.shape, op.after
                to["share_y"], to["share_x"] = op.share
                _write_windows(to, op.windows, "size")
                for name in ("weight", "bias", "own_weight", "own_bias", "odd", "even"):
                    to[name] = getattr(op, name)
                to["tiny"], to["numbers"] = self._tiny(level.deep), self.entries[deep]
                if op.kind != LINEAR:
                    self.entries[deep] += 2 * math.prod(op.shape)
                longest = max(longest, op.windows[0].size * 2 * op.after[1] * LANES)
            first += len(level.operations)
            used[deep] = ring + longest
        self.records = fused_cpu_numba.Records(
            self.levels, self.operations, np.array(offsets, np.int64), np.array(schedule, np.int64).reshape(-1, 2)
        )
        self.pixels = network.pixels
        self.work = used
        self.cost = _covariances(levels, needed)

    def _tiny(self, deep: bool) -> float:
        """Distance from 1 at which a correlation counts as 1: the rounding of its covariances, from the pixels on."""
        rounding = float(np.finfo(self.dtypes[0]).eps)
        if self.dtypes[0] == np.float64:
            return (ROUNDING + math.sqrt(self.channels)) * rounding
        return rounding * (0.01 if deep else 1.1)

    def new_tables(self, n: int) -> Arrays:
        """Zeros for the pixels of n images and what their activations need, (n, entries)."""
        first, deep = (np.zeros((n, entries), dtype) for entries, dtype in zip(self.entries, self.dtypes, strict=True))
        return first, deep

    def run(self, left: Arrays, right: Arrays, paired: bool = False, fill: bool = False) -> Tensor:
        """Means over pixels of NNGP and NTK at the last level, (first images, second images, 2) in float64.

        Args:
            left: Of the first images, (images, entries) or, paired, in groups.
            right: Of the second images, in groups.
            paired: Pair every first image with the second one of the same index alone: (images, 1, 2).
            fill: Fill in what activations need.

        Returns:
            The means.
        """
        sums = np.zeros((len(left[0]), 1 if paired else len(right[0]), 2, LANES))
        first, deep = (
            fused_cpu_numba.Buffers(_aligned(np.zeros(size, dtype)), *sides)
            for size, dtype, *sides in zip(self.work, self.dtypes, left, right, strict=True)
        )
        fused_cpu_numba.run_block(
            first, deep, self.records, paired, fill, self.fields, sums.reshape(*sums.shape[:2], -1)
        )
        means = torch.from_numpy(sums / self.pixels)
        return means.movedim(3, 1).flatten(0, 1) if paired else means.movedim(3, 2).flatten(1, 2)


def _write_windows(record: Any, windows: Sequence[Window], size: str) -> None:  # noqa: ANN401 - NumPy's record
    for axis, window in zip("yx", windows, strict=True):
        record[f"{size}_{axis}"], record[f"stride_{axis}"], record[f"pad_{axis}"] = (
            window.size,
            window.stride,
            window.low,
        )


def _needed(levels: Sequence[Level], diagonal: bool) -> list[tuple[list[int], list[int]]]:
    """Offsets (dy, dx) at the beginning of each level."""
    needed: list[tuple[list[int], list[int]]] = []
    wanted: list[list[int]] | None = None
    for level in reversed(levels):
        axes = []
        for axis in range(2):
            side, window = level.after[axis], level.pooling[axis]
            offsets = range(1 - side, side)
            if wanted is not None:
                ends = [o for o in offsets if any(abs(o - window.stride * w) < window.size for w in wanted[axis])]
            else:
                ends = [0] if diagonal else list(offsets)
            axes.append([level.share[axis] * o for o in sorted(ends, key=partial(_order, window))])
        wanted = axes
        needed.insert(0, (axes[0], axes[1]))
    return needed


def _order(window: Window, offset: int) -> tuple[int, ...]:
    """Sort offsets before a pooling."""
    # Those that meet one window come in the same order whether 0 is moved to the front or not: then variances and
    # covariances of equal pixels are the same sums, whose correlation is 1 to rounding. Of the orders that do so it is
    # one in which few windows are open at once.
    if window.stride < window.size:
        return abs(offset), offset
    return -(-offset // window.stride), offset % window.stride > 0, offset


def _level_by_level(
    needed: Sequence[tuple[list[int], list[int]]],
) -> tuple[list[tuple[int, int]], list[dict[int, int]]]:
    """As :func:`_schedule`; all planes of a level are stored at once, so that each may begin with offset 0."""
    schedule = [(index, dy) for index, (rows, _) in enumerate(needed) for dy in rows]
    return schedule, [{dy: place for place, dy in enumerate(rows)} for rows, _ in needed]


def _schedule(
    levels: Sequence[Level], needed: Sequence[tuple[list[int], list[int]]]
) -> tuple[list[tuple[int, int]], list[dict[int, int]]]:
    """Order (level, dy) so that all that a level needs is complete, and the place of the stored rows of planes."""
    schedule: list[tuple[int, int]] = []
    places: list[dict[int, int]] = [{} for _ in levels]
    waiting: list[dict[int, int]] = [{} for _ in levels]
    free: list[list[int]] = [[] for _ in levels]

    def meets(index: int, dy: int) -> list[int]:
        window, end = levels[index].pooling[0], dy // levels[index].share[0]
        return [w for w in needed[index + 1][0] if abs(end - window.stride * w) < window.size]

    for index in range(len(levels) - 1):
        for dy in needed[index][0]:
            for w in meets(index, dy):
                waiting[index + 1][w] = waiting[index + 1].get(w, 0) + 1

    def run(index: int, dy: int) -> None:
        schedule.append((index, dy))
        if index + 1 == len(levels):
            return
        for w in meets(index, dy):
            if w not in places[index + 1]:
                taken = len(set(places[index + 1].values()))
                places[index + 1][w] = free[index + 1].pop() if free[index + 1] else taken
        for w in meets(index, dy):
            waiting[index + 1][w] -= 1
            if waiting[index + 1][w] == 0:
                run(index + 1, w)
                free[index + 1].append(places[index + 1][w])

    for dy in needed[0][0]:
        run(0, dy)
    return schedule, places


def _covariances(levels: Sequence[Level], needed: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many covariances of the first pixels are computed, of one pair."""
    (height, width), (dys, dxs) = levels[0].shape, needed[0]
    return sum(height - abs(dy) for dy in dys) * sum(width - abs(dx) for dx in dxs)


def packed(tables: Arrays, images: NDArray[Any]) -> Arrays:
    """Take the numbers of images in groups of 16.

    Args:
        tables: (n, entries) in either precision.
        images: Which, (m,).

    Returns:
        (groups, entries x 16), with zeros for missing images.
    """
    groups = -(-len(images) // LANES)
    both = []
    for table in tables:
        rows = np.zeros((groups * LANES, table.shape[1]), table.dtype)
        rows[: len(images)] = table[images]
        lanes = rows.reshape(groups, LANES, table.shape[1]).swapaxes(1, 2)
        both.append(_aligned(lanes).reshape(groups, table.shape[1] * LANES))
    return both[0], both[1]


def unpacked(groups: NDArray[Any], images: int) -> NDArray[Any]:
    """Undo :func:`packed` in one precision.

    Args:
        groups: (groups, entries x 16).
        images: How many, m.

    Returns:
        (m, entries).
    """
    entries = groups.shape[1] // LANES
    rows = groups.reshape(len(groups), entries, LANES).swapaxes(1, 2)
    return rows.reshape(len(groups) * LANES, entries)[:images]


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Copy to an address that is a multiple of 64 bytes, so that no vector crosses a cache line."""
    room = np.empty(array.nbytes + _CACHE_LINE, np.uint8)
    start = -room.ctypes.data % _CACHE_LINE
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
