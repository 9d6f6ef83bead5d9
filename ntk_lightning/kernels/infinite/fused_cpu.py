"""The infinite-width kernels of convolutional networks on CPUs: what is computed where, and in which order.

The compiled code is in :mod:`~ntk_lightning.kernels.infinite.fused_cpu_numba`; it takes 16 pairs at once through a
network that :mod:`~ntk_lightning.kernels.infinite.fused_cpu_program` has translated. Here a Gram is cut into blocks and
threads take one block after the other. What activations need of the pixels comes from the same code, run once on images
paired with themselves, over the few offsets that pooling carries to offset 0. No threading layer of Numba is used, so
concurrent callers are safe.

The NTK is most sensitive to rounding where correlations are near one: at equal pixels of similar images, and after some
layers everywhere. Where such covariances weigh much and cost little, they are always computed in float64: in networks
that end in ``nn.Flatten``, on few pixels, after poolings and strides that leave 1/256 of the covariances, for pairs of
images that are almost but not quite the same, and for images so bright that float32 does not hold a derivative.

Longer than 300 lines, since the records of the compiled code and what runs them share their layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ntk_lightning.kernels.infinite import fused_cpu_numba
from ntk_lightning.kernels.infinite.activations import ROUNDING
from ntk_lightning.kernels.infinite.architecture import Layer, Window
from ntk_lightning.kernels.infinite.fused import finish, near_duplicates, needs_variances, saturates
from ntk_lightning.kernels.infinite.fused_cpu_program import FEW, LINEAR, Level, Network, read
from ntk_lightning.kernels.infinite.fused_cpu_simd import LANES

__all__ = ["diag", "gram"]

T = TypeVar("T")
Arrays = tuple[NDArray[Any], NDArray[Any]]  # of the levels in the inputs' precision, and of the deep ones in float64

_NEAR = 1e-2  # distance of images, scaled to length one, below which their pair is computed in float64
_JOB = 2**28  # covariances in one uninterruptible block, a fraction of a second
_CACHE_LINE = 64  # bytes
_NEVER = -(2**31)  # below any diagonal


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


class _Program:
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

    def run(self, left: Arrays, right: Arrays, paired: bool = False, fill: bool = False, below: int = _NEVER) -> Tensor:
        """Means over pixels of NNGP and NTK at the last level, (first images, second images, 2) in float64.

        Args:
            left: Of the first images, (images, entries) or, paired, in groups.
            right: Of the second images, in groups.
            paired: Pair every first image with the second one of the same index alone: (images, 1, 2).
            fill: Fill in what activations need.
            below: In a symmetric Gram, the first row's number less the first column's: groups of columns that lie below
                the diagonal are left out.
        """
        sums = np.zeros((len(left[0]), 1 if paired else len(right[0]), 2, LANES))
        first, deep = (
            fused_cpu_numba.Buffers(_aligned(np.zeros(size, dtype)), *sides)
            for size, dtype, *sides in zip(self.work, self.dtypes, left, right, strict=True)
        )
        fused_cpu_numba.run_block(
            first, deep, self.records, paired, fill, below, self.fields, sums.reshape(*sums.shape[:2], -1)
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
    """Sort offsets before a pooling.

    Those that meet one window come in the same order whether 0 is moved to the front or not: then variances and
    covariances of equal pixels are the same sums, whose correlation is 1 to rounding. Of the orders that do so it is
    one in which few windows are open at once.
    """
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


def gram(layers: Sequence[Layer], kind: str, x1: Tensor, x2: Tensor | None, advance: Callable[[float], None]) -> Tensor:
    """Compute a Gram matrix; see :mod:`ntk_lightning.kernels.infinite.fused` for the convention.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        x1: Images (n1, C, H, W), float32 or float64, on the CPU.
        x2: Images (n2, C, H, W) of the same dtype, or None for the symmetric Gram of x1.
        advance: Called with the number of entries just finished.

    Returns:
        The kernel of all pairs, (n1, n2).

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import MyrtleCNN
        >>> gram(parse(MyrtleCNN()), "nngp", torch.ones(2, 3, 8, 8), None, lambda entries: None).shape
        torch.Size([2, 2])
    """
    network, fields = read(layers, x1.shape[2:]), 1 if kind == "nngp" else 2
    whole = needs_variances(network.head)
    x1, x2 = _as_images(x1), None if x2 is None else _as_images(x2)
    result = x1.new_empty(len(x1), len(x1 if x2 is None else x2))
    if _in_double(network, layers, x1) or (x2 is not None and _in_double(network, layers, x2)):
        x1, x2 = x1.double(), None if x2 is None else x2.double()
    tables1, own1 = _with_itself(network, x1, fields, whole)
    tables2, own2 = (tables1, own1) if x2 is None else _with_itself(network, x2, fields, whole)
    program = _Program(network, x1.shape[1:], tables1[0].dtype, fields, network.flat)

    def block(i: slice, j: slice) -> int:
        rows, columns = (torch.arange(s.start, s.stop) for s in (i, j))
        one, other = torch.cartesian_prod(rows, columns).T
        if x2 is None:
            one, other = one[one <= other], other[one <= other]
        means = torch.empty(len(rows), len(columns), 2, dtype=torch.float64)
        if -(-len(one) // LANES) <= 0.75 * len(rows) * -(-len(columns) // LANES):  # else too many lanes stay empty
            left, right = _packed(tables1, one.numpy()), _packed(tables2, other.numpy())
            means[one - i.start, other - j.start] = program.run(left, right, paired=True)[: len(one), 0]
        else:
            left, right = (tables1[0][i], tables1[1][i]), _packed(tables2, columns.numpy())
            means = program.run(left, right, below=i.start - j.start if x2 is None else _NEVER)[:, : len(columns)]
        nngp, ntk = means.unbind(-1)
        kernel = finish(network.head, kind, nngp, ntk, own1[i, 0], own2[j, 0]).to(result.dtype)
        result[one, other] = kernel[one - i.start, other - j.start]
        if x2 is None:
            result[other, one] = result[one, other]
        return len(one) + (int((one != other).sum()) if x2 is None else 0)

    fair = result.numel() // (8 * torch.get_num_threads())
    width = LANES * max(1, int(min(fair, _JOB / program.cost) ** 0.5) // LANES)
    height = max(1, min(max(LANES, fair // width), int(_JOB / program.cost / width)))
    blocks = (
        (i, j)
        for i in _cut(len(result), height)
        for j in _cut(result.shape[1], width)
        if x2 is not None or i.start < j.stop
    )
    for finished in _parallel(block, blocks):
        advance(finished)
    if kind == "ntk" and x1.dtype == torch.float32:
        for i, near in near_duplicates(x1, x1 if x2 is None else x2, _NEAR):
            j = near if x2 is not None else near[near > i]
            if len(j):
                exact = gram(
                    layers, kind, x1[i : i + 1].double(), (x1 if x2 is None else x2)[j].double(), lambda _: None
                )
                result[i, j] = exact[0].to(result.dtype)
                if x2 is None:
                    result[j, i] = result[i, j]
    return result


def diag(layers: Sequence[Layer], kind: str, x: Tensor) -> Tensor:
    """Compute the kernel of every image with itself.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        x: Images (n, C, H, W), float32 or float64, on the CPU.

    Returns:
        The diagonal of the Gram of x, (n,).

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import MyrtleCNN
        >>> diag(parse(MyrtleCNN()), "nngp", torch.zeros(2, 3, 8, 8))
        tensor([0., 0.])
    """
    network, x = read(layers, x.shape[2:]), _as_images(x)
    images = x.double() if _in_double(network, layers, x) else x
    own = _with_itself(network, images, 1 if kind == "nngp" else 2, whole=True)[1]
    kernel = finish(network.head, kind, own[:, :1], own[:, 1:], own[:, 0], own[:, :1])
    return kernel[:, 0].to(x.dtype)


def _as_images(x: Tensor) -> Tensor:
    """Sequences are images of height 1."""
    return x if x.dim() == 4 else x[:, :, None]


def _in_double(network: Network, layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether already the first level is to be computed in float64."""
    return network.flat or x[0, 0].numel() <= FEW or saturates(layers, x)


def _with_itself(network: Network, x: Tensor, fields: int, whole: bool) -> tuple[Arrays, Tensor]:
    """Per image, pixels and what activations need of them; where ``whole``, its means of NNGP and NTK, (n, 2)."""
    n, channels, height, width = x.shape
    pixels = x.detach().numpy().reshape(n, -1)
    shape, dtype = (channels, height, width), pixels.dtype
    active = (i + 1 for i, level in enumerate(network.levels) if any(op.kind != LINEAR for op in level.operations))
    part = replace(network, levels=network.levels[: max(active, default=1)])
    filling = _Program(part, shape, dtype, 1, diagonal=True, fill=True)
    program = _Program(network, shape, dtype, fields, network.flat)
    tables, own = program.new_tables(n), torch.zeros(n, 2, dtype=torch.float64)
    np.divide(pixels, channels**0.5, out=tables[0][:, : math.prod(shape)])

    def block(i: slice) -> None:
        both = _packed(tables, np.arange(i.start, i.stop))
        filling.run(both, both, paired=True, fill=True)
        for table, packed in zip(tables, both, strict=True):
            table[i] = _unpacked(packed, i.stop - i.start)
        if whole:
            own[i] = program.run(both, both, paired=True)[: i.stop - i.start, 0]

    for _ in _parallel(block, [(i,) for i in _cut(n, LANES)]):
        pass
    return tables, own


def _packed(tables: Arrays, images: NDArray[Any]) -> Arrays:
    """The numbers of images in groups of 16: (n, entries) -> (groups, entries x 16), with zeros for missing images."""
    groups = -(-len(images) // LANES)
    packed = []
    for table in tables:
        rows = np.zeros((groups * LANES, table.shape[1]), table.dtype)
        rows[: len(images)] = table[images]
        packed.append(
            _aligned(rows.reshape(groups, LANES, table.shape[1]).swapaxes(1, 2)).reshape(groups, -1 if rows.size else 0)
        )
    return packed[0], packed[1]


def _unpacked(packed: NDArray[Any], images: int) -> NDArray[Any]:
    """Undo :func:`_packed`."""
    entries = packed.shape[1] // LANES
    return (
        packed.reshape(len(packed), entries, LANES)
        .swapaxes(1, 2)
        .reshape(-1 if packed.size else images, entries)[:images]
    )


def _cut(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + max(1, size), n)) for start in range(0, n, max(1, size))]


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Copy to an address that is a multiple of 64 bytes, so that no vector crosses a cache line."""
    room = np.empty(array.nbytes + _CACHE_LINE, np.uint8)
    start = -room.ctypes.data % _CACHE_LINE
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _parallel(function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Yield results as they come, from as many threads as torch uses; an interrupt waits for running calls only."""
    threads = torch.get_num_threads()
    pending: set[Future[T]] = set()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for a in arguments:
                pending.add(pool.submit(function, *a))
                if len(pending) >= 4 * threads:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in as_completed(pending))
        finally:
            for future in pending:
                future.cancel()
