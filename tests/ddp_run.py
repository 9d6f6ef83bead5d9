"""What test_ddp.py starts in several processes: every module and callback once; rank zero writes what came out.

torchrun --nproc_per_node 2 ddp_run.py FOLDER 2 1
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from tiny import QUIET, data, leave_group, net
from torch import Tensor, nn

from ntk_lightning.callbacks import (
    AfterKernel,
    ComparisonTable,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=1.0, momentum=0.9, batch_size=12)  # 37 = 12 + 12 + 12 + 1: some have no share of the 1


class Recorder(Logger):
    """Keeps every logged value by name and step."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, int | None], float] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.values |= {(name, step): float(value) for name, value in metrics.items()}


def brighten(x: Tensor) -> Tensor:
    """Augment at random: a process that saw only its share would draw other numbers."""
    return x + 0.1 * torch.randn(len(x), 1, 1, 1)


def flat_net() -> nn.Sequential:
    """A network of two hidden layers, whose infinite kernel costs little."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), *MLP(width=8, depth=2, in_features=192))


def modules() -> dict[str, LightningModule]:
    return {
        "finite": FiniteNetwork(flat_net(), OPTIMIZER),
        "linearized": LinearizedNetwork(net(), OPTIMIZER),
        "readout": KernelReadout(EmpiricalNTK(net()), OPTIMIZER),
        "infinite": InfiniteNTKReadout(flat_net(), OPTIMIZER, backend="reference"),
    }


def callbacks(name: str, folder: Path) -> list[Callback]:
    measured: list[Callback] = [OptimalEarlyStopping(), StopAtTrainError(0.0), ComparisonTable()]
    if name == "finite":
        measured += [EmpiricalNTKDynamics(every_n_batches=5), KernelDiagnostics(every_n_batches=4, probe_size=12)]
        measured += [AfterKernel([8, 16], fresh=True), InfiniteNTKFit(backend="reference")]
        measured += [InfiniteNTKFit(store=str(folder / "grams"), kind="nngp", backend="reference")]
    return measured


def train_all(folder: Path, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401 - the Trainer's
    """Train every module, and give its weights, what it logged, and the tables of its callbacks."""
    found: dict[str, Any] = {}
    for name, module in modules().items():
        recorder, root = Recorder(), folder / name
        trainer = Trainer(
            **{**QUIET, "logger": recorder, "precision": "64-true", "max_epochs": 3, "min_epochs": 3, **kwargs},
            default_root_dir=root,
            callbacks=callbacks(name, folder),
        )
        trainer.fit(module, data(37, n_val=7, fresh=16, transform=brighten if name == "finite" else None))
        tables = {file.stem: list(csv.DictReader(file.open())) for file in sorted(root.rglob("*.csv"))}
        found[name] = {"weights": dict(module.state_dict()), "logged": recorder.values, "tables": tables}
        found["world_size"] = trainer.world_size
    return found


if __name__ == "__main__":
    folder, devices, num_nodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    found = train_all(folder, strategy="ddp", devices=devices, num_nodes=num_nodes)
    if torch.distributed.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    leave_group()
