"""The command line: Lightning's, for the modules and data of this package or any other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from ntk_lightning.callbacks.run import run_folder

__all__ = ["main"]


class RunConfig(SaveConfigCallback):
    """Keeps the whole configuration of a run beside its tables and pictures."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder."""
        self.parser.save(self.config, run_folder(trainer) / "config.yaml", skip_none=False, overwrite=True)


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    W&B runs offline unless ``WANDB_MODE`` says otherwise.

    Args:
        args: Command line, by default the process's.

    Returns:
        The CLI after the run, with ``trainer``, ``model`` and ``datamodule``.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`")  # Lightning's own, on recent torch
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        RunConfig,
        {"save_to_log_dir": False},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        args=None if args is None else list(args),
    )
