"""Data sets as Lightning data modules, one a file."""

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.batches import BatchLoader
from ntk_lightning.datamodules.cifar5m import CIFAR5mBinary
from ntk_lightning.datamodules.cifar10 import CIFAR10Binary
from ntk_lightning.datamodules.fashion_mnist import FashionMNISTBinary
from ntk_lightning.datamodules.samples import Batch, Samples
from ntk_lightning.datamodules.svhn import SVHNParity
from ntk_lightning.datamodules.synthetic import SyntheticTeacher
from ntk_lightning.datamodules.tensors import TensorData

__all__ = [
    "Batch",
    "BatchLoader",
    "CIFAR5mBinary",
    "CIFAR10Binary",
    "FashionMNISTBinary",
    "ImageDataModule",
    "SVHNParity",
    "Samples",
    "SyntheticTeacher",
    "TensorData",
]
