"""Power laws of the lines of a study's figure, and their exponents beside each other and the published ones."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ntk_lightning.scaling.multiple_tests import holm
from ntk_lightning.scaling.power_law import ExponentDifference, PowerLawFit, compare_exponents, fit_power_law
from ntk_lightning.studies.figure_lines import Line, study_lines
from ntk_lightning.studies.figure_predictions import Prediction, predict_line
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["Comparison", "Exponent", "FittedSeries", "compare_lines", "fit_lines", "fit_series"]

_LEVEL = 0.05  # of significance
_LEAST_WITH_FLOOR = 4  # sizes, of a law with three parameters
_CURVED, _PERHAPS_CURVED = 0.01, 0.1  # p-values: below the first the fit itself warns
_BENT = 1.5  # ratio of the exponents at both ends that is worth a note


@dataclass(frozen=True)
class FittedSeries:
    """A line of a figure and its power law.

    Args:
        series: The line.
        fit: Its power law; None where there is none to fit.
        seeds: Seeds behind the fit.
        notes: What a reader must know of the fit, one sentence each.
        with_floor: The law with an offset on the same sizes; None where there are fewer than 4.
    """

    series: Line
    fit: PowerLawFit | None
    seeds: tuple[int, ...]
    notes: list[str]
    with_floor: PowerLawFit | None = None


@dataclass(frozen=True)
class Comparison:
    """The difference of two exponents, tested.

    Args:
        difference: Of the first line's exponent and this one's, with interval and p-value.
        paired: Whether the test paired the seeds, which both lines share.
        corrected_p_value: Corrected for the number of comparisons in the figure (Holm, 1979).
    """

    difference: ExponentDifference
    paired: bool
    corrected_p_value: float

    @property
    def verdict(self) -> str:
        """What the corrected p-value says at the level of 5%."""
        return "different" if self.corrected_p_value < _LEVEL else "not told apart"


@dataclass(frozen=True)
class Exponent:
    """The exponent of a line, and what it is compared with.

    Args:
        fitted: The line and its power law.
        published: The source paper's exponent of it, of test errors only; None where there is none.
        comparison: With the first line's; None where that was not tested.
        floor_comparison: The same of laws with a floor.
        predicted: The curve that its kernel's spectrum predicts; None where the line is of no kernel, or has none.
        notes: What a reader must know of it, one sentence each.
    """

    fitted: FittedSeries
    published: float | None
    comparison: Comparison | None
    floor_comparison: Comparison | None
    predicted: Prediction | None
    notes: list[str]

    @property
    def p_value(self) -> float | None:
        """Of the hypothesis that it is that of the first line; None where that was not tested."""
        return None if self.comparison is None else self.comparison.difference.p_value

    @property
    def paired(self) -> bool:
        """Whether the test paired the seeds, which both lines share."""
        return self.comparison is not None and self.comparison.paired

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
    chance = _chance(results, quantity)
    tests, floor_tests = (
        [_compare(fits[0], fitted, chance, floor) if number else _Test() for number, fitted in enumerate(fits)]
        for floor in (False, True)
    )
    exponents = []
    for fitted, test, comparison, floor_comparison in zip(
        fits, tests, _corrected(tests), _corrected(floor_tests), strict=True
    ):
        arm, label = fitted.series.arm, fitted.series.label
        of_arm = published.get(arm) if arms[arm] == 1 else None
        of_paper = published.get(label, of_arm)
        shown = results.axis == "n" and results.value == "optimal"  # the prediction is that of the best ridge
        predicted = predict_line(fitted.series, quantity) if shown else None
        exponents.append(Exponent(fitted, of_paper, comparison, floor_comparison, predicted, fitted.notes + test.notes))
    return exponents


class _Test(NamedTuple):
    """A difference of exponents, if there is one to test, whether seeds were paired, and what must be said of it."""

    difference: ExponentDifference | None = None
    paired: bool = False
    notes: list[str] = []  # noqa: RUF012 - never changed


def _corrected(tests: Sequence[_Test]) -> list[Comparison | None]:
    """Correct the p-values of a figure's tests for their number."""
    p_values = holm([None if test.difference is None else test.difference.p_value for test in tests])
    return [
        None if test.difference is None or p_value is None else Comparison(test.difference, test.paired, p_value)
        for test, p_value in zip(tests, p_values, strict=True)
    ]


def _chance(results: StudyResults, quantity: Quantity) -> float | None:
    """The error of guessing; a loss has none that a fit could check."""
    return results.config.figure.chance if quantity == "error" else None


def _compare(first: FittedSeries, other: FittedSeries, chance: float | None, floor: bool) -> _Test:
    """Test whether two lines have one exponent, on the sizes that both have."""
    a, b = (fitted.with_floor if floor else fitted.fit for fitted in (first, other))
    if a is None or b is None:
        return _Test()
    notes, label = list[str](), first.series.label
    if [*a.n] != [*b.n]:
        common = [int(n) for n in a.n if n in b.n]
        if len(common) < (_LEAST_WITH_FLOOR if floor else 2):
            return _Test(notes=[f"No p-value: fewer than 2 of its sizes are those of {label}."])
        notes.append(f"The p-value compares it with {label} on the {len(common)} sizes that both have.")
        a, b = (_power_law(fitted.series, fitted.seeds, common, chance, floor)[0] for fitted in (first, other))
    if a is None or b is None or not math.isfinite(a.standard_error) or not math.isfinite(b.standard_error):
        return _Test()  # one seed and as many parameters as sizes leave nothing to test with
    paired = other.seeds == first.seeds and len(other.seeds) > 1
    return _Test(compare_exponents(a, b, paired=paired), paired, notes)


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
    floor = _power_law(line, full, xs, chance, True)[0] if fit and len(fit.n) >= _LEAST_WITH_FLOOR else None
    return FittedSeries(line, fit, tuple(full), [*notes, *more, *_bend(fit)], floor)


def _bend(fit: PowerLawFit | None) -> list[str]:
    """Say where a law bends that the test of curvature lets pass: a parabola's exponents at both ends."""
    if fit is None or len(fit.n) < 4 or not _CURVED <= fit.curvature_p_value < _PERHAPS_CURVED:
        return []
    x = np.log(fit.n)
    square, slope, _ = np.polyfit(x, np.log(fit.mean_errors), 2)
    first, last = -(slope + 2 * square * x[0]), -(slope + 2 * square * x[-1])
    if min(first, last) > 0 and max(first, last) < _BENT * min(first, last):
        return []
    return [
        f"The errors may bend in log-log (p = {fit.curvature_p_value:.1g}): a parabola through the means has the "
        f"exponent {first:.2f} at {fit.n[0]:g} and {last:.2f} at {fit.n[-1]:g}, so that the fitted one depends on the "
        "sizes."
    ]


def _power_law(
    line: Line, seeds: Sequence[int], xs: Sequence[int], chance: float | None, floor: bool = False
) -> tuple[PowerLawFit | None, list[str]]:
    """Fit some seeds and sizes of a line; what the fit warns about, or why there is none, becomes notes."""
    table = [[line.values[seed][x] for x in xs] for seed in seeds]  # (seeds, sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = fit_power_law(xs, table, chance=chance, offset=floor)
        except ValueError as error:
            return None, [str(error), *(str(warning.message) for warning in caught)]
    return fit, [str(warning.message) for warning in caught]
