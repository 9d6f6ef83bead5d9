"""Infinite-width Grams of a study's cells: of each training subset, or one of the whole pool that serves all seeds."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.kernels.grams.stored import block_side, pooled_gram_and_cross, stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Kind
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.build import build
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.schema import WIDTH_FREE

__all__ = ["cell_grams", "cells_of_pools", "infinite_kernel"]

# Arguments of the data that choose a subset of the pool and leave the samples themselves as they are
_SUBSET = ("n_train", "subset_seed", "fresh")


def cell_grams(cell: Cell, kernel: InfiniteNTK, folder: Path, pool: int | None, progress: bool) -> GramAndCross:
    """Make the function that gives the Grams of a cell.

    Args:
        cell: A fit of an infinite-width kernel.
        kernel: The kernel.
        folder: Of the Grams.
        pool: Samples of the pool whose one Gram serves this cell; None for a Gram of the cell's own subset.
        progress: Show a progress bar.

    Returns:
        The function.
    """
    if pool is None:
        return stored_gram_and_cross(kernel, folder, progress=progress)
    return pooled_gram_and_cross(kernel, folder, _pool_samples(_pool_cell(cell, pool)), progress=progress)


def cells_of_pools(cells: Sequence[Cell], pool: int, folder: Path) -> dict[str, int]:
    """Choose the cells for which one Gram of the whole pool costs less than their own.

    The subsets of S seeds with n samples and m test samples have S (n^2 / 2 + m n) pairs, the pool of N has
    N^2 / 2 + m N, less what is stored. One seed's subsets are nested: its largest contains the others.

    Args:
        cells: Those that are to be run.
        pool: N, the training samples that the data have.
        folder: Of the Grams.

    Returns:
        N by the key of each such cell.
    """
    groups: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        arguments = cell.data.get("init_args", {})
        alike = arguments.get("n_statistics") == pool or arguments.get("normalize") is False
        if cell.model in WIDTH_FREE and alike:  # whatever their seed, samples are then the same numbers
            groups[_name(cell)].append(cell)
    chosen: dict[str, int] = {}
    for group in groups.values():
        test = group[0].data["init_args"].get("n_test", 1000) + group[0].data["init_args"].get("n_val", 0)
        largest: dict[int, int] = {}
        for cell in group:
            largest[cell.seed] = max(cell.n, largest.get(cell.seed, 0))
        apart = sum(_pairs(n, test) for n in largest.values())
        if apart > _pairs(pool, test) or apart > _missing_pairs(group[0], pool, folder):
            chosen |= {cell.key: pool for cell in group}
    return chosen


def infinite_kernel(cell: Cell) -> InfiniteNTK:
    """Make the kernel of a cell at infinite width.

    Args:
        cell: The cell.

    Returns:
        The kernel, NNGP or NTK.
    """
    kind: Kind = "nngp" if cell.model == "nngp" else "ntk"
    with torch.random.fork_rng():
        return InfiniteNTK(build(cell)[1], kind)


def _name(cell: Cell) -> str:
    """What the cells share that one Gram serves."""
    arguments = {k: value for k, value in cell.data.get("init_args", {}).items() if k not in _SUBSET}
    return json.dumps([cell.model, cell.data.get("class_path"), arguments, dict(cell.net)], sort_keys=True)


def _pairs(n: int, test: int) -> int:
    return n * (n + 1) // 2 + test * n


def _missing_pairs(cell: Cell, pool: int, folder: Path) -> int:
    """Pairs of the pool's Gram that are not stored."""
    samples = _pool_samples(_pool_cell(cell, pool))
    store = KernelStore(folder, infinite_kernel(cell), samples, block=block_side(len(samples)))
    first = len(samples) - pool  # no fit asks for the kernel of test samples with one another
    needed = [(i, j) for i, j in store.block_ids if (j + 1) * store.block > first]
    return sum(store._pairs(block_id) for block_id in needed if not store._stored(*store._ordered(block_id)))


def _pool_cell(cell: Cell, pool: int) -> str:
    """The data of the whole pool, as what :func:`_pool_samples` caches by."""
    arguments = {k: value for k, value in cell.data.get("init_args", {}).items() if k not in ("n_val", "balanced")}
    arguments |= {"n_train": pool, "subset_seed": 0, "fresh": 0}
    return json.dumps({"data": {**cell.data, "init_args": arguments}, "net": dict(cell.net)}, sort_keys=True)


@lru_cache(maxsize=1)
def _pool_samples(made: str) -> Tensor:
    """The test set, then the whole pool, in the order of subset seed 0."""
    parts: Mapping[str, Any] = json.loads(made)
    cell = Cell("infinite", 1, None, 0, OptimizerConfig(), data=parts["data"], net=parts["net"])
    with torch.random.fork_rng():
        data, _ = build(cell)
    data.prepare_data()
    data.setup()
    sets = [samples.x for samples in (data.test_set, data.train_set) if samples is not None]
    return torch.cat(sets)
