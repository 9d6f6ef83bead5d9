"""Pullover against coat of Fashion-MNIST, shipped with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.nn import functional as F

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.parquet import read_parquet
from ntk_lightning.datamodules.samples import Samples

__all__ = ["FashionMNISTBinary"]


class FashionMNISTBinary(ImageDataModule):
    """Pullover (-1) against coat (+1) of Fashion-MNIST (Xiao et al., 2017, arXiv 1708.07747), zero-padded to 32x32.

    4096 training and 2000 test images, one channel, embedded in the package: no download. Arguments are those of
    :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Example:
        >>> data = FashionMNISTBinary(n_train=8, n_test=4)
        >>> data.setup()
        >>> data.train_set.x.shape
        torch.Size([8, 1, 32, 32])
    """

    side = 32

    def load(self, train: bool) -> Samples:
        """Read the embedded pool (see the base class)."""
        split = "train" if train else "test"
        file = Path(__file__).parent / "data" / f"fashion_mnist_pullover_coat_{split}.parquet"
        samples = read_parquet([file], "image", (2, 4), "L", 28)
        return replace(samples, x=F.pad(samples.x, (2, 2, 2, 2)))
