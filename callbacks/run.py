"""What callbacks ask of a run: its data, its optimizer config, and where its results go."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure
from torch import nn

from ntk_lightning.datamodules.base import Samples, samples_of
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.objective import encode_targets
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers.result import error_and_loss

__all__ = [
    "check_folder",
    "error_and_loss_of",
    "evaluation_kernel",
    "evaluation_sets",
    "log_figure",
    "log_metrics",
    "log_table",
    "network",
    "run_config",
    "run_folder",
    "samples",
    "writing",
]


def samples(trainer: Trainer, split: str) -> Samples:
    """Take a whole data set from the run's data module, on the device and in the precision of the training.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".

    Returns:
        Inputs (n, ...) and labels (n,).

    Raises:
        TypeError: The data module has no such set.
    """
    return samples_of(trainer, split).to(
        trainer.strategy.root_device, cast(torch.dtype, trainer.lightning_module.dtype)
    )


def evaluation_sets(trainer: Trainer) -> dict[str, Samples]:
    """Take the sets that kernel fits are measured on.

    Args:
        trainer: Of the run, set up.

    Returns:
        The "test" set, and the "val" set if the data module has one.

    Raises:
        TypeError: There is no test set.
    """
    has_val = getattr(getattr(trainer, "datamodule", None), "val_set", None) is not None
    return {split: samples(trainer, split) for split in (("test", "val") if has_val else ("test",))}


def network(module: LightningModule, name: str) -> nn.Module:
    """Find the network inside a Lightning module.

    Args:
        module: Of the run.
        name: Attribute path of the submodule that maps inputs to outputs.

    Returns:
        The submodule.

    Raises:
        AttributeError: There is no such submodule.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        children = [child for child, _ in module.named_children()]
        raise AttributeError(
            f"{type(module).__name__} has no network {name!r}; its submodules are {children}. Give the callback the "
            "one that maps inputs to outputs as network=..."
        ) from error


def run_config(trainer: Trainer, module: LightningModule, optimizer: OptimizerConfig | None) -> OptimizerConfig:
    """Give kernel fits the optimizer config and length of the run they are compared with.

    Args:
        trainer: Fixes the length by ``max_epochs`` or ``max_steps``.
        module: Fixes the rest by its ``optimizer_config``.
        optimizer: Used as it is instead, where given.

    Returns:
        The config of the fits.

    Raises:
        TypeError: There is no config to take.
        ValueError: The run has no end that the fits could share.
    """
    if optimizer is not None:
        return optimizer
    config = getattr(module, "optimizer_config", None)
    if not isinstance(config, OptimizerConfig):
        raise TypeError(
            f"{type(module).__name__} has no optimizer_config: give the callback optimizer=OptimizerConfig(...) for "
            "its kernel fits."
        )
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if steps == -1 and (epochs is None or epochs == -1):
        raise ValueError("The Trainer never ends: set max_epochs or max_steps, or give the callback its own optimizer.")
    return replace(config, epochs=epochs if epochs and epochs > 0 else 1, steps=None if steps == -1 else steps)


def run_folder(trainer: Trainer) -> Path:
    """Give the folder of the run's tables and pictures, where its checkpoints go too.

    Args:
        trainer: Of the run.

    Returns:
        <save_dir>/<name>/<version> of the first logger, or the Trainer's root folder; made if missing.

    Raises:
        OSError: It cannot be made.
    """
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        folder = Path(logger.save_dir or folder) / str(logger.name) / str(logger.version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot make {folder}: {error.strerror}. Make room there, or choose another default_root_dir of the "
            "Trainer or save_dir of the logger",
        ) from error
    return folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say what to do when the body cannot write into a run's folder.

    Args:
        path: What is being written.

    Yields:
        Nothing.

    Raises:
        OSError: The body raised one.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write {path}: {error.strerror or error}. Make room there, or choose another default_root_dir of "
            "the Trainer or save_dir of the logger",
        ) from error


def check_folder(trainer: Trainer) -> None:
    """Make the folder of the run's tables and pictures, on rank zero, so that its absence is told before the training.

    Args:
        trainer: Of the run.
    """
    if trainer.is_global_zero:
        run_folder(trainer)


def log_metrics(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    """Hand metrics to every logger of the run.

    Args:
        trainer: Of the run.
        metrics: Values by name.
        step: Optimizer step that they belong to.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def log_table(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Keep a table as CSV in the run's folder and in W&B; does nothing but on rank zero, or without rows.

    Args:
        trainer: Of the run.
        name: Of the table.
        rows: Cells by column, the same columns in every row.

    Raises:
        OSError: The table cannot be written; the message holds it.
    """
    if not trainer.is_global_zero or not rows:
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    path = Path(trainer.default_root_dir) / f"{name}.csv"
    try:
        path = run_folder(trainer) / f"{name}.csv"
        partial = path.with_suffix(".csv.partial")
        partial.write_text(text.getvalue(), newline="")
        partial.replace(path)  # a table that was there is whole until the new one is
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write {path}: {error.strerror}. Make room there or choose another default_root_dir; the table is\n"
            f"{text.getvalue()}",
        ) from error
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(name, list(rows[0]), [list(row.values()) for row in rows])


def log_figure(trainer: Trainer, name: str, figure: Figure) -> Path | None:
    """Keep a figure as <name>.png in the run's folder and as <name>_figure in W&B; does nothing but on rank zero.

    Args:
        trainer: Of the run.
        name: Of the picture.
        figure: What was drawn.

    Returns:
        The path of the picture, None off rank zero.

    Raises:
        OSError: It cannot be written.
    """
    if not trainer.is_global_zero:
        return None
    path = run_folder(trainer) / f"{name}.png"
    with writing(path):
        figure.savefig(path)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"{name}_figure", [str(path)])
    return path


def evaluation_kernel(module: LightningModule, name: str, memory: str) -> EmpiricalNTK:
    """Copy a module's network, in evaluation mode, and take its empirical NTK.

    Args:
        module: Of the run; it is left as it is.
        name: Attribute path of the network.
        memory: Budget of the kernel, such as "4GB".

    Returns:
        The kernel at the network's current weights.
    """
    kernel = EmpiricalNTK(network(module, name), memory=memory)
    kernel.net.eval()
    return kernel


def error_and_loss_of(net: nn.Module, test: Samples) -> tuple[float, float]:
    """Measure a network's test error and test loss.

    Args:
        net: Maps (n, ...) to (n, num_outputs), in the mode that it is in.
        test: Test set.

    Returns:
        Fraction of errors and mean squared error; 1 and infinity where an output is not finite.
    """
    with torch.no_grad():
        outputs = torch.cat([net(chunk) for chunk in torch.split(test.x, 500)])
    error, loss = error_and_loss(outputs, encode_targets(test.y, outputs.shape[1], outputs.dtype))
    return float(error), float(loss)
