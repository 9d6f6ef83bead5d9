"""Power laws of error against training-set size, with intervals that hold for few seeds, and their comparison."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

__all__ = ["ExponentDifference", "PowerLawFit", "compare_exponents", "fit_power_law"]


@dataclass(frozen=True, eq=False)
class PowerLawFit:
    """A fitted scaling law L(n) = alpha n^(-beta).

    Args:
        alpha: Fitted error at n = 1.
        beta: Exponent, positive for falling error.
        beta_interval: Confidence interval of beta.
        r_squared: Share of the variance of log L, over sizes, that the line explains.
        confidence: Confidence of the interval.
        standard_error: Standard error of beta.
        degrees_of_freedom: Those of the t distribution behind the interval.
        n: Sizes that were fitted, (sizes,).
        mean_errors: Mean error over seeds at these sizes, (sizes,).
        resampled_betas: beta of every resample of the seeds, (resamples,); empty with one seed.
        seed: Seed of the resamples.
    """

    alpha: float
    beta: float
    beta_interval: tuple[float, float]
    r_squared: float
    confidence: float
    standard_error: float
    degrees_of_freedom: int
    n: NDArray[np.float64] = field(repr=False)
    mean_errors: NDArray[np.float64] = field(repr=False)
    resampled_betas: NDArray[np.float64] = field(repr=False)
    seed: int = field(repr=False)

    def predict(self, n: ArrayLike) -> NDArray[np.float64]:
        """Evaluate the law.

        Args:
            n: Training-set sizes, any shape.

        Returns:
            alpha n^(-beta), in the same shape.
        """
        return self.alpha * np.asarray(n, dtype=np.float64) ** -self.beta


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

    Args:
        n: Training-set sizes, (sizes,), at least 2 different ones.
        errors: Errors or losses, (seeds, sizes), or (sizes,) of one seed. A size where a seed has error 0 is left out,
            with a warning: its logarithm does not exist.
        confidence: Confidence of the interval.
        chance: Error of guessing; a mean error within 5% of it or above it draws a warning. None for losses.
        resamples: Resamples of the seeds.
        seed: Seed of the resamples.

    Returns:
        The fit.

    Raises:
        ValueError: Shapes do not agree, a value is NaN or negative, or fewer than 2 sizes have positive errors.

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
    sizes, table = _in_range(sizes, table, chance)

    seeds, means = len(table), table.mean(0)
    centered = np.log(sizes) - np.log(sizes).mean()
    weights = -centered / (centered @ centered)  # beta is linear in log L
    log_errors = np.log(means)
    beta = float(weights @ log_errors)
    residuals = log_errors - log_errors.mean() + beta * centered
    if seeds > 1:
        picks = np.random.default_rng(seed).integers(seeds, size=(resamples, seeds))
        resampled = np.log(table[picks].mean(1)) @ weights
        freedom, error = seeds - 1, float(resampled.std() * (seeds / (seeds - 1)) ** 0.5)
    else:
        resampled, freedom = np.empty(0), len(sizes) - 2
        error = float(np.sqrt(residuals @ residuals / freedom * (weights @ weights))) if freedom else np.inf
    total = float(((log_errors - log_errors.mean()) ** 2).sum())
    return PowerLawFit(
        alpha=float(np.exp(log_errors.mean() + beta * np.log(sizes).mean())),
        beta=beta,
        beta_interval=_interval(beta, error, freedom, confidence),
        r_squared=1 - float(residuals @ residuals) / total if total > 0 else float("nan"),
        confidence=confidence,
        standard_error=error,
        degrees_of_freedom=freedom,
        n=sizes,
        mean_errors=means,
        resampled_betas=resampled,
        seed=seed,
    )


def compare_exponents(a: PowerLawFit, b: PowerLawFit, *, paired: bool = False) -> ExponentDifference:
    """Test whether two arms have the same exponent.

    t = (beta_a - beta_b) / se. Unpaired: se^2 = se_a^2 + se_b^2 with the degrees of freedom of Welch (1947), whose
    level holds for three or more seeds an arm; with two in one arm and many in the other it rejects up to twice as
    often as it should. Paired, for arms whose seeds used the same training subsets: se is that of the difference over
    the same resamples of the seeds, which is smaller where the arms share their noise.

    Args:
        a: Fit of one arm.
        b: Fit of the other; its confidence must be the same.
        paired: The s-th seed of both arms shares data; needs equal numbers of seeds, resamples and equal ``seed``.

    Returns:
        The difference, its interval and the p-value.

    Raises:
        ValueError: The confidences differ, or a paired comparison lacks matching seeds.

    Example:
        >>> sizes = [100, 200, 400, 800]
        >>> steep, flat = (fit_power_law(sizes, [n**-b for n in sizes], chance=None) for b in (0.4, 0.1))
        >>> round(compare_exponents(steep, flat).difference, 6)
        0.3
    """
    if a.confidence != b.confidence:
        raise ValueError(f"Fit both arms at the same confidence, got {a.confidence} and {b.confidence}.")
    difference, freedom = a.beta - b.beta, float(a.degrees_of_freedom)
    if paired:
        matches = (a.degrees_of_freedom, a.seed, len(a.resampled_betas)) == (
            b.degrees_of_freedom,
            b.seed,
            len(b.resampled_betas),
        )
        if not matches or not len(a.resampled_betas):
            raise ValueError("A paired comparison needs two or more seeds, the same in both arms, and equal resamples.")
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


def _in_range(
    sizes: NDArray[np.float64], table: NDArray[np.float64], chance: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Leave out sizes with errors of 0, and warn about what makes a fit weak."""
    positive = (table > 0).all(0)
    if positive.sum() < 2:
        raise ValueError(
            f"Only {positive.sum()} of {len(sizes)} sizes have a positive error for every seed, and a line needs 2: "
            "use a larger test set, smaller training sets, or the test loss."
        )
    if not positive.all():
        warnings.warn(
            f"Left out n={sizes[~positive].tolist()}, where a seed has error 0, which has no logarithm: use a larger "
            "test set or the test loss.",
            stacklevel=3,
        )
    sizes, table = sizes[positive], table[:, positive]
    if len(sizes) < 4:
        warnings.warn(f"A power law fitted to {len(sizes)} sizes is weak evidence: use at least 4.", stacklevel=3)
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
