"""The end of a comparison: every arm's test error in one table."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table

from ntk_lightning.callbacks.nested_fits import Arm
from ntk_lightning.callbacks.run_output import log_table, run_folder

__all__ = ["ComparisonTable"]


class ComparisonTable(Callback):
    """Collect the arms of all other callbacks of the run, print them, and keep them in ``comparison.csv``.

    A callback takes part by a method ``arms()``, as :class:`~ntk_lightning.callbacks.OptimalEarlyStopping` (the trained
    model), :class:`~ntk_lightning.callbacks.EmpiricalNTKDynamics`, :class:`~ntk_lightning.callbacks.AfterKernel` and
    :class:`~ntk_lightning.callbacks.InfiniteNTKFit` have it.
    """

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table and say where the results lie, when all callbacks have measured the end of the run."""
        if stage != "fit":
            return
        arms = [arm for callback in trainer.callbacks for arm in getattr(callback, "arms", list)()]  # type: ignore[attr-defined]  # callbacks exists
        log_table(trainer, "comparison", [arm.row() for arm in arms])
        if trainer.is_global_zero and arms:
            console = Console(width=None if Console().is_terminal else 110)
            console.print(comparison_table(arms))
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
                console.print(f"Tables and pictures: {run_folder(trainer)}", soft_wrap=True)


def comparison_table(arms: list[Arm]) -> Table:
    """Lay out a table of test errors.

    Args:
        arms: One a row.

    Returns:
        The table, errors in percent.
    """
    validated = any(arm.validated_error is not None for arm in arms)
    table = Table(title="Test error (%)")
    table.add_column("model")
    columns = ["n", "optimal early stopping (oracle)", "at step", "last step"]
    for column in [*columns, *(["best validation step"] if validated else [])]:
        table.add_column(column, justify="right")
    for arm in arms:
        cells = [f"{arm.n}", f"{100 * arm.optimal_error:.2f}", f"{arm.optimal_step}", f"{100 * arm.last_error:.2f}"]
        if validated:
            cells.append("" if arm.validated_error is None else f"{100 * arm.validated_error:.2f}")
        table.add_row(arm.name, *cells)
    return table
