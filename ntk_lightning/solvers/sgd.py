"""Mini-batch SGD with momentum on a kernel model, step for step what the linearized network does.

The package's runs and studies call `kernel_sgd`; `kernel_sgd_grid` is for users who sweep rates, seeds and sizes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.progress import progress_bar
from ntk_lightning.solvers.checks import Problem, check_optimizers, check_problem
from ntk_lightning.solvers.kernel_fit import Curve, KernelFit, error_and_loss
from ntk_lightning.spectrum import largest_eigenvalue, warn_above_critical
from ntk_lightning.whole_number import is_whole

__all__ = ["kernel_sgd", "kernel_sgd_grid"]

_MAX_INDICES = 2**20  # of batches held at once


def kernel_sgd(
    kernel: Tensor,
    targets: Tensor,
    optimizer: OptimizerConfig,
    *,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    eval_every: int | Sequence[int] | None = None,
    evaluate_train: bool = False,
    initial_coefficients: Tensor | None = None,
    progress: bool = False,
    real: bool = False,
) -> KernelFit:
    """Fit a kernel model by the mini-batch SGD that its network would run.

    f = K(., X) a with a_0 = 0. A step on batch b of size B with C outputs: g_b = 2 / (B C) (f(x_b) - y_b), 0 elsewhere;
    v <- mu v + g; a <- a - lr v. This is SGD on the weights of g1 (the linearized network without f0) for the loss
    mean (f - y)^2 and the same batches, seen through K: the functional gradient, not the gradient in a.
    Jacot et al. (2018, arXiv 1806.07572).

    Args:
        kernel: Gram of the training set, (n, n). Its dtype is the precision of the products; coefficients and momentum
            are float64.
        targets: Labels (n,) in {-1, +1}, real numbers (n,), or (n, C) real or one-hot.
        optimizer: Learning rate, momentum, and the batches of every step.
        test: Kernel between test and training points (m, n), and test targets (m,) or (m, C).
        val: The same of a validation set.
        eval_every: Evaluate every so many steps and after the last, or after exactly these step counts (0 is before the
            first step). By default at the end of every epoch.
        evaluate_train: Evaluate the training set too, which reads the Gram once more each time.
        initial_coefficients: a_0, (n,) or (n, C); zero by default.
        progress: Show a progress bar.
        real: True: the targets are real numbers, whatever their values, and have losses alone. By default their values
            tell.

    Returns:
        The coefficients and the error curves. A run that diverges ends early, with a warning and errors of 1.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, steps or values are not usable.

    Example:
        >>> fit = kernel_sgd(torch.eye(2), torch.tensor([1.0, -1.0]), OptimizerConfig(lr=0.5, momentum=0, epochs=1))
        >>> fit.coefficients
        tensor([ 0.5000, -0.5000], dtype=torch.float64)
    """
    check_optimizers(optimizer)
    problem = check_problem(kernel, targets, test, val, real=real)
    initial = None
    if initial_coefficients is not None:
        if initial_coefficients.shape != targets.shape:
            raise ValueError(
                f"initial_coefficients must have the shape of targets, {tuple(targets.shape)}, got "
                f"{tuple(initial_coefficients.shape)}."
            )
        initial = initial_coefficients.detach().to(problem.targets).reshape(problem.targets.shape)
    steps, total = _evaluation_steps(eval_every, optimizer, len(kernel)), optimizer.total_steps(len(kernel))
    problem = problem.with_train() if evaluate_train else problem
    with progress_bar("kernel SGD", total, "steps", enabled=progress) as report:
        return _fit_together(problem, [optimizer], steps, report, initial)[0]


def kernel_sgd_grid(
    kernel: Tensor,
    targets: Tensor,
    optimizers: Sequence[OptimizerConfig],
    *,
    sizes: Sequence[int] | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    eval_every: int | Sequence[int] | None = None,
    evaluate_train: bool = False,
    progress: bool = False,
) -> dict[tuple[int, OptimizerConfig, int], KernelFit]:
    """Run `kernel_sgd` for all combinations of training size, optimizer and label vector.

    Runs that see the same batches (they may differ in labels, learning rate and momentum) advance together, and each
    row of the Gram is read once for all of them. Other seeds and sizes need other rows at every step: they follow one
    another, on views of the one Gram.

    Args:
        kernel: Gram of the largest training set, (n, n).
        targets: Label vectors (n,), (r, n) or (r, n, C), as in `kernel_sgd`.
        optimizers: Learning rates, momenta, batch sizes, seeds, ...
        sizes: Nested training sets: the first ``size`` samples of the Gram. Only n by default.
        test: Kernel between test and training points (m, n), and test targets (m,), (r, m) or (r, m, C).
        val: The same of a validation set.
        eval_every: As in `kernel_sgd`.
        evaluate_train: As in `kernel_sgd`.
        progress: Show a progress bar.

    Returns:
        The fit of each (size, optimizer, index of the label vector).

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or another argument is of a wrong type.
        ValueError: Shapes, labels, steps, sizes or values are not usable.

    Example:
        >>> rates = [OptimizerConfig(lr=lr, momentum=0, epochs=1) for lr in (0.25, 0.5)]
        >>> fits = kernel_sgd_grid(torch.eye(2), torch.tensor([1.0, -1.0]), rates)
        >>> fits[2, rates[0], 0].coefficients
        tensor([ 0.2500, -0.2500], dtype=torch.float64)
    """
    check_optimizers(*optimizers)
    problem = check_problem(kernel, targets, test, val, several=True)
    sizes = [len(kernel)] if sizes is None else sizes
    if not all(map(is_whole, sizes)):
        raise TypeError(f"sizes must be whole numbers, got {sizes}.")
    if not optimizers or not sizes or not all(1 <= size <= len(kernel) for size in sizes):
        raise ValueError(f"Give at least one optimizer and sizes between 1 and {len(kernel)}, got {sizes=}.")
    # Fits that differ in rate and momentum alone see the same batches: one group each
    groups: dict[tuple[int, OptimizerConfig], list[OptimizerConfig]] = {}
    for size in dict.fromkeys(sizes):
        for optimizer in dict.fromkeys(optimizers):
            groups.setdefault((size, replace(optimizer, lr=1.0, momentum=0.0)), []).append(optimizer)
    steps = {(size, order): _evaluation_steps(eval_every, order, size) for size, order in groups}
    fits: dict[tuple[int, OptimizerConfig, int], KernelFit] = {}
    total = sum(order.total_steps(size) for size, order in groups)
    with progress_bar("kernel SGD", total, "steps", enabled=progress) as report:
        for (size, order), members in groups.items():
            nested = problem.first(size).with_train() if evaluate_train else problem.first(size)
            results = _fit_together(nested, members, steps[size, order], report)
            keys = [(size, optimizer, label) for optimizer in members for label in range(len(problem.targets))]
            fits.update(zip(keys, results, strict=True))
    return fits


def _fit_together(
    problem: Problem,
    optimizers: Sequence[OptimizerConfig],
    steps: Sequence[int],
    report: Callable[[float], None],
    initial: Tensor | None = None,
) -> list[KernelFit]:
    """Fit every pair of an optimizer and a label vector; the optimizers differ in rate and momentum alone."""
    # A row of the state is one output of one pair: with p pairs (optimizers by r label vectors) and C outputs, a and v
    # are (p C, n), so that one pass over a row of the Gram serves all of them
    from ntk_lightning.solvers.sgd_steps import (  # here: numba takes a second that only fits need to spend
        advance,
        product,
    )

    assert problem.kernel is not None, "kernel SGD takes a Gram"
    kernel, order = problem.kernel, optimizers[0]
    _, n, outputs = problem.targets.shape
    largest = largest_eigenvalue(kernel, tolerance=1e-2)
    warn_above_critical(kernel, optimizers, outputs, largest=largest, stacklevel=4)

    def models(vectors: Tensor) -> Tensor:
        """(r, m, C) to (p, C, m)."""
        return vectors.mT.repeat(len(optimizers), 1, 1)

    pairs = [(optimizer, classes) for optimizer in optimizers for classes in problem.classes]
    rates = torch.tensor([(o.lr, o.momentum) for o, _ in pairs], dtype=torch.float64, device=kernel.device)
    rates = rates.repeat_interleave(outputs, 0)  # (p C, 2)
    labels = models(problem.targets).flatten(0, 1)
    coefficients = torch.zeros_like(labels) if initial is None else models(initial).flatten(0, 1)
    velocity = torch.zeros_like(labels)
    truths = {name: models(targets) for name, (_, targets) in problem.sets.items()}
    # What stands here where a run ends early, since it diverged
    errors = {name: torch.ones(len(pairs), len(steps), dtype=torch.float64) for name in truths}
    losses = {name: torch.full_like(curve, torch.inf) for name, curve in errors.items()}

    batches, done, total = order.run_batches(n), 0, order.total_steps(n)
    position = {step: i for i, step in enumerate(steps)}
    finite = torch.ones(len(pairs), dtype=torch.bool)
    for stop in sorted({*steps, total}):
        while done < stop and finite.any():
            chunk = list(islice(batches, min(stop - done, max(1, _MAX_INDICES // n))))
            advance(kernel, labels, chunk, coefficients, velocity, rates, outputs)
            done += len(chunk)
            report(len(chunk))
        finite = torch.isfinite(coefficients).view(len(pairs), -1).all(1)
        if not finite.any():
            break
        for name, (rows, _) in problem.sets.items() if stop in position else ():
            predictions = product(rows, coefficients).double().view_as(truths[name])  # (p, C, m)
            error, loss = error_and_loss(predictions.mT, truths[name].mT)
            errors[name][:, position[stop]], losses[name][:, position[stop]] = error.cpu(), loss.cpu()
    if not finite.all():
        warnings.warn(
            f"{int((~finite).sum())} of {len(pairs)} kernel fits of {n} samples diverged (by step {done} of {total}); "
            "errors from there on are 1: lower the learning rate.",
            stacklevel=3,
        )
    final = coefficients.view(len(pairs), outputs, n).mT  # (p, n, C)
    return [
        KernelFit(
            coefficients=final[i].reshape(problem.shape).clone(),
            steps=torch.tensor(steps),
            curves={
                name: Curve(errors[name][i].clone() if classes else None, losses[name][i].clone()) for name in truths
            },
            diverged=not bool(finite[i]),
            critical_lr=(1 + optimizer.momentum) * n * outputs / largest if largest > 0 else math.inf,
        )
        for i, (optimizer, classes) in enumerate(pairs)
    ]


def _evaluation_steps(eval_every: int | Sequence[int] | None, order: OptimizerConfig, n: int) -> list[int]:
    """Step counts at which a run is evaluated, increasing."""
    total = order.total_steps(n)
    if eval_every is None:
        eval_every = order.steps_per_epoch(n)
    counts = list(eval_every) if isinstance(eval_every, Iterable) else [eval_every]
    if not all(map(is_whole, counts)):
        raise TypeError(f"eval_every must be a whole number of steps, or a list of such numbers; got {eval_every!r}.")
    if not isinstance(eval_every, Iterable):
        if eval_every < 1:
            raise ValueError(f"eval_every must be at least 1 step, got {eval_every}.")
        return sorted({*range(eval_every, total + 1, eval_every), total})
    steps = sorted({int(count) for count in counts})
    if not steps or steps[0] < 0 or steps[-1] > total:
        raise ValueError(f"eval_every must be step counts from 0 to {total}, the length of the run; got {eval_every}.")
    return steps
