"""When a network in training and the kernel that it started with part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ntk_lightning.studies.figure_lines import Series, collect, study_series
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["TimedPair", "parting_step", "timed_pairs"]


@dataclass(frozen=True)
class TimedPair:
    """A network in training, the kernel K^0 trained beside it, and the kernels K^t taken from it.

    Args:
        kernel: Test error or loss of K^t after its fit, at each t.
        network: The network's own at each t.
        initial: That of K^0 trained for t steps, at each t from 1 on.
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
            return f"{self.network.label} is {ahead} {self.initial.label} from t = {self.steps[0]} on."
        if self.parting == self.steps[-1]:
            return f"{names} do not part: the former is at no two measured steps in a row {ahead} the latter."
        return (
            f"{names} part after t = {self.parting}: at the next measured steps the former is for the first time "
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
    chance = float(results.config["figure"].get("chance", 0.5))
    guessing = chance if quantity == "error" else 1.0  # the mean squared error of 0
    pairs = []
    for kernel in study_series(results, quantity):
        if results.axis != "t" or not kernel.places:
            continue
        network = _beside(kernel, "network", f"network_{quantity}")
        trained = replace(kernel, rows=[row for row in kernel.rows if row["t"] > 0])  # K^0 untrained is 0 everywhere
        initial = _beside(trained, "$K^0$", f"initial_{quantity}")
        steps = [t for t in initial.places if t in network.places]
        of_network, of_initial = ([float(line.at(t).mean()) for t in steps] for line in (network, initial))
        parting = parting_step(steps, of_network, of_initial, guessing=guessing)
        pairs.append(TimedPair(kernel, network, initial, parting, steps))
    return pairs


def _beside(kernel: Series, name: str, column: str) -> Series:
    """The line of another column of the same rows."""
    label = kernel.label.replace("$K^t$", name)
    return collect(replace(kernel, label=label, values={}, left_out=[]), "t", column)


def parting_step(
    steps: Sequence[int],
    network: Sequence[float],
    kernel: Sequence[float],
    tolerance: float = 0.1,
    guessing: float = math.inf,
) -> int | None:
    """Find when a network parts from the kernel K^0 that it started with.

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
        >>> parting_step([1, 10, 100, 1000], [0.5, 0.3, 0.2, 0.1], [0.5, 0.31, 0.25, 0.24])
        10
    """
    pairs = zip(network, kernel, strict=True)
    ahead = [of_network < (1 - tolerance) * min(of_kernel, guessing) for of_network, of_kernel in pairs]
    together = None
    for place, step in enumerate(steps):
        if all(ahead[place : place + 2]):
            break
        together = step
    return together
