"""The end of a comparison: every model's test error in one table."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.run_output import log_table, run_folder

__all__ = ["ComparisonTable"]


class ComparisonTable(Callback):
    """Collect the errors of all models of the run, print them, and keep them in ``comparison.csv``.

    A callback takes part by a method ``model_errors()`` that returns a list of
    :class:`~ntk_lightning.callbacks.ModelErrors`. :class:`~ntk_lightning.callbacks.OptimalEarlyStopping` (the trained
    model), :class:`~ntk_lightning.callbacks.EmpiricalNTKDynamics`, :class:`~ntk_lightning.callbacks.AfterKernel` and
    :class:`~ntk_lightning.callbacks.InfiniteNTKFit` have it.
    """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table and say where the results lie, when all callbacks have measured the end of the run."""
        if stage != "fit":
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]  # it exists
        models = [model for callback in callbacks for model in getattr(callback, "model_errors", list)()]
        log_table(trainer, "comparison", [model.row() for model in models])
        if trainer.is_global_zero and models:
            console = Console(width=None if Console().is_terminal else 110)
            console.print(comparison_table(models))
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
                console.print(f"Tables and pictures: {run_folder(trainer)}", soft_wrap=True)


def comparison_table(models: list[ModelErrors]) -> Table:
    """Lay out a table of test errors.

    Args:
        models: One a row.

    Returns:
        The table, errors in percent; of losses where the targets are real.
    """
    real = all(model.optimal_error is None for model in models)
    validated = any((model.validated_loss if real else model.validated_error) is not None for model in models)
    table = Table(title="Test loss" if real else "Test error (%)")
    table.add_column("model")
    columns = ["n", "optimal early stopping (oracle)", "at step", "last step"]
    for column in [*columns, *(["best validation step"] if validated else [])]:
        table.add_column(column, justify="right")
    for model in models:
        errors = (
            (model.optimal_loss, model.last_loss, model.validated_loss)
            if real
            else (model.optimal_error, model.last_error, model.validated_error)
        )
        least, last, chosen = ("" if e is None else f"{e:.4g}" if real else f"{100 * e:.2f}" for e in errors)
        step = f"{model.optimal_step}" if isinstance(model.optimal_step, int) else f"{model.optimal_step:.3g}"
        table.add_row(model.name, f"{model.n}", least, step, last, *([chosen] if validated else []))
    return table
