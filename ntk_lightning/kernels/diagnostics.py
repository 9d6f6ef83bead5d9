"""Measures of a Gram matrix and of its change: pure functions, each with its source."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lightning.whole_number import is_whole

__all__ = [
    "centered_kernel_alignment",
    "effective_rank",
    "kernel_distance",
    "kernel_target_alignment",
    "kernel_velocity",
    "leading_eigenvalues",
    "target_share",
]


def centered_kernel_alignment(kernel1: Tensor, kernel2: Tensor) -> float:
    """Compute the alignment of two kernels after centering, CKA.

    <HKH, HK'H>_F / (||HKH||_F ||HK'H||_F) with H = I - 1 1' / n: Cortes, Mohri and Rostamizadeh (2012, "Algorithms for
    learning kernels based on centered alignment"); Kornblith et al. (2019, arXiv 1905.00414).

    Args:
        kernel1: Gram on n points, (n, n).
        kernel2: Another Gram on the same points, (n, n).

    Returns:
        A value in [0, 1] for positive semidefinite kernels; 1 where they agree up to scale and shifts of the features;
        NaN where a centered kernel is zero.

    Raises:
        ValueError: The Grams are not square, finite, or of one size.

    Example:
        >>> round(centered_kernel_alignment(torch.eye(3), 5 * torch.eye(3) + 1), 6)
        1.0
    """
    return _cosine(*(_centered(kernel) for kernel in _checked(kernel1, kernel2)))


def kernel_target_alignment(kernel: Tensor, targets: Tensor) -> float:
    """Compute the alignment of a kernel with the kernel of its labels.

    <K, y y'>_F / (||K||_F ||y y'||_F), which for one output is y'K y / (||K||_F ||y||^2): Cristianini et al. (2001,
    "On kernel-target alignment").

    Args:
        kernel: Gram on n points, (n, n).
        targets: Labels, (n,) or (n, C); not centered here.

    Returns:
        A value in [0, 1] for a positive semidefinite kernel; NaN where the kernel or the labels are zero.

    Raises:
        ValueError: The Gram is not square and finite, or the labels do not fit it.

    Example:
        >>> y = torch.tensor([1.0, -1.0])
        >>> kernel_target_alignment(torch.outer(y, y), y)
        1.0
    """
    (gram,) = _checked(kernel)
    labels = _labels(targets, gram)
    return _cosine(gram, labels @ labels.T)


def kernel_distance(kernel1: Tensor, kernel2: Tensor) -> float:
    """Compute the distance between two kernels, one minus their cosine.

    1 - <K, K'>_F / (||K||_F ||K'||_F): Fort et al. (2020, arXiv 2010.15110).

    Args:
        kernel1: Gram on n points, (n, n).
        kernel2: Another Gram on the same points, (n, n).

    Returns:
        A value in [0, 1] for positive semidefinite kernels: 0 where they agree up to scale; NaN where one is zero.

    Raises:
        ValueError: The Grams are not square, finite, or of one size.

    Example:
        >>> kernel_distance(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0])))
        1.0
    """
    first, second = _checked(kernel1, kernel2)
    first, second = first / first.norm(), second / second.norm()
    return float((first - second).square().sum() / 2)  # equal to 1 - cosine, and exact where that is tiny


def kernel_velocity(kernel1: Tensor, kernel2: Tensor, steps: float) -> float:
    """Compute the speed at which a kernel turns, its distance per optimizer step.

    kernel_distance(K^t, K^{t + dt}) / dt: Fort et al. (2020, arXiv 2010.15110).

    Args:
        kernel1: Gram at step t, (n, n).
        kernel2: Gram at step t + dt, (n, n).
        steps: dt, the number of steps between them, more than 0.

    Returns:
        The distance per step; NaN where a kernel is zero.

    Raises:
        ValueError: The Grams are not square, finite, or of one size, or ``steps`` is not positive.

    Example:
        >>> kernel_velocity(torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0])), steps=10)
        0.1
    """
    if not steps > 0:
        raise ValueError(f"steps between two kernels must be more than 0, got {steps}.")
    return kernel_distance(kernel1, kernel2) / steps


def effective_rank(kernel: Tensor) -> float:
    """Compute the effective rank of a kernel.

    exp(-sum_i p_i log p_i) with p_i = lambda_i / sum_j lambda_j: Roy and Vetterli (2007, "The effective rank: a measure
    of effective dimensionality"). Eigenvalues that rounding made negative count as 0.

    Args:
        kernel: Gram on n points, (n, n).

    Returns:
        A value in [1, n]; NaN for the zero kernel.

    Raises:
        ValueError: The Gram is not square and finite.

    Example:
        >>> round(effective_rank(torch.eye(4)), 6)
        4.0
    """
    values = torch.linalg.eigvalsh(*_checked(kernel)).clamp_min(0)
    shares = values / values.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def leading_eigenvalues(kernel: Tensor, k: int) -> Tensor:
    """Compute the largest eigenvalues of a kernel.

    Args:
        kernel: Gram on n points, (n, n).
        k: How many, from 1 to n.

    Returns:
        Falling eigenvalues, (k,), float64.

    Raises:
        ValueError: The Gram is not square and finite, or k is out of range.

    Example:
        >>> leading_eigenvalues(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2)
        tensor([3., 2.], dtype=torch.float64)
    """
    (gram,) = _checked(kernel)
    _check_count(k, len(gram))
    falling: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    return falling[:k]


def target_share(kernel: Tensor, targets: Tensor, k: int) -> float:
    """Compute the share of the labels that lies in the leading eigenvectors of a kernel.

    sum_{i <= k} ||q_i'y||^2 / ||y||^2, q_i falling by eigenvalue; the part of the labels that gradient descent fits
    first. Arora et al. (2019, arXiv 1901.08584); the cumulative power of Canatar et al. (2021, arXiv 2006.13198).

    Args:
        kernel: Gram on n points, (n, n).
        targets: Labels, (n,) or (n, C).
        k: How many eigenvectors, from 1 to n.

    Returns:
        A value in [0, 1]; NaN where the labels are zero.

    Raises:
        ValueError: The Gram is not square and finite, the labels do not fit it, or k is out of range.

    Example:
        >>> target_share(torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), torch.ones(4), k=2)
        0.5
    """
    (gram,) = _checked(kernel)
    labels = _labels(targets, gram)
    _check_count(k, len(gram))
    leading = torch.linalg.eigh(gram).eigenvectors[:, -k:]
    return float((leading.T @ labels).square().sum() / labels.square().sum())


def _checked(*kernels: Tensor) -> tuple[Tensor, ...]:
    """The Grams in float64, where their sums of n^2 products lose nothing."""
    for kernel in kernels:
        if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
            raise ValueError(f"A Gram must be (n, n), got {tuple(kernel.shape)}: pass the kernel of the probe points.")
        if kernel.shape != kernels[0].shape:
            raise ValueError(
                f"Both Grams must be on the same points, got {tuple(kernels[0].shape)} and {tuple(kernel.shape)}."
            )
        if not torch.isfinite(kernel).all():
            raise ValueError("The Gram has a NaN or infinite entry: has the network diverged?")
    return tuple(kernel.detach().double() for kernel in kernels)


def _labels(targets: Tensor, gram: Tensor) -> Tensor:
    if targets.dim() not in (1, 2) or len(targets) != len(gram) or not torch.isfinite(targets).all():
        raise ValueError(
            f"targets must be finite, ({len(gram)},) or ({len(gram)}, C) as the Gram, got {tuple(targets.shape)}."
        )
    return targets.detach().to(gram).reshape(len(gram), -1)


def _check_count(k: int, n: int) -> None:
    if not is_whole(k) or not 1 <= k <= n:
        raise ValueError(f"k must be a whole number from 1 to {n}, the number of points, got {k}.")


def _centered(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def _cosine(kernel1: Tensor, kernel2: Tensor) -> float:
    return float((kernel1 * kernel2).sum() / (kernel1.norm() * kernel2.norm()))
