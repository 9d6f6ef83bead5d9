"""A tiny task and a quiet Trainer, for tests that train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, distributed, nn

from ntk_lightning.datamodules import TensorData
from ntk_lightning.networks import FiveLayerCNN
from ntk_lightning.optim import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12)  # 40 = 12 + 12 + 12 + 4: a ragged last batch
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let every write of a file beyond so many bytes fail, as on a full disk."""
    import resource  # not on Windows

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def leave_group() -> None:
    """End the processes' group once all of them are done: threads of gloo can abort a process that exits with it."""
    distributed.barrier()
    distributed.destroy_process_group()


def data(n: int = 40, pool: int = 60, **kwargs: Any) -> TensorData:  # noqa: ANN401 - passed on
    """Noise with a faint bright or dark spot: 8x8 pixels, 30 test images."""
    generator = torch.Generator().manual_seed(0)
    y = torch.where(torch.rand(pool + 30, generator=generator) < 0.5, -1.0, 1.0)
    x = torch.randn(pool + 30, 3, 8, 8, generator=generator)
    x[:, :, 2:6, 2:6] += 0.7 * y[:, None, None, None]
    return TensorData((x[:pool], y[:pool]), (x[pool:], y[pool:]), **{"n_train": n, **kwargs})


def net(seed: int = 0, num_outputs: int = 1) -> nn.Sequential:
    """A five-layer CNN of width 6."""
    torch.manual_seed(seed)
    return FiveLayerCNN(width=6, num_outputs=num_outputs)


def fit(module: LightningModule, datamodule: TensorData, epochs: int = 3, **kwargs: Any) -> Trainer:  # noqa: ANN401
    """Train quietly on the CPU, in float64 unless told otherwise."""
    trainer = Trainer(max_epochs=epochs, **{"precision": "64-true", **QUIET, **kwargs})
    trainer.fit(module, datamodule=datamodule)
    return trainer


def test_images(datamodule: TensorData) -> Tensor:
    """Normalized test images in float64."""
    assert datamodule.test_set is not None
    return datamodule.test_set.x.double()


test_images.__test__ = False  # type: ignore[attr-defined]  # a helper
