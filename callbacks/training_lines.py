"""Lines of text about a training run whose output is no terminal, where a progress bar shows nothing until the end."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from ntk_lightning.progress import ProgressLines, shows_bars

__all__ = ["TrainingLines"]


class TrainingLines(Callback):
    """Prints steps, speed, time left and the metrics of the progress bar: a line a minute, or at each quarter.

    It prints on rank zero only, and nothing on a terminal. The commands ``fit`` and so on attach it to every run.
    """

    def __init__(self) -> None:
        self._lines: ProgressLines | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at the step that the run begins at."""
        total = trainer.estimated_stepping_batches
        if trainer.is_global_zero and not shows_bars() and total != float("inf"):
            self._lines = ProgressLines("training", total, "steps", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count the steps since the last batch."""
        if self._lines is not None:
            metrics = trainer.progress_bar_metrics.items()
            note = ", ".join(f"{name} {value:.3g}" for name, value in metrics if isinstance(value, float | int))
            self._lines.advance(trainer.global_step - self._lines.done, note)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the run."""
        self._lines = None
