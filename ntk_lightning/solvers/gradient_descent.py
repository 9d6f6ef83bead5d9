"""Full-batch gradient descent and gradient flow on a kernel model, at any steps at once, in the kernel's eigenbasis.

Callbacks fit by gradient flow where a run has no optimizer config; with one they take the network's mini-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers.checks import Problem, check_optimizers, check_problem
from ntk_lightning.solvers.kernel_fit import Curve, KernelFit, error_and_loss
from ntk_lightning.spectrum import warn_above_critical
from ntk_lightning.whole_number import is_whole

__all__ = ["gradient_descent", "gradient_flow"]


def gradient_descent(
    kernel: Tensor,
    targets: Tensor,
    optimizer: OptimizerConfig,
    steps: Sequence[int] | None = None,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    eigensystem: tuple[Tensor, Tensor] | None = None,
    real: bool = False,
) -> KernelFit:
    """Find what full-batch gradient descent with momentum reaches after given numbers of steps, without taking them.

    The steps v <- mu v + (2 / n C) (K a - y), a <- a - lr v split in the eigenvectors q_i of K: with
    s_i = 2 lr lambda_i / (n C), a_t = (2 lr / n C) sum_i q_i <q_i, y> phi_t(s_i), where phi_0 = w_0 = 0,
    w_{t+1} = mu w_t + 1 - s phi_t, phi_{t+1} = phi_t + w_{t+1}. The t-th power of this affine map, by squaring,
    needs no roots, so real, complex and double roots are one case. Without momentum s phi_t = 1 - (1 - s)^t.
    See Goh (2017), "Why momentum really works".

    Args:
        kernel: Gram of the training set, (n, n).
        targets: Labels (n,) in {-1, +1}, real numbers (n,), or (n, C) real or one-hot.
        optimizer: Learning rate, momentum and number of steps (an epoch is one step); its batch size does not matter.
        steps: Numbers of steps to evaluate, at least 0; by default about 100, logarithmically spaced to the
            optimizer's last.
        test: Kernel between test and training points (m, n), and test targets (m,) or (m, C).
        val: The same of a validation set.
        eigensystem: ``torch.linalg.eigh(kernel.double())`` where it is known, to reuse over many fits.
        real: True: the targets are real numbers, whatever their values, and have losses alone. By default their values
            tell.

    Returns:
        The coefficients after the last of the steps, and the error curves, training set included.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, steps or values are not usable.

    Example:
        >>> config = OptimizerConfig(lr=0.5, momentum=0.0)
        >>> gradient_descent(torch.eye(2), torch.tensor([1.0, -1.0]), config, steps=[1, 2]).coefficients
        tensor([ 0.7500, -0.7500], dtype=torch.float64)
    """
    check_optimizers(optimizer)
    total = optimizer.steps if optimizer.steps is not None else optimizer.epochs
    if steps is None:
        steps = [round(total ** (i / 99)) for i in range(100)]
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps must be a list of step counts, got {steps!r}: write [{steps!r}].")
    asked = steps.tolist() if isinstance(steps, Tensor) else list(steps)
    if not asked or not all(map(is_whole, asked)) or min(asked) < 0:
        raise ValueError(f"steps must be whole numbers of at least 0, got {steps}.")
    counts = torch.tensor(sorted({int(step) for step in asked}))
    problem = check_problem(kernel, targets, test, val, real=real).with_train()
    values, vectors = _eigensystem(kernel, eigensystem)
    warn_above_critical(kernel, [optimizer], targets[0].numel(), largest=float(values.max()), stacklevel=3)
    scale = 2 * optimizer.lr / targets.numel()
    progress = _momentum_progress(scale * values, optimizer.momentum, counts)
    return _fit(problem, vectors, scale * progress, counts)


def gradient_flow(
    kernel: Tensor,
    targets: Tensor,
    times: Sequence[float],
    *,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    eigensystem: tuple[Tensor, Tensor] | None = None,
    real: bool = False,
) -> KernelFit:
    """Follow gradient flow, the limit of small learning rates at time t = lr * steps, without momentum.

    f_t = y - exp(-2 K t / (n C)) y on the training set: a_t = sum_i q_i <q_i, y> (1 - exp(-2 lambda_i t / (n C))) /
    lambda_i. Jacot et al. (2018, arXiv 1806.07572).

    Args:
        kernel: Gram of the training set, (n, n).
        targets: Labels (n,) in {-1, +1}, real numbers (n,), or (n, C) real or one-hot.
        times: Times to evaluate, at least 0.
        test: Kernel between test and training points (m, n), and test targets (m,) or (m, C).
        val: The same of a validation set.
        eigensystem: ``torch.linalg.eigh(kernel.double())`` where it is known, to reuse over many fits.
        real: True: the targets are real numbers, whatever their values, and have losses alone. By default their values
            tell.

    Returns:
        The coefficients at the last time, and the error curves; ``steps`` holds the times.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, times or values are not usable.

    Example:
        >>> gradient_flow(2 * torch.eye(2), torch.tensor([1.0, -1.0]), [1e3]).coefficients
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    if not isinstance(times, Iterable):
        raise TypeError(f"times must be a list of times, got {times!r}: write [{times!r}].")
    moments = torch.tensor(sorted(set(times)), dtype=torch.float64)
    if not len(moments) or not torch.isfinite(moments).all() or moments[0] < 0:
        raise ValueError(f"times must be finite and at least 0, got {times}.")
    problem = check_problem(kernel, targets, test, val, real=real).with_train()
    values, vectors = _eigensystem(kernel, eigensystem)
    rates = 2 * values / targets.numel()
    elapsed = moments.to(values)
    # (1 - exp(-rate t)) / rate, which is t where the rate is 0
    safe = torch.where(rates == 0, 1.0, rates)[:, None]
    progress = torch.where(rates[:, None] == 0, elapsed, -torch.expm1(-safe * elapsed) / safe)
    return _fit(problem, vectors, 2 / targets.numel() * progress, moments)


def _eigensystem(kernel: Tensor, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,) and eigenvectors (n, n) in float64, computed unless they are known."""
    values, vectors = torch.linalg.eigh(kernel.detach().double()) if known is None else known
    if values.shape != kernel.shape[:1] or vectors.shape != kernel.shape:
        raise ValueError(
            f"eigensystem must be torch.linalg.eigh(kernel.double()) of this kernel of {len(kernel)} samples, got "
            f"{tuple(values.shape)} and {tuple(vectors.shape)}."
        )
    return values.to(kernel.device, torch.float64), vectors.to(kernel.device, torch.float64)


def _momentum_progress(s: Tensor, momentum: float, counts: Tensor) -> Tensor:
    """phi_t(s) of every eigenvalue and number of steps, (n, k)."""
    # One step is (phi, w, 1) <- A (phi, w, 1) with a 3 by 3 matrix A for each s; A^t is the product of the squarings
    # A, A^2, A^4, ... that the binary digits of t ask for
    one, mu = torch.ones_like(s), torch.full_like(s, momentum)
    zero = torch.zeros_like(s)
    rows = ((one - s, mu, one), (-s, mu, one), (zero, zero, one))
    power = torch.stack([torch.stack(row, -1) for row in rows], -2)  # A, (n, 3, 3)
    state = torch.stack((zero, zero, one), -1)[..., None].repeat(1, 1, len(counts))  # (n, 3, k)
    bits = counts.to(s.device)
    while bits.any():
        state = torch.where(bits % 2 == 1, power @ state, state)
        power, bits = power @ power, bits // 2
    return state[:, 0]


def _fit(problem: Problem, vectors: Tensor, filters: Tensor, steps: Tensor) -> KernelFit:
    """Evaluate a_t = sum_i q_i <q_i, y> filter_i(t), with q_i the columns of vectors and the filters (n, k)."""
    (labels,), (classes,) = problem.targets, problem.classes
    n, outputs = labels.shape
    projections = (vectors.T @ labels)[:, None]  # <q_i, y>, (n, 1, C)
    coefficients = (vectors @ (filters[:, :, None] * projections).flatten(1)).view(n, -1, outputs)  # (n, k, C)
    curves = {}
    for name, (rows, (truth,)) in problem.sets.items():
        predictions = (rows.to(vectors) @ coefficients.flatten(1)).view(len(rows), -1, outputs)
        errors, losses = error_and_loss(predictions.transpose(0, 1), truth[None])
        curves[name] = Curve(errors.cpu() if classes else None, losses.cpu())
    diverged = not bool(torch.isfinite(coefficients).all())
    return KernelFit(coefficients[:, -1].reshape(problem.shape).clone(), steps, curves, diverged)
