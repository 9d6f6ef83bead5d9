"""Gaussian predictions of infinitely wide networks, with covariance: the posterior and the trained ensemble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ntk_lightning.precision import own_precision

__all__ = ["GaussianPrediction", "KernelBlocks", "log_marginal_likelihood", "nngp_posterior", "ntk_ensemble"]


@dataclass(frozen=True, eq=False)
class KernelBlocks:
    """The kernel of n training and m test samples, in three blocks: K(X, X), K(X', X) and K(X', X').

    Args:
        train: K(X, X), (n, n), float32 or float64.
        test_train: K(X', X), (m, n), test samples first.
        test: K(X', X'), (m, m).

    Raises:
        TypeError: A block is not a float32 or float64 tensor.
        ValueError: Shapes, dtypes or devices do not agree, an entry is not finite, or a Gram is not symmetric.

    Example:
        >>> x, x_test = torch.randn(8, 3), torch.randn(4, 3)
        >>> KernelBlocks(x @ x.T, x_test @ x.T, x_test @ x_test.T).test_train.shape
        torch.Size([4, 8])
    """

    train: Tensor
    test_train: Tensor
    test: Tensor

    def __post_init__(self) -> None:
        for name in ("train", "test_train", "test"):
            _check_matrix(name, getattr(self, name), square=name != "test_train")
        (m, n), expected = self.test_train.shape, (len(self.test), len(self.train))
        if (m, n) != expected:
            hint = ": transpose it" if (n, m) == expected else ""
            raise ValueError(
                f"test_train must be (m, n) = {expected}, test samples by training samples, got {(m, n)}{hint}."
            )
        for what in ("dtype", "device"):
            found = [getattr(block, what) for block in (self.train, self.test_train, self.test)]
            if len(set(found)) > 1:
                raise ValueError(f"train, test_train and test differ in {what}: {', '.join(map(str, found))}.")


@dataclass(frozen=True, eq=False)
class GaussianPrediction:
    """A Gaussian distribution of the function's values at m test samples.

    Args:
        mean: (m,), or (m, C) for C outputs.
        covariance: (m, m), of each output; different outputs are independent. It is of the function: a label that is
            drawn with noise has the noise's variance more.

    Example:
        >>> GaussianPrediction(torch.zeros(2), torch.tensor([[4.0, 0.0], [0.0, 1.0]])).standard_deviation
        tensor([2., 1.])
    """

    mean: Tensor
    covariance: Tensor

    @property
    def standard_deviation(self) -> Tensor:
        """Root of the covariance's diagonal, (m,); a variance that rounding has made negative counts as 0."""
        return self.covariance.diagonal().clamp_min(0).sqrt()


def nngp_posterior(
    nngp: KernelBlocks, targets: Tensor, noise: float = 0.0, *, time: float = math.inf
) -> GaussianPrediction:
    r"""Predict with the Gaussian process that an infinitely wide network is at initialization, given its labels.

    With the NNGP kernel K and A = K(X, X) + noise I, the posterior at the test samples X' is

        mean = K(X', X) A^-1 y,    covariance = K(X', X') - K(X', X) A^-1 K(X, X').

    It is also the ensemble of networks of which gradient flow trains the last layer only, each on labels with noise of
    its own: after a ``time`` t, A^-1 becomes A^-1 (I - exp(-t A)) in the mean and A^-1 (I - exp(-2 t A)) in the
    covariance. Lee et al. (2018, arXiv 1711.00165); Matthews et al. (2018, arXiv 1804.11271); for the ensemble, Lee et
    al. (2019, arXiv 1902.06720), equations 14 to 16.

    A singular A without noise gives the limit, the pseudo-inverse, where the test samples do not depend on the
    directions that A lacks: for repeated samples, or linear kernels.

    Args:
        nngp: NNGP kernel, ``InfiniteNTK(net, kind="nngp")`` for example.
        targets: Real labels, (n,) or (n, C).
        noise: Variance of the labels' noise, in squared units of the labels; at least 0.
        time: Time of the gradient flow on 1/2 sum (f - y)^2 + noise/2 ||w - w_0||^2; at least 0.

    Returns:
        Mean (m,) or (m, C) and covariance (m, m), computed in float64, in the kernel's dtype.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: Shapes or values are not usable, or A is so close to singular that rounding hides the prediction.

    Example:
        >>> one = torch.ones(1, 1)
        >>> posterior = nngp_posterior(KernelBlocks(one, one / 2, one), torch.tensor([2.0]), noise=1.0)
        >>> posterior.mean, posterior.covariance
        (tensor([0.5000]), tensor([[0.8750]]))
    """
    noise, time = _number("noise", noise), _number("time", time, infinite=True)
    labels = _labels(nngp.train, targets)
    with own_precision(nngp.train.device.type):
        values, vectors, cross = _eigenbasis(nngp, noise, time, "noise")
        mean = cross @ (_progress(values, time)[:, None] * (vectors.T @ labels))
        covariance = nngp.test.detach().double() - cross * _progress(values, 2 * time) @ cross.T
    return _prediction(mean, covariance, targets, nngp.train.dtype)


def ntk_ensemble(
    nngp: KernelBlocks, ntk: KernelBlocks, targets: Tensor, time: float = math.inf, *, regularization: float = 0.0
) -> GaussianPrediction:
    r"""Predict with the ensemble of infinitely wide networks, over initializations, after gradient flow on all weights.

    With the NNGP kernel K, the NTK T, A = T(X, X) + n regularization I and M = T(X', X) A^-1 (I - exp(-t A)),

        mean = M y,    covariance = K(X', X') + M K(X, X) M^T - M K(X, X') - K(X', X) M^T,

    Lee et al. (2019, arXiv 1902.06720), equations 14 to 16. It is no Bayesian posterior. The mean at infinite time is
    that of :func:`ridge`. The mean is linear in the labels, so that a single network with outputs f_0 at initialization
    is at ``f_0(X') + ntk_ensemble(nngp, ntk, y - f_0(X), t).mean``.

    Args:
        nngp: NNGP kernel, ``InfiniteNTK(net, kind="nngp")`` for example.
        ntk: NTK of the same samples.
        targets: Real labels, (n,) or (n, C).
        time: Time t of the gradient flow on 1/2 sum (f - y)^2, at least 0. Training on the mean of (f - y)^2 over
            samples and outputs reaches t = 2 / (n C) times the learning rate times the steps.
        regularization: reg in units of the kernel per sample, as for :func:`ridge`: the flow is that of
            1/2 sum (f - y)^2 + n reg/2 ||w - w_0||^2.

    Returns:
        Mean (m,) or (m, C) and covariance (m, m), computed in float64, in the kernels' dtype.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: Shapes or values are not usable, or A is so close to singular that rounding hides the prediction.

    Example:
        >>> one = torch.ones(1, 1)
        >>> nngp, ntk = KernelBlocks(one, one / 2, one), KernelBlocks(2 * one, one, 2 * one)
        >>> ensemble = ntk_ensemble(nngp, ntk, torch.tensor([2.0]))
        >>> ensemble.mean, ensemble.covariance
        (tensor([1.]), tensor([[0.7500]]))
    """
    time, regularization = _number("time", time, infinite=True), _number("regularization", regularization)
    for what in ("shape", "dtype", "device"):
        found = [getattr(blocks.test_train, what) for blocks in (nngp, ntk)]
        if found[0] != found[1]:
            raise ValueError(f"nngp and ntk must be of the same samples, but differ in {what}: {found[0]}, {found[1]}.")
    labels = _labels(ntk.train, targets)
    train, test_train, test = (block.detach().double() for block in (nngp.train, nngp.test_train, nngp.test))
    with own_precision(ntk.train.device.type):
        values, vectors, cross = _eigenbasis(ntk, len(labels) * regularization, time, "regularization")
        weights = cross * _progress(values, time) @ vectors.T  # M, (m, n)
        covariance = test + (weights @ train - 2 * test_train) @ weights.T
        return _prediction(weights @ labels, covariance, targets, ntk.train.dtype)


def log_marginal_likelihood(nngp: Tensor, targets: Tensor, noise: float = 0.0) -> float:
    """Compute the log density of the labels under the Gaussian process of an infinitely wide network.

    With A = K + noise I, summed over C independent outputs y_c,

        log p(y) = -1/2 sum_c y_c^T A^-1 y_c - C/2 log det A - n C/2 log 2 pi.

    It compares architectures, scales and noise on the training set alone. Rasmussen and Williams (2006), "Gaussian
    processes for machine learning", equation 2.30.

    Args:
        nngp: NNGP kernel of the training samples, (n, n).
        targets: Real labels, (n,) or (n, C).
        noise: Variance of the labels' noise, at least 0.

    Returns:
        The natural logarithm of the density, computed in float64.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: Shapes or values are not usable, or A is singular to rounding: its density does not exist.

    Example:
        >>> round(log_marginal_likelihood(torch.eye(2), torch.tensor([1.0, -1.0]), noise=1.0), 4)
        -3.031
    """
    _check_matrix("nngp", nngp, square=True)
    noise, labels = _number("noise", noise), _labels(nngp, targets)
    with own_precision(nngp.device.type):
        values, vectors, rounding = _eigensystem(nngp, noise)
        if values[0] <= rounding:
            raise ValueError(_singular(values, rounding, "noise"))
        squares = (vectors.T @ labels).square().sum(1)
    outputs = labels.shape[1]
    return -0.5 * float((squares / values).sum() + outputs * (values.log() + math.log(2 * math.pi)).sum())


def _eigensystem(gram: Tensor, shift: float) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues of A = gram + shift I (n,), eigenvectors (n, n), and how far rounding of the Gram moves a value."""
    values, vectors = torch.linalg.eigh(gram.detach().double())
    rounding = len(values) * torch.finfo(gram.dtype).eps * float(values.abs().max())
    if values[0] + shift < -rounding:
        raise ValueError(
            f"The training Gram is not positive semidefinite: its smallest eigenvalue is {float(values[0]):.3e}, its "
            f"largest {float(values[-1]):.3e}. Compute the kernel in float64, and pass the Gram of one kernel."
        )
    return (values + shift).clamp_min(0), vectors, rounding


def _eigenbasis(blocks: KernelBlocks, shift: float, time: float, remedy: str) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues a of A = K(X, X) + shift I (r,), eigenvectors Q (n, r) and K(X', X) Q (m, r) for a prediction."""
    # K(X, X) q = 0 means K(X', X) q = 0, for any kernel: such a direction moves no prediction and is left out. Where an
    # eigenvalue is below rounding but K(X', X) q is not, the progress is t until a time of about 1 / rounding, and not
    # known beyond.
    values, vectors, rounding = _eigensystem(blocks.train, shift)
    cross = blocks.test_train.detach().double() @ vectors
    unresolved = values <= rounding
    seen = cross.abs().amax(0) > 10 * rounding
    if (unresolved & seen).any() and time * rounding > 0.1:
        raise ValueError(_singular(values, rounding, remedy))
    kept = seen | ~unresolved
    return values[kept], vectors[:, kept], cross[:, kept]


def _progress(values: Tensor, time: float) -> Tensor:
    """(1 - exp(-t a)) / a of every eigenvalue a, or t where a = 0, (r,)."""
    if time == math.inf:
        return 1 / values
    safe = torch.where(values == 0, 1.0, values)
    return torch.where(values == 0, time, -torch.expm1(-time * safe) / safe)


def _singular(values: Tensor, rounding: float, remedy: str) -> str:
    condition = float(values[-1]) / max(float(values[0]), rounding) if rounding else math.inf
    return (
        f"The training Gram is singular to rounding: its condition number is {condition:.1e} or more. Pass {remedy} "
        f"above {rounding:.1e}, use a float64 Gram, or leave out samples that are nearly the same."
    )


def _prediction(mean: Tensor, covariance: Tensor, targets: Tensor, dtype: torch.dtype) -> GaussianPrediction:
    symmetric = (covariance + covariance.T) / 2
    return GaussianPrediction(mean.reshape(len(mean), *targets.shape[1:]).to(dtype), symmetric.to(dtype))


def _labels(gram: Tensor, targets: Tensor) -> Tensor:
    """Check real labels and give them as (n, C) in float64, on the kernel's device."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}: convert them by torch.as_tensor.")
    if targets.is_complex() or targets.dim() not in (1, 2) or len(targets) != len(gram) or not targets.numel():
        raise ValueError(
            f"targets must be real, ({len(gram)},) or ({len(gram)}, C), a label for each training sample, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}."
        )
    labels = targets.detach().to(gram.device, torch.float64).reshape(len(gram), -1)
    if not torch.isfinite(labels).all():
        raise ValueError("targets has a NaN or infinite entry: leave out samples without a label.")
    return labels


def _number(name: str, value: float, infinite: bool = False) -> float:
    if not isinstance(value, Real) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    number = float(value)
    if not number >= 0 or (number == math.inf and not infinite):
        raise ValueError(f"{name} must be at least 0{'' if infinite else ' and finite'}, got {number}.")
    return number


def _check_matrix(name: str, matrix: Tensor, square: bool) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}: convert it by torch.from_numpy.")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {matrix.dtype}: call .float() first.")
    if matrix.dim() != 2 or 0 in matrix.shape or (square and matrix.shape[0] != matrix.shape[1]):
        shape = "a square matrix" if square else "a matrix"
        raise ValueError(f"{name} must be {shape} with entries, got shape {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name} has a NaN or infinite entry: recompute it, in float64 if it overflowed.")
    if square and (asymmetry := float((matrix - matrix.T).abs().max() / matrix.abs().max().clamp_min(1e-30))) > 1e-3:
        raise ValueError(
            f"{name} is not symmetric (relative difference {asymmetry:.1e}): pass the Gram of these samples with "
            "themselves, or (kernel + kernel.T) / 2."
        )
