"""Training until the training set is fitted."""

from __future__ import annotations

from typing import cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.datamodules import BatchLoader
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.objective import count_errors, encode_targets

__all__ = ["StopAtTrainError"]


class StopAtTrainError(Callback):
    """Stop when the fraction of training samples that are misclassified falls to a threshold.

    The training set is evaluated at the end of every epoch, at the weights of that moment: the running average over the
    epoch's batches would lag behind. Logged as ``train/exact_error``.

    Args:
        threshold: Fraction in [0, 1) at or below which to stop.

    Raises:
        ValueError: The threshold is out of range.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold is a fraction in [0, 1), got {threshold}.")
        self.threshold = threshold

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module is one of this package's."""
        if not isinstance(pl_module, NTKModule):
            raise TypeError(
                f"StopAtTrainError works with the modules of ntk_lightning, not {type(pl_module).__name__}."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the training error and decide."""
        assert isinstance(pl_module, NTKModule), "checked in setup"
        counts = torch.zeros(2, dtype=torch.float64)
        precision = trainer.precision_plugin
        with isolate_rng(), torch.no_grad(), precision.forward_context():
            for batch in map(precision.convert_input, cast(BatchLoader, trainer.train_dataloader)):
                outputs = pl_module.predict(batch, "train")
                targets = encode_targets(batch.y, outputs.shape[1], outputs.dtype)
                counts += torch.tensor([count_errors(outputs, targets).sum().item(), len(batch.y)])
        wrong, seen = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").tolist()
        pl_module.log("train/exact_error", wrong / seen)
        if wrong / seen <= self.threshold:
            trainer.should_stop = True
