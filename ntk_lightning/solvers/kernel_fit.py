"""What a kernel fit takes and gives: checked problems, prediction errors, and `KernelFit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_lightning.objective import count_errors, squared_error
from ntk_lightning.optim import OptimizerConfig

__all__ = [
    "KernelFit",
    "check_arguments",
    "check_evaluation_set",
    "check_kernel",
    "check_problem",
    "check_targets",
    "error_and_loss",
]


@dataclass(frozen=True, eq=False)
class KernelFit:
    """A kernel model f(x) = sum_i K(x, x_i) a_i fitted by gradient steps, and its error curves.

    The optimal early stopping of the source paper picks the step by the test error itself: it is an oracle, so the last
    error and the error at the best validation step stand beside it.

    Args:
        coefficients: The last coefficients a, (n,) or (n, C), float64.
        steps: Optimizer steps, or times, of the evaluations, (k,), increasing.
        test_errors: Fraction of the test set that is wrong at these steps, (k,), or None without a test set.
        test_losses: Mean squared error on the test set, (k,).
        val_errors: The same on the validation set.
        val_losses: The same on the validation set.
        train_errors: The same on the training set.
        train_losses: The same on the training set.
        diverged: Whether a coefficient became infinite or NaN; errors from there on are 1.

    Example:
        >>> fit = KernelFit(torch.zeros(2), torch.tensor([10, 20]), test_errors=torch.tensor([0.25, 0.5]))
        >>> fit.optimal_error, fit.optimal_step, fit.last_error
        (0.25, 10, 0.5)
    """

    coefficients: Tensor
    steps: Tensor
    test_errors: Tensor | None = None
    test_losses: Tensor | None = None
    val_errors: Tensor | None = None
    val_losses: Tensor | None = None
    train_errors: Tensor | None = None
    train_losses: Tensor | None = None
    diverged: bool = False

    @property
    def optimal_error(self) -> float:
        """The least test error of all evaluations: optimal early stopping.

        Raises:
            ValueError: There are no test errors.
        """
        return float(self._curve("test").min())

    @property
    def optimal_step(self) -> int | float:
        """The first step with the least test error.

        Raises:
            ValueError: There are no test errors.
        """
        return self.steps[self._curve("test").argmin()].item()

    @property
    def last_error(self) -> float:
        """The test error of the last evaluation.

        Raises:
            ValueError: There are no test errors.
        """
        return float(self._curve("test")[-1])

    @property
    def validated_error(self) -> float:
        """The test error at the first step with the least validation error.

        Raises:
            ValueError: There are no test or no validation errors.
        """
        return float(self._curve("test")[self._curve("val").argmin()])

    def predict(self, kernel_rows: Tensor) -> Tensor:
        """Predict with the last coefficients.

        Args:
            kernel_rows: Kernel between new points and the training set, (m, n).

        Returns:
            f at the new points, (m,) or (m, C), in the dtype of ``kernel_rows``.
        """
        return kernel_rows @ self.coefficients.to(kernel_rows)

    def _curve(self, name: str) -> Tensor:
        errors: Tensor | None = getattr(self, f"{name}_errors")
        if errors is None or not len(errors):
            raise ValueError(
                f"This fit has no {name} errors: pass {name}_kernel and {name}_targets, and evaluate once."
            )
        return errors


def check_arguments(targets: object, *optimizers: object) -> None:
    """Check the types of what a fit is given beside its kernel.

    Args:
        targets: Training labels.
        *optimizers: Its optimizer configs.

    Raises:
        TypeError: The labels are not a tensor, or a config is not an OptimizerConfig.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}: convert them by torch.as_tensor.")
    for optimizer in optimizers:
        if not isinstance(optimizer, OptimizerConfig):
            raise TypeError(
                f"The optimizer must be a config, got {type(optimizer).__name__}: write OptimizerConfig(lr=..., ...)."
            )


def check_kernel(kernel: Tensor) -> None:
    """Check a training Gram.

    Args:
        kernel: The kernel of the training set with itself, (n, n).

    Raises:
        TypeError: It is not a float32 or float64 tensor.
        ValueError: It is not square, not finite or not symmetric.
    """
    _check_matrix("kernel", kernel)
    n, columns = kernel.shape
    if n != columns:
        raise ValueError(f"kernel must be square, (n, n), got {tuple(kernel.shape)}.")
    probe = slice(0, n, max(1, n // 64))
    asymmetry = float((kernel[probe] - kernel[:, probe].T).abs().max() / kernel[probe].abs().max().clamp_min(1e-300))
    if asymmetry > 1e-3:
        raise ValueError(
            f"kernel is not symmetric (relative difference {asymmetry:.1e}): pass the Gram of the training set with "
            "itself, or (kernel + kernel.T) / 2."
        )


def check_targets(name: str, targets: Tensor, count: int) -> None:
    """Check labels before a fit.

    Args:
        name: What to call them in a message.
        targets: (count,) or (count, 1) in {-1, +1}, or (count, C) real or one-hot.
        count: The number of samples that the kernel has.

    Raises:
        ValueError: Their number is wrong, an entry is not finite, or a single column is not of -1 and +1.

    Example:
        >>> check_targets("targets", torch.tensor([0.0, 1.0]), count=2)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: targets must be -1 or +1, got [0.0, 1.0]: map 0/1 labels by 2 * y - 1; ...
    """
    if targets.dim() not in (1, 2) or len(targets) != count:
        raise ValueError(f"{name} must be ({count},) or ({count}, C) to fit the kernel, got {tuple(targets.shape)}.")
    if not torch.isfinite(targets).all():
        raise ValueError(f"{name} has a NaN or infinite entry: clean the data.")
    if (targets.dim() == 1 or targets.shape[1] == 1) and not (targets.abs() == 1).all():
        raise ValueError(
            f"{name} must be -1 or +1, got {targets.unique()[:4].tolist()}: map 0/1 labels by 2 * y - 1; pass class "
            "numbers as one_hot(y), (n, C)."
        )


def check_evaluation_set(
    name: str, kernel: Tensor | None, targets: Tensor | None, train_targets: Tensor, train_kernel: Tensor | None = None
) -> None:
    """Check a test or validation set against the training set.

    Args:
        name: "test" or "val", for messages.
        kernel: Kernel between its points and the training set, (m, n), or None with ``targets`` None.
        targets: Its labels, (m,) or (m, C).
        train_targets: The training labels, (n,) or (n, C).
        train_kernel: The training Gram, (n, n), where there is one.

    Raises:
        TypeError: The kernel is not a float32 or float64 tensor.
        ValueError: One of the two is missing, or shapes, dtypes, devices or labels do not agree.
    """
    if kernel is None and targets is None:
        return
    if kernel is None or targets is None:
        raise ValueError(f"Pass {name}_kernel and {name}_targets together.")
    _check_matrix(f"{name}_kernel", kernel)
    n = len(train_targets)
    if kernel.shape[1] != n:
        hint = ": transpose it" if kernel.shape[0] == n else ""
        raise ValueError(
            f"{name}_kernel must be (m, {n}), new points by training points, got {tuple(kernel.shape)}{hint}."
        )
    for what in ("dtype", "device") if train_kernel is not None else ():
        if getattr(kernel, what) != getattr(train_kernel, what):
            raise ValueError(
                f"kernel and {name}_kernel differ in {what}: {getattr(train_kernel, what)}, {getattr(kernel, what)}."
            )
    check_targets(f"{name}_targets", targets, len(kernel))
    if targets.shape[1:] != train_targets.shape[1:]:
        raise ValueError(
            f"targets and {name}_targets must have the same number of outputs, got {tuple(train_targets.shape)} and "
            f"{tuple(targets.shape)}."
        )


def check_problem(
    kernel: Tensor,
    targets: Tensor,
    sets: Mapping[str, tuple[Tensor | None, Tensor | None]],
    lead: Callable[[Tensor], Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Check a Gram, its label vectors and the sets to evaluate; keep the sets that are given.

    Args:
        kernel: The training Gram, (n, n).
        targets: Label vectors (r, n) or (r, n, C).
        sets: By name, the kernel of new points (m, n) and their labels, or two times None.
        lead: Gives the labels of a set their leading dimension r.

    Returns:
        By name, the kernel of new points (m, n) and their labels (r, m) or (r, m, C).

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor.
        ValueError: Shapes, dtypes, devices, labels or values do not agree.

    Example:
        >>> sets = {"test": (torch.ones(1, 2), torch.ones(1)), "val": (None, None)}
        >>> list(check_problem(torch.eye(2), torch.ones(1, 2), sets, lambda labels: labels[None]))
        ['test']
    """
    check_kernel(kernel)
    for vector in targets:
        check_targets("targets", vector, len(kernel))
    given = {}
    for name, (rows, vectors) in sets.items():
        labels = None if vectors is None else lead(vectors)
        if labels is not None and len(labels) != len(targets):
            raise ValueError(f"{name}_targets must hold {len(targets)} label vectors as targets, got {len(labels)}.")
        for vector in [None] if labels is None else labels:
            check_evaluation_set(name, rows, vector, targets[0], kernel)
        if rows is not None and labels is not None:
            given[name] = rows.detach(), labels
    return given


def error_and_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute classification error and mean squared error.

    The errors and losses of :mod:`ntk_lightning.objective`, the same as every network's. A set with a NaN or infinite
    prediction has error 1: its model has diverged.

    Args:
        predictions: f, (..., m, C).
        targets: y, (..., m, C).

    Returns:
        The fraction of errors and the mean over samples and outputs of (f - y)^2, both (...,).

    Example:
        >>> error_and_loss(torch.tensor([[0.5], [-1.0]]), torch.tensor([[1.0], [1.0]]))
        (tensor(0.5000, dtype=torch.float64), tensor(2.1250))
    """
    finite = torch.isfinite(predictions).all(-1).all(-1)
    errors = torch.where(finite, count_errors(predictions, targets).double().mean(-1), 1.0)
    losses = torch.where(finite, squared_error(predictions, targets).mean(-1), torch.inf)
    return errors, losses


def _check_matrix(name: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}: convert it by torch.from_numpy.")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {matrix.dtype}: call .float() first.")
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
        raise ValueError(f"{name} has a NaN or infinite entry: recompute it, in float64 if it overflowed.")
