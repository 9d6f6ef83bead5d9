"""When a network departs from its initial kernel: the step at which its error drops below that of K^0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ntk_lightning.studies.figure_lines import Line
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["Departure", "departure_step", "find_departures"]


@dataclass(frozen=True)
class Departure:
    """A network in training, the kernel K^0 trained beside it, and the kernels K^t taken from it.

    Args:
        kernel: Test error or loss of K^t after its fit, at each t.
        network: The network's own at each t.
        initial: That of K^0 trained for t steps, at each t from 1 on.
        step: Last step before the network leaves K^0 behind, see :func:`departure_step`; None if it is ahead at once.
        steps: Steps at which both were measured.
    """

    kernel: Line
    network: Line
    initial: Line
    step: int | None
    steps: list[int]

    def __str__(self) -> str:
        """Say when they part, in a sentence."""
        names, ahead = f"{self.network.label} and {self.initial.label}", "more than 10% below"
        if not self.steps:
            return f"{names} were never measured at the same step."
        if self.step is None:
            return f"{self.network.label} is {ahead} {self.initial.label} from t = {self.steps[0]} on."
        if self.step == self.steps[-1]:
            return f"{names} do not part: the former is at no two measured steps in a row {ahead} the latter."
        return (
            f"{names} part after t = {self.step}: at the next measured steps the former is for the first time "
            f"{ahead} the latter."
        )


def find_departures(results: StudyResults, lines: Sequence[Line], quantity: Quantity) -> list[Departure]:
    """Compare networks and the kernels they started with step by step, in a study whose axis is t.

    Args:
        results: A study.
        lines: Of its figure.
        quantity: Test error or test loss.

    Returns:
        One for each line of kernels K^t; means over seeds decide. None where the axis is not t.
    """
    guessing = results.config.figure.chance if quantity == "error" else 1.0  # the mean squared error of 0
    departures = []
    for kernel in lines:
        if results.axis != "t" or not kernel.xs:
            continue
        trained = [row for row in kernel.rows if row["t"] > 0]  # K^0 untrained is 0 everywhere
        network = _beside(kernel, kernel.rows, "network", f"network_{quantity}")
        initial = _beside(kernel, trained, "$K^0$", f"initial_{quantity}")
        steps = [t for t in initial.xs if t in network.xs]
        of_network, of_initial = ([float(line.at(t).mean()) for t in steps] for line in (network, initial))
        step = departure_step(steps, of_network, of_initial, guessing=guessing)
        departures.append(Departure(kernel, network, initial, step, steps))
    return departures


def _beside(kernel: Line, rows: list[dict[str, Any]], name: str, column: str) -> Line:
    """The line of another column of a kernel's rows."""
    label = kernel.label.replace("$K^t$", name)
    return Line.of_rows(label, kernel.arm, kernel.model, rows, "t", column)


def departure_step(
    steps: Sequence[int],
    network: Sequence[float],
    kernel: Sequence[float],
    tolerance: float = 0.1,
    guessing: float = math.inf,
) -> int | None:
    """Find when a network departs from the kernel K^0 that it started with.

    The last step before the network's error is for the first time below (1 - tolerance) times that of K^0, at two
    measured steps in a row (or at the last). What the curves do later, when K^0 may be unstable, does not matter, nor
    what they do before either is better than guessing.

    Args:
        steps: Steps, ascending.
        network: The network's test error or loss at these steps.
        kernel: That of K^0, trained by the same steps.
        tolerance: Relative difference that still counts as agreement.
        guessing: The error or loss of a model that knows nothing; a K^0 that is worse counts as that.

    Returns:
        The step: the last of all where the two never part, None where they are apart at the first.

    Example:
        >>> departure_step([1, 10, 100, 1000], [0.5, 0.3, 0.2, 0.1], [0.5, 0.31, 0.25, 0.24])
        10
    """
    pairs = zip(network, kernel, strict=True)
    ahead = [of_network < (1 - tolerance) * min(of_kernel, guessing) for of_network, of_kernel in pairs]
    together = None
    for position, step in enumerate(steps):
        if all(ahead[position : position + 2]):
            break
        together = step
    return together
