"""The paper's claims: what would refute each, stated before the runs, and what the runs say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import numpy as np
from scipy import stats

from ntk_lightning.scaling.multiple_tests import holm
from ntk_lightning.studies.figure_fits import FittedSeries, compare_lines, fit_series
from ntk_lightning.studies.figure_lines import Line, study_lines
from ntk_lightning.studies.first_epochs import after_first_epochs
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import DURING, Kernel

__all__ = ["CLAIMS", "Claim", "Evidence", "judge"]

LEVEL = 0.05
MARGIN = 0.05  # exponents closer than this are the same
LEAST_ERROR = 0.005  # an error that is less than half a point lower is not lower


class Evidence(NamedTuple):
    """A measured effect.

    Attributes:
        effect: What the claim is about: a difference of exponents or of errors, or an exponent.
        interval: Its 95% confidence interval.
        p_value: Of the hypothesis that it is 0.
        percent: Whether it is of errors.
    """

    effect: float
    interval: tuple[float, float]
    p_value: float
    percent: bool = False

    def text(self) -> str:
        """The effect with its interval."""
        numbers = (self.effect, *self.interval)
        shown = [f"{100 * x:.1f}" if self.percent else f"{x:.3f}" for x in numbers]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]" + (" points" if self.percent else "")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Args:
        figure: Where the paper makes it.
        text: The claim.
        study: Of the results that decide it.
        measure: Takes the study and gives the evidence; None where the study lacks what it needs.
        least: The smallest effect that counts where something is claimed to be larger; None where two are the same.
        fixed: Whether it can be told at a fixed budget of epochs too.
    """

    figure: str
    text: str
    study: str
    measure: Callable[[StudyResults], Evidence | None]
    least: float | None
    fixed: bool = True

    @property
    def refuted(self) -> str:
        """What would refute it."""
        if self.least is None:
            return f"a difference that is not 0 (corrected p < {LEVEL:g}), its interval not within ±{MARGIN:g}"
        small = f"{100 * self.least:g} points" if self.least == LEAST_ERROR else f"{self.least:.3g}"
        return f"an interval that ends below {small}"

    def verdict(self, evidence: Evidence, corrected: float) -> str:
        """What the evidence says.

        Args:
            evidence: Of the runs.
            corrected: P-value, corrected for the number of claims.

        Returns:
            "shows", "does not show" or "cannot tell".
        """
        low, high = evidence.interval
        if self.least is None:
            if max(-low, high) < MARGIN:
                return "shows"
            return "does not show" if corrected < LEVEL else "cannot tell"
        if high < self.least:
            return "does not show"
        return "shows" if corrected < LEVEL and evidence.effect > 0 else "cannot tell"


def exponents(first: str, second: str) -> Callable[[StudyResults], Evidence | None]:
    """The exponent of one arm less that of another, seeds paired."""

    def measure(study: StudyResults) -> Evidence | None:
        fits = {fitted.series.arm: fitted for fitted in sorted(fit_series(study), key=lambda f: _own(f.series))}
        if first not in fits or second not in fits:
            return None
        return _compared(study, fits[first], fits[second])

    return measure


def exponents_of_models(first: str, second: str) -> Callable[[StudyResults], Evidence | None]:
    """The same of the models of one arm."""

    def measure(study: StudyResults) -> Evidence | None:
        fits = {fitted.series.model: fitted for fitted in fit_series(study)}
        if first not in fits or second not in fits:
            return None
        return _compared(study, fits[first], fits[second])

    return measure


def falls(model: str) -> Callable[[StudyResults], Evidence | None]:
    """The exponent of a model."""

    def measure(study: StudyResults) -> Evidence | None:
        fits = [fitted.fit for fitted in fit_series(study) if fitted.series.model == model and fitted.fit]
        if not fits or not math.isfinite(fits[0].standard_error) or not fits[0].standard_error:
            return None
        fit = fits[0]
        p_value = 2 * float(stats.t.sf(abs(fit.beta) / fit.standard_error, fit.degrees_of_freedom))
        return Evidence(fit.beta, fit.beta_interval, p_value)

    return measure


def errors(worse: str, better: str) -> Callable[[StudyResults], Evidence | None]:
    """The error of one arm less that of another, at the largest size or width that both have, seeds paired."""

    def measure(study: StudyResults) -> Evidence | None:
        lines = {line.arm: line for line in sorted(study_lines(study, "error"), key=_own) if line.values}
        if worse not in lines or better not in lines:
            return None
        a, b = lines[worse], lines[better]
        shared = [x for x in a.xs if x in b.xs]
        x = max(shared, default=None)
        # a kernel of infinite width has no place on the axis of widths
        pairs = [(_at(a, seed, x), _at(b, seed, x)) for seed in a.values if seed in b.values]
        return _paired([(p, q) for p, q in pairs if p is not None and q is not None], study)

    return measure


def last_kernel(study: StudyResults) -> Evidence | None:
    """The error of the kernel at initialization less that of the kernel at the end, seeds paired."""
    by_seed: dict[int, dict[int, float]] = {}
    for row in study.rows:
        if row["model"] == DURING:
            by_seed.setdefault(row["seed"], {})[row["t"]] = row["optimal_error"]
    return _paired([(found[0], found[max(found)]) for found in by_seed.values() if 0 in found], study)


CLAIMS: Sequence[Claim] = (
    Claim("1A", "The network's error falls faster with samples than that of its NTK at initialization", "figure_1a",
          exponents("network", "empirical NTK"), (0.291 - 0.185) / 2),
    Claim("1A", "and faster than that of the infinite NTK", "figure_1a",
          exponents("network", "infinite NTK"), (0.291 - 0.213) / 2),
    Claim("1A", "At the largest size the network is better than its NTK at initialization", "figure_1a",
          errors("empirical NTK", "network"), LEAST_ERROR),
    Claim("1A", "and better than the infinite NTK", "figure_1a", errors("infinite NTK", "network"), LEAST_ERROR),
    Claim("2a", "The network's exponent does not depend on width: 16 and 64", "figure_2a",
          exponents("width 64", "width 16"), None),
    Claim("2a", "and 64 and 128", "figure_2a", exponents("width 64", "width 128"), None),
    Claim("2b", "The widest network is better than its NTK at initialization: width is not what the kernel lacks",
          "figure_2b", errors("empirical NTK", "network"), LEAST_ERROR),
    Claim("3a", "A tenth of the learning rate leaves the network's exponent as it is", "figure_3a",
          exponents("network", "network, lr x0.1"), None),
    Claim("3a", "and so does three times the rate", "figure_3a", exponents("network", "network, lr x3"), None),
    Claim("3b", "The network's error falls faster than the kernel's under full-batch descent too", "figure_3b",
          exponents("network", "empirical NTK"), (0.291 - 0.185) / 2),
    Claim("3c", "and without momentum", "figure_3c", exponents("network", "empirical NTK"), (0.291 - 0.185) / 2),
    Claim("3d", "and faster than the infinite NTK's when both are trained to convergence", "figure_3d",
          exponents("network", "infinite NTK"), (0.292 - 0.219) / 2, fixed=False),
    Claim("4a", "The after-kernel scales like its network, on the samples that made it", "figure_4a",
          exponents_of_models("network", "after-kernel"), None, fixed=False),
    Claim("4a", "and on fresh ones", "figure_4a", exponents_of_models("network", "after-kernel, fresh"), None,
          fixed=False),
    Claim("1B, 4b", "Trained on more samples, the network learns a better kernel for the same 500 fresh samples",
          "figure_4b", falls("after-kernel, fresh"), 0.05, fixed=False),
    Claim("4c", "The kernel of a network trained on many samples is better than the kernel at initialization",
          "figure_4c", errors("$K_0$", "K_8000"), LEAST_ERROR, fixed=False),
    Claim("1C, 5a", "The kernel at the end of training is better than at its start", "figure_5a", last_kernel,
          LEAST_ERROR, fixed=False),
    Claim("orders", "Taylor models of order 2 come closer to the network than its NTK", "orders",
          errors("order 1 (empirical NTK)", "order 2"), LEAST_ERROR),
    Claim("orders", "and those of order 3 closer still", "orders", errors("order 2", "order 3"), LEAST_ERROR),
    Claim("synthetic", "On labels of a random network, too, the network's error falls faster than its kernel's",
          "synthetic", exponents("network", "empirical NTK"), (0.291 - 0.185) / 2),
)  # fmt: skip


def judge(studies: Mapping[str, StudyResults], epochs: int | None = None) -> list[tuple[Claim, Evidence | None, str]]:
    """Judge all claims.

    Args:
        studies: The studies that have run, by name.
        epochs: The fixed budget; None for all epochs.

    Returns:
        Each claim with its evidence and the verdict, or why there is none; p-values are corrected for the number of
        claims that were tested (Holm, 1979).
    """
    found = []
    for claim in CLAIMS:
        study = studies.get(claim.study)
        asked = study is not None and (epochs is None or claim.fixed)
        if asked and study is not None and epochs is not None:
            study = StudyResults(study.config, [after_first_epochs(row, epochs) for row in study.rows])
        found.append(claim.measure(study) if asked and study is not None else None)
    corrected = holm([None if evidence is None else evidence.p_value for evidence in found])
    judged = []
    for claim, evidence, p_value in zip(CLAIMS, found, corrected, strict=True):
        if evidence is not None and p_value is not None:
            verdict = f"{claim.verdict(evidence, p_value)} (p = {p_value:.2g})"
        else:
            verdict = "not of this budget" if epochs is not None and not claim.fixed else "not measured"
        judged.append((claim, evidence, verdict))
    return judged


def _compared(study: StudyResults, first: FittedSeries, second: FittedSeries) -> Evidence | None:
    comparison = compare_lines(study, [first, second], "error")[1].comparison
    if comparison is None:
        return None
    difference = comparison.difference
    return Evidence(difference.difference, difference.interval, difference.p_value)


def _own(line: Line) -> bool:
    """Whether a line is of what its arm trains or fits, not of a kernel extracted from that; those come first."""
    return line.model not in get_args(Kernel)


def _at(line: Line, seed: int, x: int | None) -> float | None:
    values = line.values[seed]
    return values.get(x, values.get(None))


def _paired(pairs: Sequence[tuple[float, float]], study: StudyResults) -> Evidence | None:
    """Mean difference of pairs of errors, one a seed, with the error of a test set that all seeds share."""
    if len(pairs) < 2:
        return None
    worse, better = np.array(pairs).T
    difference, count = worse - better, len(pairs)
    images = (study.config.data.get("init_args") or {}).get("n_test", 1000)
    # Of m images at most a share p + q is told differently by two classifiers of errors p and q: variance (p + q) / m
    variance = difference.var(ddof=1) / count + (worse.mean() + better.mean()) / images
    error, effect = math.sqrt(variance), float(difference.mean())
    quantile = float(stats.t.ppf(1 - LEVEL / 2, count - 1))
    p_value = 2 * float(stats.t.sf(abs(effect) / error, count - 1))
    return Evidence(effect, (effect - quantile * error, effect + quantile * error), p_value, percent=True)
