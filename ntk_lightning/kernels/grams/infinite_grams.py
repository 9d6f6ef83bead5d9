"""The Grams that fits of an infinite-width kernel ask for, divided among processes and kept in a store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ntk_lightning.kernels.grams.distributed import gather_or_raise, place, sharded_gram_and_cross
from ntk_lightning.kernels.grams.store import KernelStore
from ntk_lightning.kernels.infinite.infinite_ntk import InfiniteNTK

__all__ = ["infinite_grams"]


def infinite_grams(
    kernel: InfiniteNTK, store: Path | None, *, progress: bool = True
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make the function that fits ask for the two Grams of an infinite-width kernel; processes divide the work.

    Args:
        kernel: The kernel.
        store: Folder to keep them in, where nested training sets with one test set share their blocks; None keeps none.
        progress: Show a progress bar.

    Returns:
        Maps n training inputs and m others to their Grams (n, n) and (m, n).
    """

    def grams(x_train: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
        if store is None:
            gram, cross = sharded_gram_and_cross(kernel, x_train, x_other, progress=progress)
            return gram, cross
        block = 64 if len(x_other) < 4096 else 256  # a file each: fewer of them for large sets, the same for all n
        stored = KernelStore(store, kernel, torch.cat([x_other, x_train]), block=block)
        train, other = slice(len(x_other), None), slice(0, len(x_other))
        rank, processes = place()
        if processes > 1:
            needed = [(i, j) for i, j in stored.block_ids if (j + 1) * stored.block > len(x_other)]
            gather_or_raise(partial(stored.compute, needed, rank=rank, world_size=processes, progress=progress))
        return stored.gram(train, progress=progress), stored.gram(other, train, progress=progress)

    return grams
