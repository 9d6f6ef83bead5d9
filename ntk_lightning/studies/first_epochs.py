"""A row of results as it would be if training had ended after its first epochs."""

from __future__ import annotations

import math
from typing import Any

from ntk_lightning.optim import OptimizerConfig

__all__ = ["after_first_epochs"]


def after_first_epochs(row: dict[str, Any], epochs: int | None) -> dict[str, Any]:
    """Cut the curve of a fitted model.

    Batches and rate do not depend on the length of a run, so the first epochs of a long one are a short one.

    Args:
        row: Of the result table.
        epochs: How many epochs count; None for all.

    Returns:
        The row, with the least and last values of the curve so far; itself where it is no longer than that.

    Example:
        >>> row = {"n": 4, "batch_size": 2, "full_batch": False, "epochs": 3, "curve_steps": [2, 4, 6],
        ...        "curve_errors": [0.5, 0.25, 0.125], "curve_losses": [1.0, 0.75, 0.5]}
        >>> cut = after_first_epochs(row, 2)
        >>> cut["optimal_error"], cut["optimal_step"], cut["epochs"], cut["curve_steps"]
        (0.25, 4, 2, [2, 4])
    """
    if epochs is None or row["epochs"] <= epochs:
        return row
    per_epoch = OptimizerConfig(batch_size=row["batch_size"], full_batch=row["full_batch"]).steps_per_epoch(row["n"])
    count = sum(step <= epochs * per_epoch for step in row["curve_steps"])
    columns = {name: row[name][:count] for name in ("curve_steps", "curve_errors", "curve_losses")}
    errors, losses = columns["curve_errors"], columns["curve_losses"]
    least = min(errors)
    return {
        **row,
        **columns,
        "epochs": epochs,
        "optimal_error": least,
        "optimal_step": columns["curve_steps"][errors.index(least)],
        "last_error": errors[-1],
        "optimal_loss": min((loss for loss in losses if math.isfinite(loss)), default=math.inf),
        "last_loss": losses[-1],
    }
