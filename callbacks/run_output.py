"""Where the tables, pictures and metrics of a run go, on rank zero."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from matplotlib.figure import Figure

from ntk_lightning.atomic_files import atomic_write, writing

__all__ = ["ADVICE", "check_folder", "log_figure", "log_metrics", "log_table", "run_folder"]

ADVICE = "Make room there, or choose another default_root_dir of the Trainer or save_dir of the logger"


def run_folder(trainer: Trainer, advice: str = ADVICE) -> Path:
    """Give the folder of the run's tables and pictures, where its checkpoints go too.

    Args:
        trainer: Trainer of the run.
        advice: What to do where it cannot be made.

    Returns:
        <save_dir>/<name>/<version> of the first logger, or the Trainer's root folder; made if missing.

    Raises:
        OSError: It cannot be made.
    """
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"  # as Lightning
        folder = Path(logger.save_dir or folder) / str(logger.name) / version
    with writing(folder, advice):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_folder(trainer: Trainer) -> None:
    """Make the folder of the run's tables and pictures, on rank zero, so that its absence is told before the training.

    Args:
        trainer: Trainer of the run.
    """
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
        run_folder(trainer)


def log_metrics(trainer: Trainer, metrics: dict[str, float], step: int) -> None:
    """Hand metrics to every logger of the run, and to callbacks that monitor one by ``trainer.callback_metrics``.

    Args:
        trainer: Trainer of the run.
        metrics: Values by name.
        step: Optimizer step that they belong to.
    """
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)
    trainer.callback_metrics.update({name: torch.tensor(float(value)) for name, value in metrics.items()})


def log_table(trainer: Trainer, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Keep a table as CSV in the run's folder and in the loggers that keep tables, texts or files.

    W&B gets a table, TensorBoard a text, MLflow the file; the folder is a CSV logger's own. Only rank zero writes;
    nothing is written without rows or in a ``fast_dev_run``.

    Args:
        trainer: Trainer of the run.
        name: Name of the table.
        rows: Cells by column; a column that a row does not have is empty there.

    Raises:
        OSError: The table cannot be written; the message holds it.
    """
    if not trainer.is_global_zero or not rows or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
        return
    text = io.StringIO(newline="")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    writer = csv.writer(text)
    writer.writerows([columns, *cells])
    advice = f"{ADVICE}; the table is\n{text.getvalue()}"
    path = run_folder(trainer, advice) / f"{name}.csv"
    with atomic_write(path, advice) as temporary:
        temporary.write_text(text.getvalue(), newline="")
    for logger in trainer.loggers:
        experiment = _experiment(logger)
        if hasattr(logger, "log_table"):  # W&B
            logger.log_table(name, columns, cells)
        elif hasattr(experiment, "add_text"):  # TensorBoard
            experiment.add_text(name, _markdown(columns, cells), trainer.global_step)
        else:
            _log_file(logger, experiment, path)


def log_figure(trainer: Trainer, name: str, figure: Figure) -> Path | None:
    """Keep a figure as <name>.png in the run's folder, and as <name>_figure in the loggers that keep pictures or files.

    That is W&B, TensorBoard and MLflow. Only rank zero writes; nothing is written in a ``fast_dev_run``.

    Args:
        trainer: Trainer of the run.
        name: Name of the picture.
        figure: What was drawn.

    Returns:
        The path of the picture, None where none is written.

    Raises:
        OSError: It cannot be written.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
        return None
    path = run_folder(trainer) / f"{name}.png"
    with writing(path, ADVICE):
        figure.savefig(path)
    for logger in trainer.loggers:
        experiment = _experiment(logger)
        if hasattr(logger, "log_image"):  # W&B
            logger.log_image(f"{name}_figure", [str(path)])
        elif hasattr(experiment, "add_figure"):  # TensorBoard
            experiment.add_figure(f"{name}_figure", figure, trainer.global_step, close=False)
        else:
            _log_file(logger, experiment, path)
    return path


def _experiment(logger: Any) -> Any:  # noqa: ANN401 - a logger of either Lightning package, or of somebody's own
    """The object of the tracker's own library behind a logger, None without one."""
    return getattr(logger, "experiment", None)


def _log_file(logger: Any, experiment: Any, path: Path) -> None:  # noqa: ANN401
    """Hand a file to MLflow's client; other loggers keep none, and the run's folder has it."""
    if hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):
        experiment.log_artifact(logger.run_id, str(path))


def _markdown(columns: list[str], cells: list[list[Any]]) -> str:
    """Lay out a table as TensorBoard shows it."""
    texts = [
        ["" if each is None else f"{each:.4g}" if isinstance(each, float) else str(each) for each in row]
        for row in cells
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *texts])
