"""Kernels computed by all processes of a run together: every one its share, and all end with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from ntk_lightning.kernels.checks import check_inputs
from ntk_lightning.kernels.grams.agreement import agree_on_kernel, agree_on_tensors

__all__ = ["gather_or_raise", "place", "sharded_gram", "sharded_gram_and_cross", "swap"]

_Piece = tuple[int, slice, slice, Tensor]  # number of a matrix, its rows and columns, and their values


def sharded_gram(
    kernel: Callable[..., Tensor], x1: Tensor, x2: Tensor | None = None, *, progress: bool = False
) -> Tensor:
    """Compute a Gram on all ranks of the default process group together.

    Every rank computes a block of rows; of a symmetric Gram only its upper half, in blocks of equal area.
    Call it on every rank, with the same inputs and kernel, which checksums compare; a kernel that is an ``nn.Module``
    takes the buffers of rank zero. An error on one rank ends the call on all, with one of its kind.

    Args:
        kernel: Maps (n1, ...), (n2, ...) to (n1, n2), or (n1, ...) alone to its symmetric Gram.
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...), or None for the symmetric Gram of x1.
        progress: Show a progress bar, on rank zero.

    Returns:
        What ``kernel(x1, x2)`` returns, to rounding and in its dtype; without a process group, exactly that.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Inputs are malformed, or differ between ranks, or the kernel's parameters do.
        FloatingPointError: The kernel is not finite.

    Example:
        >>> import torch
        >>> sharded_gram(lambda x1, x2=None, progress=False: x1 @ (x1 if x2 is None else x2).T, torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    rank, ranks = place()
    progress = progress and rank == 0
    if ranks == 1:
        return kernel(x1, progress=progress) if x2 is None else kernel(x1, x2, progress=progress)
    if x2 is None:
        return sharded_gram_and_cross(kernel, x1, progress=progress)[0]
    _agree(kernel, x1, x2)
    rows = slice(*(round(len(x1) * r / ranks) for r in (rank, rank + 1)))

    def pieces() -> list[_Piece]:
        check_inputs(x1, x2)
        return [(0, rows, slice(None), kernel(x1[rows], x2, progress=progress))] if len(x1[rows]) else []

    return _exchange(pieces, [(len(x1), len(x2))], x1.device)[0]


def sharded_gram_and_cross(
    kernel: Callable[..., Tensor], x_train: Tensor, *x_tests: Tensor, progress: bool = False
) -> tuple[Tensor, ...]:
    """Compute the Gram of a training set and the kernels of test sets with it on all ranks together.

    Every rank computes a block of columns, of the Gram only the lower half; all blocks have equal area. Call it on
    every rank, with the same inputs and kernel, as :func:`sharded_gram`.

    Args:
        kernel: As for :func:`sharded_gram`. Its method ``gram_and_cross`` is used where it has one.
        x_train: Inputs (n, ...).
        *x_tests: Any number of inputs (m, ...).
        progress: Show a progress bar, on rank zero.

    Returns:
        The training Gram (n, n), then for each test set the kernel (m, n), in the kernel's dtype.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Inputs are malformed, or differ between ranks, or the kernel's parameters do.
        FloatingPointError: The kernel is not finite.
    """
    rank, ranks = place()
    progress = progress and rank == 0
    together: Callable[..., tuple[Tensor, ...]] | None = getattr(kernel, "gram_and_cross", None)

    def columns(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        if together is not None:
            return together(x, *others, progress=progress)
        return kernel(x, progress=progress), *(kernel(other, x, progress=progress) for other in others)

    if ranks == 1:
        return columns(x_train, *x_tests)
    _agree(kernel, x_train, *x_tests)
    n = len(x_train)

    def pieces() -> list[_Piece]:
        for x in x_tests or (None,):
            check_inputs(x_train, x)
        ratio = 1 + sum(map(len, x_tests)) / n
        start, stop = (
            round(n * (ratio - max(0.0, ratio**2 - (2 * ratio - 1) * r / ranks) ** 0.5)) for r in (rank, rank + 1)
        )
        mine, below = x_train[start:stop], x_train[stop:]
        if not len(mine):
            return []
        square, *blocks = columns(mine, *([below] if len(below) else []), *x_tests)
        here, after = slice(start, stop), slice(stop, None)
        found: list[_Piece] = [(0, here, here, square)]
        if len(below):
            block = blocks.pop(0)
            found += [(0, after, here, block), (0, here, after, swap(block))]
        return found + [(i, slice(None), here, block) for i, block in enumerate(blocks, 1)]

    return _exchange(pieces, [(len(x), n) for x in (x_train, *x_tests)], x_train.device)


def _agree(kernel: Callable[..., Any], *inputs: Tensor) -> None:
    """Raise on all ranks where they have not one kernel and the same inputs, before anything is computed."""
    agree_on_tensors(
        {f"inputs {i}": x for i, x in enumerate(inputs, 1) if isinstance(x, Tensor)},
        "every process must pass the same samples in the same order, so seed whatever draws or splits them.",
    )
    agree_on_kernel(kernel)


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


def place() -> tuple[int, int]:
    """Tell which process this is.

    Returns:
        Rank and number of processes of the default process group; 0 and 1 without one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
