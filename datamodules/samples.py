"""Whole data sets, batches of them, and the look-up of a run's sets in its data module."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from lightning import Trainer
from torch import Tensor

from ntk_lightning.pytrees import Tree, take_samples, to_device

__all__ = ["Batch", "Samples", "has_set", "samples_of"]


class Batch(NamedTuple):
    """One process's share of a batch.

    ``x`` (b, C, H, W), ``y`` (b,), ``indices`` (b,) positions in the data set, ``size`` of the batch over all
    processes.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    size: int

    def to(self, device: torch.device | str) -> Batch:
        """Move the tensors; Lightning asks for that at every step, and need not look for them one by one."""
        if self.x.device == torch.device(device):  # where the data set lies
            return self
        return Batch(self.x.to(device), self.y.to(device), self.indices.to(device), self.size)


@dataclass(frozen=True)
class Samples:
    """Inputs ``x``, such as images (n, C, H, W), and labels ``y``, (n,) or (n, C).

    Inputs of the user's own loaders may be tuples, lists and mappings of tensors that each have the n samples first. A
    pool whose labels stand for groups of classes may have the class of each sample, ``classes`` (n,).
    """

    x: Tree
    y: Tensor
    classes: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Samples:
        """Move all tensors and cast floating-point inputs; the same tensors where nothing changes."""
        return replace(self, x=to_device(self.x, device, dtype), y=self.y.to(device))

    def take(self, index: slice | Tensor) -> Samples:
        """Take some samples: a slice, which gives views, or positions (m,)."""
        classes = None if self.classes is None else self.classes[index]
        return Samples(take_samples(self.x, index), self.y[index], classes)


def samples_of(trainer: Trainer, split: str) -> Samples:
    """Take a whole data set from a run's data module.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".

    Returns:
        Inputs (n, ...) and labels (n,), where the data module keeps them.

    Raises:
        TypeError: The data module has no such set.
    """
    found = _find_set(trainer, split)
    if found is None:
        raise TypeError(
            f"A kernel needs the whole {split} set: fit with a data module of ntk_lightning.datamodules that has one "
            "(TensorData takes your own tensors; n_val and fresh make the val and fresh sets)."
        )
    return found


def has_set(trainer: Trainer, split: str) -> bool:
    """Tell whether :func:`samples_of` finds a data set.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".

    Returns:
        True if the run's data module keeps one.
    """
    return _find_set(trainer, split) is not None


def _find_set(trainer: Trainer, split: str) -> Samples | None:
    found = getattr(getattr(trainer, "datamodule", None), f"{split}_set", None)
    return found if isinstance(found, Samples) else None
