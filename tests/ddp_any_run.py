"""What test_any_run.py starts in two processes: a user's module on plain loaders, measured by two callbacks.

ddp_any_run.py FOLDER; rank zero writes what came out, and what each process was told where their streams differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from tiny import QUIET, leave_group
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ntk_lightning.callbacks import EmpiricalNTKDynamics, KernelDiagnostics


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Share(IterableDataset[Any]):
    """Every process reads a stream of its own length."""

    def __iter__(self) -> Iterator[Any]:
        n = 6 + distributed.get_rank()
        yield from zip(torch.ones(n, 4), torch.zeros(n, dtype=torch.long), strict=True)


def loaders(batch: int) -> list[DataLoader[Any]]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
    sets = TensorDataset(x[:24], y[:24]), TensorDataset(x[24:], y[24:])
    return [DataLoader(each, batch_size=batch) for each in sets]


def run(folder: Path, **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Train, with the same samples a step on however many processes."""
    dynamics, diagnostics = EmpiricalNTKDynamics(at=[1, 3]), KernelDiagnostics(at=[1, 3], per_layer=True)
    trainer = Trainer(
        **{**QUIET, "max_epochs": 4, **options}, callbacks=[dynamics, diagnostics], default_root_dir=folder
    )
    trainer.fit(Module(), *loaders(24 // trainer.world_size))  # all samples in a step: Lightning shuffles those of many
    names = ("step", "optimal_error", "network_error", "network_loss")
    rows = [
        {name: row[name] for name in names} | {"rank": other["effective_rank"]}
        for row, other in zip(dynamics.rows, diagnostics.rows, strict=True)
    ]
    layers = [{"share": row["trace_share"], "alignment": row["target_alignment"]} for row in diagnostics.layers]
    return {"rows": rows, "layers": layers}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = run(folder, strategy="ddp", devices=1, num_nodes=2, use_distributed_sampler=True)
    told = ""
    trainer = Trainer(
        **{**QUIET, "max_steps": 2}, strategy="ddp", devices=1, num_nodes=2, callbacks=[EmpiricalNTKDynamics()]
    )
    try:
        trainer.fit(Module(), DataLoader(Share(), batch_size=2), loaders(4)[1])
    except ValueError as error:
        told = str(error).partition(":")[0]
    everywhere = [None, None]
    distributed.all_gather_object(everywhere, told)
    if distributed.get_rank() == 0:
        torch.save({**found, "told": everywhere}, folder / "found.pt")
    leave_group()
