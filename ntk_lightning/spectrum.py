"""The largest eigenvalue of a kernel, and the learning rate above which gradient descent on it diverges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from ntk_lightning.precision import own_precision

if TYPE_CHECKING:
    from ntk_lightning.optim import OptimizerConfig

__all__ = ["critical_learning_rate", "largest_eigenvalue", "warn_above_critical"]


def largest_eigenvalue(
    kernel: Tensor | Callable[[Tensor], Tensor],
    n: int | None = None,
    *,
    device: torch.device | None = None,
    tolerance: float = 1e-6,
    max_products: int = 300,
    seed: int = 0,
) -> float:
    """Find the largest eigenvalue of a symmetric matrix from its products with vectors.

    The Lanczos iteration with full reorthogonalization (Golub and Van Loan, "Matrix Computations", chapter 10), which
    approaches lambda_max from below. Products are taken in the matrix's own precision, at least float32, also inside
    autocast.

    Args:
        kernel: Symmetric matrix (n, n), or a function that multiplies it by a float64 vector (n,).
        n: Its size; needed with a function.
        device: Of the vectors that a function is given; the CPU by default.
        tolerance: Relative bound on the error at which the iteration stops.
        max_products: Products with the matrix at most.
        seed: Seed of the start vector.

    Returns:
        The largest eigenvalue.

    Raises:
        ValueError: The matrix is not square, ``n`` is missing, or the products are not finite.
        RuntimeError: The iteration did not reach the tolerance.

    Example:
        >>> round(largest_eigenvalue(torch.diag(torch.tensor([4.0, 1.0]))), 6)
        4.0
    """
    multiply: Callable[[Tensor], Tensor]
    if isinstance(kernel, Tensor):
        matrix = kernel.detach()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or n not in (None, len(matrix)):
            raise ValueError(f"kernel must be a square Gram (n, n) of n={n} samples, got {tuple(matrix.shape)}.")
        if matrix.dtype not in (torch.float32, torch.float64):  # in float16 or integers vectors would be rounded
            matrix = matrix.double()
        n, device, multiply = len(matrix), matrix.device, lambda vector: matrix @ vector.to(matrix.dtype)
    else:
        multiply, device = kernel, device or torch.device("cpu")
    if n is None or n < 1:
        raise ValueError("Pass n, the size of the training set, with a function that multiplies by the kernel.")
    with own_precision(device.type):
        return _lanczos(multiply, n, device, tolerance, max_products, seed)


def critical_learning_rate(
    kernel: Tensor | Callable[[Tensor], Tensor],
    n: int | None = None,
    momentum: float = 0.0,
    *,
    tolerance: float = 1e-6,
    max_products: int = 300,
    seed: int = 0,
) -> float:
    """Find the learning rate above which full-batch gradient descent on a kernel model diverges.

    (1 + mu) n / lambda_max(K): with f <- f - lr v and v <- mu v + (2 / n) K (f - y), an eigenvalue lambda is stable
    while 2 lr lambda / n < 2 (1 + mu). Polyak (1964), "Some methods of speeding up the convergence of iteration
    methods". lambda_max comes from :func:`largest_eigenvalue`. Mini-batches can diverge at lower rates. A loss that is
    also averaged over C outputs multiplies the critical rate by C.

    Args:
        kernel: Gram of the training set (n, n), symmetric positive semidefinite, or a function that multiplies it by a
            vector (n,).
        n: Size of the training set; needed with a function.
        momentum: PyTorch's heavy-ball momentum mu.
        tolerance: Relative bound on the error of lambda_max at which Lanczos stops.
        max_products: Products with the kernel at most.
        seed: Seed of the start vector.

    Returns:
        The critical learning rate, infinite for the zero kernel; the same inside autocast and outside.

    Raises:
        ValueError: An argument is out of range, ``n`` is missing, or the products are not finite.
        RuntimeError: Lanczos did not reach the tolerance.

    Example:
        >>> round(critical_learning_rate(torch.diag(torch.tensor([4.0, 1.0])), momentum=0.5), 6)
        0.75
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    largest = largest_eigenvalue(kernel, n, tolerance=tolerance, max_products=max_products, seed=seed)
    samples = len(kernel) if isinstance(kernel, Tensor) else n
    assert samples is not None, "checked by largest_eigenvalue"
    return (1 + momentum) * samples / largest if largest > 0 else float("inf")


def warn_above_critical(
    kernel: Tensor,
    optimizers: Sequence[OptimizerConfig],
    num_outputs: int = 1,
    *,
    largest: float | None = None,
    stacklevel: int = 2,
) -> None:
    """Warn about the learning rate that is the farthest above the one at which full-batch descent diverges.

    Args:
        kernel: Gram of the training set, (n, n).
        optimizers: Configs of the fits.
        num_outputs: Outputs over which the loss is averaged.
        largest: Its largest eigenvalue, where it is known.
        stacklevel: Of the warning, as for ``warnings.warn``.
    """
    if largest is None:
        largest = largest_eigenvalue(kernel, tolerance=1e-2)
    worst = max(optimizers, key=lambda o: o.lr / (1 + o.momentum))
    # lr / critical rate, with the critical rate (1 + mu) n C / lambda_max
    ratio = worst.lr * largest / ((1 + worst.momentum) * len(kernel) * num_outputs)
    if ratio > 1:
        warnings.warn(
            f"lr={worst.lr:g} is {ratio:.3g} times the critical learning rate {worst.lr / ratio:.3g} of this kernel "
            f"({len(kernel)} samples, momentum {worst.momentum:g}): expect divergence.",
            stacklevel=stacklevel,
        )


def _lanczos(
    multiply: Callable[[Tensor], Tensor], n: int, device: torch.device, tolerance: float, max_products: int, seed: int
) -> float:
    """Largest eigenvalue by the Lanczos iteration."""
    # In the orthonormal basis q_1, q_2, ... K is tridiagonal, T: alpha_j = q_j' K q_j on its diagonal and
    # beta_j = ||r_j|| below it, where r_j is K q_j made orthogonal to q_1 ... q_j, and q_{j+1} = r_j / beta_j. The
    # largest eigenvalue theta of T, with eigenvector s, is off by at most beta_j |s_j|
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    below: list[float] = []
    for _ in range(min(n, max_products)):
        product = multiply(basis[-1]).to(device, torch.float64)
        diagonal.append(float(basis[-1] @ product))
        vectors = torch.stack(basis)
        for _ in range(2):  # once is not orthogonal to rounding
            product = product - vectors.T @ (vectors @ product)
        below.append(float(product.norm()))
        if not np.isfinite([diagonal[-1], below[-1]]).all():
            raise ValueError("Products with the kernel are not finite: check it for NaN and infinite entries.")
        values, ritz = eigh_tridiagonal(diagonal, below[:-1])
        scale = max(abs(values))
        if below[-1] * abs(ritz[-1, -1]) <= tolerance * scale or len(basis) == n:
            return float(values[-1])
        basis.append(product / below[-1])
    raise RuntimeError(
        f"Lanczos has not found the largest eigenvalue to {tolerance:g} in {max_products} products: raise max_products "
        "or tolerance."
    )
