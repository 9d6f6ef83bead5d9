"""The lines of a study's figure: which fits make one line, and what it is called."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import AFTER, DURING, FRESH, MODELS, Quantity

__all__ = ["Series", "collect", "size_text", "study_series"]

AFTER_KERNELS = {AFTER: "K", FRESH: "K^F"}
SETTINGS = {
    **{"width": "width", "lr": "lr", "momentum": "momentum", "batch_size": "batch", "epochs": "epochs"},
    "full_batch": "full batch",
}


@dataclass(frozen=True)
class Series:
    """One line of a figure.

    Args:
        label: Its name in the legend; mathematics between dollar signs.
        arm: The study's name for it.
        model: The kind of model.
        n: Samples fitted, where all its points share them.
        values: Test error or loss, by seed and place on the horizontal axis; finite values only. The place is None for
            a model without one, such as the infinite width.
        left_out: Places and seeds of fits that have no finite value.
        rows: The fits behind it.
    """

    label: str
    arm: str
    model: str
    n: int | None
    values: dict[int, dict[int | None, float]]
    left_out: list[str]
    rows: list[dict[str, Any]]

    @property
    def places(self) -> list[int]:
        """Places on the horizontal axis, ascending."""
        return sorted({x for by_x in self.values.values() for x in by_x if x is not None})

    def at(self, x: int | None) -> NDArray[np.float64]:
        """Collect the values of all seeds at one place.

        Args:
            x: The place.

        Returns:
            The values, (seeds,).
        """
        return np.array([by_x[x] for by_x in self.values.values() if x in by_x])


def size_text(size: int) -> str:
    """Shorten a size: 16000 becomes 16k.

    Returns:
        The text.
    """
    return f"{size // 1000}k" if size >= 1000 and size % 1000 == 0 else str(size)


def study_series(results: StudyResults, quantity: Quantity = "error", *, keep_empty: bool = False) -> list[Series]:
    """Sort a study's fits into the lines of its figure.

    A line is an arm and a model, at one width, n, m, t and choice of hyperparameters where these are not the horizontal
    axis. Kernels of networks trained on the n samples themselves (m = n) make one line, K_n(n); those of one network,
    K_m(n), one for each m.

    Args:
        results: A study.
        quantity: Test error or test loss (mean squared error).
        keep_empty: Keep lines without any finite value as well.

    Returns:
        The lines, networks first; values are the best over training, ``optimal_error`` or ``optimal_loss``, or those of
        the last step where the study's ``figure.value`` is "last".

    Raises:
        ValueError: A line has two fits of one seed at one place.
    """
    axis = results.axis
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results.rows:
        groups.setdefault((row["model"], row["arm"]), []).append(row)
    order = {model: place for place, model in enumerate(MODELS)}
    lines = []
    for (model, arm), group in sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order))):
        for rows, time in _split(group, axis):
            label = _label(rows, group, axis, time)
            line = Series(label, arm, model, _shared(rows, "n"), {}, [], rows)
            lines.append(collect(line, axis, f"{results.value}_{quantity}"))
    for telling in ("arm", "model"):
        names = Counter(line.label for line in lines)
        lines = [
            replace(line, label=f"{line.label} ({getattr(line, telling)})")
            if names[line.label] > 1 and getattr(line, telling) != line.label
            else line
            for line in lines
        ]
    return [line for line in lines if line.values or keep_empty]


def collect(series: Series, axis: str, column: str) -> Series:
    """Sort a column of a line's fits by seed and place into the line.

    Args:
        series: A line that has no values yet.
        axis: The horizontal axis.
        column: Column of the values.

    Returns:
        The line.

    Raises:
        ValueError: It has two fits of one seed at one place.
    """
    for row in series.rows:
        x = (
            row["n"]
            if axis == "m" and row["m"] is None
            else row[axis]
            if axis != "t" or row["model"] == DURING
            else None
        )
        seen = series.values.get(row["seed"], {})
        if x in seen:
            raise ValueError(
                f"{series.label} has two fits at {axis} = {x} with seed {row['seed']}: give arms that differ different "
                "names in the study."
            )
        value = row[column]
        if value is None or not math.isfinite(value):
            series.left_out.append(f"{axis} = {x}, seed {row['seed']}")
        else:
            series.values.setdefault(row["seed"], {})[x] = value
    return series


def _shared(rows: list[dict[str, Any]], column: str) -> int | None:
    values = {row[column] for row in rows}
    return values.pop() if len(values) == 1 else None


def _by(rows: list[dict[str, Any]], column: str) -> list[list[dict[str, Any]]]:
    """Split by a column's values, ascending, null first."""
    values = sorted({row[column] for row in rows}, key=lambda value: (value is not None, value))
    return [[row for row in rows if row[column] == value] for value in values]


def _split(group: list[dict[str, Any]], axis: str) -> list[tuple[list[dict[str, Any]], str]]:
    """Split the fits of one arm and model into lines, with the text of their time."""
    parts = [group]
    for column in SETTINGS:
        if column != axis:
            parts = [split for part in parts for split in _by(part, column)]
    if axis in ("t", "width") or (axis == "m" and group[0]["m"] is not None):
        parts = [split for part in parts for split in _by(part, "n")]
    elif axis == "n":
        parts = [split for part in parts for split in _by_samples_of_network(part)]
    if axis == "t" or group[0]["model"] != DURING:
        return [(part, "") for part in parts]
    return [split for part in parts for split in _by_time(part)]


def _by_samples_of_network(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split after-kernels into K_n(n), whose m is n, and a K_m(n) for every other m."""
    fixed = sorted({row["m"] for row in rows if row["m"] is not None and row["m"] != row["n"]})
    own = [row for row in rows if row["m"] is None or row["m"] == row["n"]]
    if all(row["m"] in fixed for row in own):
        own = []
    return [part for part in (own, *([row for row in rows if row["m"] == m] for m in fixed)) if part]


def _by_time(rows: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], str]]:
    """Split by t, or by its rank where schedules differ with n."""
    schedules: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        schedules.setdefault((row["n"], row["seed"]), set()).add(row["t"])
    if all(schedule == next(iter(schedules.values())) for schedule in schedules.values()):
        return [(part, f", t = {part[0]['t']}") for part in _by(rows, "t")]
    ranks: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        ranks.setdefault(sorted(schedules[row["n"], row["seed"]]).index(row["t"]), []).append(row)
    parts = []
    for _, part in sorted(ranks.items()):
        low, high = min(row["t"] for row in part), max(row["t"] for row in part)
        parts.append((part, f", t = {low}" + (f" to {high}" if high > low else "")))
    return parts


def _label(rows: list[dict[str, Any]], group: list[dict[str, Any]], axis: str, time: str) -> str:
    row, model = rows[0], rows[0]["model"]
    label = str(row["arm"])
    if model == DURING:
        label = f"$K^t${time}"
    elif model in AFTER_KERNELS:
        samples = "n" if all(row["m"] == row["n"] for row in rows) else "m" if axis == "m" else size_text(row["m"])
        label = f"${AFTER_KERNELS[model]}_{{{samples}}}(n)${time}".replace("_{n}", "_n").replace("_{m}", "_m")
    for column, name in SETTINGS.items():
        if column != axis and len({row[column] for row in group}) > 1:
            if column == "full_batch":
                label += f", {name}" if row[column] else ", mini-batches"
                continue
            value = f"{row[column]:g}"
            label += "" if re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", label) else f", {name} {value}"
    of_network = axis == "m" and row["m"] is not None
    if of_network or (axis in ("t", "width") and len({row["n"] for row in group}) > 1):
        label += f", n = {size_text(row['n'])}"
    return label
