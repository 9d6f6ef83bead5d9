"""The NTK of a Lightning project of your own, watched while it trains: two callbacks, and nothing else changes.

The module below has its own layers, loss and optimizer, and the loaders are plain ones of PyTorch. All that a project
adds is `callbacks=[EmpiricalNTKDynamics()]`: the callback finds the network, the samples and a fit by itself.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.callbacks import EmpiricalNTKDynamics, KernelDiagnostics
from ntk_lightning.datamodules import FashionMNISTBinary, Samples


class YourModule(LightningModule):
    """An ordinary classifier, which knows nothing of kernels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.GELU()),
            *(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.GELU()),
            *(nn.AdaptiveMaxPool2d(4), nn.Flatten(), nn.Linear(16 * width, 2)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Take any loss."""
        images, classes = batch
        return F.cross_entropy(self.body(images), classes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Choose any optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def your_loaders(n: int) -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Make a training and a validation loader of images and class numbers, as any project does."""
    data = FashionMNISTBinary(n_train=n, n_test=n)
    data.setup()
    assert data.train_set is not None
    assert data.test_set is not None

    def images_and_classes(samples: Samples) -> TensorDataset:
        return TensorDataset(samples.x, (samples.y > 0).long())

    train, val = images_and_classes(data.train_set), images_and_classes(data.test_set)
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=32)


def main() -> None:
    """Train, watch and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="images to train on, and to test on")
    parser.add_argument("--width", type=int, default=32, help="channels, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--times", type=int, default=8, help="about how many times to look at the kernel")
    parser.add_argument("--output", help="folder of the tables and pictures (default: a temporary one)")
    options = parser.parse_args()
    folder = options.output or tempfile.mkdtemp(prefix="watch_any_module_")

    seed_everything(0)
    dynamics = EmpiricalNTKDynamics(log_spaced=options.times)
    diagnostics = KernelDiagnostics(log_spaced=options.times, per_layer=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=options.epochs,
        callbacks=[dynamics, diagnostics],
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(YourModule(options.width), *your_loaders(options.n))

    print("\nThe kernel K^t after t steps, fitted on the training images by gradient flow, beside the network:")
    print(
        "  step   network's test error   kernel's test error   alignment with K^0   share of labels in 5 eigenvectors"
    )
    for fit, row in zip(dynamics.rows, diagnostics.rows, strict=True):
        print(
            f"  {fit['step']:4d}   {fit['network_error']:20.1%}   {fit['optimal_error']:19.1%}"
            f"   {row['alignment_with_initial']:18.3f}   {row['target_share']:33.3f}"
        )
    last = [row for row in diagnostics.layers if row["step"] == diagnostics.rows[-1]["step"]]
    leading = max(last, key=lambda row: row["trace_share"])
    print(f"At the end {leading['trace_share']:.0%} of the kernel's trace are of the layer {leading['layer']}.")
    print(f"Tables and pictures: {folder}")


if __name__ == "__main__":
    main()
