"""What all trained models of a comparison share: the step, the loss, the metrics and the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ntk_lightning.datamodules.base import Batch
from ntk_lightning.modules.loss_and_error import LossAndError
from ntk_lightning.modules.resume_guard import ResumeGuard
from ntk_lightning.objective import check_labels, encode_targets, squared_error
from ntk_lightning.optim import OptimizerConfig

__all__ = ["NTKModule"]


class NTKModule(ResumeGuard, ABC):
    """Base of the three models: mean squared error on +-1 labels, SGD with momentum, error rate.

    Logs ``train/loss``, ``train/error``, and the same for every evaluation split, averaged over samples (a smaller
    last batch counts less). Batches are :class:`ntk_lightning.datamodules.Batch` or plain tuples (x, y).

    Args:
        optimizer: Learning rate, momentum, batch size and order. The Trainer's ``max_epochs`` or ``max_steps`` fixes
            the length of the run.
    """

    label: ClassVar[str]

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        prefixes = nn.ModuleDict({prefix: LossAndError() for prefix in ("train/", "val/", "test/")})
        self._metrics = cast("dict[str, LossAndError]", prefixes)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the model: inputs (n, ...) to outputs (n, num_outputs)."""

    def predict(self, batch: Batch, split: str) -> Tensor:
        """Evaluate the model on a batch, by its position in the data set where that is faster.

        Args:
            batch: A batch of the data module.
            split: "train", "val" or "test": the data set it is from.

        Returns:
            Outputs (b, num_outputs).
        """
        outputs: Tensor = self(batch.x)
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401 - Batch or (x, y)
        """Compute the loss of one training batch."""
        return self._shared_step(batch, batch_idx, "train")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        """Measure one batch of an evaluation split."""
        splits = getattr(getattr(self.trainer, "datamodule", None), "evaluation_splits", ("val",))
        if dataloader_idx >= len(splits):
            raise ValueError(
                f"Validation loader {dataloader_idx} has no name: give the data module evaluation_splits, the names of "
                'its loaders in order, of "test" and "val".'
            )
        self._shared_step(batch, batch_idx, splits[dataloader_idx])

    def test_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Measure one batch of the test set."""
        self._shared_step(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        """Evaluate the model on one batch."""
        outputs: Tensor = self(batch[0])
        return outputs

    def on_train_epoch_end(self) -> None:
        """Log the epoch's training loss and error."""
        self._log_epoch()

    def on_validation_epoch_end(self) -> None:
        """Log loss and error of the evaluation splits."""
        self._log_epoch()

    def on_test_epoch_end(self) -> None:
        """Log loss and error of the test set."""
        self._log_epoch()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer that all models share."""
        return self.optimizer_config.configure(self.parameters())

    def _log_epoch(self) -> None:
        """Log the metrics that were updated, once an epoch: every step would cost a tenth of a small network's."""
        for prefix, metric in self._metrics.items():
            if metric.update_called and (prefix == "train/") == self.trainer.training:
                for name, value in metric.compute().items():
                    # equal on all processes already: their maximum is the same bits, their mean need not be
                    self.log(prefix + name, value, prog_bar=name == "error", sync_dist=True, reduce_fx="max")
                    if prefix + name == "train/loss" and not torch.isfinite(value):
                        self._stop_diverged(float(value))
                metric.reset()

    def _stop_diverged(self, loss: float) -> None:
        """End the run, whose weights cannot recover; callbacks still keep what they have measured."""
        rank_zero_warn(
            f"The training loss is {loss} in epoch {self.current_epoch}: the model has diverged and the run ends here. "
            f"Lower the learning rate, which is {self.optimizer_config.lr:g}; what was measured before is kept."
        )
        self.trainer.should_stop = True

    def _shared_step(self, batch: Any, batch_idx: int, split: str) -> Tensor:  # noqa: ANN401
        if not isinstance(batch, Batch):
            x, y = batch
            batch = Batch(x, y, torch.arange(0), len(y) * self.trainer.world_size)
        outputs = self.predict(batch, split)
        if outputs.dim() != 2 or len(outputs) != len(batch.y):
            raise ValueError(
                f"The model must map (n, ...) to (n, num_outputs), but gave {tuple(outputs.shape)} for {len(batch.y)} "
                "samples: end the network in a linear layer with one unit an output."
            )
        if batch_idx == 0 or batch.y.device.type == "cpu":  # elsewhere the check waits for the device
            check_labels(batch.y, outputs.shape[1])
        targets = encode_targets(batch.y, outputs.shape[1], outputs.dtype)
        self._metrics[f"{split}/"].update(outputs.detach(), targets)
        # DDP averages gradients over processes: this makes the average that of the whole batch, however it was cut
        loss: Tensor = squared_error(outputs, targets).sum() * (self.trainer.world_size / batch.size)
        return loss
