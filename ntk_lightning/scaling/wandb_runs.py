"""The rows of a study as W&B runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wandb

__all__ = ["log_rows"]


def log_rows(rows: Sequence[dict[str, Any]], project: str, group: str, folder: Path) -> None:
    """Log each row of a cell as one run: its curve as history, its least and last errors as summary.

    Args:
        rows: Of one cell, with the columns of the result table.
        project: W&B project.
        group: Name of the study, which groups its runs.
        folder: Where W&B keeps its files; offline unless ``WANDB_MODE`` says otherwise.
    """
    for row in rows:
        config = {name: value for name, value in row.items() if not name.startswith("curve_") and name != "config"}
        name = f"{row['model']}, n {row['n']}, seed {row['seed']}"
        with wandb.init(project=project, group=group, name=name, config=config, dir=folder) as run:
            curve = zip(row["curve_steps"], row["curve_errors"], row["curve_losses"], strict=True)
            for step, error, loss in curve:
                run.log({"test/error": error, "test/loss": loss}, step=int(step))
            run.summary.update({"test/optimal_error": row["optimal_error"], "test/last_error": row["last_error"]})
