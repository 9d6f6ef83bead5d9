"""What every arm of a comparison shares: the step, the loss, the metrics and the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ntk_lightning.datamodules.base import Batch, Samples, has_set, samples_of
from ntk_lightning.modules.loss_and_error import LossAndError
from ntk_lightning.objective import check_labels, encode_targets, squared_error
from ntk_lightning.optim import OptimizerConfig

__all__ = ["NTKModule"]


class NTKModule(LightningModule, ABC):
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
        self._train_summary: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Take down what the run is trained on, so that it is not resumed on anything else.

        Args:
            stage: Only "fit" trains.
        """
        if stage == "fit":
            known = has_set(self.trainer, "train")
            self._train_summary = _summary(samples_of(self.trainer, "train")) if known else None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the model: inputs (n, ...) to outputs (n, num_outputs)."""

    def predict(self, batch: Batch, split: str) -> Tensor:
        """Evaluate the model on a batch, by its position in the data set where that is faster.

        Args:
            batch: Of the data module.
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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the epoch's training metrics so far, one row a process, the optimizer config and the data."""
        checkpoint["train_totals"] = cast(Tensor, self.all_gather(self._metrics["train/"].totals)).reshape(-1, 3).cpu()
        checkpoint["optimizer_config"] = asdict(self.optimizer_config)
        checkpoint["train_summary"] = self._train_summary

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the precision of the weights and the sums of the training metrics.

        Raises:
            ValueError: A run is resumed with another optimizer config, or on other data, than it began with.
        """
        dtypes = {value.dtype for value in checkpoint["state_dict"].values() if value.is_floating_point()}
        if len(dtypes) == 1:  # Lightning loads them before it brings the module into the run's precision
            self.to(dtypes.pop())
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        config = asdict(self.optimizer_config)
        for name, value in checkpoint.get("optimizer_config", {}).items():
            if name not in ("epochs", "steps") and config[name] != value:  # those two are the Trainer's in a fit
                raise ValueError(
                    f"The checkpoint's run had {name}={value}, this one has {name}={config[name]}: resume with the "
                    "same optimizer config, or remove the checkpoint to start a new run."
                )
        before, now = checkpoint.get("train_summary"), self._train_summary
        if before is not None and now is not None and not _equal_to_rounding(before, now):
            raise ValueError(
                "The checkpoint's run was trained on other samples than this one's: resume with the same data "
                "module, n_train and subset_seed, or remove the checkpoint to start a new run."
            )
        if "train_totals" in checkpoint:
            share = checkpoint["train_totals"][trainer.global_rank :: trainer.world_size]
            self._metrics["train/"].totals = share.sum(0)

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


def _summary(samples: Samples) -> Tensor:
    """Mean input and labels of every sample, (n, 1 + C): tells training sets apart, whatever the rounding."""
    n = len(samples)
    return torch.cat([samples.x.reshape(n, -1).mean(1, keepdim=True), samples.y.reshape(n, -1)], 1).float().cpu()


def _equal_to_rounding(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
