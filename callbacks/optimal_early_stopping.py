"""The best test error over training, named as the oracle it is."""

from __future__ import annotations

from collections.abc import Sized
from difflib import get_close_matches
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.named import NamedCallback
from ntk_lightning.callbacks.run_output import log_metrics, log_table
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.datamodules.base import has_set, samples_of
from ntk_lightning.datamodules.from_loaders import named_loaders

__all__ = ["OptimalEarlyStopping"]


class OptimalEarlyStopping(NamedCallback):
    """Report the least test error over training, as the source paper does (arXiv 2206.10012).

    It is an oracle: it looks at the test set. The last error, and the test error where the validation error was least,
    are reported beside it. Nothing is stopped. Measured after every validation, so ``check_val_every_n_epoch`` and
    ``val_check_interval`` of the Trainer set the grid. Logged at the end as ``test/optimal_error``,
    ``test/last_error`` and ``test/validated_error``; the curve is kept in ``error_curve.csv``.

    Args:
        monitor: Name of the logged test error, in [0, 1].
        validation_monitor: Name of the logged validation error, used if it is there.
        loss_monitor: Name of the logged test loss, kept beside the error if it is there.
        name: Tells several callbacks of this class apart: in files, metrics and checkpoints.
    """

    table = "error_curve"

    def __init__(
        self,
        monitor: str = "test/error",
        validation_monitor: str = "val/error",
        loss_monitor: str = "test/loss",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.monitor, self.validation_monitor, self.loss_monitor = monitor, validation_monitor, loss_monitor
        self.rows: list[dict[str, Any]] = []
        self._label, self._n = "network", 0
        self._resumed: int | None = None  # steps that a checkpoint says were taken
        self._taken = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new curve, unless a checkpoint is resumed."""
        super().on_train_start(trainer, pl_module)
        steps_of(trainer).start(trainer, pl_module, self._resumed)
        self._resumed = None
        if steps_of(trainer).taken(trainer) == 0:
            self.rows = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count the batch as a step, if it was one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._taken = steps_of(trainer).taken(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the errors of this validation."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        logged_now = {*trainer.callback_metrics}
        misspelled = self.monitor not in logged_now and get_close_matches(self.monitor, logged_now)
        if trainer.sanity_checking and not misspelled:  # a sanity check may log nothing, or less
            return
        if self.monitor not in logged_now:
            raise KeyError(
                f"No metric {self.monitor!r} is logged in validation; there are {sorted(trainer.callback_metrics)}. "
                "Name the one that is the test error as monitor=..."
            )
        monitors = {"test_error": self.monitor, "test_loss": self.loss_monitor, "val_error": self.validation_monitor}
        logged = {column: trainer.callback_metrics.get(name) for column, name in monitors.items()}
        values = {column: None if value is None else float(value) for column, value in logged.items()}
        self.rows.append({"step": steps_of(trainer).taken(trainer), **values})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the three errors and keep the curve."""
        self._label = getattr(pl_module, "label", type(pl_module).__name__)
        self._n = _count_training_samples(trainer)
        for model in self.model_errors():
            group = self.named("test")
            errors = {"optimal": model.optimal_error, "last": model.last_error, "validated": model.validated_error}
            metrics = {f"{group}/{name}_error": error for name, error in errors.items() if error is not None}
            log_metrics(trainer, metrics, steps_of(trainer).taken(trainer))
        log_table(trainer, self.named(self.table), self.rows)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the curve so far when the run breaks off."""
        try:
            log_table(trainer, self.named(self.table), self.rows)
        except OSError as error:
            rank_zero_warn(str(error))  # the exception that ended the run is the one to raise

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the trained model."""
        if not self.rows:
            return []
        best = min(self.rows, key=lambda row: row["test_error"])
        validated = [row for row in self.rows if row["val_error"] is not None]
        chosen = min(validated, key=lambda row: row["val_error"])["test_error"] if validated else None
        columns = {"steps": "step", "errors": "test_error", "losses": "test_loss"}
        curve = {name: [row[column] for row in self.rows] for name, column in columns.items()}
        return [
            ModelErrors(
                self.model_name(self._label),
                self._n,
                best["test_error"],
                best["step"],
                self.rows[-1]["test_error"],
                chosen,
                curve,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the curve so far and the steps taken, for the checkpoint."""
        return {"rows": self.rows, "steps": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve of a checkpoint."""
        self.rows, self._resumed = state_dict["rows"], state_dict.get("steps")


def _count_training_samples(trainer: Trainer) -> int:
    """Count the samples that the run trains on; 0 where its data set has no length."""
    if has_set(trainer, "train"):
        return len(samples_of(trainer, "train"))
    data = [getattr(loader, "dataset", None) for _, loader in named_loaders(trainer.train_dataloader)]
    return sum(len(each) for each in data if isinstance(each, Sized))
