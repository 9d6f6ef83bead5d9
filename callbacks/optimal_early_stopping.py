"""The best test error over training, named as the oracle it is."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ntk_lightning.callbacks.kernel_fit import Arm
from ntk_lightning.callbacks.run import log_metrics, log_table

__all__ = ["OptimalEarlyStopping"]


class OptimalEarlyStopping(Callback):
    """Report the least test error over training, as the source paper does (arXiv 2206.10012).

    It is an oracle: it looks at the test set. The last error, and the test error where the validation error was least,
    are reported beside it. Nothing is stopped. Measured after every validation, so ``check_val_every_n_epoch`` and
    ``val_check_interval`` of the Trainer set the grid. Logged at the end as ``test/optimal_error``,
    ``test/last_error`` and ``test/validated_error``; the curve is kept in ``error_curve.csv``.

    Args:
        monitor: Name of the logged test error, in [0, 1].
        validation_monitor: Name of the logged validation error, used if it is there.
    """

    def __init__(self, monitor: str = "test/error", validation_monitor: str = "val/error") -> None:
        self.monitor, self.validation_monitor = monitor, validation_monitor
        self.rows: list[dict[str, Any]] = []
        self._name, self._n = "network", 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new curve, unless a checkpoint is resumed."""
        if trainer.global_step == 0:
            self.rows = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take down the errors of this validation."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            raise KeyError(
                f"No metric {self.monitor!r} is logged in validation; there are {sorted(trainer.callback_metrics)}. "
                "Name the one that is the test error as monitor=..."
            )
        validation = trainer.callback_metrics.get(self.validation_monitor)
        self.rows.append(
            {
                "step": trainer.global_step,
                "test_error": float(trainer.callback_metrics[self.monitor]),
                "val_error": None if validation is None else float(validation),
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the three errors and keep the curve."""
        self._name = getattr(pl_module, "label", type(pl_module).__name__)
        self._n = len(getattr(getattr(trainer, "datamodule", None), "train_set", None) or ())
        for arm in self.arms():
            metrics = {"test/optimal_error": arm.optimal_error, "test/last_error": arm.last_error}
            if arm.validated_error is not None:
                metrics["test/validated_error"] = arm.validated_error
            log_metrics(trainer, metrics, trainer.global_step)
        log_table(trainer, "error_curve", self.rows)

    def arms(self) -> list[Arm]:
        """Summarize the trained model."""
        if not self.rows:
            return []
        best = min(self.rows, key=lambda row: row["test_error"])
        validated = [row for row in self.rows if row["val_error"] is not None]
        chosen = min(validated, key=lambda row: row["val_error"])["test_error"] if validated else None
        return [Arm(self._name, self._n, best["test_error"], best["step"], self.rows[-1]["test_error"], chosen)]

    def state_dict(self) -> dict[str, Any]:
        """Give the curve so far, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the curve of a checkpoint."""
        self.rows = state_dict["rows"]
