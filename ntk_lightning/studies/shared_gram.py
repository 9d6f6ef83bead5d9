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

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.kernels.grams.stored import (
    blocks_of_fit,
    pooled_gram_and_cross,
    pooled_store,
    stored_gram_and_cross,
)
from ntk_lightning.kernels.infinite.infinite_ntk import Kind
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.build import LoadedData, apart_from_subset, build, set_up
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.schema import WIDTH_FREE

__all__ = ["cell_grams", "cells_of_pools", "count_pairs", "infinite_kernel", "missing_pairs"]


def cell_grams(cell: Cell, folder: Path, pool: LoadedData | None, progress: bool) -> GramAndCross:
    """Make the function that gives the Grams of a cell.

    Args:
        cell: A fit of an infinite-width kernel.
        folder: Of the Grams.
        pool: Data of whose whole pool one Gram serves this cell; None for a Gram of the cell's own subset.
        progress: Show a progress bar.

    Returns:
        The function.
    """
    kernel = infinite_kernel(cell)
    if pool is None:
        return stored_gram_and_cross(kernel, folder, progress=progress)
    return pooled_gram_and_cross(kernel, folder, _pool_samples(_pool_cell(cell, pool.pool), pool), progress=progress)


def cells_of_pools(cells: Sequence[Cell], loaded: LoadedData, folder: Path) -> frozenset[str]:
    """Choose the cells for which one Gram of the whole pool costs less than their own.

    The subsets of S seeds with n samples and m test samples have S (n^2 / 2 + m n) pairs, the pool of N has
    N^2 / 2 + m N, less what is stored. One seed's subsets are nested: its largest contains the others.

    Args:
        cells: Those that are to be run.
        loaded: Their data.
        folder: Of the Grams.

    Returns:
        The keys of these cells.
    """
    pool = loaded.pool
    groups: defaultdict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        arguments = cell.data.get("init_args", {})
        alike = arguments.get("n_statistics") == pool or arguments.get("normalize") is False
        if cell.model in WIDTH_FREE and alike:  # whatever their seed, samples are then the same numbers
            groups[json.dumps([cell.model, apart_from_subset(cell), dict(cell.net)], sort_keys=True)].append(cell)
    chosen = set[str]()
    for group in groups.values():
        test = group[0].num_evaluated
        largest: dict[int, int] = {}
        for cell in group:
            largest[cell.seed] = max(cell.n, largest.get(cell.seed, 0))
        apart = sum(count_pairs(n, test) for n in largest.values())
        if apart > count_pairs(pool, test) or apart > missing_pairs(group[0], loaded, folder):
            chosen |= {cell.key for cell in group}
    return frozenset(chosen)


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


def count_pairs(n: int, test: int) -> int:
    """Count the pairs of a fit on n samples, evaluated at others: n^2 / 2 + n test, and half the diagonal."""
    return n * (n + 1) // 2 + test * n


def missing_pairs(cell: Cell, loaded: LoadedData, folder: Path) -> int:
    """Count the pairs of the whole pool's Gram that are not stored.

    Args:
        cell: A fit of the kernel.
        loaded: Its data.
        folder: Of the Grams.

    Returns:
        The number.
    """
    samples = _pool_samples(_pool_cell(cell, loaded.pool), loaded)
    store = pooled_store(infinite_kernel(cell), folder, samples)
    return store.count_missing_pairs(blocks_of_fit(store, len(samples) - loaded.pool))


def _pool_cell(cell: Cell, pool: int) -> str:
    """The data of the whole pool, as what :func:`_pool_samples` caches by."""
    data = apart_from_subset(cell)
    arguments = {k: value for k, value in data["init_args"].items() if k not in ("n_val", "balanced")}
    arguments |= {"n_train": pool, "subset_seed": 0}
    return json.dumps({"data": {**data, "init_args": arguments}, "net": dict(cell.net)}, sort_keys=True)


@lru_cache(maxsize=1)
def _pool_samples(made: str, loaded: LoadedData) -> Tensor:
    """The test set, then the whole pool, in the order of subset seed 0."""
    parts: Mapping[str, Any] = json.loads(made)
    cell = Cell("infinite", 1, None, 0, OptimizerConfig(), data=parts["data"], net=parts["net"])
    data, _ = set_up(cell, loaded)
    return torch.cat([samples.x for samples in (data.test_set, data.train_set) if samples is not None])
