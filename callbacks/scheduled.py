"""Measuring at chosen steps of a training run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["ScheduledCallback", "schedule"]


class ScheduledCallback(Callback, ABC):
    """Measures at the start, at scheduled steps and at the end, without moving the random state.

    Args:
        every_n_batches: Measure every so many steps.
        log_spaced: Measure at about this many logarithmically spaced steps instead (30 if nothing is given).
        at: Measure at these steps instead.

    Raises:
        ValueError: More than one schedule is given, or a number is below 1.
    """

    def __init__(
        self, every_n_batches: int | None = None, log_spaced: int | None = None, at: Sequence[int] | None = None
    ) -> None:
        if sum(given is not None for given in (every_n_batches, log_spaced, at)) > 1:
            raise ValueError("Give only one of every_n_batches, log_spaced and at.")
        if any(number is not None and number < 1 for number in (every_n_batches, log_spaced, *(at or ()))):
            raise ValueError("every_n_batches, log_spaced and the steps of at must be at least 1.")
        self.every_n_batches, self.log_spaced, self.at = every_n_batches, log_spaced or 30, at
        self.rows: list[dict[str, Any]] = []
        self._steps: set[int] = set()

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure after ``step`` optimizer steps, and append to ``rows``, each with its "step"."""

    @abstractmethod
    def finish(self, trainer: Trainer) -> None:
        """Keep the rows when the last is there."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, and measure the initial state."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("The schedule needs the length of the run: set the Trainer's max_epochs or max_steps.")
        self._steps = schedule(int(total), self.every_n_batches, self.log_spaced, self.at)
        if trainer.global_step == 0:
            self.rows = []
        self._measure_at({0}, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure where the schedule says so."""
        self._measure_at(self._steps, trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last step, wherever the run stopped, and keep the results."""
        self._measure_at({trainer.global_step}, trainer, pl_module)
        self._finish_once(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the results so far when the run breaks off."""
        try:
            self._finish_once(trainer)
        except OSError as error:
            rank_zero_warn(str(error))  # the exception that ended the run is the one to raise

    def state_dict(self) -> dict[str, Any]:
        """Give the rows so far, for the checkpoint."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rows of a checkpoint."""
        self.rows = state_dict["rows"]

    def _measure_at(self, steps: set[int], trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step in steps and not (self.rows and self.rows[-1]["step"] >= step):
            with isolate_rng():
                try:
                    self.measure(trainer, pl_module, step)
                except FloatingPointError as error:
                    rank_zero_warn(f"{type(self).__name__} leaves out steps at which there is no kernel. {error}")

    def _finish_once(self, trainer: Trainer) -> None:
        if self.rows and self._steps:
            self._steps = set()
            self.finish(trainer)


def schedule(total: int, every: int | None, log_spaced: int, at: Sequence[int] | None = None) -> set[int]:
    """Choose the steps to measure at.

    Args:
        total: Steps of the run.
        every: Distance of two steps, or None for logarithmic spacing.
        log_spaced: Number of logarithmically spaced steps from 1 to ``total``; fewer where rounding makes them equal.
        at: The steps themselves, instead; those beyond ``total`` never come.

    Returns:
        The steps, with 0 and the last.

    Example:
        >>> sorted(schedule(100, None, 5))
        [0, 1, 3, 10, 32, 100]
    """
    if at is not None:
        return {0, *at, total}
    spaced = range(0, total, every) if every else np.geomspace(1, total, log_spaced).round().astype(int).tolist()
    return {0, *spaced, total}
