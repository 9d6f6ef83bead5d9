"""Power laws of error against training-set size, with intervals that hold for few seeds, and their comparison."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ntk_lightning.scaling.log_log import curvature_p_value, fit_law_with_offset, fit_line, local_exponents

__all__ = ["ExponentDifference", "PowerLawFit", "compare_exponents", "fit_power_law"]

_CURVED = 0.01  # p-value below which a curve is said not to be a power law
_Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class PowerLawFit:
    """A fitted scaling law L(n) = alpha n^(-beta), or L(n) = alpha n^(-beta) + offset.

    Args:
        alpha: Fitted error at n = 1, less the offset.
        beta: Exponent, positive for falling error.
        beta_interval: Confidence interval of beta.
        r_squared: Share of the variance of log L, over sizes, that the law explains.
        confidence: Confidence of the intervals.
        standard_error: Standard error of beta.
        degrees_of_freedom: Those of the t distribution behind the intervals.
        n: Sizes that were fitted, (sizes,).
        mean_errors: Mean error over seeds at these sizes, (sizes,).
        resampled_betas: beta of every resample of the seeds, (resamples,); empty with one seed.
        seed: Seed of the resamples.
        offset: The floor that the error falls to, at least 0; 0 where none was fitted.
        offset_interval: Confidence interval of the floor; None where none was fitted.
        curvature_p_value: Of the hypothesis that log L is a straight line in log n; NaN with 2 sizes, and with 3 of one
            seed, which leave nothing to test.

    Example:
        >>> sizes = np.array([100, 200, 400, 800, 1600])
        >>> fit = fit_power_law(sizes, 2 * sizes**-0.5 + 0.05, chance=None, offset=True)
        >>> round(fit.beta, 4), round(fit.offset, 4), fit.local_exponents.round(2)
        (0.5, 0.05, array([0.39, 0.35, 0.31, 0.27]))
    """

    alpha: float
    beta: float
    beta_interval: tuple[float, float]
    r_squared: float
    confidence: float
    standard_error: float
    degrees_of_freedom: int
    n: _Array = field(repr=False)
    mean_errors: _Array = field(repr=False)
    resampled_betas: _Array = field(repr=False)
    seed: int = field(repr=False)
    offset: float = 0.0
    offset_interval: tuple[float, float] | None = None
    curvature_p_value: float = float("nan")

    @property
    def local_exponents(self) -> _Array:
        """Exponents between neighbouring sizes, from the smallest up, -log(L' / L) / log(n' / n), (sizes - 1,)."""
        return local_exponents(self.n, self.mean_errors)

    def predict(self, n: ArrayLike) -> _Array:
        """Evaluate the law.

        Args:
            n: Training-set sizes, any shape.

        Returns:
            alpha n^(-beta) + offset, in the same shape.
        """
        return self.alpha * np.asarray(n, dtype=np.float64) ** -self.beta + self.offset


@dataclass(frozen=True)
class ExponentDifference:
    """The difference of two exponents, beta_a - beta_b.

    Args:
        difference: beta_a - beta_b.
        interval: Its confidence interval.
        p_value: Two-sided, of the hypothesis that the exponents are equal.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float


def fit_power_law(
    n: ArrayLike,
    errors: ArrayLike,
    *,
    offset: bool = False,
    confidence: float = 0.95,
    chance: float | None = 0.5,
    resamples: int = 2000,
    seed: int = 0,
) -> PowerLawFit:
    """Fit L(n) = alpha n^(-beta) by least squares of log L on log n, L the mean error over seeds.

    The interval is beta -+ t se with se = sqrt(S / (S - 1)) times the standard deviation of beta over resamples of the
    S seeds (whole error curves), and t of S - 1 degrees of freedom: Hesterberg (2015, "What teachers should know about
    the bootstrap"). Percentile and BCa intervals cannot leave the range of the seeds and miss far more than they should
    for S < 10. It covers the noise of the seeds, not a law that is not a power law. With one seed, se and t come from
    the residuals of the line (sizes - 2 degrees of freedom), which takes every deviation from it for noise.

    A curve that levels off at a floor is no power law, and its exponent depends on the sizes. A t test of the quadratic
    term of log L in log n against the scatter of the seeds (with one seed, against the residuals) warns at a p-value
    below 0.01, which a true power law draws in one of a hundred fits. ``offset`` fits L(n) = alpha n^(-beta) + c with
    c >= 0 instead, by least squares of log L; se is then that of the law linearized at the fit (the delta method).

    Args:
        n: Training-set sizes, (sizes,), at least 2 different ones, 3 with an offset.
        errors: Errors or losses, (seeds, sizes), or (sizes,) of one seed. A size where a seed has error 0 is left out,
            with a warning: its logarithm does not exist.
        offset: Fit a floor c too.
        confidence: Confidence of the intervals.
        chance: Error of guessing; a mean error within 5% of it or above it draws a warning. None for losses.
        resamples: Resamples of the seeds.
        seed: Seed of the resamples.

    Returns:
        The fit.

    Raises:
        ValueError: Shapes do not agree, a value is NaN or negative, or too few sizes have positive errors.

    Example:
        >>> sizes = [100, 200, 400, 800]
        >>> fit = fit_power_law(sizes, [[2 * n**-0.25 for n in sizes]] * 3, chance=None)
        >>> round(fit.alpha, 6), round(fit.beta, 6)
        (2.0, 0.25)
    """
    sizes, table = np.asarray(n, dtype=np.float64), np.atleast_2d(np.asarray(errors, dtype=np.float64))
    if sizes.ndim != 1 or table.ndim != 2 or table.shape[1] != len(sizes) or not len(table):
        raise ValueError(f"n must be (sizes,) and errors (seeds, sizes), got {sizes.shape} and {np.shape(errors)}.")
    if not np.isfinite(sizes).all() or not (sizes > 0).all() or len(np.unique(sizes)) < len(sizes):
        raise ValueError(f"n must be different positive sizes, got {sizes.tolist()}.")
    if not np.isfinite(table).all() or (table < 0).any():
        raise ValueError("errors must be finite and at least 0: leave out seeds whose runs failed.")
    if not 0 < confidence < 1 or resamples < 100:
        raise ValueError(f"confidence must be in (0, 1) and resamples at least 100, got {confidence}, {resamples}.")
    sizes, table = _in_range(sizes, table, chance, 3 if offset else 2)

    means = table.mean(0)
    p_value = curvature_p_value(sizes, table)
    if p_value < _CURVED and not offset:
        _warn_of_curvature(sizes, means, p_value)
    line = fit_line(sizes, means)
    law = fit_law_with_offset(sizes, means) if offset else line
    seeds, freedom, changes, resampled = len(table), len(sizes) - len(law.weights), None, np.empty(0)
    if seeds > 1:
        freedom = seeds - 1
        picks = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
        deviations = np.log(table[picks].mean(1)) - np.log(means)
        resampled = law.beta + deviations @ law.weights[1]
        changes = deviations * (seeds / freedom) ** 0.5
    error = law.standard_error(1, changes)
    interval, offset_interval, shown = _interval(law.beta, error, freedom, confidence), None, law
    if offset:
        low, high = _interval(law.offset, law.standard_error(2, changes), freedom, confidence)
        offset_interval = max(low, 0.0), max(high, 0.0)
    if law.offset < 0:  # c >= 0 binds: the fit is the line, and beta may lie in the interval of either
        of_line = _interval(line.beta, line.standard_error(1, changes), freedom, confidence)
        shown, interval = line, (min(interval[0], of_line[0]), max(interval[1], of_line[1]))
    total = float(((np.log(means) - np.log(means).mean()) ** 2).sum())
    return PowerLawFit(
        alpha=shown.alpha,
        beta=shown.beta,
        beta_interval=interval,
        r_squared=1 - float(shown.residuals @ shown.residuals) / total if total > 0 else float("nan"),
        confidence=confidence,
        standard_error=error,
        degrees_of_freedom=freedom,
        n=sizes,
        mean_errors=means,
        resampled_betas=resampled,
        seed=seed,
        offset=shown.offset,
        offset_interval=offset_interval,
        curvature_p_value=p_value,
    )


def compare_exponents(a: PowerLawFit, b: PowerLawFit, *, paired: bool = False) -> ExponentDifference:
    """Test whether two models have the same exponent.

    t = (beta_a - beta_b) / se. Unpaired: se^2 = se_a^2 + se_b^2 with the degrees of freedom of Welch (1947), whose
    level holds for three or more seeds a model; with two of one and many of the other it rejects up to twice as
    often as it should. Paired, for models whose seeds used the same training subsets: se is that of the difference over
    the same resamples of the seeds, which is smaller where the models share their noise.

    Args:
        a: Fit of one model.
        b: Fit of the other; its confidence must be the same.
        paired: The s-th seed of both models shares data; needs equal numbers of seeds, resamples and equal ``seed``.

    Returns:
        The difference, its interval and the p-value.

    Raises:
        ValueError: The confidences differ, one fit alone has an offset, or a paired comparison lacks matching seeds.

    Example:
        >>> sizes = [100, 200, 400, 800]
        >>> steep, flat = (fit_power_law(sizes, [n**-b for n in sizes], chance=None) for b in (0.4, 0.1))
        >>> round(compare_exponents(steep, flat).difference, 6)
        0.3
    """
    if a.confidence != b.confidence:
        raise ValueError(f"Fit both at the same confidence, got {a.confidence} and {b.confidence}.")
    if (a.offset_interval is None) != (b.offset_interval is None):
        raise ValueError("Fit both with an offset or both without: their exponents mean different things.")
    difference, freedom = a.beta - b.beta, float(a.degrees_of_freedom)
    if paired:
        matches = (a.degrees_of_freedom, a.seed, len(a.resampled_betas)) == (
            b.degrees_of_freedom,
            b.seed,
            len(b.resampled_betas),
        )
        if not matches or not len(a.resampled_betas):
            raise ValueError("A paired comparison needs two or more seeds, the same of both, and equal resamples.")
        error = float((a.resampled_betas - b.resampled_betas).std() * ((freedom + 1) / freedom) ** 0.5)
    else:
        error = float(np.hypot(a.standard_error, b.standard_error))
        parts = [(fit.standard_error / error) ** 4 / fit.degrees_of_freedom for fit in (a, b) if 0 < error < np.inf]
        freedom = 1 / sum(parts) if parts else freedom
    if error > 0:
        p_value = float(2 * stats.t.sf(abs(difference) / error, freedom)) if error < np.inf else 1.0
    else:
        p_value = float(difference == 0)
    return ExponentDifference(difference, _interval(difference, error, freedom, a.confidence), p_value)


def _warn_of_curvature(sizes: _Array, means: _Array, p_value: float) -> None:
    """Say that the errors are curved in log-log, which way, and what to do."""
    local = local_exponents(sizes, means)
    levels_off = local[-1] < local[0]
    advice = "fit a floor too, by offset=True, or" if levels_off else "fit"
    warnings.warn(
        f"The errors are not a power law: in log-log they are curved beyond their scatter (p = {p_value:.1g}), and "
        f"the exponent between neighbouring sizes goes from {local[0]:.2g} to {local[-1]:.2g}. The fitted exponent "
        f"depends on the sizes: {advice} only the sizes where the line is straight.",
        stacklevel=3,
    )


def _in_range(sizes: _Array, table: _Array, chance: float | None, least: int) -> tuple[_Array, _Array]:
    """Leave out sizes with errors of 0, and warn about what makes a fit weak."""
    positive = (table > 0).all(0)
    if positive.sum() < least:
        raise ValueError(
            f"Only {positive.sum()} of {len(sizes)} sizes have a positive error for every seed, and a law needs "
            f"{least}: use a larger test set, smaller training sets, or the test loss."
        )
    if not positive.all():
        warnings.warn(
            f"Left out n={sizes[~positive].tolist()}, where a seed has error 0, which has no logarithm: use a larger "
            "test set or the test loss.",
            stacklevel=3,
        )
    sizes, table = sizes[positive], table[:, positive]
    if len(sizes) < least + 2:
        warnings.warn(
            f"A power law fitted to {len(sizes)} sizes is weak evidence: use at least {least + 2}.", stacklevel=3
        )
    guessing = table.mean(0) >= 0.95 * chance if chance is not None else np.zeros(len(sizes), dtype=bool)
    if guessing.any():
        warnings.warn(
            f"At n={sizes[guessing].tolist()} the error is at chance ({chance}), outside the range of a power law: "
            "leave these sizes out, or pass chance=None for losses.",
            stacklevel=3,
        )
    return sizes, table


def _interval(center: float, error: float, freedom: float, confidence: float) -> tuple[float, float]:
    """Center -+ t times the standard error; without degrees of freedom, everything."""
    width = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error if error < np.inf else np.inf
    return center - width, center + width
