"""A kernel fitted on nested training sets, the same way wherever the kernel comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ntk_lightning.datamodules import Samples
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit, kernel_sgd

__all__ = ["Arm", "check_sizes", "fit_nested"]


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
    grams: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    train: Samples,
    evaluation: dict[str, Samples],
    optimizer: OptimizerConfig,
    sizes: Sequence[int],
) -> dict[int, KernelFit]:
    """Fit a kernel by SGD on the first n training samples, for several n.

    Args:
        grams: Gives the kernel of n training inputs, (n, n), and that of m other inputs with them, (m, n).
        train: The largest training set.
        evaluation: The "test" set, and the "val" set if there is one.
        optimizer: The same as the network's.
        sizes: Sizes of the nested training sets, increasing.

    Returns:
        The fit of each size.
    """
    train = Samples(train.x[: sizes[-1]], train.y[: sizes[-1]])
    gram, cross = grams(train.x, torch.cat([samples.x for samples in evaluation.values()]))
    kernels = dict(zip(evaluation, torch.split(cross, [len(samples) for samples in evaluation.values()]), strict=True))
    fits = {}
    for n in sizes:
        sets: dict[str, Any] = {}
        for name, samples in evaluation.items():
            sets |= {f"{name}_kernel": kernels[name][:, :n], f"{name}_targets": samples.y}
        fits[n] = kernel_sgd(gram[:n, :n], train.y[:n], optimizer, **sets)
    return fits
