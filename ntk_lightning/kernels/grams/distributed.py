"""Kernels computed by all processes of a run together: every one its share, and all end with the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ntk_lightning.kernels.checks import check_inputs
from ntk_lightning.kernels.grams.agreement import agree_on_kernel, agree_on_tensors, lines_of
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross, Kernel, gram_and_cross
from ntk_lightning.pytrees import named_tensors

__all__ = [
    "distributed_cross",
    "distributed_gram",
    "distributed_gram_and_cross",
    "gather_or_raise",
    "rank_and_world_size",
    "swap",
]

_Piece = tuple[int, slice, slice, Tensor]  # number of a matrix, its rows and columns, and their values


def distributed_gram_and_cross(local: GramAndCross) -> GramAndCross:
    """Divide the two matrices of a fit among the ranks of the default process group.

    Every rank computes a block of columns, of the Gram only the lower half; all blocks have equal area. The function
    that is returned is called on every rank, with the same inputs, which checksums compare. An error on one rank ends
    the call on all, with one of its kind.

    Args:
        local: Computes the matrices in one process, the same ones on every rank; where they are a network's, call
            :func:`~ntk_lightning.kernels.grams.agreement.agree_on_kernel` before.

    Returns:
        A function with the values of ``local``, to rounding and in its dtype; without a process group, exactly those.
        It raises the errors of ``local``, and ValueError and TypeError of malformed inputs.

    Example:
        >>> linear = lambda x1, x2=None, *, progress=False: x1 @ (x1 if x2 is None else x2).T
        >>> distributed_gram_and_cross(gram_and_cross(linear))(torch.eye(2))
        (tensor([[1., 0.],
                [0., 1.]]),)
    """

    def divided(x_train: Tensor, /, *x_others: Tensor) -> tuple[Tensor, ...]:
        rank, ranks = rank_and_world_size()
        if ranks == 1:
            return local(x_train, *x_others)
        _agree_on_inputs(x_train, *x_others)
        n = len(x_train)

        def pieces() -> list[_Piece]:
            for x in x_others or (None,):
                check_inputs(x_train, x)
            start, stop = (_column(n, sum(map(len, x_others)), r / ranks) for r in (rank, rank + 1))
            mine, below = x_train[start:stop], x_train[stop:]
            if not len(mine):
                return []
            # my columns of the lower half: a square on the diagonal, the block below it, and all rows of the others
            square, *blocks = local(mine, *([below] if len(below) else []), *x_others)
            here, after = slice(start, stop), slice(stop, None)
            found: list[_Piece] = [(0, here, here, square)]
            if len(below):
                block = blocks.pop(0)
                found += [(0, after, here, block), (0, here, after, swap(block))]
            return found + [(i, slice(None), here, block) for i, block in enumerate(blocks, 1)]

        return _exchange(pieces, [(len(x), n) for x in (x_train, *x_others)], x_train.device)

    return divided


def _column(n: int, m: int, share: float) -> int:
    """Column of the lower half of an (n, n) Gram above an (m, n) block, left of which lies this share of their area."""
    # Column c holds n - c entries of the Gram and m of the others. With u = c / n and r = 1 + m / n, the columns up to
    # u have the area n^2 (r u - u^2 / 2), of n^2 (r - 1/2) in all. Setting the first to `share` of the second gives
    # u^2 - 2 r u + (2 r - 1) share = 0, whose smaller root lies in [0, 1].
    r = 1 + m / n
    u = r - math.sqrt(max(0.0, r**2 - (2 * r - 1) * share))
    return round(n * u)


def distributed_gram(kernel: Kernel, x: Tensor, *, progress: bool = False) -> Tensor:
    """Compute a symmetric Gram on all ranks of the default process group together.

    Checksums compare the inputs and the parameters of a kernel that is an ``nn.Module``; its buffers become those of
    rank zero.

    Args:
        kernel: The same on every rank.
        x: Inputs (n, ...), the same on every rank.
        progress: Show a progress bar, on rank zero.

    Returns:
        What ``kernel(x)`` returns, (n, n), to rounding and in its dtype; without a process group, exactly that.
    """
    if rank_and_world_size()[1] == 1:
        return kernel(x, progress=progress)
    agree_on_kernel(kernel)
    (gram,) = distributed_gram_and_cross(gram_and_cross(kernel, progress=progress))(x)
    return gram


def distributed_cross(kernel: Kernel, x1: Tensor, x2: Tensor, *, progress: bool = False) -> Tensor:
    """Compute the kernel of two sets on all ranks of the default process group together, each a block of rows.

    Call it on every rank. An error on one rank ends the call on all, with one of its kind. Inputs and kernel are
    compared as for :func:`distributed_gram`.

    Args:
        kernel: The same on every rank.
        x1: Inputs (n1, ...), the same on every rank.
        x2: Inputs (n2, ...), the same on every rank.
        progress: Show a progress bar, on rank zero.

    Returns:
        What ``kernel(x1, x2)`` returns, (n1, n2), to rounding and in its dtype; without a process group, exactly that.
    """
    rank, ranks = rank_and_world_size()
    if ranks == 1:
        return kernel(x1, x2, progress=progress)
    _agree_on_inputs(x1, x2)
    agree_on_kernel(kernel)
    rows = slice(*(round(len(x1) * r / ranks) for r in (rank, rank + 1)))

    def pieces() -> list[_Piece]:
        check_inputs(x1, x2)
        return [(0, rows, slice(None), kernel(x1[rows], x2, progress=progress))] if len(x1[rows]) else []

    return _exchange(pieces, [(len(x1), len(x2))], x1.device)[0]


def _agree_on_inputs(*inputs: Tensor) -> None:
    """Raise on all ranks where their inputs differ, before anything is computed."""
    agree_on_tensors(
        dict(itertools.chain.from_iterable(_tensors(x, f"inputs {i}") for i, x in enumerate(inputs, 1))),
        "every process must pass the same samples in the same order, so seed whatever draws or splits them.",
        {
            k: v
            for i, x in enumerate(inputs, 1)
            for k, v in lines_of(getattr(x, "form", None), f"arguments {i}").items()
        },
    )


def _tensors(x: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a network's arguments, which EmpiricalNTK hands over as one object that can be cut."""
    return named_tensors(getattr(x, "leaves", x), name)


def _exchange(
    pieces: Callable[[], list[_Piece]], shapes: Sequence[tuple[int, int]], device: torch.device
) -> tuple[Tensor, ...]:
    """Compute the pieces of some matrices on every rank and put them together on all, or raise on all."""
    found: list[_Piece] = []

    def compute() -> tuple[torch.dtype, torch.Size] | None:
        found.extend(pieces())
        return (found[0][-1].dtype, found[0][-1].shape[2:]) if found else None

    forms = gather_or_raise(compute)
    dtype, outputs = next(form for form in forms if form is not None)
    matrices = tuple(torch.zeros(*shape, *outputs, dtype=dtype, device=device) for shape in shapes)
    for number, rows, columns, values in found:
        matrices[number][rows, columns] = values
    for matrix in matrices:
        distributed.all_reduce(matrix)  # every entry is zero on all ranks but one
    return matrices


def gather_or_raise(work: Callable[[], object]) -> list[Any]:
    """Do something on every rank, and let none wait for one that failed.

    Args:
        work: Called on every rank, within a process group.

    Returns:
        What it returned on each rank, which must be small.

    Raises:
        Exception: It failed here; or on another rank, then of the same kind, so that all deal with it in one way.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # of whatever kind: the other ranks wait below
        error = raised
    everywhere: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everywhere, (None if error is None else (_kind(error), str(error)), result))
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(everywhere):
        if failure is not None:
            raise failure[0](f"Process {rank} failed: {failure[1]}")
    return [found for _, found in everywhere]


def _kind(error: Exception) -> type[Exception]:
    kinds = (FloatingPointError, MemoryError, OSError, TypeError, ValueError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)


def swap(kernel: Tensor) -> Tensor:
    """Exchange both sides of a kernel (n1, n2) or (n1, n2, C, C): the inputs and, where kept apart, the outputs.

    Args:
        kernel: The kernel of n1 with n2 inputs.

    Returns:
        That of the n2 with the n1 inputs, a view.
    """
    return kernel.transpose(0, 1).transpose(2, 3) if kernel.dim() == 4 else kernel.T


def rank_and_world_size() -> tuple[int, int]:
    """Give rank and number of processes of the default process group.

    Returns:
        Both; (0, 1) without a process group.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
