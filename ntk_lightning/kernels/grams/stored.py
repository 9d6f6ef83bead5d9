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
from ntk_lightning.kernels.grams.kernel_key import digest
from ntk_lightning.kernels.grams.store import BlockId, KernelStore

__all__ = ["block_side", "blocks_of_fit", "pooled_gram_and_cross", "pooled_store", "stored_gram_and_cross"]


def block_side(m: int) -> int:
    """Choose how many samples a block's side has: a file each, so fewer of them for large sets.

    Args:
        m: Samples that stay the same while the training set grows, from which the side must be chosen alone.

    Returns:
        The number, of which m is a multiple, or a little more: the test samples of a block that holds training samples
        too are paired with all others, which nothing asks for.

    Example:
        >>> [block_side(m) for m in (256, 1000, 2000, 10048)]
        [64, 250, 250, 1004]
    """
    parts = -(-m // (64 if m < 512 else 256 if m < 4096 else 1024))
    return m // parts if parts else 64


def _earlier_block_side(m: int) -> int:
    """The same of version 0.1."""
    return 64 if m < 4096 else 256


def blocks_of_fit(store: KernelStore, m: int) -> list[BlockId]:
    """List the blocks that a fit asks for: all but those of the other samples with one another.

    Args:
        store: Of a Gram that has the m other samples first.
        m: Their number.

    Returns:
        Ids (i, j), i <= j, of the blocks of which some column is a training sample.
    """
    return [(i, j) for i, j in store.block_ids if (j + 1) * store.block > m]


def pooled_store(kernel: Kernel, folder: Path, samples: Tensor) -> KernelStore:
    """Open the store of a kernel's Gram of all samples.

    Args:
        kernel: A kernel that has a name.
        folder: Of the stores.
        samples: All samples (N, ...).

    Returns:
        The store.
    """
    return KernelStore(folder, kernel, samples, block=1024 if len(samples) > 4096 else 128)


def pooled_gram_and_cross(kernel: Kernel, folder: Path, samples: Tensor, *, progress: bool = True) -> GramAndCross:
    """Make the function that cuts a kernel's two matrices out of one stored Gram, in which samples are looked up.

    Sets in any order and of any overlap, such as the training subsets of several seeds, share each pair.

    Args:
        kernel: A kernel that has a name (``kernel_key``).
        folder: Of the stores.
        samples: All samples (N, ...) that a set may be taken from, always in the same order.
        progress: Show a progress bar.

    Returns:
        The function, of one process. It raises a KeyError for a sample that is none of these.
    """
    store = pooled_store(kernel, folder, samples)
    places = {digest(sample): place for place, sample in enumerate(samples.cpu())}

    def pooled(x_train: Tensor, /, *x_others: Tensor) -> tuple[Tensor, ...]:
        train, *others = ([places[digest(sample)] for sample in x.cpu()] for x in (x_train, *x_others))
        return store.gram(train, progress=progress), *(store.gram(other, train, progress=progress) for other in others)

    return pooled


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
        x = torch.cat([*x_others, x_train])  # the sets that stay first
        store = KernelStore(folder, kernel, x, block=_earlier_block_side(m))
        if not store.has_blocks():
            store = KernelStore(folder, kernel, x, block=block_side(m))
        train = slice(m, None)
        rank, processes = rank_and_world_size()
        if processes > 1:
            needed = blocks_of_fit(store, m)
            gather_or_raise(partial(store.compute, needed, rank=rank, world_size=processes, progress=progress))
        gram = store.gram(train, progress=progress)
        if not m:
            return (gram,)
        cross = store.gram(slice(0, m), train, progress=progress)
        return gram, *cross.split([len(x) for x in x_others])

    return stored
