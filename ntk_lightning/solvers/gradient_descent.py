"""Full-batch gradient descent and gradient flow on a kernel model, at any steps at once, in the kernel's eigenbasis."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers.kernel_fit import KernelFit, check_arguments, check_problem, error_and_loss

__all__ = ["gradient_descent", "gradient_flow"]


def gradient_descent(
    kernel: Tensor,
    targets: Tensor,
    optimizer: OptimizerConfig,
    steps: Sequence[int] | None = None,
    *,
    test_kernel: Tensor | None = None,
    test_targets: Tensor | None = None,
    val_kernel: Tensor | None = None,
    val_targets: Tensor | None = None,
    eigensystem: tuple[Tensor, Tensor] | None = None,
) -> KernelFit:
    """Find what full-batch gradient descent with momentum reaches after given numbers of steps, without taking them.

    The steps v <- mu v + (2 / n C) (K a - y), a <- a - lr v split in the eigenvectors q_i of K: with
    s_i = 2 lr lambda_i / (n C), a_t = (2 lr / n C) sum_i q_i <q_i, y> phi_t(s_i), where phi_0 = w_0 = 0,
    w_{t+1} = mu w_t + 1 - s phi_t, phi_{t+1} = phi_t + w_{t+1}. The t-th power of this affine map, by squaring,
    needs no roots, so real, complex and double roots are one case. Without momentum s phi_t = 1 - (1 - s)^t.
    See Goh (2017), "Why momentum really works".

    Args:
        kernel: Gram of the training set, (n, n).
        targets: Labels (n,) in {-1, +1}, or (n, C) real or one-hot.
        optimizer: Learning rate, momentum and number of steps (an epoch is one step); its batch size does not matter.
        steps: Numbers of steps to evaluate, at least 0; by default about 100, logarithmically spaced to the
            optimizer's last.
        test_kernel: Kernel between test and training points, (m, n).
        test_targets: Test labels, (m,) or (m, C).
        val_kernel: Kernel between validation and training points, (k, n).
        val_targets: Validation labels, (k,) or (k, C).
        eigensystem: ``torch.linalg.eigh(kernel.double())`` where it is known, to reuse over many fits.

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
    check_arguments(targets, optimizer)
    total = optimizer.steps if optimizer.steps is not None else optimizer.epochs
    if steps is None:
        steps = [round(total ** (i / 99)) for i in range(100)]
    if not isinstance(steps, Iterable):
        raise TypeError(f"steps must be a list of step counts, got {steps!r}: write [{steps!r}].")
    counts = torch.tensor(sorted(set(steps)))
    if not len(counts) or counts.is_floating_point() or counts[0] < 0:
        raise ValueError(f"steps must be integers of at least 0, got {steps}.")
    sets = {"test": (test_kernel, test_targets), "val": (val_kernel, val_targets)}
    given = check_problem(kernel, targets[None], sets, lambda labels: labels[None])
    values, vectors = _eigensystem(kernel, eigensystem)
    scale = 2 * optimizer.lr / targets.numel()
    ratio = float(scale * values.max()) / (2 * (1 + optimizer.momentum))
    if ratio > 1:
        warnings.warn(
            f"lr={optimizer.lr:g} is {ratio:.3g} times the critical learning rate {optimizer.lr / ratio:.3g} of this "
            f"kernel ({len(kernel)} samples, momentum {optimizer.momentum:g}): the fit diverges.",
            stacklevel=2,
        )
    progress = _momentum_progress(scale * values, optimizer.momentum, counts)
    return _fit(kernel, targets, given, vectors, scale * progress, counts)


def gradient_flow(
    kernel: Tensor,
    targets: Tensor,
    times: Sequence[float],
    *,
    test_kernel: Tensor | None = None,
    test_targets: Tensor | None = None,
    val_kernel: Tensor | None = None,
    val_targets: Tensor | None = None,
    eigensystem: tuple[Tensor, Tensor] | None = None,
) -> KernelFit:
    """Follow gradient flow, the limit of small learning rates at time t = lr * steps, without momentum.

    f_t = y - exp(-2 K t / (n C)) y on the training set: a_t = sum_i q_i <q_i, y> (1 - exp(-2 lambda_i t / (n C))) /
    lambda_i. Jacot et al. (2018, arXiv 1806.07572).

    Args:
        kernel: Gram of the training set, (n, n).
        targets: Labels (n,) in {-1, +1}, or (n, C) real or one-hot.
        times: Times to evaluate, at least 0.
        test_kernel: Kernel between test and training points, (m, n).
        test_targets: Test labels, (m,) or (m, C).
        val_kernel: Kernel between validation and training points, (k, n).
        val_targets: Validation labels, (k,) or (k, C).
        eigensystem: ``torch.linalg.eigh(kernel.double())`` where it is known, to reuse over many fits.

    Returns:
        The coefficients at the last time, and the error curves; ``steps`` holds the times.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, times or values are not usable.

    Example:
        >>> gradient_flow(2 * torch.eye(2), torch.tensor([1.0, -1.0]), [1e3]).coefficients
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    check_arguments(targets)
    if not isinstance(times, Iterable):
        raise TypeError(f"times must be a list of times, got {times!r}: write [{times!r}].")
    moments = torch.tensor(sorted(set(times)), dtype=torch.float64)
    if not len(moments) or not torch.isfinite(moments).all() or moments[0] < 0:
        raise ValueError(f"times must be finite and at least 0, got {times}.")
    sets = {"test": (test_kernel, test_targets), "val": (val_kernel, val_targets)}
    given = check_problem(kernel, targets[None], sets, lambda labels: labels[None])
    values, vectors = _eigensystem(kernel, eigensystem)
    rates = 2 * values / targets.numel()
    elapsed = moments.to(values)
    safe = torch.where(rates == 0, 1.0, rates)[:, None]
    progress = torch.where(rates[:, None] == 0, elapsed, -torch.expm1(-safe * elapsed) / safe)
    return _fit(kernel, targets, given, vectors, 2 / targets.numel() * progress, moments)


def _eigensystem(kernel: Tensor, known: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(kernel.detach().double()) if known is None else known
    if values.shape != kernel.shape[:1] or vectors.shape != kernel.shape:
        raise ValueError(
            f"eigensystem must be torch.linalg.eigh(kernel.double()) of this kernel of {len(kernel)} samples, got "
            f"{tuple(values.shape)} and {tuple(vectors.shape)}."
        )
    return values.to(kernel.device, torch.float64), vectors.to(kernel.device, torch.float64)


def _momentum_progress(s: Tensor, momentum: float, counts: Tensor) -> Tensor:
    """phi_t(s) of every eigenvalue and number of steps, (n, k)."""
    one, mu = torch.ones_like(s), torch.full_like(s, momentum)
    zero = torch.zeros_like(s)
    rows = ((one - s, mu, one), (-s, mu, one), (zero, zero, one))  # (phi, w, 1) <- power @ (phi, w, 1)
    power = torch.stack([torch.stack(row, -1) for row in rows], -2)
    state = torch.stack((zero, zero, one), -1)[..., None].repeat(1, 1, len(counts))
    bits = counts.to(s.device)
    while bits.any():
        state = torch.where(bits % 2 == 1, power @ state, state)
        power, bits = power @ power, bits // 2
    return state[:, 0]


def _fit(
    kernel: Tensor,
    targets: Tensor,
    sets: dict[str, tuple[Tensor, Tensor]],
    vectors: Tensor,
    filters: Tensor,
    steps: Tensor,
) -> KernelFit:
    """Evaluate a_t = sum_i q_i <q_i, y> filter_i(t), with the filters (n, k), on all sets."""
    n, outputs = len(kernel), targets.numel() // len(kernel)
    labels = targets.detach().to(vectors).reshape(n, outputs)
    coefficients = (vectors @ (filters[:, :, None] * (vectors.T @ labels)[:, None]).flatten(1)).view(n, -1, outputs)
    curves: dict[str, Tensor] = {}
    for name, (rows, truth) in {**sets, "train": (kernel.detach(), targets)}.items():
        predictions = (rows.to(vectors) @ coefficients.flatten(1)).view(len(rows), -1, outputs)
        expected = truth.detach().to(vectors).reshape(len(rows), 1, outputs)
        errors, losses = error_and_loss(predictions.transpose(0, 1), expected.transpose(0, 1))
        curves |= {f"{name}_errors": errors.cpu(), f"{name}_losses": losses.cpu()}
    diverged = not bool(torch.isfinite(coefficients).all())
    return KernelFit(coefficients[:, -1].reshape(targets.shape).clone(), steps, diverged=diverged, **curves)
