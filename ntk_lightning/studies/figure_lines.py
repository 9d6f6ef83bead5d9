"""The lines of a study's figure: which fits make one line, and what it is called."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_lightning.studies.figure_text import size_text
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import AFTER, DURING, FRESH, MODELS, Axis, Quantity

__all__ = ["Line", "study_lines"]

AFTER_KERNELS = {AFTER: "K", FRESH: "K^F"}
SETTINGS = {
    **{"width": "width", "lr": "lr", "momentum": "momentum", "batch_size": "batch", "epochs": "epochs"},
    "full_batch": "full batch",
}


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Args:
        label: Its name in the legend; mathematics between dollar signs.
        arm: The study's name for it.
        model: The kind of model.
        n: Samples fitted, where all its points share them.
        values: Test error or loss, by seed and value of x; finite ones only. x is None for a model that has no place on
            the horizontal axis, such as the infinite width against time.
        left_out: x and seed of every fit that has no finite value.
        rows: The fits behind it.
    """

    label: str
    arm: str
    model: str
    n: int | None
    values: dict[int, dict[int | None, float]]
    left_out: list[str]
    rows: list[dict[str, Any]]

    @classmethod
    def of_rows(cls, label: str, arm: str, model: str, rows: list[dict[str, Any]], axis: Axis, column: str) -> Line:
        """Make a line of a column of some fits.

        Args:
            label: Its name.
            arm: Of the fits.
            model: The same.
            rows: The fits.
            axis: The horizontal axis.
            column: Column of the values.

        Returns:
            The line.

        Raises:
            ValueError: Two fits have one seed and one x.
        """
        values: dict[int, dict[int | None, float]] = {}
        left_out = []
        for row in rows:
            x, value = _x_of(row, axis), row[column]
            if x in values.get(row["seed"], {}):
                raise ValueError(
                    f"{label} has two fits at {axis} = {x} with seed {row['seed']}: give arms that differ different "
                    "names in the study."
                )
            if value is None or not math.isfinite(value):
                left_out.append(f"{axis} = {x}, seed {row['seed']}")
            else:
                values.setdefault(row["seed"], {})[x] = value
        return cls(label, arm, model, _shared(rows, "n"), values, left_out, rows)

    @property
    def xs(self) -> list[int]:
        """Values on the horizontal axis, ascending."""
        return sorted({x for by_x in self.values.values() for x in by_x if x is not None})

    def at(self, x: int | None) -> NDArray[np.float64]:
        """Collect the values of all seeds at one x.

        Args:
            x: On the horizontal axis.

        Returns:
            The values, (seeds,).
        """
        return np.array([by_x[x] for by_x in self.values.values() if x in by_x])


def study_lines(results: StudyResults, quantity: Quantity = "error") -> list[Line]:
    """Sort a study's fits into the lines of its figure.

    A line is an arm and a model, at one width, n, m, t and choice of hyperparameters where these are not the horizontal
    axis. Kernels of networks trained on the n samples themselves (m = n) make one line, K_n(n); those of one network,
    K_m(n), one for each m.

    Args:
        results: A study.
        quantity: Test error or test loss (mean squared error).

    Returns:
        The lines, networks first, also those without any finite value; values are the best over training,
        ``optimal_error`` or ``optimal_loss``, or those of the last step where the study's ``figure.value`` is "last".

    Raises:
        ValueError: A line has two fits of one seed at one x.
    """
    axis, column = results.axis, f"{results.value}_{quantity}"
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results.rows:
        groups.setdefault((row["model"], row["arm"]), []).append(row)
    order = {model: position for position, model in enumerate(MODELS)}
    lines = [
        Line.of_rows(_label(rows, group, axis, time), arm, model, rows, axis, column)
        for (model, arm), group in sorted(groups.items(), key=lambda item: order.get(item[0][0], len(order)))
        for rows, time in _split(group, axis)
    ]
    for telling in ("arm", "model"):  # what tells lines of one name apart
        names = Counter(line.label for line in lines)
        lines = [
            replace(line, label=f"{line.label} ({getattr(line, telling)})")
            if names[line.label] > 1 and getattr(line, telling) != line.label
            else line
            for line in lines
        ]
    return lines


def _x_of(row: dict[str, Any], axis: Axis) -> int | None:
    """Where a fit stands on the horizontal axis."""
    if axis == "m" and row["m"] is None:  # a network or a kernel of none: the samples it was trained on itself
        x = row["n"]
    elif axis == "t" and row["model"] != DURING:  # t of an after-kernel is its network's last step, no time of its own
        x = None
    else:
        x = row[axis]
    return None if x is None else int(x)


def _shared(rows: list[dict[str, Any]], column: str) -> int | None:
    values = {row[column] for row in rows}
    return values.pop() if len(values) == 1 else None


def _by(rows: list[dict[str, Any]], column: str) -> list[list[dict[str, Any]]]:
    """Split by a column's values, ascending, null first."""
    values = sorted({row[column] for row in rows}, key=lambda value: (value is not None, value))
    return [[row for row in rows if row[column] == value] for value in values]


def _split(group: list[dict[str, Any]], axis: Axis) -> list[tuple[list[dict[str, Any]], str]]:
    """Split the fits of one arm and model into lines, with the text of their time."""
    # Beside SETTINGS, what has one value a line:
    #
    #   axis    columns
    #   n       m; but K_n(n), whose m is n at every point, is one line
    #   m       n of kernels of trained networks; of other models n is on the axis itself
    #   t       n
    #   width   n
    #
    # and on every axis but t the time t of kernels during training.
    of_network = group[0]["m"] is not None
    columns = [column for column in SETTINGS if column != axis]
    if axis in ("t", "width") or (axis == "m" and of_network):
        columns.append("n")
    parts = [group]
    for column in columns:
        parts = [split for part in parts for split in _by(part, column)]
    if axis == "n":
        parts = [split for part in parts for split in _by_samples_of_network(part)]
    if axis != "t" and group[0]["model"] == DURING:
        return [split for part in parts for split in _by_time(part)]
    return [(part, "") for part in parts]


def _by_samples_of_network(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split after-kernels into K_n(n), whose m is n, and a K_m(n) for every other m."""
    fixed = sorted({row["m"] for row in rows if row["m"] is not None and row["m"] != row["n"]})
    own = [row for row in rows if row["m"] is None or row["m"] == row["n"]]
    if all(row["m"] in fixed for row in own):
        own = []
    return [part for part in (own, *([row for row in rows if row["m"] == m] for m in fixed)) if part]


def _by_time(rows: list[dict[str, Any]]) -> list[tuple[list[dict[str, Any]], str]]:
    """Split by t, or by its rank where schedules differ with n."""
    schedules: dict[tuple[int, int], set[int]] = {}  # by n and seed, the steps that kernels were taken at
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


def _label(rows: list[dict[str, Any]], group: list[dict[str, Any]], axis: Axis, time: str) -> str:
    """Name a line by its arm or kernel, and by what tells it from the other lines of the same arm and model."""
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
