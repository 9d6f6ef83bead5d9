"""The predicted curve of a line's kernel, and how far it is from what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ntk_lightning.scaling.log_log import fit_line
from ntk_lightning.studies.figure_lines import Line
from ntk_lightning.studies.schema import Quantity

__all__ = ["Prediction", "predict_line"]

_COLUMNS: dict[Quantity, str] = {"error": "predicted_errors", "loss": "predicted_losses"}


@dataclass(frozen=True, eq=False)
class Prediction:
    """The learning curve that spectrum and labels of a line's kernel predict, averaged over seeds.

    Args:
        sizes: Samples n, increasing, (sizes,).
        values: Predicted test error or loss, (sizes,).
        seeds: How many have one.
        exponent: Of the power law through the values at the sizes that the line has too; NaN where these are fewer
            than 2.
        deviation: The measured mean differs from the prediction the most, as the ratio predicted / measured - 1; NaN
            where no measured size lies among the predicted ones.
        at: The size of that deviation.
    """

    sizes: NDArray[np.int64]
    values: NDArray[np.float64]
    seeds: int
    exponent: float
    deviation: float
    at: int | None

    def interpolate(self, n: int) -> float:
        """Read the curve at a size between the predicted ones, on a straight line in log-log.

        Args:
            n: Samples.

        Returns:
            The predicted value; NaN outside the predicted sizes.
        """
        if not self.sizes[0] <= n <= self.sizes[-1]:
            return float("nan")
        return float(np.exp(np.interp(np.log(n), np.log(self.sizes), np.log(self.values))))


def predict_line(line: Line, quantity: Quantity) -> Prediction | None:
    """Gather the predictions in the rows of a line whose axis is n.

    A kernel that is the same at every n, of the infinite width, at initialization or K_m, is predicted by its Gram on
    the largest n of each seed. K_n(n) is another kernel at each n and is predicted point by point, from the Gram of the
    n samples alone, by leave-one-out.

    Args:
        line: The line.
        quantity: What it shows.

    Returns:
        The prediction; None where no row has one.
    """
    rows = [row for row in line.rows if row["predicted_sizes"]]
    changes = len({row["m"] for row in line.rows}) > 1
    by_seed: dict[int, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: int(row["n"])):
        curve = _curve(row, quantity)
        if changes:  # its own point alone
            by_seed.setdefault(row["seed"], {})[row["n"]] = curve[row["n"]]
        else:
            by_seed[row["seed"]] = curve  # the largest n comes last
    if not by_seed:
        return None
    sizes = sorted(set.intersection(*(set(curve) for curve in by_seed.values())))
    if not sizes:
        return None
    values = np.array([np.mean([curve[n] for curve in by_seed.values()]) for n in sizes])
    prediction = Prediction(np.array(sizes), values, len(by_seed), float("nan"), float("nan"), None)
    pairs = [(n, prediction.interpolate(n), float(line.at(n).mean())) for n in line.xs]
    pairs = [pair for pair in pairs if np.isfinite(pair[1]) and min(pair[1:]) > 0]
    if not pairs:
        return prediction
    at, predicted, measured = max(pairs, key=lambda pair: abs(np.log(pair[1] / pair[2])))
    ns, curve_there = np.array([pair[0] for pair in pairs], float), np.array([pair[1] for pair in pairs])
    exponent = fit_line(ns, curve_there).beta if len(pairs) > 1 else float("nan")
    return Prediction(prediction.sizes, values, len(by_seed), exponent, predicted / measured - 1, at)


def _curve(row: dict[str, Any], quantity: Quantity) -> dict[int, float]:
    return dict(zip(row["predicted_sizes"], row[_COLUMNS[quantity]], strict=True))
