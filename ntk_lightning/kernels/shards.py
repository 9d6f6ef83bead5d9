"""Kernels computed by all processes of a run together: every one its share, and all end with the same bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, distributed

from ntk_lightning.kernels.empirical import EmpiricalNTK

__all__ = ["place", "sharded_gram", "sharded_gram_and_cross"]


def sharded_gram(
    kernel: Callable[..., Tensor], x1: Tensor, x2: Tensor | None = None, *, progress: bool = False
) -> Tensor:
    """Compute a Gram on all ranks of the default process group together.

    Every rank computes a block of rows; of a symmetric Gram only its upper half, in blocks of equal area.
    Call it on every rank, with the same inputs and kernel.

    Args:
        kernel: Maps (n1, ...), (n2, ...) to (n1, n2), or (n1, ...) alone to its symmetric Gram.
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...), or None for the symmetric Gram of x1.
        progress: Show a progress bar, on rank zero.

    Returns:
        What ``kernel(x1, x2)`` returns, to rounding; without a process group, exactly that.

    Example:
        >>> sharded_gram(lambda x1, x2=None, progress=False: x1 @ (x1 if x2 is None else x2).T, torch.eye(2))
        tensor([[1., 0.],
                [0., 1.]])
    """
    rank, ranks = place()
    progress = progress and rank == 0
    if isinstance(kernel, EmpiricalNTK):
        return kernel.sharded(x1, x2, progress=progress)
    if ranks == 1:
        return kernel(x1, progress=progress) if x2 is None else kernel(x1, x2, progress=progress)
    start, stop = (
        round(len(x1) * (r / ranks if x2 is not None else 1 - (1 - r / ranks) ** 0.5)) for r in (rank, rank + 1)
    )
    mine, gram = x1[start:stop], x1.new_zeros(len(x1), len(x1 if x2 is None else x2))
    if len(mine) and x2 is not None:
        gram[start:stop] = kernel(mine, x2, progress=progress)
    elif len(mine):
        gram[start:stop, start:stop] = kernel(mine, progress=progress)
        if stop < len(x1):
            gram[stop:, start:stop] = kernel(x1[stop:], mine, progress=progress)
            gram[start:stop, stop:] = gram[stop:, start:stop].T
    distributed.all_reduce(gram)  # every entry is zero on all ranks but one
    return gram


def sharded_gram_and_cross(
    kernel: EmpiricalNTK, x_train: Tensor, *x_tests: Tensor, progress: bool = False
) -> tuple[Tensor, ...]:
    """Compute the Gram of a training set and the kernels of test sets with it on all ranks together.

    Every rank computes a block of columns, from one set of gradients. Call it on every rank, with the same inputs and
    weights.

    Args:
        kernel: The empirical NTK.
        x_train: Inputs (n, ...).
        *x_tests: Any number of inputs (m, ...).
        progress: Show a progress bar, on rank zero.

    Returns:
        What ``kernel.gram_and_cross`` returns, to rounding; without a process group, exactly that.
    """
    rank, ranks = place()
    progress = progress and rank == 0
    if ranks == 1:
        return kernel.gram_and_cross(x_train, *x_tests, progress=progress)
    start, stop = (round(len(x_train) * r / ranks) for r in (rank, rank + 1))
    gram, *crosses = (x_train.new_zeros(len(x), len(x_train)) for x in (x_train, *x_tests))
    mine, below = x_train[start:stop], x_train[stop:]
    if len(mine):
        others = ([below] if len(below) else []) + list(x_tests)
        square, *blocks = kernel.gram_and_cross(mine, *others, progress=progress)
        gram[start:stop, start:stop] = square
        if len(below):
            gram[stop:, start:stop] = blocks.pop(0)
            gram[start:stop, stop:] = gram[stop:, start:stop].T
        for cross, block in zip(crosses, blocks, strict=True):
            cross[:, start:stop] = block
    for matrix in (gram, *crosses):
        distributed.all_reduce(matrix)  # every entry is zero on all ranks but one
    return gram, *crosses


def place() -> tuple[int, int]:
    """Tell which process this is.

    Returns:
        Rank and number of processes of the default process group; 0 and 1 without one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()
