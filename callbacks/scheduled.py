"""Measuring at chosen steps of a training run."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.callbacks.extraction import shared_extraction, weights_of
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.named import NamedCallback
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.kernels.grams.agreement import on_all_ranks

__all__ = ["ScheduledCallback", "steps_to_measure"]


class ScheduledCallback(NamedCallback, ABC):
    """Measures at the start, at scheduled steps and at the end, without moving the random state.

    A step is a training batch in which an optimizer has stepped. The last measurement is of the weights that the run
    ends with: where weight averaging or a hook has changed them after the last step, that step is measured again.

    Args:
        every_n_batches: Measure every so many steps.
        log_spaced: Measure at about this many logarithmically spaced steps instead (30 if nothing is given).
        at: Measure at these steps instead.
        measured: The network and the samples.
        name: Tells several callbacks of one class apart: in files, metrics and checkpoints.

    Raises:
        ValueError: More than one schedule is given, or a number is below 1.
    """

    def __init__(
        self,
        every_n_batches: int | None = None,
        log_spaced: int | None = None,
        at: Sequence[int] | None = None,
        *,
        measured: Measured | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if sum(given is not None for given in (every_n_batches, log_spaced, at)) > 1:
            raise ValueError("Give only one of every_n_batches, log_spaced and at.")
        if any(number is not None and number < 1 for number in (every_n_batches, log_spaced, *(at or ()))):
            raise ValueError("every_n_batches, log_spaced and the steps of at must be at least 1.")
        self.every_n_batches, self.log_spaced, self.at = every_n_batches, log_spaced or 30, at
        self.measured = measured or Measured()
        self.rows: list[dict[str, Any]] = []
        self._steps: set[int] = set()
        self._resumed: int | None = None  # steps that a checkpoint says were taken
        self._taken = 0
        self._before_last: dict[str, Any] = {}  # state before the last measurement
        self._weights: int | None = None  # checksum of the weights that were measured last

    @abstractmethod
    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Measure after ``step`` optimizer steps, and append to ``rows``, each with its "step"."""

    @abstractmethod
    def finish(self, trainer: Trainer) -> None:
        """Keep the rows when the last is there."""

    def due(self, step: int, moved: bool = False, ended: bool = False) -> bool:
        """Tell whether a step is to be measured now.

        Args:
            step: Steps that have been taken.
            moved: The weights are not those of the last extraction.
            ended: The training has ended.

        Returns:
            True at scheduled steps and at the end, unless it is measured already at these weights.
        """
        if step == 0 and not ended:
            return True
        measured = bool(self.rows) and self.rows[-1]["step"] >= step
        return (ended and (moved or not measured)) or (step in self._steps and not measured)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check network, samples and targets; a module may have built its network only in setup or configure_model."""
        self.measured.check(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule, and measure the initial state."""
        super().on_train_start(trainer, pl_module)
        total = trainer.estimated_stepping_batches
        if not 0 <= total < float("inf"):
            raise ValueError(
                "The schedule needs the length of the run: set the Trainer's max_epochs or max_steps; with an iterable "
                "data set, which does not tell how many batches it has, max_steps or limit_train_batches."
            )
        self._steps = steps_to_measure(int(total), self.every_n_batches, self.log_spaced, self.at)
        steps_of(trainer).start(trainer, pl_module, self._resumed)
        shared_extraction(trainer).ended = False
        self._taken, self._resumed, self._weights = steps_of(trainer).taken(trainer), None, None
        if self._taken == 0:
            self.rows = []
            self._measure(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Free the Grams of the step before."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        shared_extraction(trainer).release()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure where the schedule says so."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._taken = steps_of(trainer).taken(trainer)
        if self._taken and self.due(self._taken):
            self._measure(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last step, wherever the run stopped, after every hook that changes the weights at the end."""
        if not self._steps:  # nothing has been trained
            return
        step, shared = steps_of(trainer).taken(trainer), shared_extraction(trainer)
        shared.ended = True
        measured = self.rows and self.rows[-1]["step"] >= step and self._weights is not None
        if measured and not on_all_ranks(self._weights == weights_of(self.measured.net(pl_module))):
            rank_zero_warn(
                f"The weights have changed after the last step, {step} (by weight averaging, maybe): the last "
                f"measurement of {type(self).__name__} is of the weights that the run ends with, those before are of "
                "the weights in training."
            )
            self.load_state_dict(self._before_last)
        if not (self.rows and self.rows[-1]["step"] >= step):
            self._measure(trainer, pl_module)
        self._finish_once(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the results so far when the run breaks off."""
        shared_extraction(trainer).release()
        try:
            self._finish_once(trainer)
        except OSError as error:
            rank_zero_warn(str(error))  # the exception that ended the run is the one to raise

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the last Grams."""
        shared_extraction(trainer).release()

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far and the steps taken, for the checkpoint."""
        return {"rows": self.rows, "steps": self._taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows of a checkpoint."""
        self.rows, self._resumed = state_dict["rows"], state_dict.get("steps")

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_last = {name: copy.copy(value) for name, value in self.state_dict().items()}
        with isolate_rng():
            try:
                self.measure(trainer, pl_module, steps_of(trainer).taken(trainer))
            except FloatingPointError as error:
                rank_zero_warn(f"{type(self).__name__} leaves out steps at which there is no kernel. {error}")
        self._weights = weights_of(self.measured.net(pl_module))

    def _finish_once(self, trainer: Trainer) -> None:
        if self.rows and self._steps:
            self._steps = set()
            self.finish(trainer)


def steps_to_measure(total: int, every: int | None, log_spaced: int, at: Sequence[int] | None = None) -> set[int]:
    """Choose the steps to measure at.

    Args:
        total: Steps of the run.
        every: Distance of two steps, or None for logarithmic spacing.
        log_spaced: Number of logarithmically spaced steps from 1 to ``total``; fewer where rounding makes them equal.
        at: The steps themselves, instead; those beyond ``total`` never come.

    Returns:
        The steps, with 0 and the last.

    Example:
        >>> sorted(steps_to_measure(100, None, 5))
        [0, 1, 3, 10, 32, 100]
    """
    if at is not None:
        return {0, *at, total}
    spaced = range(0, total, every) if every else np.geomspace(1, total, log_spaced).round().astype(int).tolist()
    return {0, *spaced, total}
