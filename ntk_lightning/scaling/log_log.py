"""Curves in log-log: least squares of a line or a law with a floor, and whether a curve is straight."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

__all__ = ["Law", "curvature_p_value", "fit_law_with_offset", "fit_line", "local_exponents"]

_Array = NDArray[np.float64]


class Law(NamedTuple):
    """A law L(n) = alpha n^(-beta) + offset fitted to mean errors by least squares of log L.

    Attributes:
        alpha: The error at n = 1, less the offset.
        beta: Exponent.
        offset: Floor, 0 for a line.
        residuals: log L less the law's, (sizes,).
        weights: Derivatives of log alpha, beta and, where it was fitted, the offset by log L, (2 or 3, sizes): the
            pseudo-inverse of the design matrix at the fit.
    """

    alpha: float
    beta: float
    offset: float
    residuals: _Array
    weights: _Array

    def standard_error(self, parameter: int, changes: _Array | None) -> float:
        """Compute the standard error of a parameter to first order.

        Args:
            parameter: 0 for log alpha, 1 for beta, 2 for the offset.
            changes: Changes of log L in resamples of S seeds, times sqrt(S / (S - 1)), (resamples, sizes); without
                them the residuals are taken for independent noise.

        Returns:
            The error; infinite where as many parameters as sizes leave no residuals.
        """
        weights = self.weights[parameter]
        if changes is not None:
            return float((changes @ weights).std())
        freedom = len(self.residuals) - len(self.weights)
        return float(np.sqrt(self.residuals @ self.residuals / freedom * (weights @ weights))) if freedom else np.inf


def fit_line(sizes: _Array, means: _Array) -> Law:
    """Fit log L = log alpha - beta log n.

    Args:
        sizes: n, (sizes,), at least 2.
        means: L > 0, (sizes,).

    Returns:
        The law, with offset 0.
    """
    x, log_errors = np.log(sizes), np.log(means)
    weights = np.linalg.pinv(np.stack([np.ones_like(x), -x], 1))
    log_alpha, beta = weights @ log_errors
    return Law(float(np.exp(log_alpha)), float(beta), 0.0, log_errors - (log_alpha - beta * x), weights)


def fit_law_with_offset(sizes: _Array, means: _Array) -> Law:
    """Fit log L = log(alpha n^(-beta) + c) with beta >= 0 and a c of either sign.

    Args:
        sizes: n, (sizes,), at least 3.
        means: L > 0, (sizes,).

    Returns:
        The law; its offset is negative where log L falls the faster the larger n.
    """
    # In units of the smallest size and the largest error: theta = (log alpha, beta, c)
    smallest, scale = sizes.min(), means.max()
    x, log_errors = np.log(sizes / smallest), np.log(means / scale)

    def parts(theta: _Array) -> tuple[_Array, _Array]:
        power = np.exp(theta[0] - theta[1] * x)
        return power, np.maximum(power + theta[2], 1e-12)

    def residuals(theta: _Array) -> _Array:
        out: _Array = log_errors - np.log(parts(theta)[1])
        return out

    def design(theta: _Array) -> _Array:
        power, law = parts(theta)
        return np.stack([power / law, -x * power / law, 1 / law], 1)

    lower, upper = np.array([-50.0, 0.0, -10.0]), np.array([50.0, 50.0, 1.0])
    fits = []
    for share in (-1.0, 0.0, 0.5, 0.9, 0.99):  # starts at shares of the least error: the valley is long and curved
        start = share * means.min() / scale
        slope, level = np.polyfit(x, np.log(means / scale - start), 1)
        first = np.clip([level, max(-slope, 0.01), start], lower, upper)
        fits.append(
            optimize.least_squares(
                residuals, first, lambda t: -design(t), bounds=(lower, upper), xtol=1e-14, ftol=1e-14, gtol=1e-14
            )
        )
    theta = min(fits, key=lambda fit: float(fit.cost)).x
    weights = np.linalg.pinv(design(theta))
    weights[0] += np.log(smallest) * weights[1]  # of log alpha at n = 1
    weights[2] *= scale
    alpha = float(scale * np.exp(theta[0] + theta[1] * np.log(smallest)))
    return Law(alpha, float(theta[1]), float(scale * theta[2]), residuals(theta), weights.astype(np.float64))


def curvature_p_value(sizes: _Array, table: _Array) -> float:
    """Test whether log L is a straight line in log n, by a t test of its quadratic term.

    Args:
        sizes: n, (sizes,).
        table: L > 0, (seeds, sizes). The scatter of the seeds is the noise; with one seed, the residuals of the
            parabola are.

    Returns:
        The two-sided p-value; NaN where there is nothing to test.
    """
    seeds, means = len(table), table.mean(0)
    freedom = seeds - 1 if seeds > 1 else len(sizes) - 3
    if len(sizes) < 3 or freedom < 1:
        return float("nan")
    x = np.log(sizes)
    x = (x - x.mean()) / np.ptp(x)
    design = np.stack([np.ones_like(x), x, x * x], 1)
    weights = np.linalg.pinv(design)
    curvature = float(weights[2] @ np.log(means))
    if seeds > 1:  # of the seeds' own curves, log L_s - log L = L_s / L - 1 to first order
        error = float(((table / means - 1) @ weights[2]).std(ddof=1) / seeds**0.5)
    else:
        residuals = np.log(means) - design @ (weights @ np.log(means))
        error = float(np.sqrt(residuals @ residuals / freedom * (weights[2] @ weights[2])))
    return float(
        2 * stats.t.sf(abs(curvature) / max(error, 1e-10), freedom)
    )  # at least rounding, which is no curvature


def local_exponents(sizes: _Array, means: _Array) -> _Array:
    """Compute the exponents between neighbouring sizes.

    Args:
        sizes: n, (sizes,).
        means: L > 0, (sizes,).

    Returns:
        -log(L' / L) / log(n' / n), from the smallest size up, (sizes - 1,).
    """
    order = np.argsort(sizes)
    exponents: _Array = -np.diff(np.log(means[order])) / np.diff(np.log(sizes[order]))
    return exponents
