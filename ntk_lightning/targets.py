"""What a batch's targets are, class numbers, two classes, one-hot or real values, and the targets of a kernel fit."""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TargetKind", "describe_targets", "targets_for"]

TargetKind = Literal["classes", "binary", "one-hot", "real"]


def describe_targets(y: Tensor, num_outputs: int) -> TargetKind:
    """Tell of what kind targets are.

    Args:
        y: Of the training samples: (n,) or (n, 1) for one output; (n,) class numbers or (n, C) for C outputs.
        num_outputs: Outputs C of the network.

    Returns:
        "classes" for class numbers, "binary" for two classes as {0, 1} or {-1, +1} on one output, "one-hot" for rows
        of {0, 1} or {-1, +1} with a single 1, and "real" for anything else: those have losses but no error rate.
        Floating-point targets of one output that are all 0 are real.

    Raises:
        TypeError: ``y`` is no tensor of real numbers.
        ValueError: A target is not finite or no class number of the network, or shapes do not fit.

    Example:
        >>> describe_targets(torch.tensor([0, 2, 1]), 3), describe_targets(torch.tensor([0, 1]), 1)
        ('classes', 'binary')
        >>> describe_targets(torch.tensor([0.3, 1.7]), 1)
        'real'
    """
    _check(y, num_outputs)
    if num_outputs == 1:
        values = set(y.unique()[:3].tolist())
        if values <= {-1, 1} or (values <= {0, 1} and (1 in values or not y.is_floating_point())):
            return "binary"
        if y.is_floating_point():
            return "real"
        raise ValueError(
            f"Whole-number targets of a network with one output must be 0 and 1 or -1 and +1, got "
            f"{y.unique()[:5].tolist()}: give the network one output a class, or targets of floating point for a "
            "regression."
        )
    if y.dim() == 1:
        wrong = y[(y < 0) | (y >= num_outputs) | (y != y.floor())] if y.dtype != torch.bool else y[:0]
        if len(wrong):
            raise ValueError(
                f"Targets (n,) of a network with {num_outputs} outputs must be class numbers 0 to {num_outputs - 1}, "
                f"got {wrong.unique()[:5].tolist()}: map them, leave those samples out, or give real targets "
                f"(n, {num_outputs})."
            )
        return "classes"
    single = (y == 1).sum(1) == 1
    off = (y == 0).sum(1), (y == -1).sum(1)  # the others of a row: all 0, or all -1
    return "one-hot" if any((single & (zeros == num_outputs - 1)).all() for zeros in off) else "real"


def targets_for(y: Tensor, num_outputs: int, dtype: torch.dtype, kind: TargetKind | None = None) -> Tensor:
    """Bring targets to what a kernel is fitted to, and an error is counted with.

    Args:
        y: As of :func:`describe_targets`.
        num_outputs: Outputs C of the network.
        dtype: Floating-point type of the outputs.
        kind: Of the training targets, for those of another set, which may show fewer classes. By default ``y``'s own.

    Returns:
        (n,) for one output, where class 0 is -1 and class 1 is +1; (n, C) for several, one-hot for class numbers.

    Raises:
        TypeError: ``y`` is no tensor of real numbers.
        ValueError: The targets do not fit the number of outputs, or are not of this kind.

    Example:
        >>> targets_for(torch.tensor([0, 1, 1]), 1, torch.float32)
        tensor([-1.,  1.,  1.])
        >>> targets_for(torch.tensor([1, 0]), 3, torch.float32)
        tensor([[0., 1., 0.],
                [1., 0., 0.]])
    """
    _check(y, num_outputs)
    if kind == "real" and (num_outputs == 1 or y.dim() == 2):  # whatever this set's own values look like
        return y.reshape(_shape(y, num_outputs)).to(dtype)
    own = describe_targets(y, num_outputs)
    constant_zero = kind == "binary" and own == "real" and not y.any()  # class 0 only, seen as real on its own
    if kind not in (None, own) and not constant_zero:
        raise ValueError(f"The training targets are {kind}, but targets of another set are {own}: give both alike.")
    kind = kind or own
    if kind == "classes":
        return F.one_hot(y.long(), num_outputs).to(dtype)
    targets = y.reshape(_shape(y, num_outputs)).to(dtype)
    if kind == "binary" and bool((targets == 0).any()):
        _say_once("Targets 0 and 1 of a network with one output: kernels are fitted to -1 and +1, class 1 is +1.")
        return 2 * targets - 1
    return targets


def _check(y: Tensor, num_outputs: int) -> None:
    """Check type, shape and values, for all kinds alike."""
    if not isinstance(y, Tensor) or y.is_complex():
        given = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"Targets must be a tensor of real numbers, got {given}: give samples=, a function of a batch.")
    columns = y.shape[1:]
    fits = columns in ((), (1,)) if num_outputs == 1 else columns in ((), (num_outputs,))
    if y.dim() == 0 or not fits:
        shapes = "(n,) or (n, 1)" if num_outputs == 1 else f"(n,) or (n, {num_outputs})"
        raise ValueError(
            f"Targets of shape {tuple(y.shape)} do not fit a network with {num_outputs} output(s), which needs "
            f"{shapes}: give output=, a function of what the network returns, or samples=, a function of a batch to "
            "(inputs, targets)."
        )
    if not len(y):
        raise ValueError("There are no targets: the batch is empty.")
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise ValueError("A target is NaN or infinite: clean the data, or leave those samples out.")


def _shape(y: Tensor, num_outputs: int) -> tuple[int, ...]:
    return (len(y),) if num_outputs == 1 else (len(y), num_outputs)


@cache
def _say_once(message: str) -> None:
    rank_zero_info(message)
