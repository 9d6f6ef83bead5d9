"""What a checkpoint of a training run holds so that the run is resumed as it began, or not at all."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ntk_lightning.datamodules.base import Samples, has_set, samples_of

if TYPE_CHECKING:
    from ntk_lightning.modules.loss_and_error import LossAndError
    from ntk_lightning.optim import OptimizerConfig

__all__ = ["ResumeGuard"]


class ResumeGuard(LightningModule):
    """Mixin of a module with an ``optimizer_config``: refuses to resume a run with another config or on other samples.

    It also saves the sums behind the epoch's training metrics, so that a run resumed in mid-epoch logs the same values.
    """

    optimizer_config: OptimizerConfig
    _metrics: dict[str, LossAndError]
    _train_summary: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Record a summary of the training set; resuming on other data is refused.

        Args:
            stage: Only "fit" trains.
        """
        if stage == "fit":
            known = has_set(self.trainer, "train")
            self._train_summary = _summary(samples_of(self.trainer, "train")) if known else None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the sums of the epoch's training metrics, one row a process, the optimizer config and the summary."""
        checkpoint["train_totals"] = cast(Tensor, self.all_gather(self._metrics["train/"].totals)).cpu()
        checkpoint["optimizer_config"] = asdict(self.optimizer_config)
        checkpoint["train_summary"] = self._train_summary

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the weights' precision from the checkpoint and, in a fit, compare and restore what the guard saved.

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
            self._metrics["train/"].load_share(checkpoint["train_totals"], trainer.global_rank, trainer.world_size)


def _summary(samples: Samples) -> Tensor:
    """Mean input and labels of every sample, (n, 1 + C): tells training sets apart, whatever the rounding."""
    n = len(samples)
    return torch.cat([samples.x.reshape(n, -1).mean(1, keepdim=True), samples.y.reshape(n, -1)], 1).float().cpu()


def _equal_to_rounding(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3)
