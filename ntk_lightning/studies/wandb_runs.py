"""The rows of a study's table as W&B runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb
from rich.console import Console

__all__ = ["log_rows"]

MARKER = "wandb_logged.txt"


def log_rows(rows: Sequence[dict[str, Any]], project: str, folder: Path) -> None:
    """Log each row that was not logged before as one run: its curve as history, its errors as summary.

    A run's id is a hash of its study, arm, cell, model, n, m and t, and its group is the study. What was logged is
    noted in the folder's ``wandb_logged.txt``. A failure of W&B is printed: the table has everything, and the next run
    of the study goes on with the rows that are left.

    Args:
        rows: Of the result table.
        project: W&B project.
        folder: Where W&B keeps its files; offline unless ``WANDB_MODE`` says otherwise.
    """
    marker = folder / MARKER
    try:
        logged = set(marker.read_text(encoding="utf-8").splitlines()) if marker.exists() else set()
        for row in rows:
            identifier = _identifier(row)
            if (line := f"{project} {identifier}") not in logged:
                _log_row(row, project, identifier, folder)
                with marker.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")
    except Exception as error:  # a finished study must not end in a trouble of the network
        text = (
            f"W&B has not taken all rows ({error}). The table has them; run the same command again to log the others."
        )
        Console(stderr=True).print(text, soft_wrap=True, markup=False, emoji=False)


def _identifier(row: dict[str, Any]) -> str:
    content = [row[name] for name in ("study", "arm", "cell", "model", "n", "m", "t")]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _log_row(row: dict[str, Any], project: str, identifier: str, folder: Path) -> None:
    config = {
        name: value for name, value in row.items() if not name.startswith(("curve_", "predicted_")) and name != "config"
    }
    known = {"n": row["n"], "m": row["m"], "t": row["t"], "width": row["width"], "lr": row["lr"], "seed": row["seed"]}
    varied = (f"{name} {value:g}" for name, value in known.items() if value is not None)
    name = ", ".join([row["arm"], *([row["model"]] if row["model"] != row["arm"] else []), *varied])
    summary = ("optimal_error", "last_error", "optimal_loss", "last_loss")
    with wandb.init(project=project, group=row["study"], name=name, id=identifier, config=config, dir=folder) as run:
        for step, error, loss in zip(row["curve_steps"], row["curve_errors"], row["curve_losses"], strict=True):
            run.log({"test/error": error, "test/loss": loss}, step=int(step))
        run.summary.update({f"test/{column}": row[column] for column in summary})
