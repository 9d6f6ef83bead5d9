"""The one door through which every solver takes its arguments: checked once, in one shape behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ntk_lightning.objective import check_labels
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers.kernel_fit import EvaluationSet

__all__ = ["Problem", "check_optimizers", "check_problem"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A checked training set with r label vectors, and the sets to evaluate on.

    Args:
        kernel: The training Gram, (n, n), without gradient; None where the solver has only a function.
        targets: (r, n, C), float64, on the kernel's device, C = 1 for one output.
        sets: "test" and "val" where given: kernels (m, n) and targets (r, m, C), float64.
        classes: Of each label vector: whether its targets stand for classes. False for real targets of one output,
            which have a loss and no error rate.
        shape: Of the coefficients of one label vector: (n,) or (n, C).
    """

    kernel: Tensor | None
    targets: Tensor
    sets: dict[str, EvaluationSet]
    classes: list[bool]
    shape: torch.Size

    def first(self, n: int) -> Problem:
        """Take the first n training samples; the evaluation sets stay whole.

        Args:
            n: How many.

        Returns:
            Views of the same Grams.
        """
        return replace(
            self,
            kernel=None if self.kernel is None else self.kernel[:n, :n],
            targets=self.targets[:, :n],
            sets={name: EvaluationSet(rows[:, :n], labels) for name, (rows, labels) in self.sets.items()},
            shape=torch.Size((n, *self.shape[1:])),
        )

    def with_train(self) -> Problem:
        """Add the training set itself to the sets to evaluate.

        Returns:
            The same problem with a set "train".
        """
        assert self.kernel is not None, "only a Gram can be evaluated on its own set"
        return replace(self, sets={**self.sets, "train": EvaluationSet(self.kernel, self.targets)})


def check_optimizers(*optimizers: object) -> None:
    """Check that optimizers are configs.

    Args:
        *optimizers: What a solver was given.

    Raises:
        TypeError: One is not an OptimizerConfig.
    """
    for optimizer in optimizers:
        if not isinstance(optimizer, OptimizerConfig):
            raise TypeError(
                f"The optimizer must be a config, got {type(optimizer).__name__}: write OptimizerConfig(lr=..., ...)."
            )


def check_problem(
    kernel: Tensor | None,
    targets: Tensor,
    test: tuple[Tensor, Tensor] | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    *,
    several: bool = False,
    real: bool = False,
) -> Problem:
    """Check a Gram, its targets and the sets to evaluate, and bring them to one shape.

    What the training targets are decides what is measured. All -1 or +1: labels, with error rates. Two or more columns:
    the largest is the class, with error rates. One column of other floating-point numbers: real targets, with losses
    alone. A column of whole numbers that are not all -1 or +1, of whatever dtype, is refused: it may hold class
    numbers, which a fit would silently take for regression targets. With ``real`` the caller knows better.

    Args:
        kernel: The training Gram, (n, n); None where the solver has only a function that multiplies by it.
        targets: (n,) or (n, C); with ``several``, label vectors (n,), (r, n) or (r, n, C).
        test: Kernel (m, n) and targets (m,) or (m, C) of a test set; with ``several``, label vectors too.
        val: The same of a validation set.
        several: There are several label vectors.
        real: True: all targets are real numbers, whatever their values and columns, with losses alone.

    Returns:
        The checked problem.

    Raises:
        TypeError: A kernel is not a float32 or float64 tensor, or an argument is of a wrong type.
        ValueError: Shapes, dtypes, devices, labels or values do not agree.

    Example:
        >>> problem = check_problem(torch.eye(2), torch.tensor([0.3, 1.0]), test=(torch.ones(1, 2), torch.ones(1)))
        >>> list(problem.sets), problem.classes, problem.shape
        (['test'], [False], torch.Size([2]))
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets must be a tensor, got {type(targets).__name__}: convert them by torch.as_tensor.")
    if kernel is not None:
        _check_gram(kernel)
    n, device = (len(torch.atleast_1d(targets)), targets.device) if kernel is None else (len(kernel), kernel.device)
    vectors = torch.atleast_2d(targets) if several else targets[None]
    classes = [_check_targets("targets", vector, n, real=real) for vector in vectors]
    sets = {
        name: _check_set(name, pair, vectors, classes, kernel, several, real)
        for name, pair in (("test", test), ("val", val))
        if pair is not None
    }
    return Problem(
        kernel=None if kernel is None else kernel.detach(),
        targets=_in_columns(vectors, device),
        sets=sets,
        classes=classes,
        shape=vectors.shape[1:],
    )


def _check_set(
    name: str, pair: object, train: Tensor, classes: list[bool], gram: Tensor | None, several: bool, real: bool
) -> EvaluationSet:
    """Check an evaluation set against the training label vectors (r, n) or (r, n, C) and the training Gram."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], Tensor):
        raise TypeError(f"{name} must be a pair of tensors, {name}=(kernel, targets): kernel (m, n), targets (m,).")
    kernel, targets = pair
    _check_matrix(f"The kernel of {name}", kernel)
    n = train.shape[1]
    if kernel.shape[1] != n:
        hint = ": transpose it" if kernel.shape[0] == n else ""
        raise ValueError(
            f"The kernel of {name} must be (m, {n}), new points by training points, got {tuple(kernel.shape)}{hint}."
        )
    for what in ("dtype", "device") if gram is not None else ():
        if getattr(kernel, what) != getattr(gram, what):
            raise ValueError(
                f"kernel and the kernel of {name} differ in {what}: {getattr(gram, what)}, {getattr(kernel, what)}."
            )
    vectors = torch.atleast_2d(targets) if several else targets[None]
    if len(vectors) != len(train):
        raise ValueError(f"The targets of {name} must hold {len(train)} label vectors as targets, got {len(vectors)}.")
    if vectors.shape[2:] != train.shape[2:]:
        raise ValueError(
            f"targets and the targets of {name} must have the same number of outputs, got {tuple(train.shape[1:])} and "
            f"{tuple(vectors.shape[1:])}."
        )
    for vector, of_classes in zip(vectors, classes, strict=True):
        _check_targets(f"The targets of {name}", vector, len(kernel), like=of_classes, real=real)
    return EvaluationSet(kernel.detach(), _in_columns(vectors, kernel.device))


def _check_targets(name: str, targets: Tensor, count: int, like: bool | None = None, *, real: bool = False) -> bool:
    """Check one label vector, (count,) or (count, C), and tell whether it stands for classes, as the training set's."""
    if targets.is_complex():
        raise TypeError(f"{name} must be real, got {targets.dtype}: call .real first, or fit real and imaginary parts.")
    if targets.dim() not in (1, 2) or len(targets) != count:
        raise ValueError(f"{name} must be ({count},) or ({count}, C) to fit the kernel, got {tuple(targets.shape)}.")
    if not torch.isfinite(targets).all():
        raise ValueError(f"{name} has a NaN or infinite entry: clean the data.")
    if real:
        return False
    if targets.dim() == 2 and targets.shape[1] > 1:
        return True
    # A few real targets may all be whole numbers by chance, so an evaluation set follows the training set (like)
    floating = targets.is_floating_point()
    fractions = floating and bool((targets != targets.round()).any())
    if like is not False and bool(((targets == 1) | (targets == -1)).all()):
        return True
    if (like is False and floating) or (like is None and fractions):
        return False
    if like is False or (like is True and fractions):
        kinds = "real numbers and integers" if like is False else "labels -1 and +1 and real numbers"
        raise ValueError(f"targets and {name[0].lower() + name[1:]} differ in kind, {kinds}: give both alike.")
    check_labels(targets, name=name, hint=" Whole numbers are no real targets: for regression, subtract their mean.")
    return True


def _in_columns(vectors: Tensor, device: torch.device) -> Tensor:
    """(r, m) or (r, m, C) to (r, m, C), float64."""
    return vectors.detach().to(device, torch.float64).reshape(*vectors.shape[:2], -1)


def _check_gram(kernel: Tensor) -> None:
    """Check that a training Gram is a square, finite, symmetric float tensor."""
    _check_matrix("kernel", kernel)
    n, columns = kernel.shape
    if n != columns:
        raise ValueError(f"kernel must be square, (n, n), got {tuple(kernel.shape)}.")
    probe = slice(0, n, max(1, n // 64))  # about 64 rows tell a Gram from a matrix that is not symmetric
    asymmetry = float((kernel[probe] - kernel[:, probe].T).abs().max() / kernel[probe].abs().max().clamp_min(1e-300))
    if asymmetry > 1e-3:
        raise ValueError(
            f"kernel is not symmetric (relative difference {asymmetry:.1e}): pass the Gram of the training set with "
            "itself, or (kernel + kernel.T) / 2."
        )


def _check_matrix(name: str, matrix: Tensor) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}: convert it by torch.from_numpy.")
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {matrix.dtype}: call .float() first.")
    if matrix.dim() != 2 or 0 in matrix.shape:
        raise ValueError(f"{name} must be a non-empty matrix, got shape {tuple(matrix.shape)}.")
    if not torch.isfinite(matrix.sum()) and not torch.isfinite(matrix).all():
        raise ValueError(f"{name} has a NaN or infinite entry: recompute it, in float64 if it overflowed.")
