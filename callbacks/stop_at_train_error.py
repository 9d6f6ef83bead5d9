"""Training until the training set is fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning import Callback, LightningModule, Trainer
from torch import distributed, nn

from ntk_lightning.callbacks.find_network import evaluating
from ntk_lightning.callbacks.measured import Measured, check_sets
from ntk_lightning.datamodules import BatchLoader
from ntk_lightning.datamodules.samples import has_set
from ntk_lightning.kernels.grams.agreement import share_buffers
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.objective import count_errors, encode_targets

__all__ = ["StopAtTrainError"]

_BATCH = 500  # samples that are evaluated at a time


@contextmanager
def first_buffers(module: nn.Module) -> Iterator[None]:
    """Evaluate one network on all processes: for a while its buffers are those of rank zero, which drift in DDP.

    Args:
        module: The module.

    Yields:
        None, without gradients; every process has its own buffers again at the end.
    """
    shared = distributed.is_available() and distributed.is_initialized()
    own = [(buffer, buffer.clone()) for buffer in module.buffers()] if shared else []
    with torch.no_grad():
        share_buffers(module)
        try:
            yield
        finally:
            for buffer, values in own:
                buffer.copy_(values)


class StopAtTrainError(Callback):
    """Stop when the fraction of training samples that are misclassified falls to a threshold.

    The training set is evaluated at the end of every epoch, at the weights of that moment, in evaluation mode and
    without the data module's transform: the running average over the epoch's batches would lag behind. Logged as
    ``train/exact_error``.

    Args:
        threshold: Fraction in [0, 1) at or below which to stop.

    Raises:
        TypeError: A run's module is not of this package, or its data module keeps no training set.
        ValueError: The threshold is out of range.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a fraction in [0, 1), got {threshold}.")
        self.threshold = threshold

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that module and data are of the kinds that can be evaluated.

        Raises:
            TypeError: One is not.
        """
        if not isinstance(pl_module, NTKModule):
            raise TypeError(
                f"StopAtTrainError works with the modules of ntk_lightning, not {type(pl_module).__name__}."
            )
        if stage == "fit":
            if not has_set(trainer, "train"):
                raise TypeError(
                    "StopAtTrainError evaluates the whole training set, which loaders do not give: fit with a data "
                    "module of ntk_lightning.datamodules, or log a training error and stop by EarlyStopping."
                )
            check_sets(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training error and decide."""
        assert isinstance(pl_module, NTKModule), "checked in setup"
        train, counts = Measured().take(trainer, "train"), torch.zeros(2, dtype=torch.float64)
        parts = torch.arange(len(train)).split(_BATCH)
        loader = BatchLoader(train, parts, rank=trainer.global_rank, world_size=trainer.world_size)
        with first_buffers(pl_module), evaluating(pl_module), trainer.precision_plugin.forward_context():
            for batch in loader:
                outputs = pl_module.predict(batch, "train")
                targets = encode_targets(batch.y, outputs.shape[1], outputs.dtype)
                counts += torch.tensor([count_errors(outputs, targets).sum().item(), len(batch.y)])
        wrong, seen = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").tolist()
        pl_module.log("train/exact_error", wrong / seen)
        if wrong / seen <= self.threshold:
            trainer.should_stop = True
