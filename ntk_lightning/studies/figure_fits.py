"""Power laws of the lines of a study's figure, and their exponents beside each other and the published ones."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ntk_lightning.scaling.power_law import PowerLawFit, compare_exponents, fit_power_law
from ntk_lightning.studies.figure_lines import Line, study_lines
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["Exponent", "FittedSeries", "compare_lines", "fit_lines", "fit_series"]


@dataclass(frozen=True)
class FittedSeries:
    """A line of a figure and its power law.

    Args:
        series: The line.
        fit: Its power law; None where there is none to fit.
        seeds: Seeds behind the fit.
        notes: What a reader must know of the fit, one sentence each.
    """

    series: Line
    fit: PowerLawFit | None
    seeds: tuple[int, ...]
    notes: list[str]


@dataclass(frozen=True)
class Exponent:
    """The exponent of a line, and what it is compared with.

    Args:
        fitted: The line and its power law.
        published: The source paper's exponent of it, of test errors only; None where there is none.
        p_value: Of the hypothesis that it is that of the first line; None where that was not tested.
        paired: Whether the test paired the seeds, which both lines share.
        notes: What a reader must know of it, one sentence each.
    """

    fitted: FittedSeries
    published: float | None
    p_value: float | None
    paired: bool
    notes: list[str]

    @property
    def label(self) -> str:
        """The name of the line."""
        return self.fitted.series.label


def fit_series(results: StudyResults, quantity: Quantity = "error") -> list[FittedSeries]:
    """Fit a power law to every line of a figure whose axis is n or m.

    Args:
        results: A study.
        quantity: Test error or test loss.

    Returns:
        The lines that have values, and their fits; none where the horizontal axis is time or width.
    """
    return fit_lines(results, [line for line in study_lines(results, quantity) if line.values], quantity)


def fit_lines(results: StudyResults, lines: Sequence[Line], quantity: Quantity) -> list[FittedSeries]:
    """Fit a power law to given lines of a figure (see :func:`fit_series`).

    Args:
        results: The study.
        lines: Lines of its figure that have values.
        quantity: What they show.

    Returns:
        The lines and their fits.
    """
    if results.axis not in ("n", "m"):
        return []
    return [_fit(line, _chance(results, quantity)) for line in lines]


def compare_lines(results: StudyResults, fits: Sequence[FittedSeries], quantity: Quantity) -> list[Exponent]:
    """Compare the exponents of a figure with the first line's, and with the published ones.

    Args:
        results: The study.
        fits: Its lines and their fits.
        quantity: What they show.

    Returns:
        One exponent a line.
    """
    published = results.config.figure.published if quantity == "error" else {}
    arms = Counter(fitted.series.arm for fitted in fits)
    exponents = []
    for fitted in fits:
        p_value, paired, notes = None, False, list[str]()
        if fitted is not fits[0]:
            p_value, paired, notes = _compare(fits[0], fitted, _chance(results, quantity))
        arm, label = fitted.series.arm, fitted.series.label
        of_arm = published.get(arm) if arms[arm] == 1 else None
        exponents.append(Exponent(fitted, published.get(label, of_arm), p_value, paired, fitted.notes + notes))
    return exponents


def _chance(results: StudyResults, quantity: Quantity) -> float | None:
    """The error of guessing; a loss has none that a fit could check."""
    return results.config.figure.chance if quantity == "error" else None


def _compare(first: FittedSeries, other: FittedSeries, chance: float | None) -> tuple[float | None, bool, list[str]]:
    """Test whether two lines have one exponent, on the sizes that both have: p-value, whether paired, notes."""
    a, b = first.fit, other.fit
    if a is None or b is None:
        return None, False, []
    notes, label = list[str](), first.series.label
    if [*a.n] != [*b.n]:
        common = [int(n) for n in a.n if n in b.n]
        if len(common) < 2:
            return None, False, [f"No p-value: fewer than 2 of its sizes are those of {label}."]
        notes.append(f"The p-value compares it with {label} on the {len(common)} sizes that both have.")
        a, b = (_power_law(fit.series, fit.seeds, common, chance)[0] for fit in (first, other))
    if a is None or b is None or not math.isfinite(a.standard_error) or not math.isfinite(b.standard_error):
        return None, False, []  # one seed and two sizes leave nothing to test with
    paired = other.seeds == first.seeds and len(other.seeds) > 1
    return compare_exponents(a, b, paired=paired).p_value, paired, notes


def _fit(line: Line, chance: float | None) -> FittedSeries:
    """Fit the largest full table of seeds and sizes that a line has."""
    xs = line.xs
    full = [seed for seed in sorted(line.values) if len(line.values[seed]) == len(xs)]
    common = [x for x in xs if all(x in by_x for by_x in line.values.values())]
    notes = []
    if len(full) < len(line.values):
        if len(full) * len(xs) >= len(line.values) * len(common):
            notes.append("The fit leaves out seeds that lack a size.")
        else:
            full, xs = sorted(line.values), common
            notes.append("The fit leaves out sizes that some seeds lack.")
    if len(xs) < 2:
        return FittedSeries(line, None, tuple(full), [*notes, "No power law: it needs 2 or more sizes."])
    fit, more = _power_law(line, full, xs, chance)
    return FittedSeries(line, fit, tuple(full), notes + more)


def _power_law(
    line: Line, seeds: Sequence[int], xs: Sequence[int], chance: float | None
) -> tuple[PowerLawFit | None, list[str]]:
    """Fit some seeds and sizes of a line; what the fit warns about, or why there is none, becomes notes."""
    table = [[line.values[seed][x] for x in xs] for seed in seeds]  # (seeds, sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = fit_power_law(xs, table, chance=chance)
        except ValueError as error:
            return None, [str(error), *(str(warning.message) for warning in caught)]
    return fit, [str(warning.message) for warning in caught]
