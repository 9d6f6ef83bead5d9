"""The learning curve of kernel ridge regression, predicted from a Gram's spectrum and the task's coefficients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ntk_lightning.precision import own_precision
from ntk_lightning.solvers.checks import check_problem

__all__ = ["LearningCurve", "predict_learning_curve"]

_Array = NDArray[np.float64]
_STEP = 0.01  # of log n, for the local exponents
_ALMOST_ZERO = 1e-20  # of the largest eigenvalue: the ridge whose limit "no ridge" is


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """What kernel ridge regression on n samples is predicted to reach on others.

    Args:
        sizes: Training-set sizes n, (s,).
        test_losses: Mean squared error, over samples and outputs, on samples that were not trained on, averaged over
            training sets of n samples, (s,).
        test_errors: Fraction of them that is wrong, by the approximation that a sample's prediction is Gaussian over
            training sets, (s,); None where the targets are not -1 and +1.
        local_exponents: -d log(test loss) / d log n at these sizes, (s,).
        loss_standard_errors: What the finite number of samples leaves open of the losses, (s,): their squared
            residuals' standard error, as if these were independent. The error of the theory is not in it.
        effective_ridges: kappa, (s,), in the unit of ``ridge``: the fit on n samples is, averaged over training sets,
            that of the whole Gram with this ridge.
        rank: Eigenvalues of the Gram above rounding.

    Example:
        >>> predict_learning_curve(torch.eye(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), [1, 2]).test_losses
        array([1., 1.])
    """

    sizes: NDArray[np.int64]
    test_losses: _Array
    test_errors: _Array | None
    local_exponents: _Array
    loss_standard_errors: _Array
    effective_ridges: _Array = field(repr=False)
    rank: int


def predict_learning_curve(
    kernel: Tensor,
    targets: Tensor,
    sizes: Sequence[int],
    ridge: float = 0.0,
    *,
    eigensystem: tuple[Tensor, Tensor] | None = None,
) -> LearningCurve:
    r"""Predict the test loss of kernel ridge regression on n of N samples, tested on the others, without a fit.

    With delta = n ridge, as :func:`ntk_lightning.solvers.ridge` has it, omega = N kappa solves

        sum_i (lambda_i + delta) / (lambda_i + omega) = n

    over all N eigenvalues of K. Let G = (K + omega I)^-1, g = tr(G) / N, h = tr(G^2) / N and p = n / N. The
    leave-one-out residuals r_j = (G y)_j / G_jj of the whole Gram at ridge kappa then give

        test loss = c mean_j r_j^2,    c = p g^2 / (g^2 - (1 - p) h),

    where c >= 1 is the factor by which the choice of the n samples adds to the loss. For large N and G_jj = g, this is
    the test loss of Bordelon, Canatar and Pehlevan (2020, arXiv 2002.02561) and Simon et al. (2021, arXiv 2110.03922)
    for samples from a distribution with the eigenvalues lambda_i / N. At n = N it is exact leave-one-out, and, where
    G_jj = g, the kernel alignment risk estimator of Jacot et al. (2020, arXiv 2006.09796). N is finite here, training
    sets are drawn without replacement, and noise in the targets counts as part of the task. The test error is
    mean_j Phi((y_j r_j - 1) / tau) with tau^2 = (c - 1) mean_j r_j^2: the prediction of sample j is taken for Gaussian
    with mean y_j - r_j and variance tau^2.

    Eigenvectors are taken to be generic: losses are then good to about 1% from 40 samples on. On images they are good
    to 1 to 4%. Fewer samples, and sizes near the rank of K without a ridge, are the weakest.

    Args:
        kernel: Gram of all samples, (N, N), training and test alike.
        targets: Labels (N,) in {-1, +1}, real targets (N,), or (N, C) real or one-hot.
        sizes: Training-set sizes n, from 1 to N.
        ridge: At least 0, in units of the kernel per sample. 0 is its limit, interpolation.
        eigensystem: ``torch.linalg.eigh(kernel.double())`` where it is known, to reuse for many ridges or tasks.

    Returns:
        The predicted curve.

    Raises:
        TypeError: The kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, sizes or values are not usable.

    Example:
        >>> x = torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
        >>> curve = predict_learning_curve(x @ x.T, x[:, 0].sign(), [20, 40, 80], ridge=0.1)
        >>> bool((np.diff(curve.test_losses) < 0).all() and (curve.local_exponents > 0).all())
        True
    """
    problem = check_problem(kernel, targets)
    total, counts = len(kernel), _check_sizes(sizes, len(kernel))
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge!r}.")
    with own_precision(kernel.device.type):
        values, vectors = torch.linalg.eigh(kernel.detach().double()) if eigensystem is None else eigensystem
        if values.shape != kernel.shape[:1] or vectors.shape != kernel.shape:
            raise ValueError(
                f"eigensystem must be torch.linalg.eigh(kernel.double()) of this Gram of {total} samples, got "
                f"{tuple(values.shape)} and {tuple(vectors.shape)}."
            )
        vectors, labels = vectors.to(kernel.device, torch.float64), problem.targets[0]
        spectrum, rank = _positive_part(values, torch.finfo(kernel.dtype).eps, counts, ridge)

        # Three sizes each: n, and a little less and more for the slope; the theory takes n that are no integers
        near = np.minimum(np.exp([[-_STEP], [0.0], [_STEP]]) * counts, total)
        omegas = np.array([[_omega(spectrum, n, n * ridge) for n in row] for row in near])
        resolvent = 1 / (spectrum[:, None] + omegas.reshape(-1))  # eigenvalues of G, (N, q)
        g, h, p = resolvent.mean(0), np.square(resolvent).mean(0), near.reshape(-1) / total
        excess = p * g**2 / (g**2 - (1 - p) * h)  # c
        weights = torch.from_numpy(resolvent).to(vectors)
        diagonal = vectors.square() @ weights  # G_jj, (N, q)
        residuals = [vectors @ (weights * (vectors.T @ y)[:, None]) / diagonal for y in labels.T]  # r, C times (N, q)
        squares = sum(r.square() for r in residuals) / len(residuals)
    assert isinstance(squares, Tensor), "there is an output"
    losses = (excess * squares.mean(0).cpu().numpy()).reshape(3, -1)
    spread = (excess * squares.std(0).cpu().numpy()).reshape(3, -1)[1] / total**0.5
    slopes = -np.log(losses[2] / losses[0]) / np.log(near[2] / near[0])
    errors = None
    if problem.classes[0] and labels.shape[1] == 1:
        middle = slice(len(counts), 2 * len(counts))
        margins = 1 - labels * residuals[0][:, middle]  # y_j f_j, averaged over training sets, (N, s)
        deviation = torch.from_numpy(np.sqrt(np.maximum(excess[middle] - 1, 1e-30) * losses[1] / excess[middle]))
        errors = torch.special.ndtr(-margins.cpu() / deviation).mean(0).numpy()
    return LearningCurve(counts, losses[1], errors, slopes, spread, omegas[1] / total, rank)


def _omega(spectrum: _Array, n: float, delta: float) -> float:
    """Solve sum_i (lambda_i + delta) / (lambda_i + omega) = n for omega >= delta."""
    delta = max(delta, _ALMOST_ZERO * spectrum[-1])

    def too_many(log_omega: float) -> float:
        return float(((spectrum + delta) / (spectrum + math.exp(log_omega))).sum()) - n

    # At omega = delta the sum is N >= n; it is at most (trace + N delta) / omega
    low, high = math.log(delta) - 1e-6, math.log((spectrum.sum() + len(spectrum) * delta) / n) + 1e-6
    return math.exp(brentq(too_many, low, high, xtol=1e-13, rtol=1e-14))


def _positive_part(values: Tensor, epsilon: float, sizes: NDArray[np.int64], ridge: float) -> tuple[_Array, int]:
    """Eigenvalues, increasing, with those below rounding set to 0, and how many are not."""
    spectrum: _Array = values.detach().cpu().double().numpy().copy()
    rounding = len(spectrum) * epsilon * spectrum[-1]
    if spectrum[-1] <= 0 or spectrum[0] < -rounding:
        raise ValueError(
            f"kernel is not positive semidefinite: its eigenvalues go from {spectrum[0]:.3e} to {spectrum[-1]:.3e}. "
            "Compute it in float64, and pass the Gram of one kernel."
        )
    spectrum[spectrum <= rounding] = 0
    rank = int((spectrum > 0).sum())
    if ridge == 0 and rank < len(spectrum) and sizes.max() >= rank:
        warnings.warn(
            f"The Gram of {len(spectrum)} samples has rank {rank} to rounding: without a ridge, sizes from {rank} on "
            "are predicted as least squares in so many directions. Pass a ridge, or compute the Gram in float64.",
            stacklevel=3,
        )
    return spectrum, rank


def _check_sizes(sizes: Sequence[int], total: int) -> NDArray[np.int64]:
    counts = np.asarray(sizes)
    if counts.ndim != 1 or not len(counts) or counts.dtype.kind not in "iu":
        raise TypeError(f"sizes must be a list of whole numbers, got {sizes!r}.")
    if counts.min() < 1 or counts.max() > total:
        raise ValueError(f"sizes must be from 1 to the {total} samples of the kernel, got {counts.tolist()}.")
    return counts.astype(np.int64)
