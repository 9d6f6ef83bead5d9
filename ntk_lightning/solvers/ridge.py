"""Kernel ridge regression: Cholesky for small training sets, preconditioned conjugate gradients for large ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ntk_lightning.optim import critical_learning_rate
from ntk_lightning.progress import progress_bar
from ntk_lightning.solvers.kernel_fit import (
    check_arguments,
    check_evaluation_set,
    check_kernel,
    check_targets,
    error_and_loss,
)

__all__ = ["RidgeFit", "ridge"]

_CHOLESKY_MAX = 8192  # samples: about 2 GiB for the float64 Gram, the system, its factor and a copy
_BLOCK_ROWS = 512


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A kernel ridge regression f(x) = sum_i K(x, x_i) a_i, and how well its system was solved.

    Args:
        coefficients: a, (n,) or (n, C), float64.
        method: "cholesky" or "cg".
        residual: The largest over outputs of ||(K + n reg I) a - y|| / ||y||.
        condition_number: Of K + n reg I: estimated by Lanczos with "cholesky"; with "cg" the upper bound
            1 + lambda_max(K) / (n reg), which is infinite where reg = 0: nothing is known then.
        iterations: Products with the kernel that the solution took, 0 with "cholesky".
        test_error: Fraction of the test set that is wrong, or None without a test set.
        test_loss: Mean squared error on the test set.

    Example:
        >>> RidgeFit(torch.tensor([0.5, -0.5]), "cholesky", 0.0, 1.0, 0).predict(torch.eye(2))
        tensor([ 0.5000, -0.5000])
    """

    coefficients: Tensor
    method: Literal["cholesky", "cg"]
    residual: float
    condition_number: float
    iterations: int
    test_error: float | None = None
    test_loss: float | None = None

    def predict(self, kernel_rows: Tensor) -> Tensor:
        """Predict at new points.

        Args:
            kernel_rows: Kernel between new points and the training set, (m, n).

        Returns:
            f at the new points, (m,) or (m, C), in the dtype of ``kernel_rows``.
        """
        return kernel_rows @ self.coefficients.to(kernel_rows)


def ridge(
    kernel: Tensor | Callable[[Tensor], Tensor],
    targets: Tensor,
    regularization: float = 0.0,
    *,
    test_kernel: Tensor | None = None,
    test_targets: Tensor | None = None,
    method: Literal["auto", "cholesky", "cg"] = "auto",
    tolerance: float | None = None,
    max_iterations: int = 1000,
    rank: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> RidgeFit:
    """Solve kernel ridge regression, (K + n reg I) a = y.

    It minimizes mean (f - y)^2 + reg ||f||_K^2. With reg = 0 it interpolates: the end of gradient descent when K is
    positive definite. The preconditioner is the randomized Nystrom approximation of K; Frangella, Tropp and Udell
    (2023, arXiv 2110.02820).

    Args:
        kernel: Gram of the training set (n, n), or a function that multiplies it by a float64 vector (n,).
        targets: Labels (n,) in {-1, +1}, or (n, C) real or one-hot.
        regularization: reg, at least 0, in units of the kernel per sample.
        test_kernel: Kernel between test and training points, (m, n).
        test_targets: Test labels, (m,) or (m, C).
        method: "cholesky" (float64), "cg", or "auto": "cholesky" for a Gram of up to 8192 samples.
        tolerance: Relative residual to reach: 1e-10 by default, 1e-5 for a function that computes in float32.
        max_iterations: Iterations of "cg" at most.
        rank: Rank of the preconditioner, 0 for none; it costs ``rank`` products with the kernel.
        seed: Seed of the preconditioner's random test vectors.
        progress: Show a progress bar of the iterations.

    Returns:
        The fit with its residual and condition number. Where "cg" misses the tolerance it warns.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels or values are not usable, or the system is not positive definite.

    Example:
        >>> ridge(torch.eye(2), torch.tensor([1.0, -1.0]), regularization=0.5).coefficients
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    check_arguments(targets)
    if not regularization >= 0 or (tolerance is not None and not tolerance > 0) or rank < 0 or max_iterations < 1:
        raise ValueError(
            "regularization and rank must be >= 0, tolerance > 0 and max_iterations >= 1, got "
            f"{regularization=}, {rank=}, {tolerance=}, {max_iterations=}."
        )
    if method not in ("auto", "cholesky", "cg"):
        raise ValueError(f'method must be "auto", "cholesky" or "cg", got {method!r}.')
    gram = kernel.detach() if isinstance(kernel, Tensor) else None
    if gram is not None:
        check_kernel(gram)
    elif method == "cholesky":
        raise ValueError('method="cholesky" needs the Gram itself: pass a tensor, or use "cg".')
    n = len(targets) if gram is None else len(gram)
    check_targets("targets", targets, n)
    check_evaluation_set("test", test_kernel, test_targets, targets, gram)
    labels = targets.detach().to(targets.device if gram is None else gram.device, torch.float64).reshape(n, -1)
    shift = n * regularization
    used: Literal["cholesky", "cg"] = "cg"
    if gram is not None and (method == "cholesky" or (method == "auto" and n <= _CHOLESKY_MAX)):
        used, iterations, tolerance = "cholesky", 0, tolerance or 1e-10
        coefficients, residual, condition = _cholesky(gram.double(), labels, shift)
    else:
        multiply = _system(kernel, shift)
        precision = torch.float64 if isinstance(kernel, Tensor) else kernel(labels[:, 0]).dtype
        precondition = _nystrom(multiply, n, rank, seed, labels.device, torch.finfo(precision).eps)
        tolerance = tolerance or (1e-10 if precision == torch.float64 else 1e-5)
        with progress_bar("ridge regression", max_iterations, "iterations", enabled=progress) as advance:
            coefficients, iterations = _conjugate_gradient(
                multiply, precondition, labels, tolerance, max_iterations, advance
            )
        residual = _relative(multiply(coefficients) - labels, labels)
        largest = n / critical_learning_rate(lambda v: multiply(v.to(labels)[:, None])[:, 0], n, tolerance=1e-2)
        condition = largest / shift if shift else float("inf")
    if not residual <= 2 * tolerance:
        known = "not bounded without regularization" if condition == float("inf") else f"{condition:.1e}"
        warnings.warn(
            f"ridge reached a relative residual of {residual:.1e}, not {tolerance:.1e}, after {iterations} iterations "
            f"(condition number {known}): raise regularization, rank or max_iterations, or use float64.",
            stacklevel=2,
        )
    coefficients = coefficients.reshape(targets.shape)
    test_error = test_loss = None
    if test_kernel is not None and test_targets is not None:
        predictions = (test_kernel.detach().double() @ coefficients.to(test_kernel.device)).view(len(test_kernel), -1)
        truth = test_targets.detach().to(predictions).reshape(predictions.shape)
        test_error, test_loss = (float(value) for value in error_and_loss(predictions, truth))
    return RidgeFit(coefficients, used, residual, condition, iterations, test_error, test_loss)


def _relative(residuals: Tensor, labels: Tensor) -> float:
    """The largest over outputs of ||residual|| / ||y||; an output of zeros has none."""
    norms = labels.norm(dim=0)
    return float((residuals.norm(dim=0) / torch.where(norms > 0, norms, 1.0)).max())


def _cholesky(gram: Tensor, labels: Tensor, shift: float) -> tuple[Tensor, float, float]:
    """Coefficients, relative residual and condition number of (gram + shift I) a = y."""
    n = len(gram)
    system = gram + shift * torch.eye(n, dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        smallest = float(torch.linalg.eigvalsh(gram)[0])
        raise ValueError(
            f"K + n * regularization * I is not positive definite: the smallest eigenvalue of K is {smallest:.3e}. Use "
            f"regularization > {max(-smallest, torch.finfo(gram.dtype).eps * float(gram.norm())) / n:.1e}, a float64 "
            "Gram, or remove duplicate samples."
        )
    coefficients = torch.cholesky_solve(labels, factor)
    largest = n / critical_learning_rate(system, tolerance=1e-2)
    smallest = (
        critical_learning_rate(lambda v: torch.cholesky_solve(v[:, None].to(factor), factor)[:, 0], n, tolerance=1e-2)
        / n
    )
    return coefficients, _relative(system @ coefficients - labels, labels), largest / smallest


def _system(kernel: Tensor | Callable[[Tensor], Tensor], shift: float) -> Callable[[Tensor], Tensor]:
    """The product of K + shift I with (n, k) float64: in float64 for a Gram of any dtype, else as the function does."""
    if isinstance(kernel, Tensor):
        blocks = kernel.detach().split(_BLOCK_ROWS)
        return lambda x: torch.cat([block.double() @ x for block in blocks]).add_(x, alpha=shift)
    return lambda x: torch.stack([kernel(column).double() for column in x.unbind(1)], 1).add_(x, alpha=shift)


def _nystrom(
    multiply: Callable[[Tensor], Tensor], n: int, rank: int, seed: int, device: torch.device, epsilon: float
) -> Callable[[Tensor], Tensor]:
    """Nystrom preconditioner of the system, from products that are good to epsilon."""
    if rank == 0:
        return lambda x: x
    noise = torch.randn(n, min(rank, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    test = torch.linalg.qr(noise.to(device)).Q
    sketch = multiply(test)
    jitter = n**0.5 * epsilon * float(sketch.norm())
    core = test.T @ sketch + jitter * torch.eye(test.shape[1], dtype=torch.float64, device=device)
    core = (core + core.T) / 2
    factor, failed = torch.linalg.cholesky_ex(core)
    if failed:
        raise _indefinite(float(torch.linalg.eigvalsh(core)[0]) - jitter)
    half = torch.linalg.solve_triangular(factor, (sketch + jitter * test).T, upper=False).T
    vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
    values = (roots.square() - jitter).clamp_min(jitter)
    weights = (values[-1] / values - 1)[:, None]
    return lambda x: x + vectors @ (weights * (vectors.T @ x))


def _indefinite(bound: float) -> ValueError:
    return ValueError(
        f"K + n * regularization * I is not positive definite: its smallest eigenvalue is at most {bound:.3e}. Raise "
        "regularization, use float64, or check that the function multiplies by a kernel."
    )


def _conjugate_gradient(
    multiply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    labels: Tensor,
    tolerance: float,
    max_iterations: int,
    advance: Callable[[float], None],
) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients, one independent run a column."""
    solution, residuals = torch.zeros_like(labels), labels
    direction = preconditioned = precondition(residuals)
    energy = (residuals * preconditioned).sum(0)
    goal = tolerance * labels.norm(dim=0)
    for iteration in range(max_iterations):
        active = residuals.norm(dim=0) > goal
        if not active.any():
            return solution, iteration
        product = multiply(direction)
        curvature = (direction * product).sum(0)
        if not (curvature[active] > 0).all():
            quotient = float((curvature / direction.square().sum(0))[active].min())
            raise _indefinite(quotient)
        length = torch.where(active, energy / curvature, 0.0)
        solution, residuals = solution + length * direction, residuals - length * product
        preconditioned = precondition(residuals)
        energy, previous = (residuals * preconditioned).sum(0), energy
        direction = preconditioned + torch.where(active, energy / previous, 0.0) * direction
        advance(1)
    return solution, max_iterations
