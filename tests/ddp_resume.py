"""What test_ddp.py starts on two "machines": a run that a signal to one of its processes stops, and that goes on.

ddp_resume.py FOLDER STOP, where STOP is the step after which process 1 sends itself SIGTERM, or 0; or -1 for a
training image so bright that its kernel overflows, on one process only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from ddp_run import OPTIMIZER, brighten, flat_net
from lightning import Callback, LightningModule, Trainer
from tiny import QUIET, data, leave_group

from ntk_lightning.callbacks import AfterKernel, EmpiricalNTKDynamics, ResumableCheckpoint
from ntk_lightning.modules import FiniteNetwork


class Stop(Callback):
    """Sends the second process a signal after so many steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    folder, stop = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    module = FiniteNetwork(flat_net(), OPTIMIZER)
    watch = [
        ResumableCheckpoint(folder, every_n_steps=3),
        EmpiricalNTKDynamics(every_n_batches=5),
        AfterKernel(),
    ]
    trainer = Trainer(
        **QUIET | {"enable_checkpointing": True},
        strategy="ddp",
        devices=1,
        num_nodes=2,
        max_epochs=3,
        default_root_dir=folder,
        callbacks=[*watch, Stop(stop)],
    )
    datamodule = data(37, transform=brighten)
    datamodule.setup()
    if stop < 0:
        datamodule.train_set.x[20] *= 1e30
    trainer.fit(module, datamodule)
    if trainer.is_global_zero:
        torch.save(module.state_dict(), folder / "weights.pt")
    leave_group()
