"""The errors of one model of a comparison, as one row of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ntk_lightning.solvers import KernelFit

__all__ = ["ModelErrors"]


@dataclass(frozen=True)
class ModelErrors:
    """The test errors, in [0, 1], of one model of a comparison.

    A callback whose ``model_errors()`` returns a list of these takes part in
    :class:`~ntk_lightning.callbacks.ComparisonTable`.

    Args:
        name: What the model is called in the table.
        n: Its number of training samples.
        optimal_error: The least test error over training (an oracle).
        optimal_step: The optimizer step of that error.
        last_error: The test error after the last step.
        validated_error: The test error at the step with the least validation error; None without a validation set.
        curve: The lists "steps", "errors" and "losses" of the test set over training.

    Example:
        >>> ModelErrors("my model", n=100, optimal_error=0.1, optimal_step=50, last_error=0.2).row()["last_error"]
        0.2
    """

    name: str
    n: int
    optimal_error: float
    optimal_step: int
    last_error: float
    validated_error: float | None = None
    curve: dict[str, list[float]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_fit(cls, name: str, n: int, fit: KernelFit) -> ModelErrors:
        """Summarize a kernel fit.

        Args:
            name: What the model is called.
            n: Its number of training samples.
            fit: The fit, evaluated on a test set.

        Returns:
            Its errors.

        Raises:
            ValueError: It was not evaluated, or on real targets, which have no error rate.
        """
        errors, losses = fit.curves["test"]
        if errors is None:
            raise ValueError(
                "A comparison is of error rates, which real targets of one output do not have: give labels -1 and +1, "
                "or fit real targets by ntk_lightning.solvers, whose curves have losses."
            )
        validated = fit.validated_error if "val" in fit.curves else None
        columns = {"steps": fit.steps, "errors": errors, "losses": losses}
        curve = {name: values.tolist() for name, values in columns.items() if values is not None}
        return cls(name, n, fit.optimal_error, int(fit.optimal_step), fit.last_error, validated, curve)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> ModelErrors:
        """Read the errors out of a longer row that holds them beside other columns.

        Args:
            row: Has every field as a column.

        Returns:
            The errors.
        """
        return cls(**{part.name: row[part.name] for part in fields(cls)})

    def row(self) -> dict[str, Any]:
        """Give the cells of a table.

        Returns:
            Every field but the curve, by name.
        """
        return {name: value for name, value in vars(self).items() if name != "curve"}
