"""The two kernel matrices of a fit, divided among the processes of a run and kept in a store if there is one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ntk_lightning.kernels.grams.distributed import (
    distributed_gram_and_cross,
    gather_or_raise,
    rank_and_world_size,
)
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross, Kernel, gram_and_cross
from ntk_lightning.kernels.grams.store import KernelStore

__all__ = ["stored_gram_and_cross"]


def stored_gram_and_cross(kernel: Kernel, folder: Path | None, *, progress: bool = True) -> GramAndCross:
    """Make the function that gives a kernel's two matrices from a store, computing what is missing there.

    Args:
        kernel: A kernel that has a name (``kernel_key``).
        folder: Of the stores, where nested training sets with the same other sets share their blocks; None keeps none.
        progress: Show a progress bar, on rank zero.

    Returns:
        The function; the processes of a run divide the work.
    """
    if folder is None:
        return distributed_gram_and_cross(gram_and_cross(kernel, progress=progress))

    def stored(x_train: Tensor, /, *x_others: Tensor) -> tuple[Tensor, ...]:
        m = sum(map(len, x_others))
        block = 64 if m < 4096 else 256  # a file each: fewer of them for large sets, the same for all n
        store = KernelStore(folder, kernel, torch.cat([*x_others, x_train]), block=block)  # the sets that stay first
        train = slice(m, None)
        rank, processes = rank_and_world_size()
        if processes > 1:
            # no fit asks for the kernel of the others with one another: blocks (i, j), i <= j, whose columns all lie
            # before the first training sample are left out
            needed = [(i, j) for i, j in store.block_ids if (j + 1) * block > m]
            gather_or_raise(partial(store.compute, needed, rank=rank, world_size=processes, progress=progress))
        gram = store.gram(train, progress=progress)
        if not m:
            return (gram,)
        cross = store.gram(slice(0, m), train, progress=progress)
        return gram, *cross.split([len(x) for x in x_others])

    return stored
