"""A kernel fitted on nested training sets, the same way wherever the kernel comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntk_lightning.datamodules import Samples
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit, kernel_sgd

__all__ = ["Arm", "check_sizes", "fit_first", "fit_nested", "nested_grams"]


@dataclass(frozen=True)
class Arm:
    """One model of a comparison: its name, its number of training samples, and its test errors in [0, 1].

    ``optimal_error`` is the least over training, at ``optimal_step`` (an oracle); ``last_error`` that of the last step;
    ``validated_error`` that of the step with the least validation error, None without a validation set. ``curve`` has
    the lists "steps", "errors" and "losses" of the test set over training.
    """

    name: str
    n: int
    optimal_error: float
    optimal_step: int
    last_error: float
    validated_error: float | None = None
    curve: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_fit(cls, name: str, n: int, fit: KernelFit) -> Arm:
        """Summarize a kernel fit on n samples."""
        validated = None if fit.val_errors is None else fit.validated_error
        columns = {"steps": fit.steps, "errors": fit.test_errors, "losses": fit.test_losses}
        curve = {name: values.tolist() for name, values in columns.items() if values is not None}
        return cls(name, n, fit.optimal_error, int(fit.optimal_step), fit.last_error, validated, curve)

    def row(self) -> dict[str, Any]:
        """Give the cells of a table: everything but the curve."""
        return {name: value for name, value in vars(self).items() if name != "curve"}


def check_sizes(sizes: Sequence[int] | None, n: int, what: str) -> list[int]:
    """Check the sizes of nested training sets.

    Args:
        sizes: Sizes asked for, or None for the whole set.
        n: Samples that there are.
        what: Name of the set, for the message.

    Returns:
        The sizes, increasing.

    Raises:
        ValueError: A size is below 1 or above n.
    """
    chosen = sorted(set(sizes)) if sizes else [n]
    if chosen[0] < 1 or chosen[-1] > n:
        raise ValueError(f"Fit sizes {chosen} must lie between 1 and the {n} samples of the {what} set.")
    return chosen


def fit_nested(
    grams: GramAndCross,
    train: Samples,
    evaluation: dict[str, Samples],
    optimizer: OptimizerConfig,
    sizes: Sequence[int],
    epochs_between: float = 1.0,
) -> dict[int, KernelFit]:
    """Fit a kernel by SGD on the first n training samples, for several n.

    Args:
        grams: Gives the kernel of n training inputs, (n, n), and that of m other inputs with them, (m, n).
        train: The largest training set.
        evaluation: The "test" set, and the "val" set if there is one.
        optimizer: The same as the network's.
        sizes: Sizes of the nested training sets, increasing.
        epochs_between: Epochs between two evaluations.

    Returns:
        The fit of each size.
    """
    gram, cross = nested_grams(grams, train, evaluation, sizes[-1])
    return {n: fit_first(n, gram, cross, train, evaluation, optimizer, epochs_between) for n in sizes}


def nested_grams(grams: GramAndCross, train: Samples, evaluation: dict[str, Samples], n: int) -> tuple[Tensor, Tensor]:
    """Compute the Grams that fits on up to n samples are cut from.

    Args:
        grams: As of :func:`fit_nested`.
        train: The training set.
        evaluation: The sets to evaluate on.
        n: The largest size.

    Returns:
        The kernel of the training samples, (n, n), and that of all evaluation samples, in order, with them, (m, n).
    """
    gram, cross = grams(train.x[:n], torch.cat([samples.x for samples in evaluation.values()]))
    return gram, cross


def fit_first(
    n: int,
    gram: Tensor,
    cross: Tensor,
    train: Samples,
    evaluation: dict[str, Samples],
    optimizer: OptimizerConfig,
    epochs_between: float = 1.0,
    steps: Sequence[int] | None = None,
) -> KernelFit:
    """Fit a kernel by SGD on the first n training samples.

    Args:
        n: Number of samples.
        gram: Of :func:`nested_grams`.
        cross: The same.
        train: The training set.
        evaluation: The "test" set, and the "val" set if there is one.
        optimizer: The same as the network's.
        epochs_between: Epochs between two evaluations.
        steps: Evaluate after these steps instead.

    Returns:
        The fit.
    """
    sets: dict[str, Any] = {}
    parts = torch.split(cross, [len(samples) for samples in evaluation.values()])
    for (name, samples), part in zip(evaluation.items(), parts, strict=True):
        sets |= {f"{name}_kernel": part[:, :n], f"{name}_targets": samples.y}
    every = max(1, round(optimizer.steps_per_epoch(n) * epochs_between))
    return kernel_sgd(gram[:n, :n], train.y[:n], optimizer, eval_every=every if steps is None else steps, **sets)
