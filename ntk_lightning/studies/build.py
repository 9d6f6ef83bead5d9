"""Data module and network of a cell, and what is checked of a study before any cell runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from ntk_lightning.callbacks.scheduled import steps_to_measure
from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.config import StudyConfig
from ntk_lightning.studies.schema import AFTER, DURING, FRESH

__all__ = ["LoadedData", "apart_from_subset", "build", "check_study", "compute_device", "set_up", "set_up_data"]


@dataclass(frozen=True)
class LoadedData:
    """What a study must know of its data.

    Args:
        digest: Of the pools: of their shapes, and of the labels and images of up to 1024 samples spread over each,
            which a changed file or a changed ``load`` changes.
        pool: Samples of the training pool.
    """

    digest: str
    pool: int


def build(cell: Cell, loaded: LoadedData | None = None) -> tuple[ImageDataModule, nn.Sequential]:
    """Make a cell's data module and its network, whose weights are drawn from the generator as it stands.

    Args:
        cell: The cell.
        loaded: What the study has seen of its data: a process then reads their pools once for all cells.

    Returns:
        Data module, not set up, and network.

    Raises:
        ValueError: A class path or an argument is wrong.
    """
    parser, parsed = _parse(cell)
    made = parser.instantiate_classes(parsed)
    if not isinstance(made.net, nn.Sequential):
        raise ValueError(f"net must make an nn.Sequential, {cell.net.get('class_path')} makes {type(made.net)}.")
    data: ImageDataModule = made.data
    if loaded is not None:
        pools = _pools(json.dumps(apart_from_subset(cell), sort_keys=True), loaded.digest)
        load = data.load

        def load_once(train: bool) -> Samples:
            if train not in pools:
                pools[train] = load(train=train)
            return pools[train]

        data.load = load_once  # type: ignore[method-assign]
    return data, made.net


def set_up(cell: Cell, loaded: LoadedData | None = None) -> tuple[ImageDataModule, nn.Sequential]:
    """Make a cell's data module, set up, and its network as drawn by its seed; torch's generator stays as it is.

    Args:
        cell: The cell.
        loaded: As of :func:`build`.

    Returns:
        Data module and network.
    """
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        data, net = build(cell, loaded)
    data.prepare_data()
    data.setup()
    return data, net


def compute_device() -> torch.device:
    """Where kernels of cells are computed and fitted: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def apart_from_subset(cell: Cell) -> dict[str, Any]:
    """Describe a cell's data without the arguments that choose a subset of them.

    Args:
        cell: The cell.

    Returns:
        Class path and the other arguments.
    """
    chosen = ("n_train", "subset_seed", "fresh")
    arguments = {k: value for k, value in cell.data.get("init_args", {}).items() if k not in chosen}
    return {**cell.data, "init_args": arguments}


@lru_cache(maxsize=1)
def _pools(data: str, digest: str) -> dict[bool, Samples]:
    """The pools that this process has read of some data: of the training set, True, and of the test set, False."""
    return {}


def check_study(config: StudyConfig, arms: Mapping[str, Sequence[Cell]]) -> None:
    """Check class paths and arguments of data and networks, and that the figure's filters leave something.

    Args:
        config: The study.
        arms: Its cells by arm. Those of an arm differ in whole numbers only (sizes, seeds, widths), which each cell has
            checked: one of them stands for all.

    Raises:
        ValueError: A class path or an argument is wrong, or ``figure.fitted_on`` or ``figure.at`` match nothing.
    """
    for group in arms.values():
        _parse(group[0])
    figure = config.figure
    kernels = [kernel for cells in arms.values() for cell in cells for kernel in _kernels(cell)]
    shown = [
        kernel
        for arm in config.arms
        for cell in arms[arm.label]
        for kernel in _kernels(cell)
        if config.shows(arm, kernel)
    ]
    if figure.fitted_on is not None and not shown:
        sizes = sorted({kernel["n"] for kernel in kernels})
        raise ValueError(
            f"figure.fitted_on = {figure.fitted_on!r} of study {config.name} matches none of its kernels, which are "
            f"fitted on {sizes} samples: choose one of these, or give an arm after, after_fresh or kernels_at."
        )
    missing = sorted({*(figure.at or [])} - {kernel["t"] for kernel in shown if kernel["model"] == DURING})
    if missing or figure.at == []:
        steps = sorted({kernel["t"] for kernel in kernels if kernel["model"] == DURING})
        raise ValueError(
            f"figure.at = {figure.at} of study {config.name}: no arm shows a kernel at t = {missing}. Its kernels "
            f"during training are taken at t = {steps}: choose of these, or change kernels_at of an arm."
        )


def set_up_data(cells: Sequence[Cell], *, finished: bool = False) -> LoadedData | None:
    """Set up the data of the cell that needs the most samples, which downloads what has to be downloaded.

    Args:
        cells: Of one study, whose data differ in sizes and seeds only.
        finished: No cell is left to run: only load the data, and not even that where the data module has a
            ``prepare_data``, which may download.

    Returns:
        What the data are; None where they were not loaded.

    Raises:
        ValueError: The data set has too few samples, or a class path or an argument is wrong.
    """
    most = max(cells, key=lambda cell: cell.n + max(cell.after_fresh, default=0))
    parser, parsed = _parse(most)
    del parsed["net"]  # it may be large
    data: ImageDataModule = parser.instantiate_classes(parsed).data
    if finished and type(data).prepare_data is not ImageDataModule.prepare_data:
        return None
    load = cache(data.load)
    data.load = load  # type: ignore[method-assign]  # setup() and the digest read each pool once
    if not finished:
        data.prepare_data()
        data.setup()
    digest = hashlib.sha256()
    for train in (True, False):
        pool = load(train=train)
        count = min(len(pool), 1024)
        sample = torch.arange(count) * len(pool) // max(count, 1)  # whole numbers: the same on every machine
        digest.update(repr((tuple(pool.x.shape), str(pool.x.dtype))).encode())
        digest.update(pool.y[sample].to("cpu", torch.int8).numpy().tobytes())
        digest.update(pool.x[sample].cpu().contiguous().numpy().tobytes())
    return LoadedData(digest.hexdigest()[:16], len(load(train=True)))


def _kernels(cell: Cell) -> Iterator[dict[str, Any]]:
    """For each kernel that a cell extracts, the columns of its row that ``StudyConfig.shows`` filters on."""
    for model, sizes in ((AFTER, cell.after), (FRESH, cell.after_fresh)):
        yield from ({"model": model, "n": n, "m": cell.n, "t": None} for n in sizes)
    if cell.kernels_at or cell.log_spaced:
        total = cell.optimizer.total_steps(cell.n)
        for t in steps_to_measure(total, None, cell.log_spaced or 1, cell.kernels_at):
            if t <= total:
                yield {"model": DURING, "n": cell.n, "m": cell.n, "t": t}


def _parse(cell: Cell) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageDataModule, required=True)
    parser.add_argument("--net", type=nn.Module, required=True)
    try:
        return parser, parser.parse_object({"data": dict(cell.data), "net": dict(cell.net)})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"data or net of the study: {error}") from error
