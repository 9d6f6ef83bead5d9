"""The NTK of a LightningModule of your own, watched while it trains: two callbacks, and nothing else changes.

The module below has its own layers, loss and optimizer. The callbacks need a data module of this package, which gives
them whole data sets (`TensorData` takes your own tensors), and the name of the submodule that maps inputs to outputs.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.callbacks import EmpiricalNTKDynamics, KernelDiagnostics
from ntk_lightning.datamodules import Batch, FashionMNISTBinary
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate


class YourModule(LightningModule):
    """An ordinary classifier, which knows nothing of kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.GELU()),
            *(nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(16 * width, 1)),
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Take the logistic loss of labels in {-1, +1}."""
        return F.softplus(-batch.y * self.body(batch.x)[:, 0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Choose any optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    """Train, watch and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="images to train on, and to test on")
    parser.add_argument("--width", type=int, default=32, help="channels, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--times", type=int, default=8, help="about how many times to look at the kernel")
    parser.add_argument("--output", help="folder of the tables and pictures (default: a temporary one)")
    options = parser.parse_args()

    seed_everything(0)
    data = FashionMNISTBinary(n_train=options.n, n_test=options.n)
    data.setup()
    assert data.train_set is not None
    module = YourModule(options.width)
    rate = 0.05 * critical_learning_rate(EmpiricalNTK(module.body)(data.train_set.x))  # the kernel grows in training
    fits = OptimizerConfig(lr=rate, momentum=0.9, batch_size=32, epochs=100)
    dynamics = EmpiricalNTKDynamics(log_spaced=options.times, optimizer=fits, network="body")
    diagnostics = KernelDiagnostics(log_spaced=options.times, probe_size=min(options.n, 200), network="body")
    folder = options.output or tempfile.mkdtemp(prefix="watch_any_module_")
    trainer = Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[dynamics, diagnostics],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)

    print("\nThe kernel K^t after t steps, fitted on the training images, beside the network:")
    print(
        "  step   network's test error   kernel's test error   alignment with K^0   share of labels in 5 eigenvectors"
    )
    for fit, row in zip(dynamics.rows, diagnostics.rows, strict=True):
        print(
            f"  {fit['step']:4d}   {fit['network_error']:20.1%}   {fit['optimal_error']:19.1%}"
            f"   {row['alignment_with_initial']:18.3f}   {row['target_share']:33.3f}"
        )
    print(f"Tables and pictures: {folder}")


if __name__ == "__main__":
    main()
