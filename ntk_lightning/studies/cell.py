"""One cell of a study, run: a training run or a kernel fit, the rows that it makes, and what happens when it fails."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from ntk_lightning.callbacks import (
    AfterKernel,
    EmpiricalNTKDynamics,
    ModelErrors,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.callbacks.nested_fits import fit_nested
from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Kind
from ntk_lightning.modules import FiniteNetwork, LinearizedNetwork
from ntk_lightning.studies.build import build
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.files import Rows
from ntk_lightning.studies.schema import AFTER, DURING, FRESH, TRAINED

__all__ = ["Outcome", "attempt", "run_cell"]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        rows: Its rows of the result table; none where it failed.
        failure: The traceback of its failure, None where it succeeded.
    """

    rows: Rows = field(default_factory=list)
    failure: str | None = None


def attempt(cell: Cell, grams: Path, threads: int, memory: str, progress: bool) -> Outcome:
    """Run a cell once; whatever goes wrong in it is reported, and the other cells of the study go on.

    Args:
        cell: What to run.
        grams: As of :func:`run_cell`, like the others.
        threads: CPU threads.
        memory: Budget of an extraction.
        progress: Show progress bars.

    Returns:
        The rows, or the traceback.
    """
    try:
        return Outcome(run_cell(cell, grams, memory, threads=threads, progress=progress))
    except Exception:
        return Outcome(failure=traceback.format_exc())


def run_cell(cell: Cell, grams: Path, memory: str, *, threads: int | None = None, progress: bool = False) -> Rows:
    """Train or fit what a cell describes.

    The cell's seed fixes its data, weights and batches, so that the result is the same in any process and any order.

    Args:
        cell: What to run.
        grams: Folder of the store that cells share their infinite-width Grams in.
        memory: Budget of an extraction of an empirical NTK, such as "4GB".
        threads: CPU threads; sums, and so the last digits, depend on their number. None leaves it as it is.
        progress: Show progress bars.

    Returns:
        One row for each model that was fitted: the trained one, and every kernel extracted from it on every size.

    Raises:
        ValueError: Configuration, data and sizes do not go together.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(), _quiet_lightning(), _threads(threads):
        torch.manual_seed(cell.seed)
        data, net = build(cell)
        if cell.model in TRAINED:
            order = int(cell.model.split()[1]) if cell.model.startswith("order") else None
            module = LinearizedNetwork(net, cell.optimizer, order) if order else FiniteNetwork(net, cell.optimizer)
            with TemporaryDirectory() as scratch:
                rows = _train(cell, module, data, memory, scratch)
        else:
            rows = [_row(cell, cell.model, _fit_kernel(cell, net, data, grams, memory, progress))]
    seconds = time.perf_counter() - started
    return [{**row, "seconds": seconds} for row in rows]


def _train(cell: Cell, module: LightningModule, data: ImageDataModule, memory: str, scratch: str) -> Rows:
    """Train a network with the callbacks that make its rows; their own files go to a folder that is deleted."""
    curve, after = OptimalEarlyStopping(), AfterKernel(cell.after, cell.after_fresh, memory=memory)
    during = EmpiricalNTKDynamics(log_spaced=cell.log_spaced, at=cell.kernels_at, memory=memory)
    callbacks: list[Callback] = [curve]
    if cell.after or cell.after_fresh:
        callbacks.append(after)
    if cell.kernels_at or cell.log_spaced:
        callbacks.append(during)
    if cell.until_train_error is not None:
        callbacks.append(StopAtTrainError(cell.until_train_error))
    trainer = Trainer(
        default_root_dir=scratch,
        max_epochs=cell.optimizer.epochs,
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    rows = [_row(cell, cell.model, errors) for errors in curve.model_errors()]
    for errors in after.model_errors():
        model = FRESH if errors.name.endswith("fresh samples") else AFTER
        rows.append(_row(cell, model, errors, m=cell.n, t=trainer.global_step))
    for row in during.rows:
        beside = {name: row[name] for name in ("network_error", "network_loss", "initial_error", "initial_loss")}
        rows.append(_row(cell, DURING, ModelErrors.of_row(row), m=cell.n, t=row["step"], **beside))
    return rows


def _fit_kernel(
    cell: Cell, net: nn.Sequential, data: ImageDataModule, grams: Path, memory: str, progress: bool
) -> ModelErrors:
    """Fit a kernel of the untrained network on the training subset."""
    data.prepare_data()
    data.setup()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sets = {name: getattr(data, f"{name}_set") for name in ("train", "test", "val")}
    train, *others = (samples.to(device) for samples in sets.values() if samples is not None)
    evaluation = dict(zip(("test", "val"), others, strict=False))
    gram_and_cross: GramAndCross
    if cell.model == "empirical":
        gram_and_cross = partial(evaluation_ntk(net.to(device), memory).gram_and_cross, progress=progress)
    else:
        kind: Kind = "nngp" if cell.model == "nngp" else "ntk"
        gram_and_cross = stored_gram_and_cross(InfiniteNTK(net, kind), grams, progress=progress)
    fits = fit_nested(gram_and_cross, train, evaluation, cell.optimizer, [cell.n])
    return ModelErrors.of_fit(cell.model, cell.n, fits[cell.n])


def _row(cell: Cell, model: str, errors: ModelErrors, **extra: float | None) -> dict[str, Any]:
    """A row of the result table (see :mod:`~ntk_lightning.studies.schema`)."""
    losses = [float("nan") if loss is None else loss for loss in errors.curve["losses"]]
    optimizer = {name: value for name, value in vars(cell.optimizer).items() if name != "seed"}
    return {
        "model": model,
        "cell": cell.key,
        "n": errors.n,
        "width": cell.width,
        "seed": cell.seed,
        **optimizer,
        "optimal_error": errors.optimal_error,
        "optimal_step": errors.optimal_step,
        "last_error": errors.last_error,
        "optimal_loss": min((loss for loss in losses if isfinite(loss)), default=inf),
        "last_loss": losses[-1],
        "curve_steps": errors.curve["steps"],
        "curve_errors": errors.curve["errors"],
        "curve_losses": losses,
        "config": cell.config,
        **extra,
    }


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads for the body, None leaves them; restore the previous number."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about devices and loaders, which would come once a cell."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
