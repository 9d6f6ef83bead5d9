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
from ntk_lightning.kernels.infinite.architecture import Activation, Layer
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


_LEVEL = np.dtype(
    _record("height width rows lanes neighbour lanes1 first count window", np.int64)
    + _record("deep cut scratch span store store_gap", np.int64)
    + _record("tiny", np.float64)
)
_STEP = np.dtype(_record("kind at1 at2", np.int64) + _record("weight bias odd even", np.float64))
_RUN = np.dtype(_record("channels flat every fields", np.int64))


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
        self.tables: tuple[list[tuple[int, int]], ...] = ([(channels * height, width)], [])
        lanes1, lanes = self._lanes(width)
        sizes, at = [[channels * height * lanes1, channels * height * lanes], [0, 0]], [lanes + LANES] * 2
        rounding = float(np.finfo(self.dtypes[0]).eps)
        levels: list[tuple[float, ...]] = []
        steps: list[tuple[float, ...]] = []
        cuts = []
        for depth, offset in enumerate(reach):
            height, width = shape[1] >> depth, shape[2] >> depth
            deep = int(depth >= _DEEP or (depth > 0 and height * width <= _FEW))
            lanes1, lanes = self._lanes(width)
            rows, border, first = 1 if self.flat else width, lanes + LANES, len(steps)
            for step in network.levels[depth]:
                kind, slope, places = fused_cpu_numba.LINEAR, 0.0, tuple(sizes[deep])
                if step.activation:
                    kind, slope = _KINDS[step.activation.name], step.activation.negative_slope
                    self.tables[deep].append((2 * height, width))
                    sizes[deep] = [size + 2 * height * n for size, n in zip(places, (lanes1, lanes), strict=True)]
                odd, even = ((1 + slope) / 2) ** 2, ((1 - slope) / 2) ** 2
                steps.append((kind, *places, step.weight_variance, step.bias_variance, odd, even))
            cut, column = at[deep], np.arange(lanes) % width
            cuts.append((deep, cut, np.concatenate([column > 0, column < width - 1])))
            scratch, span, count = cut + 2 * lanes + border, rows * lanes + 2 * border, len(steps) - first
            store = scratch + (4 + 4 * count) * span
            store_gap = height**2 * (rows + 1) * lanes + 2 * border if depth else 0
            at[deep] = store + 2 * store_gap
            neighbour, tiny = 1 if self.flat else lanes + 1, rounding * (0.01 if deep else 1.1)
            numbers = height, width, rows, lanes, neighbour, lanes1, first, count, min(offset, height - 1)
            levels.append((*numbers, deep, cut, scratch, span, store, store_gap, tiny))
        every = self.flat or reach[-1] > 0
        self.levels, self.steps = np.array(levels, _LEVEL), np.array(steps, _STEP)
        self.runs = np.array([(channels, self.flat, every, fields)], _RUN)
        self.pixels = (height * width) ** (1 if reach[-1] == 0 else 2)
        self.work = tuple(np.zeros(size, dtype) for size, dtype in zip(at, self.dtypes, strict=True))
        for deep, cut, mask in cuts:
            self.work[deep][cut : cut + len(mask)] = mask

    def _lanes(self, width: int) -> tuple[int, int]:
        """Entries of a row of the left image, read one by one where tiles have rows, and of the right ones."""
        lanes = _whole_vectors(self.images * width)
        return lanes if self.flat else width, lanes

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
        work, deep_work = (_aligned(work) for work in self.work)
        fused_cpu_numba.run_block(
            *(work, left[0], right[0], deep_work, left[1], right[1]),
            *(self.levels, self.steps, self.runs, itself, triangle, sums),
        )
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
        >>> from ntk_lightning.kernels.infinite.architecture import parse
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
        >>> from ntk_lightning.kernels.infinite.architecture import parse
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
        levels = max((i + 1 for i, level in enumerate(network.levels) if any(s.activation for s in level)), default=1)
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


def _reach(network: Plan, levels: int, diagonal: bool) -> list[int]:
    """Offsets that are needed at each of the first levels, for offset 0 at the last of them or for all offsets."""
    return [window(level, levels - 1) if diagonal else _ALL for level in range(levels)]


def _side_by_side(width: int, rows: int, available: int) -> int:
    """How many images stand in a row: with the least padding, and then in tiles that suit the cache best."""

    def cost(images: int) -> tuple[float, float]:
        lanes = _whole_vectors(images * width)
        return lanes / (images * width), abs(math.log(rows * lanes / _TILE))

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
