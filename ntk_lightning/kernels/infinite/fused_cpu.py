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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import finish, near_duplicates, needs_variances, saturates
from ntk_lightning.kernels.infinite.fused_cpu_program import FEW, LINEAR, Network, read
from ntk_lightning.kernels.infinite.fused_cpu_records import Arrays, Program, packed, unpacked
from ntk_lightning.kernels.infinite.fused_cpu_simd import LANES

__all__ = ["diag", "gram"]

T = TypeVar("T")
Pairs = tuple[slice, slice, Tensor, Tensor]  # rows and columns that hold them, and the two numbers of each
_NEAR = 1e-2  # distance of images, scaled to length one, below which their pair is computed in float64
_JOB = 2**28  # covariances in one uninterruptible block, a fraction of a second


def gram(layers: Sequence[Layer], kind: str, x1: Tensor, x2: Tensor | None, advance: Callable[[float], None]) -> Tensor:
    """Compute a Gram matrix; see :mod:`ntk_lightning.kernels.infinite.fused` for the convention.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        x1: Images (n1, C, H, W) or sequences (n1, C, L), float32 or float64, on the CPU.
        x2: Images or sequences (n2, ...) of the same dtype, or None for the symmetric Gram of x1.
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
    program = Program(network, x1.shape[1:], tables1[0].dtype, fields, network.flat)

    def block(i: slice, j: slice, one: Tensor, other: Tensor) -> int:
        """Of rows i and columns j, the pairs (one, other)."""
        rows, columns = i.stop - i.start, j.stop - j.start
        means = torch.empty(rows, columns, 2, dtype=torch.float64)
        if -(-len(one) // LANES) <= 0.75 * rows * -(-columns // LANES):  # else too many lanes stay empty
            left, right = packed(tables1, one.numpy()), packed(tables2, other.numpy())
            means[one - i.start, other - j.start] = program.run(left, right, paired=True)[: len(one), 0]
        else:
            left, right = (tables1[0][i], tables1[1][i]), packed(tables2, np.arange(j.start, j.stop))
            means = program.run(left, right)[:, :columns]
        nngp, ntk = means.unbind(-1)
        kernel = finish(network.head, kind, nngp, ntk, own1[i, 0], own2[j, 0]).to(result.dtype)
        result[one, other] = kernel[one - i.start, other - j.start]
        if x2 is None:
            result[other, one] = result[one, other]
        return len(one) + (int((one != other).sum()) if x2 is None else 0)

    pairs = result.numel() if x2 is not None else len(x1) * (len(x1) + 1) // 2
    most = min(pairs // (8 * torch.get_num_threads()), int(_JOB / program.cost))  # pairs of one block
    for finished in _parallel(block, _rectangles(result.shape, most) if x2 is not None else _triangle(len(x1), most)):
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
        x: Images (n, C, H, W) or sequences (n, C, L), float32 or float64, on the CPU.

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
    filling = Program(part, shape, dtype, 1, diagonal=True, fill=True)
    program = Program(network, shape, dtype, fields, network.flat)
    tables, own = program.new_tables(n), torch.zeros(n, 2, dtype=torch.float64)
    np.divide(pixels, channels**0.5, out=tables[0][:, : math.prod(shape)])

    def block(i: slice) -> None:
        both = packed(tables, np.arange(i.start, i.stop))
        filling.run(both, both, paired=True, fill=True)
        for table, filled in zip(tables, both, strict=True):
            table[i] = unpacked(filled, i.stop - i.start)
        if whole:
            own[i] = program.run(both, both, paired=True)[: i.stop - i.start, 0]

    for _ in _parallel(block, [(i,) for i in _cut(n, LANES)]):
        pass
    return tables, own


def _rectangles(shape: Sequence[int], most: int, row: int = 0, column: int = 0) -> Iterator[Pairs]:
    """Cut a rectangle of pairs, which begins at (row, column), into blocks of about so many pairs."""
    width = LANES * max(1, int(most**0.5) // LANES)
    for i in _cut(shape[0], max(1, most // width)):
        for j in _cut(shape[1], width):
            i0, j0 = slice(row + i.start, row + i.stop), slice(column + j.start, column + j.stop)
            one, other = torch.cartesian_prod(torch.arange(i0.start, i0.stop), torch.arange(j0.start, j0.stop)).T
            yield i0, j0, one, other


def _triangle(n: int, most: int) -> Iterator[Pairs]:
    """Cut the pairs (i, j), i <= j, of n images into blocks: small triangles, and beside each a rectangle."""
    for tile in [slice(max(0, stop - LANES), stop) for stop in range(n, 0, -LANES)][::-1]:
        size, rest = tile.stop - tile.start, n - tile.stop  # the rest is whole groups of 16
        if rest:
            yield from _rectangles((size, rest), most, tile.start, tile.stop)
        one, other = torch.triu_indices(size, size) + tile.start
        for part in _cut(len(one), LANES * max(1, most // LANES)):
            yield tile, tile, one[part], other[part]


def _cut(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + max(1, size), n)) for start in range(0, n, max(1, size))]


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
