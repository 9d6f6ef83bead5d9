"""Exponents of the lines of a study's figure, beside the published ones, and whether they differ."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ntk_lightning.scaling.power_law import PowerLawFit, compare_exponents, fit_power_law
from ntk_lightning.studies.figure_lines import Series, study_series
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["FittedSeries", "exponents", "fit_series"]


@dataclass(frozen=True)
class FittedSeries:
    """A series and its power law.

    Args:
        series: The series.
        fit: Its power law; None where there is none to fit.
        seeds: Seeds behind the fit.
        notes: What a reader must know of the fit, one sentence each.
    """

    series: Series
    fit: PowerLawFit | None
    seeds: tuple[int, ...]
    notes: list[str]


def fit_series(results: StudyResults, quantity: Quantity = "error") -> list[FittedSeries]:
    """Fit a power law to every line of a figure whose axis is n or m.

    Args:
        results: A study.
        quantity: Test error or test loss.

    Returns:
        The lines and their fits; none where the horizontal axis is time or width.
    """
    if results.axis not in ("n", "m"):
        return []
    chance = results.config["figure"].get("chance", 0.5) if quantity == "error" else None
    return [_fit(series, chance) for series in study_series(results, quantity)]


def exponents(results: StudyResults, quantity: Quantity = "error") -> list[dict[str, Any]]:
    """Tabulate the exponents of a study.

    Args:
        results: A study.
        quantity: Test error or test loss.

    Returns:
        One row a line: series, beta, interval, r_squared, sizes, seeds, published (the paper's exponent, of test errors
        only), p_value and paired (of the difference from the first line; paired where both have the same seeds), notes.
    """
    published = results.config["figure"].get("published") or {} if quantity == "error" else {}
    fitted, rows = fit_series(results, quantity), []
    arms, first = Counter(line.series.arm for line in fitted), fitted[0] if fitted else None
    for line in fitted:
        fit, p_value, paired, notes = line.fit, None, False, list(line.notes)
        if fit and first and first.fit and line is not first:
            paired = line.seeds == first.seeds and len(line.seeds) > 1
            p_value = compare_exponents(first.fit, fit, paired=paired).p_value
            if [*first.fit.n] != [*fit.n]:
                notes.append(f"The p-value compares it with {first.series.label}, which is fitted on other sizes.")
        of_arm = published.get(line.series.arm) if arms[line.series.arm] == 1 else None
        rows.append(
            {
                "series": line.series.label,
                "beta": fit.beta if fit else None,
                "interval": fit.beta_interval if fit else None,
                "r_squared": fit.r_squared if fit else None,
                "sizes": [int(n) for n in fit.n] if fit else [],
                "seeds": len(line.seeds),
                "published": published.get(line.series.label, of_arm),
                "p_value": p_value,
                "paired": paired,
                "notes": notes,
            }
        )
    return rows


def _fit(series: Series, chance: float | None) -> FittedSeries:
    """Fit the largest full table of seeds and sizes that a series has."""
    places = series.places
    full = [seed for seed in sorted(series.values) if len(series.values[seed]) == len(places)]
    common = [x for x in places if all(x in by_x for by_x in series.values.values())]
    notes = []
    if len(full) < len(series.values):
        if len(full) * len(places) >= len(series.values) * len(common):
            notes.append("The fit leaves out seeds that lack a size.")
        else:
            full, places = sorted(series.values), common
            notes.append("The fit leaves out sizes that some seeds lack.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            table = [[series.values[seed][x] for x in places] for seed in full]
            fit = fit_power_law(places, table, chance=chance) if len(places) > 1 else None
        except ValueError as error:
            fit = None
            notes.append(str(error))
    if len(places) < 2:
        notes.append("No power law: it needs 2 or more sizes.")
    return FittedSeries(series, fit, tuple(full), notes + [str(warning.message) for warning in caught])
