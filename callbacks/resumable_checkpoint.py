"""Checkpoints from which a run goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from ntk_lightning.checkpoint_io import AtomicCheckpointIO

__all__ = ["ResumableCheckpoint"]

_USR1 = getattr(signal, "SIGUSR1", None)  # not on Windows
SIGNALS = tuple(number for number in (signal.SIGTERM, signal.SIGINT, _USR1) if number is not None)


class ResumableCheckpoint(OnExceptionCheckpoint):
    """Save a run so that, interrupted and started again, it ends with the same bits as an undisturbed one.

    A checkpoint is written every ``every_n_steps`` optimizer steps, always between two batches, when everything that
    the earlier ones cause (validation, extractions, logging) is done. At SIGTERM, Ctrl-C and SLURM's warning SIGUSR1
    all processes together write one before the next batch and end with exit status 128 + signal; after SIGUSR1 the job
    is requeued. Before the first batch and after the last, while kernels are computed and fitted, they end at once.
    What that or a SIGKILL loses, the work since the last checkpoint, is done again in the same way. The same command
    goes on where the run was. The file is removed when the run is complete, so that the next one starts anew; a run
    that the Trainer's ``max_time`` has ended is complete.

    Besides what Lightning saves the checkpoint holds the random states of Python, NumPy and PyTorch on every process.
    The position in the data is saved for loaders that have a ``state_dict``, as those of this package do. The length of
    an epoch must be known.

    Args:
        dirpath: Folder of the checkpoint, the same for every start of the run and seen by all its machines.
        filename: Its name without ".ckpt".
        every_n_steps: Optimizer steps between two checkpoints.

    Raises:
        ValueError: ``every_n_steps`` is below 1, or a ``ModelCheckpoint`` of the run has ``save_last``: the Trainer's
            ``ckpt_path="last"`` would resume from that, in mid-epoch.
    """

    def __init__(self, dirpath: str | Path, filename: str = "resume", every_n_steps: int = 100) -> None:
        super().__init__(dirpath, filename)
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._received = 0
        self._between_batches = False
        self._saved_step = 0
        self._at_batch: int | None = None
        self._random_states: dict[str, Any] | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write and read checkpoint files whole, before one is read, and listen to signals.

        Raises:
            ValueError: Another callback of the run saves what the Trainer takes for its last checkpoint.
        """
        if any(isinstance(other, ModelCheckpoint) and other.save_last for other in trainer.checkpoint_callbacks):
            raise ValueError(
                "ModelCheckpoint(save_last=True) beside ResumableCheckpoint: the run would resume from either. "
                "Leave save_last out."
            )
        if stage == "fit":
            self._received, self._between_batches = 0, False
            self._listen(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states of a checkpoint, and listen to signals again: Lightning has begun to as well."""
        self._saved_step = trainer.global_step
        if self._random_states is not None:
            _set_random_states(self._random_states)
            self._random_states = None
        self._listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Save where it is time, and stop where a signal came."""
        if batch_idx % trainer.accumulate_grad_batches or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside
            return
        self._between_batches = True
        step, received = trainer.global_step, self._agree(trainer)
        if step > self._saved_step and (received or step % self.every_n_steps == 0):
            self._at_batch, self._saved_step = batch_idx, step
            trainer.save_checkpoint(self.ckpt_path)
            self._at_batch = None
        if received:
            _leave(trainer, received)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect no further batch where this epoch may be the last: what follows it has no end between two batches."""
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs >= 0
        last_step = 0 <= trainer.max_steps <= trainer.global_step
        if trainer.should_stop or last_epoch or last_step:
            self._between_batches = False
            if self._received:
                _leave(trainer, self._received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep listening while kernels are extracted and fitted: Lightning would restore the handlers it has found."""
        trainer._signal_connector.teardown()
        self._listen(trainer)

    def on_exception(self, trainer: Trainer, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Lightning's signature
        """Restore the previous signal handlers. Nothing is saved: an exception may leave a step half done."""
        self._restore_handlers(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous signal handlers, and remove the checkpoint of a complete run."""
        if stage == "fit":
            self._restore_handlers(trainer)
            trainer.strategy.remove_checkpoint(self.ckpt_path)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states, and note that the batch at hand has not begun."""
        states = [_random_states()]
        if trainer.world_size > 1:
            states *= trainer.world_size
            distributed.all_gather_object(states, _random_states())
        checkpoint["random_states"] = states
        if self._at_batch is not None:
            _rewind_to_batch_start(checkpoint["loops"]["fit_loop"], self._at_batch, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states of this process until the training starts."""
        states = checkpoint.get("random_states")
        self._random_states = states[trainer.global_rank % len(states)] if states else None

    def _listen(self, trainer: Trainer) -> None:
        """Handle the signals from now on; the first time, keep the handlers that were there."""
        if threading.current_thread() is not threading.main_thread():
            return

        def on_signal(number: int, _: FrameType | None) -> None:
            """Stop before the next batch, or at once where none may come; a second signal of the kind always does."""
            self._received = number
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            if not self._between_batches:
                _leave(trainer, number)

        before = {number: signal.signal(number, on_signal) for number in SIGNALS}
        self._handlers = self._handlers or before

    def _agree(self, trainer: Trainer) -> int:
        """Have all processes stop at the same batch, whichever of them got a signal."""
        if trainer.world_size == 1:
            return self._received
        received = torch.tensor(self._received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _restore_handlers(self, trainer: Trainer) -> None:
        trainer._signal_connector.teardown()  # else Lightning would restore, later, what it has found: ours
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}


def _rewind_to_batch_start(fit_loop: dict[str, Any], batch_idx: int, trainer: Trainer) -> None:
    """Bring the state of Lightning's loops into the one form from which they go on with this batch.

    At the start of a batch it is already counted as fetched. What follows is the state in which Lightning saves after a
    batch, with the difference that its validation has run: then Lightning trains on with the next, neither repeating
    nor leaving out anything. Before the first batch of an epoch that batch is the last one of the epoch before.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    taken, in_epoch = batches["total"]["ready"] - 1, batch_idx
    restarting = batch_idx > 0 or trainer.max_steps != -1  # as in the setter of Lightning's _FitLoop.restarting
    if batch_idx == 0:
        in_epoch = int(trainer.num_training_batches)
        for counter in epochs.values():
            counter["ready"] = counter["started"] = counter["completed"]
    for counter, number in ((batches["total"], taken), (batches["current"], in_epoch)):
        counter.update(ready=number, started=number, processed=number, completed=number - restarting)
    batches["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= restarting  # Lightning adds it again
    for loader in fit_loop["state_dict"].get("combined_loader", []):
        if "batches" in loader:
            loader["batches"] = batch_idx


def _random_states() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    keys = state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": (state["bit_generator"], keys, state["state"]["pos"], state["has_gauss"], state["gauss"]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _leave(trainer: Trainer, number: int) -> None:
    """End the process for a signal, and have the job run again where the signal asks for it."""
    step = trainer.global_step
    rank_zero_info(f"{signal.Signals(number).name}: stopped at step {step}. Run the same command to go on.")
    if number == _USR1 and trainer.is_global_zero:
        _requeue()
    raise SIGTERMException(128 + number)


def _requeue() -> None:
    """Ask SLURM to run this job again."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ.get("SLURM_JOB_ID") if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    if job is not None:
        subprocess.run(["scontrol", "requeue", job], check=True)
