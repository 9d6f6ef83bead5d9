"""One cell of a study, run: a training run or a kernel fit, the rows that it makes, and what happens when it fails."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
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
    EmpiricalNTKDynamics,
    ModelErrors,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.callbacks.nested_fits import NestedProblem
from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.modules import FiniteNetwork, LinearizedNetwork
from ntk_lightning.studies.build import LoadedData, build, compute_device
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.files import Rows
from ntk_lightning.studies.predictions import predicted_columns
from ntk_lightning.studies.schema import AFTER, DURING, FRESH, TRAINED
from ntk_lightning.studies.shared_gram import cell_grams
from ntk_lightning.studies.trained import Trained, read_trained, trained_path, write_trained

__all__ = ["Outcome", "attempt", "cpu_threads", "quiet_lightning", "run_cell", "train"]


class _StopWhereEvaluated(StopAtTrainError):
    """Stop only after epochs that end with an evaluation of the test set, so that a curve has its last point."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training error and decide, if it is time."""
        if (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            super().on_train_epoch_end(trainer, pl_module)


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        rows: Its rows of the result table; none where it failed.
        failure: The traceback of its failure, None where it succeeded.
    """

    rows: Rows = field(default_factory=list)
    failure: str | None = None


def attempt(
    cell: Cell, folder: Path, loaded: LoadedData | None, whole_pool: bool, threads: int, memory: str, progress: bool
) -> Outcome:
    """Run a cell once; whatever goes wrong in it is reported, and the other cells of the study go on.

    Args:
        cell: What to run.
        folder: As of :func:`run_cell`, like the others.
        loaded: What the study has seen of its data.
        whole_pool: Take the Gram from that of the whole pool.
        threads: CPU threads.
        memory: Budget of an extraction.
        progress: Show progress bars.

    Returns:
        The rows, or the traceback.
    """
    try:
        shared = partial(run_cell, cell, folder, memory, loaded=loaded, whole_pool=whole_pool)
        return Outcome(shared(threads=threads, progress=progress))
    except Exception:
        return Outcome(failure=traceback.format_exc())


def run_cell(
    cell: Cell,
    folder: Path,
    memory: str,
    *,
    loaded: LoadedData | None = None,
    whole_pool: bool = False,
    threads: int | None = None,
    progress: bool = False,
) -> Rows:
    """Train or fit what a cell describes.

    The cell's seed fixes its data, weights and batches, so that the result is the same in any process and any order.

    Args:
        cell: What to run.
        folder: Of the results. In it cells share ``grams``, of infinite width, and ``networks``, trained.
        memory: Budget of an extraction of an empirical NTK, such as "4GB".
        loaded: What the study has seen of its data; None reads them anew.
        whole_pool: Take the Gram of infinite width from that of the whole pool, which serves all seeds; by default
            there is one of the cell's own subset.
        threads: CPU threads; sums, and so the last digits, depend on their number. None leaves it as it is.
        progress: Show progress bars.

    Returns:
        One row for each model that was fitted: the trained one, and every kernel extracted from it on every size.

    Raises:
        ValueError: Configuration, data and sizes do not go together.
    """
    started = time.perf_counter()
    with torch.random.fork_rng(), quiet_lightning(), cpu_threads(threads):
        torch.manual_seed(cell.seed)
        data, net = build(cell, loaded)
        data.prepare_data()
        data.setup()
        if cell.model == "network":
            rows = _network(cell, net, data, trained_path(folder, cell, data, loaded), memory)
        elif cell.model in TRAINED:
            trained, during = train(
                cell, LinearizedNetwork(net, cell.optimizer, int(cell.model.split()[1])), data, memory
            )
            rows = [_row(cell, cell.model, trained.model_errors), *during]
        else:
            grams: GramAndCross
            if cell.model == "empirical":
                grams = partial(evaluation_ntk(net.to(compute_device()), memory).gram_and_cross, progress=progress)
            else:
                grams = cell_grams(cell, folder / "grams", loaded if whole_pool else None, progress)
            rows = _fit_kernel(cell, cell.model, grams, data, "train", [cell.n])
    seconds = time.perf_counter() - started
    return [{**row, "seconds": seconds} for row in rows]


def _network(cell: Cell, net: nn.Sequential, data: ImageDataModule, path: Path, memory: str) -> Rows:
    """Train a network, unless a cell with the same training has, and fit the kernels extracted from it."""
    during = list[dict[str, Any]]()
    watched = cell.kernels_at or cell.log_spaced
    trained = None if watched else read_trained(path)
    if trained is None:
        trained, during = train(cell, FiniteNetwork(net, cell.optimizer), data, memory)
        write_trained(path, trained)
    net.load_state_dict(dict(trained.weights))
    rows = [_row(cell, cell.model, trained.model_errors)]
    for model, split, sizes in ((AFTER, "train", cell.after), (FRESH, "fresh", cell.after_fresh)):
        if not sizes:
            continue
        try:
            grams = evaluation_ntk(net.to(compute_device()), memory).gram_and_cross
            rows += _fit_kernel(cell, model, grams, data, split, sizes, m=cell.n, t=trained.steps)
        except FloatingPointError as error:
            warnings.warn(f"There is no after-kernel. {error}", stacklevel=2)
    return rows + during


def train(cell: Cell, module: LightningModule, data: ImageDataModule, memory: str) -> tuple[Trained, Rows]:
    """Train a module with the callbacks that a cell asks for.

    Args:
        cell: The cell.
        module: What to train.
        data: Its data.
        memory: Budget of an extraction of an empirical NTK.

    Returns:
        What became of it, and the rows of its kernels during training.
    """
    curve = OptimalEarlyStopping()
    during = EmpiricalNTKDynamics(log_spaced=cell.log_spaced, at=cell.kernels_at, memory=memory)
    callbacks: list[Callback] = [curve]
    if cell.kernels_at or cell.log_spaced:
        callbacks.append(during)
    if cell.until_train_error is not None:
        callbacks.append(_StopWhereEvaluated(cell.until_train_error))
    with TemporaryDirectory() as scratch:  # for the callbacks' own files
        trainer = Trainer(
            default_root_dir=scratch,
            max_epochs=cell.optimizer.epochs,
            check_val_every_n_epoch=cell.evaluate_every,
            devices=1,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
    rows = []
    for row in during.rows:
        beside = {name: row[name] for name in ("network_error", "network_loss", "initial_error", "initial_loss")}
        rows.append(_row(cell, DURING, ModelErrors.of_row(row), m=cell.n, t=row["step"], **beside))
    (errors,) = curve.model_errors()
    assert isinstance(module.net, nn.Module)
    return Trained.of(module.net, errors, trainer.global_step), rows


def _fit_kernel(
    cell: Cell,
    model: str,
    grams: GramAndCross,
    data: ImageDataModule,
    split: str,
    sizes: Sequence[int],
    **columns: float,
) -> Rows:
    """Fit a kernel on the first samples of a set, for each size, by the steps that the cell's network takes."""
    sets = {name: getattr(data, f"{name}_set") for name in (split, "test", "val")}
    fitted, *others = (samples.to(compute_device()) for samples in sets.values() if samples is not None)
    evaluation = dict(zip(("test", "val"), others, strict=False))
    problem = NestedProblem.compute(grams, fitted, evaluation, sizes[-1])
    errors = [ModelErrors.of_fit(model, n, problem.sgd(n, cell.optimizer)) for n in sizes]
    rows = [_row(cell, model, each, **columns) for each in errors]
    rows[-1] |= predicted_columns(problem.gram, problem.targets)
    return rows


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
        "critical_lr": errors.critical_lr,
        "curve_steps": errors.curve["steps"],
        "curve_errors": errors.curve["errors"],
        "curve_losses": losses,
        "config": cell.config,
        **extra,
    }


@contextmanager
def cpu_threads(threads: int | None) -> Iterator[None]:
    """Set torch's CPU threads for the body.

    Args:
        threads: How many; None leaves them.

    Yields:
        Nothing; the previous number is set again at the end.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's messages about devices and loaders, which would come once a cell.

    Yields:
        Nothing.
    """
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)
