"""What test_ddp.py starts in two processes: runs and Grams whose processes differ in buffers, weights, sets or labels.

ddp_agreement.py FOLDER; rank zero writes what each process was told or found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from test_public_reports_lightning import ntk
from tiny import QUIET, leave_group
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.callbacks import AfterKernel, EmpiricalNTKDynamics, InfiniteNTKFit, KernelDiagnostics
from ntk_lightning.datamodules import Samples
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.grams.distributed import distributed_gram, distributed_gram_and_cross
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig

CONFIG = OptimizerConfig(lr=0.01, batch_size=8, epochs=2)


class Data(LightningDataModule):
    """Sets of two classes; ``change`` makes those of the second process others."""

    def __init__(self, change: Callable[[LightningDataModule], object] = lambda module: None) -> None:
        super().__init__()
        self.change = change

    def setup(self, stage: str | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(24, 6, generator=generator), torch.tensor([-1.0, 1.0]).repeat(12)
        self.train_set, self.test_set, self.fresh_set = (Samples(x[i::3], y[i::3]) for i in range(3))
        if distributed.get_rank() == 1:
            self.change(self)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.train_set.x, self.train_set.y), batch_size=4)


def replace(split: str, x: Tensor | None = None, y: Tensor | None = None, n: int | None = None) -> Any:  # noqa: ANN401
    """Change inputs, labels or size of one set."""

    def change(module: Data) -> None:
        old = getattr(module, f"{split}_set")
        new_x, new_y = old.x.clone() if x is None else x, old.y.clone() if y is None else y
        setattr(module, f"{split}_set", Samples(new_x[:n], new_y[:n]))

    return change


def one_entry(split: str, labels: bool) -> Any:  # noqa: ANN401
    def change(module: Data) -> None:
        old = getattr(module, f"{split}_set")
        x, y = old.x.clone(), old.y.clone()
        if labels:
            y[3] = -y[3]
        else:
            x[3, 2] += 0.01
        setattr(module, f"{split}_set", Samples(x, y))

    return change


def shuffle(module: Data) -> None:
    """What random_split does in setup() where nobody has set a seed."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    module.train_set = Samples(module.train_set.x[order], module.train_set.y[order])


CHANGES: dict[str, Any] = {
    "an unseeded split": shuffle,
    "one training input": one_entry("train", labels=False),
    "one training label": one_entry("train", labels=True),
    "one test input": one_entry("test", labels=False),
    "one test label": one_entry("test", labels=True),
    "one fresh label": one_entry("fresh", labels=True),
    "a smaller training set": replace("train", n=7),
    "a smaller test set": replace("test", n=7),
    "a missing fresh set": lambda module: setattr(module, "fresh_set", None),
}


class Counted(nn.Module):
    """Has buffers of its own, which every process moves in its own way while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale += 0.1 + distributed.get_rank()
            self.calls += 1 + distributed.get_rank()
        scaled: Tensor = x * self.scale.item()
        return scaled


class Scaled(nn.Linear):
    """Has an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        nn.init.ones_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(input) * scale


class Module(LightningModule):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), layer, nn.ReLU(), nn.Linear(5, 1))

    def training_step(self, batch: Any, index: int) -> Tensor:  # noqa: ANN401
        loss: Tensor = nn.functional.soft_margin_loss(self.net(batch[0]).squeeze(1), batch[1])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def callbacks() -> list[Any]:
    own = {"optimizer": CONFIG}
    return [
        EmpiricalNTKDynamics(every_n_batches=1, **own),  # type: ignore[arg-type]
        KernelDiagnostics(every_n_batches=1, probe_size=8),
        AfterKernel(**own),  # type: ignore[arg-type]
    ]


def fit(module: LightningModule, data: LightningDataModule, watching: list[Callback], folder: Path) -> Trainer:
    options = {"strategy": "ddp", "num_nodes": 2, "devices": 1, "max_epochs": 2, "precision": "64-true"}
    trainer = Trainer(**QUIET | options, default_root_dir=folder, callbacks=watching)
    trainer.fit(module, datamodule=data)
    return trainer


def everywhere(value: object) -> list[Any]:
    found = [None, None]
    distributed.all_gather_object(found, value)
    return found


def told(work: Callable[[], object]) -> list[str]:
    """What each process is told by what must be a ValueError."""
    try:
        work()
    except ValueError as error:
        return everywhere(str(error))
    return everywhere("nothing")


def largest(net: nn.Module, x: Tensor) -> float:
    """Largest eigenvalue of the kernel of rank zero's network, by plain autograd."""
    mine = [torch.linalg.eigvalsh(ntk(net.eval(), x, x))[-1].item()]
    distributed.broadcast_object_list(mine, 0)
    return mine[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, found = Path(sys.argv[1]), {}
    distributed.init_process_group("gloo", rank=int(os.environ["NODE_RANK"]), world_size=2)
    for name, layer in {"batch norm": partial(nn.BatchNorm1d, 5, momentum=0.9), "own buffers": Counted}.items():
        watching = callbacks()
        module = Module(layer())
        trainer = fit(module, Data(), watching, folder)
        buffers = everywhere([buffer.tolist() for buffer in module.net.buffers()])
        row = watching[1].rows[-1]["eigenvalue_1"], largest(module.net, trainer.datamodule.train_set.x)  # type: ignore[attr-defined]
        found[name] = {"buffers": buffers, "rows": everywhere(row)}
    for name, change in CHANGES.items():
        for callback in (*callbacks(), InfiniteNTKFit(backend="reference", optimizer=CONFIG)):
            torch.manual_seed(0)
            net = MLP(4, 1, 6) if isinstance(callback, InfiniteNTKFit) else nn.Linear(6, 1)
            module = Module(nn.Identity())
            module.net = net
            case = f"{name}, {type(callback).__name__}"
            found[case] = told(
                lambda module=module, change=change, callback=callback: fit(module, Data(change), [callback], folder)
            )  # type: ignore[misc]  # bound now
    rank, x = distributed.get_rank(), torch.randn(6, 3, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(rank)
    different = EmpiricalNTK(nn.Linear(3, 1))
    torch.manual_seed(0)
    same = EmpiricalNTK(nn.Linear(3, 1))
    other = x.clone()
    other[5, 2] += 0.01 * rank
    found["sharded, other weights"] = told(lambda: different.sharded(x))
    found["sharded, other inputs"] = told(lambda: same.sharded(other))
    found["sharded, other sizes"] = told(lambda: same.sharded(x[: 6 - rank]))
    found["sharded, other second inputs"] = told(lambda: same.sharded(x, other))
    found["sharded, other test inputs"] = told(lambda: distributed_gram_and_cross(same.gram_and_cross)(x, other))
    found["sharded, a function"] = told(
        lambda: distributed_gram(lambda a, b=None, progress=False: a @ (a if b is None else b).T, other)
    )  # type: ignore[misc]
    three = nn.Linear(3, 3)
    options: list[Any] = [[{"output": 0}, {"output": 1}], [{"full": False}, {"full": True}]]
    options += [[{}, {"dtype": torch.float64}], [{"features": "float32"}, {"features": "bfloat16"}]]
    for both in options:
        found[f"sharded, other {next(iter(both[1]))}"] = told(
            lambda both=both: EmpiricalNTK(three, **both[rank]).sharded(x)
        )  # type: ignore[misc]
    layer = nn.Sequential(nn.Linear(3, 3), (nn.ReLU, nn.Tanh)[rank]())
    found["sharded, another layer"] = told(lambda: EmpiricalNTK(layer).sharded(x))
    three.bias.requires_grad_(rank == 0)
    found["sharded, frozen weights"] = told(lambda: EmpiricalNTK(three).sharded(x))
    scale = {"input": x, "scale": 1.0 + rank}
    found["sharded, other arguments"] = told(lambda: EmpiricalNTK(Scaled()).sharded(scale))
    rounded = x * (1 + 1e-7 * rank)
    found["sharded, rounding"] = told(lambda: same.sharded(rounded))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    leave_group()
