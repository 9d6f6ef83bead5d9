"""Kernel ridge regression: Cholesky for small training sets, preconditioned conjugate gradients for large ones.

Runs call it where a callback asks for fit="ridge".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ntk_lightning.precision import own_precision
from ntk_lightning.progress import progress_bar
from ntk_lightning.solvers.checks import Problem, check_problem
from ntk_lightning.solvers.kernel_fit import Curve, KernelModel, error_and_loss
from ntk_lightning.spectrum import largest_eigenvalue

__all__ = ["RidgeFit", "ridge"]

_CHOLESKY_MAX = 8192  # samples: about 2 GiB for the float64 Gram, the system, its factor and a copy
_BLOCK_ROWS = 512  # of a Gram that are converted to float64 at once


@dataclass(frozen=True, eq=False)
class RidgeFit(KernelModel):
    """A kernel ridge regression f(x) = sum_i K(x, x_i) a_i, and how well its system was solved.

    Args:
        coefficients: a, (n,) or (n, C), float64.
        method: "cholesky" or "cg".
        residual: The largest over outputs of ||(K + n reg I) a - y|| / ||y||.
        condition_number: Of K + n reg I: estimated by Lanczos with "cholesky"; with "cg" the upper bound
            1 + lambda_max(K) / (n reg), which is infinite where reg = 0: nothing is known then.
        iterations: Products with the kernel that the solution took, 0 with "cholesky".
        curves: Error and loss, (1,) each, of "test" and "val" where given.

    Example:
        >>> RidgeFit(torch.tensor([0.5, -0.5]), "cholesky", 0.0, 1.0, 0).predict(torch.eye(2))
        tensor([ 0.5000, -0.5000])
    """

    method: Literal["cholesky", "cg"]
    residual: float
    condition_number: float
    iterations: int
    curves: dict[str, Curve] = field(default_factory=dict)

    @property
    def test_error(self) -> float | None:
        """Fraction of the test set that is wrong; None without a test set, and for real targets."""
        curve = self.curves.get("test")
        return None if curve is None or curve.errors is None else float(curve.errors[0])

    @property
    def test_loss(self) -> float | None:
        """Mean squared error on the test set, None without one."""
        curve = self.curves.get("test")
        return None if curve is None else float(curve.losses[0])


def ridge(
    kernel: Tensor | Callable[[Tensor], Tensor],
    targets: Tensor,
    regularization: float = 0.0,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    method: Literal["auto", "cholesky", "cg"] = "auto",
    tolerance: float | None = None,
    max_iterations: int = 1000,
    rank: int = 200,
    seed: int = 0,
    progress: bool = False,
    real: bool = False,
) -> RidgeFit:
    """Solve kernel ridge regression, (K + n reg I) a = y.

    It minimizes mean (f - y)^2 + reg ||f||_K^2. With reg = 0 it interpolates: the end of gradient descent when K is
    positive definite. The preconditioner is the randomized Nystrom approximation of K; Frangella, Tropp and Udell
    (2023, arXiv 2110.02820).

    Args:
        kernel: Gram of the training set (n, n), or a function that multiplies it by a float64 vector (n,).
        targets: Labels (n,) in {-1, +1}, real numbers (n,), or (n, C) real or one-hot.
        regularization: reg, at least 0, in units of the kernel per sample.
        test: Kernel between test and training points (m, n), and test targets (m,) or (m, C).
        val: The same of a validation set.
        method: "cholesky" (float64), "cg", or "auto": "cholesky" for a Gram of up to 8192 samples.
        tolerance: Relative residual to reach: 1e-10 by default, 1e-5 for a function that computes in float32.
        max_iterations: Iterations of "cg" at most.
        rank: Rank of the preconditioner, 0 for none; it costs ``rank`` products with the kernel.
        seed: Seed of the preconditioner's random test vectors.
        progress: Show a progress bar of the iterations.
        real: True: the targets are real numbers, whatever their values, and have losses alone. By default their values
            tell.

    Returns:
        The fit with its residual and condition number. Where "cg" misses the tolerance it warns.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels or values are not usable, or the system is not positive definite.

    Example:
        >>> ridge(torch.eye(2), torch.tensor([1.0, -1.0]), regularization=0.5).coefficients
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    if not regularization >= 0 or (tolerance is not None and not tolerance > 0) or rank < 0 or max_iterations < 1:
        raise ValueError(
            "regularization and rank must be >= 0, tolerance > 0 and max_iterations >= 1, got "
            f"{regularization=}, {rank=}, {tolerance=}, {max_iterations=}."
        )
    if method not in ("auto", "cholesky", "cg"):
        raise ValueError(f'method must be "auto", "cholesky" or "cg", got {method!r}.')
    if not isinstance(kernel, Tensor) and method == "cholesky":
        raise ValueError('method="cholesky" needs the Gram itself: pass a tensor, or use "cg".')
    problem = check_problem(kernel if isinstance(kernel, Tensor) else None, targets, test, val, real=real)
    (labels,), gram = problem.targets, problem.kernel  # (n, C)
    n = len(labels)
    shift = n * regularization
    used: Literal["cholesky", "cg"] = "cg"
    if gram is not None and (method == "cholesky" or (method == "auto" and n <= _CHOLESKY_MAX)):
        used, iterations, tolerance = "cholesky", 0, tolerance or 1e-10
        coefficients, residual, condition = _cholesky(gram.double(), labels, shift)
    else:
        with own_precision(labels.device.type):
            precision = torch.float64 if isinstance(kernel, Tensor) else _checked_product(kernel, labels[:, 0]).dtype
            multiply = _system(kernel, shift)
            precondition = _nystrom(multiply, n, rank, seed, labels.device, torch.finfo(precision).eps)
            tolerance = tolerance or (1e-10 if precision == torch.float64 else 1e-5)
            with progress_bar("ridge regression", max_iterations, "iterations", enabled=progress) as advance:
                coefficients, iterations = _conjugate_gradient(
                    multiply, precondition, labels, tolerance, max_iterations, advance
                )
            residual = _relative(multiply(coefficients) - labels, labels)  # recomputed: that of the iteration drifts
        largest = largest_eigenvalue(lambda v: multiply(v[:, None])[:, 0], n, device=labels.device, tolerance=1e-2)
        condition = largest / shift if shift else float("inf")
    if not residual <= 2 * tolerance:
        known = "not bounded without regularization" if condition == float("inf") else f"{condition:.1e}"
        warnings.warn(
            f"ridge reached a relative residual of {residual:.1e}, not {tolerance:.1e}, after {iterations} iterations "
            f"(condition number {known}): raise regularization, rank or max_iterations, or use float64.",
            stacklevel=2,
        )
    curves = _curves(problem, coefficients)
    return RidgeFit(coefficients.reshape(problem.shape), used, residual, condition, iterations, curves)


def _curves(problem: Problem, coefficients: Tensor) -> dict[str, Curve]:
    """Error and loss of the one solution (n, C) on every set, as curves of one entry."""
    curves = {}
    for name, (rows, (truth,)) in problem.sets.items():
        predictions = rows.double() @ coefficients.to(rows.device)
        errors, losses = error_and_loss(predictions[None], truth[None])
        curves[name] = Curve(errors.cpu() if problem.classes[0] else None, losses.cpu())
    return curves


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
    largest = largest_eigenvalue(system, tolerance=1e-2)
    of_inverse = largest_eigenvalue(  # 1 / lambda_min
        lambda v: torch.cholesky_solve(v[:, None], factor)[:, 0], n, device=gram.device, tolerance=1e-2
    )
    return coefficients, _relative(system @ coefficients - labels, labels), largest * of_inverse


def _checked_product(kernel: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
    """The product with one vector (n,), of a function that has not been called before."""
    product: object = kernel(vector)
    if not isinstance(product, Tensor) or not product.is_floating_point():
        found = product.dtype if isinstance(product, Tensor) else type(product).__name__
        raise TypeError(f"The function must return K @ v, a floating-point tensor, got {found}.")
    if product.shape != vector.shape:
        raise ValueError(f"The function must map v {tuple(vector.shape)} to K @ v, got {tuple(product.shape)}.")
    if not torch.isfinite(product).all():
        raise ValueError("The function's product with the targets has a NaN or infinite entry: compute it in float64.")
    return product


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
    # Frangella, Tropp and Udell (2023), algorithm 2.1 by its numbers, with A the system K + n reg I itself: their
    # preconditioner then needs no regularization of its own
    if rank == 0:
        return lambda x: x
    # 1 and 2: a Gaussian test matrix, orthonormalized: Omega, (n, rank)
    noise = torch.randn(n, min(rank, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    omega = torch.linalg.qr(noise.to(device)).Q
    # 3: the sketch Y = A Omega, the only products
    sketch = multiply(omega)
    # 4 and 5: a shift nu of the size of the rounding errors, which keeps the core positive definite: Y + nu Omega
    nu = n**0.5 * epsilon * float(sketch.norm())
    # 6: Cholesky of the core Omega' (Y + nu Omega) = C C', lower where the paper has the upper C'
    core = omega.T @ sketch + nu * torch.eye(omega.shape[1], dtype=torch.float64, device=device)
    core = (core + core.T) / 2
    factor, failed = torch.linalg.cholesky_ex(core)
    if failed:
        raise _indefinite(float(torch.linalg.eigvalsh(core)[0]) - nu)
    # 7: B = (Y + nu Omega) C^-T, so that the approximation is B B'
    half = torch.linalg.solve_triangular(factor, (sketch + nu * omega).T, upper=False).T
    # 8 and 9: its eigenvectors U and eigenvalues, less the shift
    vectors, roots, _ = torch.linalg.svd(half, full_matrices=False)
    values = (roots.square() - nu).clamp_min(nu)
    # P^-1 = lambda_rank U Lambda^-1 U' + (I - U U')
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
    # Saad, "Iterative methods for sparse linear systems", algorithm 9.1: x solution, r residual, z = P^-1 r, p
    # direction, gamma = r'z, alpha = gamma / p'Ap, beta = gamma_new / gamma. r is carried along and drifts from
    # y - A x by rounding; the caller computes the true residual. A column that has reached its goal no longer moves.
    x, r = torch.zeros_like(labels), labels
    p = z = precondition(r)
    gamma = (r * z).sum(0)
    goal = tolerance * labels.norm(dim=0)
    for iteration in range(max_iterations):
        active = r.norm(dim=0) > goal
        if not active.any():
            return x, iteration
        a_p = multiply(p)
        curvature = (p * a_p).sum(0)  # p'Ap
        if not (curvature[active] > 0).all():
            quotient = float((curvature / p.square().sum(0))[active].min())
            raise _indefinite(quotient)
        alpha = torch.where(active, gamma / curvature, 0.0)
        x, r = x + alpha * p, r - alpha * a_p
        z = precondition(r)
        gamma, before = (r * z).sum(0), gamma
        beta = torch.where(active, gamma / before, 0.0)
        p = z + beta * p
        advance(1)
    return x, max_iterations
