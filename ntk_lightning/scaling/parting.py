"""When a network in training and the kernel that it started with part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ntk_lightning.scaling.results import StudyResults
from ntk_lightning.scaling.series import Quantity, Series, collect, study_series

__all__ = ["TimedPair", "parting_step", "timed_pairs"]


@dataclass(frozen=True)
class TimedPair:
    """A network in training, the kernel K^0 trained beside it, and the kernels K^t taken from it.

    Args:
        kernel: Test error or loss of K^t after its fit, at each t.
        network: The network's own at each t.
        initial: That of K^0 while it is trained by the same steps, at the end of each epoch.
        parting: Last step before the network leaves K^0 behind, see :func:`parting_step`; None if it is ahead at once.
        steps: Steps at which both were measured.
    """

    kernel: Series
    network: Series
    initial: Series
    parting: int | None
    steps: list[int]

    def __str__(self) -> str:
        """Say when they part, in a sentence."""
        names, ahead = f"{self.network.label} and {self.initial.label}", "more than 10% below"
        if not self.steps:
            return f"{names} were never measured at the same step."
        if self.parting is None:
            return f"{self.network.label} is {ahead} {self.initial.label} from the first epoch on."
        if self.parting == self.steps[-1]:
            return f"{names} do not part: the former is never {ahead} the latter."
        return (
            f"{names} part after t = {self.parting}: at the end of the next epoch the former is for the first time "
            f"{ahead} the latter."
        )


def timed_pairs(results: StudyResults, quantity: Quantity = "error") -> list[TimedPair]:
    """Compare networks and the kernels they started with step by step, in a study whose axis is t.

    Args:
        results: A study.
        quantity: Test error or test loss.

    Returns:
        One pair a line of kernels; their means over seeds decide when they part.
    """
    pairs = []
    for kernel in study_series(results, quantity):
        if results.axis != "t" or not kernel.places:
            continue
        names = {name: kernel.label.replace("$K^t$", name) for name in ("network", "$K^0$")}
        network = collect(replace(kernel, label=names["network"], values={}, left_out=[]), "t", f"network_{quantity}")
        initial = _curve(kernel, names["$K^0$"], [row for row in kernel.rows if row["t"] == 0], quantity)
        same = {"arm": kernel.arm, "model": "network", "n": kernel.rows[0]["n"], "width": kernel.rows[0]["width"]}
        trained = [row for row in results.rows if same.items() <= row.items()]
        own = _curve(kernel, names["network"], trained, quantity)
        steps = [t for t in initial.places if t in own.places]
        of_network, of_initial = ([float(line.at(t).mean()) for t in steps] for line in (own, initial))
        pairs.append(TimedPair(kernel, network, initial, parting_step(steps, of_network, of_initial), steps))
    return pairs


def _curve(line: Series, label: str, rows: list[dict[str, Any]], quantity: Quantity) -> Series:
    """The curves over training of some fits, finite values only."""
    column = "curve_errors" if quantity == "error" else "curve_losses"
    values: dict[int, dict[int | None, float]] = {}
    for row in rows:
        curve = zip(row["curve_steps"], row[column], strict=True)
        values[row["seed"]] = {step: value for step, value in curve if math.isfinite(value)}
    return replace(line, label=label, values=values, left_out=[], rows=rows)


def parting_step(
    steps: Sequence[int], network: Sequence[float], kernel: Sequence[float], tolerance: float = 0.1
) -> int | None:
    """Find when a network parts from the kernel K^0 that it started with.

    The last step before the network's error is for the first time below (1 - tolerance) times that of K^0. What the
    curves do later, when K^0 may be unstable, does not matter.

    Args:
        steps: Steps, ascending.
        network: The network's test error or loss at these steps.
        kernel: That of K^0, trained by the same steps.
        tolerance: Relative difference that still counts as agreement.

    Returns:
        The step: the last of all where the two never part, None where they are apart at the first.

    Example:
        >>> parting_step([1, 10, 100, 1000], [0.5, 0.3, 0.2, 0.1], [0.5, 0.31, 0.25, 0.24])
        10
    """
    together = None
    for step, of_network, of_kernel in zip(steps, network, kernel, strict=True):
        if of_network < (1 - tolerance) * of_kernel:
            break
        together = step
    return together
