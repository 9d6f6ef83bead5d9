"""The errors of one model of a comparison, as one row of its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ntk_lightning.solvers import KernelFit

__all__ = ["ModelErrors", "best_metrics"]


@dataclass(frozen=True)
class ModelErrors:
    """The test errors, in [0, 1], of one model of a comparison; real targets have losses in their place.

    A callback whose ``model_errors()`` returns a list of these takes part in
    :class:`~ntk_lightning.callbacks.ComparisonTable`.

    Args:
        name: What the model is called in the table.
        n: Its number of training samples.
        optimal_error: The least test error over training (an oracle); None for real targets, as all errors.
        optimal_step: The optimizer step of that error.
        last_error: The test error after the last step.
        validated_error: The test error at the step with the least validation error; None without a validation set.
        curve: The lists "steps", "errors" and "losses" of the test set over training.
        optimal_loss: The least test loss over training, for real targets.
        last_loss: The test loss after the last step, for real targets.
        validated_loss: The test loss at the step with the least validation loss, for real targets.
        critical_lr: Of a kernel fitted by SGD, the rate above which full-batch descent diverges; not in tables.

    Example:
        >>> ModelErrors("my model", n=100, optimal_error=0.1, optimal_step=50, last_error=0.2).row()["last_error"]
        0.2
    """

    name: str
    n: int
    optimal_error: float | None
    optimal_step: float
    last_error: float | None
    validated_error: float | None = None
    curve: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)
    optimal_loss: float | None = None
    last_loss: float | None = None
    validated_loss: float | None = None
    critical_lr: float | None = field(default=None, compare=False)

    @classmethod
    def of_fit(cls, name: str, n: int, fit: KernelFit) -> ModelErrors:
        """Summarize a kernel fit.

        Args:
            name: What the model is called.
            n: Its number of training samples.
            fit: The fit, evaluated on a test set.

        Returns:
            Its errors, or its losses where the targets are real.
        """
        errors, losses = fit.curves["test"]
        columns = {"steps": fit.steps, "errors": errors, "losses": losses}
        curve = {name: values.tolist() for name, values in columns.items() if values is not None}
        validated = "val" in fit.curves
        if errors is None:
            least = fit.optimal_loss, fit.last_loss, fit.validated_loss if validated else None
            return cls(name, n, None, fit.optimal_step, None, None, curve, *least, critical_lr=fit.critical_lr)
        return cls(
            name,
            n,
            fit.optimal_error,
            fit.optimal_step,
            fit.last_error,
            fit.validated_error if validated else None,
            curve,
            critical_lr=fit.critical_lr,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ModelErrors:
        """Read the errors out of a longer row that holds them beside other columns.

        Args:
            row: Has the fields as columns.

        Returns:
            The errors.
        """
        absent = {"optimal_error": None, "last_error": None}  # of real targets
        return cls(**(absent | {part.name: row[part.name] for part in fields(cls) if part.name in row}))

    def row(self) -> dict[str, Any]:
        """Give the cells of a table.

        Returns:
            Every field but curve and critical rate, by name; of errors and losses those that there are.
        """
        absent = "_loss" if self.optimal_error is not None else "_error"
        left_out = ("curve", "critical_lr")
        return {k: value for k, value in vars(self).items() if k not in left_out and not k.endswith(absent)}


def best_metrics(group: str, models: Iterable[ModelErrors]) -> dict[str, float]:
    """Name the best error of each model as a metric, or the best loss where targets are real.

    Args:
        group: Such as "after_kernel".
        models: One a number n of samples.

    Returns:
        Values by name: GROUP/test_error_N or GROUP/test_loss_N.
    """
    named = {
        f"{group}/test_loss_{each.n}" if each.optimal_error is None else f"{group}/test_error_{each.n}": (
            each.optimal_loss if each.optimal_error is None else each.optimal_error
        )
        for each in models
    }
    return {name: value for name, value in named.items() if value is not None}
