"""The infinite-width kernels of pooled convolutional networks on CPUs: what is computed where, and in which order.

The compiled code is in :mod:`~ntk_lightning.kernels.infinite.fused_cpu_numba`. Here pairs of images are cut into
blocks, threads take one block after the other, and the pixels' standard deviations come from the same code, run once an
image against itself over the few offsets that pooling carries to offset 0. That costs a third of a pair at 32x32 and a
few pairs at 8x8 (Myrtle-5), so nothing is kept between calls. No threading layer of Numba is used, so concurrent
callers are safe.

The NTK is most sensitive to rounding where correlations are near one: at equal pixels of similar images, and after some
layers everywhere. Where such covariances weigh much and cost little, they are always computed in float64: in networks
that end in ``nn.Flatten``, on few pixels, after the second pooling, which leaves 1/256 of the covariances, for pairs of
images that are almost but not quite the same, and for images so bright that an ``Erf`` is nearly a step.

Longer than 300 lines, since the plan of a network's stages and its execution share their layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from ntk_lightning.kernels.infinite import fused_cpu_numba
from ntk_lightning.kernels.infinite.activations import ROUNDING, Activation
from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import Plan, finish, near_duplicates, plan, saturates, window
from ntk_lightning.kernels.infinite.fused_cpu_simd import LANES

__all__ = ["diag", "gram"]

T = TypeVar("T")
Arrays = tuple[NDArray[Any], NDArray[Any]]  # of the levels in the inputs' precision, and of the deep ones in float64

_KINDS = {"relu": fused_cpu_numba.RELU, "erf": fused_cpu_numba.ERF, "gelu": fused_cpu_numba.GELU}
_DEEP, _FEW = 2, 16  # levels from this one on, and those of so few pixels, are always computed in float64
_NEAR = 1e-2  # distance of images, scaled to length one, below which their pair is computed in float64
_ALL = 2**31  # more than any offset
_TILE = 1024  # entries of a tile at full resolution that suit the innermost cache
_JOB = 2**28  # covariances in one uninterruptible block, a fraction of a second


def _record(names: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


# What the compiled code knows of a level. A "span" is the room of one tile with a border of zeros on both sides.
_LEVEL = np.dtype(
    _record("height width", np.int64)  # pixels of an image at this level
    + _record("rows pitch", np.int64)  # of a tile: rows, and entries of each, whole vectors
    + _record("left_pitch", np.int64)  # entries of a row of the left image
    + _record("neighbour", np.int64)  # from an entry of a tile to the next one on its diagonal
    + _record("first count", np.int64)  # its convolutions
    + _record("window", np.int64)  # the largest vertical offset that is needed
    + _record("deep", np.int64)  # whether it is computed in float64, in a buffer of its own
    + _record("masks", np.int64)  # in the buffer: 0 where a row's pixel has no left, and then no right, neighbour
    + _record("scratch span", np.int64)  # in the buffer: two times two tiles, then four of each convolution
    + _record(
        "store store_gap", np.int64
    )  # in the buffer: the tiles that pooling leaves, and the way to those of the NTK
    + _record("tiny", np.float64)  # correlations within it of 1 count as 1
)
_CONVOLUTION = np.dtype(
    _record("kind left right", np.int64)  # of its activation: number, and place of what it needs of a pixel
    + _record("weight bias odd even", np.float64)  # K <- weight * sum + bias; phi(u) = sqrt(odd) u + sqrt(even) |u|
)
_RUN = np.dtype(_record("channels flat every fields", np.int64))  # every: the mean is over all pairs of pixels


class _Program:
    """The first levels of a network at one image shape, as flat records and buffers for the compiled code.

    Args:
        network: From :func:`ntk_lightning.kernels.infinite.fused.plan`.
        shape: (C, H, W) of the images.
        dtype: Of the images.
        images: How many images stand side by side in a row of a tile.
        fields: 1 for the NNGP alone, 2 for both kernels.
        reach: For each level the largest offset that is needed, in pixels; 0 at the first makes one row of a tile.
    """

    def __init__(
        self, network: Plan, shape: Sequence[int], dtype: DTypeLike, images: int, fields: int, reach: Sequence[int]
    ) -> None:
        channels, height, width = shape
        self.images, self.flat = images, reach[0] == 0
        self.dtypes = np.dtype(dtype), np.dtype(np.float64)
        # Of an image, (rows, width) of its pixels and of the numbers of each activation, in either precision.
        self.tables: tuple[list[tuple[int, int]], ...] = ([(channels * height, width)], [])
        self.levels = np.zeros(len(reach), _LEVEL)
        self.convolutions = np.zeros(sum(map(len, network.levels[: len(reach)])), _CONVOLUTION)
        left_pitch, pitch = self._pitches(width)
        # Entries so far: of a left and of a right image, and of the work buffer, which begins with a row for sums.
        sizes, used = [[channels * height * left_pitch, channels * height * pitch], [0, 0]], [pitch + LANES] * 2
        first = 0
        for depth, (level, offset) in enumerate(zip(self.levels, reach, strict=True)):
            # Pooling halves the sides. The small levels, which are cheap, are computed in float64.
            height, width = shape[1] >> depth, shape[2] >> depth
            deep = int(depth >= _DEEP or (depth > 0 and height * width <= _FEW))
            left_pitch, pitch = self._pitches(width)
            level["height"], level["width"], level["deep"] = height, width, deep
            level["rows"], level["pitch"], level["left_pitch"] = 1 if self.flat else width, pitch, left_pitch
            level["neighbour"] = 1 if self.flat else pitch + 1
            level["window"], level["tiny"] = min(offset, height - 1), self._tiny(bool(deep), channels)
            level["first"], level["count"] = first, len(network.levels[depth])
            # An activation's two numbers a pixel lie behind those of the activations before.
            for record, convolution in zip(self.convolutions[first:], network.levels[depth], strict=False):
                record["weight"], record["bias"] = convolution.weight_variance, convolution.bias_variance
                record["kind"], (record["left"], record["right"]) = fused_cpu_numba.LINEAR, sizes[deep]
                if convolution.activation:
                    slope = convolution.activation.negative_slope
                    record["kind"] = _kind(convolution.activation)
                    record["odd"], record["even"] = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2
                    self.tables[deep].append((2 * height, width))
                    sizes[deep] = [
                        n + 2 * height * row for n, row in zip(sizes[deep], self._pitches(width), strict=True)
                    ]
            first += len(network.levels[depth])
            # The level's part of the work buffer: two masks, scratch tiles, and what pooling stores: one tile for each
            # pair of rows (y, y'), and between tiles a row of zeros, the neighbours beyond their first and last rows.
            border = pitch + LANES
            level["masks"] = used[deep]
            level["scratch"] = level["masks"] + 2 * pitch + border
            level["span"] = level["rows"] * pitch + 2 * border
            level["store"] = level["scratch"] + (4 + 4 * level["count"]) * level["span"]
            level["store_gap"] = height**2 * (level["rows"] + 1) * pitch + 2 * border if depth else 0
            used[deep] = int(level["store"] + 2 * level["store_gap"])
        every = self.flat or reach[-1] > 0
        self.run = np.array([(channels, self.flat, every, fields)], _RUN)
        self.pixels = (height * width) ** (1 if reach[-1] == 0 else 2)
        self.work = tuple(np.zeros(size, dtype) for size, dtype in zip(used, self.dtypes, strict=True))
        for level in self.levels:
            column = np.arange(level["pitch"]) % level["width"]
            masks = np.concatenate([column > 0, column < level["width"] - 1])
            self.work[level["deep"]][level["masks"] : level["masks"] + len(masks)] = masks

    def _pitches(self, width: int) -> tuple[int, int]:
        """Entries of a row of the left image, read one by one where tiles have rows, and of the right ones."""
        pitch = _whole_vectors(self.images * width)
        return pitch if self.flat else width, pitch

    def _tiny(self, deep: bool, channels: int) -> float:
        """Distance from 1 at which a correlation counts as 1: the rounding of its covariances, from the pixels on."""
        rounding = float(np.finfo(self.dtypes[0]).eps)
        if self.dtypes[0] == np.float64:
            return (ROUNDING + math.sqrt(channels)) * rounding
        return rounding * (0.01 if deep else 1.1)

    def new_tables(self, n: int) -> Arrays:
        """Zeros for the pixels of n images and what their activations need, (n, entries)."""
        first, deep = (
            np.zeros((n, sum(rows * width for rows, width in tables)), dtype)
            for tables, dtype in zip(self.tables, self.dtypes, strict=True)
        )
        return first, deep

    def pack(self, arrays: Arrays) -> Arrays:
        """Set images side by side in rows of whole vectors: (n, entries) -> (ceil(n / images), more entries)."""
        first, deep = (self._pack(array, tables) for array, tables in zip(arrays, self.tables, strict=True))
        return first, deep

    def _pack(self, array: NDArray[Any], tables: Sequence[tuple[int, int]]) -> NDArray[Any]:
        groups, at = -(-len(array) // self.images), 0
        array = np.pad(array, ((0, groups * self.images - len(array)), (0, 0)))
        parts = [array[:0].reshape(groups, 0)]
        for rows, width in tables:
            part = array[:, at : at + rows * width].reshape(groups, self.images, rows, width).swapaxes(1, 2)
            lines = part.reshape(groups, rows, self.images * width)
            parts.append(np.pad(lines, ((0, 0), (0, 0), (0, -lines.shape[-1] % LANES))).reshape(groups, -1))
            at += rows * width
        return _aligned(np.concatenate(parts, 1))

    def unpack(self, packed: Arrays, into: Arrays) -> None:
        """Undo :meth:`pack` of one image a row."""
        for source, target, tables in zip(packed, into, self.tables, strict=True):
            at = to = 0
            for rows, width in tables:
                size = rows * _whole_vectors(width)
                pixels = source[:, at : at + size].reshape(len(source), rows, -1)[..., :width]
                target[:, to : to + rows * width] = pixels.reshape(len(source), -1)
                at, to = at + size, to + rows * width

    def means(self, left: Arrays, right: Arrays, itself: bool = False, triangle: bool = False) -> Tensor:
        """Means over pixels of NNGP and NTK at the last level, (left images, right images, 2) in float64."""
        sums = np.zeros((len(left[0]), 1 if itself else len(right[0]) * self.images, 2))
        first, deep = (
            fused_cpu_numba.Buffers(_aligned(work), *sides) for work, *sides in zip(self.work, left, right, strict=True)
        )
        records = fused_cpu_numba.Records(self.levels, self.convolutions, self.run)
        fused_cpu_numba.run_block(first, deep, records, itself, triangle, sums)
        return torch.from_numpy(sums / self.pixels)


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
    network, fields = plan(layers), 1 if kind == "nngp" else 2
    whole = any(isinstance(layer, Activation) for layer in network.head)
    result = x1.new_empty(len(x1), len(x1 if x2 is None else x2))
    if _in_double(network, x1) or (x2 is not None and _in_double(network, x2)):
        x1, x2 = x1.double(), None if x2 is None else x2.double()
    tables1, own1 = _with_itself(network, x1, fields, whole)
    tables2, own2 = (tables1, own1) if x2 is None else _with_itself(network, x2, fields, whole)
    reach = _reach(network, len(network.levels), network.flat)
    images = _side_by_side(x1.shape[3], 1 if reach[0] == 0 else x1.shape[3], len(own2))
    program = _Program(network, x1.shape[1:], tables1[0].dtype, images, fields, reach)

    def block(i: slice, j: slice) -> int:
        triangle = x2 is None and i == j
        left = tables1[0][i], tables1[1][i]
        if program.flat:
            left = program.pack((left[0].repeat(images, 0), left[1].repeat(images, 0)))
        means = program.means(left, program.pack((tables2[0][j], tables2[1][j])), triangle=triangle)
        nngp, ntk = means[:, : j.stop - j.start].unbind(-1)
        kernel = finish(network.head, kind, nngp, ntk, own1[i, 0], own2[j, 0])
        if triangle:
            kernel = kernel.triu() + kernel.triu(1).T
        result[i, j] = kernel
        if x2 is None and i != j:
            result[j, i] = kernel.T
        return kernel.numel() * (2 if x2 is None and i != j else 1)

    covariances = (x1.shape[2] * x1.shape[3]) ** (1 if program.flat else 2)
    side = int(min((_JOB / covariances) ** 0.5, (result.numel() / (8 * torch.get_num_threads())) ** 0.5))
    rows, columns = (_cut(n, -(-max(1, side) // images) * images) for n in result.shape)
    blocks = ((i, j) for i in rows for j in columns if x2 is not None or i.start <= j.start)
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
    network = plan(layers)
    images = x.double() if _in_double(network, x) else x
    own = _with_itself(network, images, 1 if kind == "nngp" else 2, whole=True)[1]
    kernel = finish(network.head, kind, own[:, :1], own[:, 1:], own[:, 0], own[:, :1])
    return kernel[:, 0].to(x.dtype)


def _in_double(network: Plan, x: Tensor) -> bool:
    """Whether already the first level is to be computed in float64."""
    return network.flat or x[0, 0].numel() <= _FEW or saturates(network, x)


def _with_itself(network: Plan, x: Tensor, fields: int, whole: bool) -> tuple[Arrays, Tensor]:
    """Per image, pixels and what activations need of them; where ``whole``, its means of NNGP and NTK, (n, 2)."""
    n, channels, height, width = x.shape
    levels = len(network.levels)
    if not whole:
        levels = max((i + 1 for i, level in enumerate(network.levels) if any(c.activation for c in level)), default=1)
    reach = _reach(network, levels, network.flat or not whole)
    pixels = x.detach().numpy().reshape(n, -1)
    program = _Program(network, (channels, height, width), pixels.dtype, 1, fields, reach)
    tables, own = program.new_tables(n), torch.zeros(n, 2, dtype=torch.float64)
    np.divide(pixels, channels**0.5, out=tables[0][:, : channels * height * width])

    def block(i: slice) -> None:
        left = tables[0][i], tables[1][i]
        right = program.pack(left)
        means = program.means(program.pack(left) if program.flat else left, right, itself=True)
        own[i] = means[:, 0]
        program.unpack(right, left)

    covariances = height * width * (1 if program.flat else width * (2 * min(reach[0], height) + 1))
    for _ in _parallel(
        block, [(i,) for i in _cut(n, min(-(-n // (4 * torch.get_num_threads())), _JOB // covariances))]
    ):
        pass
    return tables, own


def _kind(activation: Activation) -> int:
    """Number of an activation in the compiled code."""
    if activation.name not in _KINDS:
        raise NotImplementedError(f"The CPU kernel has no activation {activation.name!r}.")
    return _KINDS[activation.name]


def _reach(network: Plan, levels: int, diagonal: bool) -> list[int]:
    """Offsets that are needed at each of the first levels, for offset 0 at the last of them or for all offsets."""
    return [window(level, levels - 1) if diagonal else _ALL for level in range(levels)]


def _side_by_side(width: int, rows: int, available: int) -> int:
    """How many images stand in a row: with the least padding, and then in tiles that suit the cache best."""

    def cost(images: int) -> tuple[float, float]:
        pitch = _whole_vectors(images * width)
        return pitch / (images * width), abs(math.log(rows * pitch / _TILE))

    return min(range(1, max(1, min(available, 2 * _TILE // (rows * width))) + 1), key=cost)


def _whole_vectors(size: int) -> int:
    return -(-size // LANES) * LANES


def _cut(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + max(1, size), n)) for start in range(0, n, max(1, size))]


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Copy to an address that is a multiple of 64 bytes, so that no vector crosses a cache line."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
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
