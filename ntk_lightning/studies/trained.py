"""Trained networks kept in a results folder: cells that differ in their kernels alone train once, in all studies."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntk_lightning.atomic_files import atomic_write, writing
from ntk_lightning.callbacks import ModelErrors
from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.kernels.grams.kernel_key import digest
from ntk_lightning.studies.build import LoadedData
from ntk_lightning.studies.cell_config import KEY_LENGTH, Cell
from ntk_lightning.studies.files import ADVICE

__all__ = ["Trained", "read_trained", "trained_path", "training", "write_trained"]

_MOST_BYTES = 2**28  # of a network that is kept: a wider one is trained again, rather than fill the disk


@dataclass(frozen=True)
class Trained:
    """What is kept of a training run.

    Args:
        weights: State of the network after the last step.
        errors: The fields of its :class:`~ntk_lightning.callbacks.ModelErrors`.
        steps: Steps that were taken.
    """

    weights: Mapping[str, Tensor]
    errors: Mapping[str, Any]
    steps: int

    @classmethod
    def of(cls, net: nn.Module, errors: ModelErrors, steps: int) -> Trained:
        """Take down a network after the last step.

        Args:
            net: The network.
            errors: Of the run.
            steps: That were taken.

        Returns:
            Copies on the CPU.
        """
        weights = {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}
        return cls(weights, dict(vars(errors)), steps)

    @property
    def model_errors(self) -> ModelErrors:
        """The errors of the run."""
        return ModelErrors(**self.errors)


def training(cell: Cell) -> Cell:
    """Reduce a cell to the training of its network, which the kernels that it extracts do not change.

    Args:
        cell: A cell that trains a network.

    Returns:
        A cell that cells with the same training share.
    """
    arguments = {k: value for k, value in cell.data.get("init_args", {}).items() if k != "fresh"}
    data = {**cell.data, "init_args": arguments}
    return replace(cell, after=(), after_fresh=(), kernels_at=None, log_spaced=None, data=data)


def trained_path(folder: Path, cell: Cell, data: ImageDataModule | None, loaded: LoadedData | None = None) -> Path:
    """Name the file of a cell's trained network, by all that its training depends on.

    Args:
        folder: Of the results.
        cell: A cell that trains a network.
        data: Its data, set up; not needed with ``loaded``.
        loaded: What the study has seen of its data, which is part of the name; None takes the sets themselves.

    Returns:
        The file, which need not be there.
    """
    sets = () if data is None else (data.train_set, data.test_set)
    content = [loaded.digest] if loaded else [digest(tensor) for each in sets if each for tensor in (each.x, each.y)]
    name = hashlib.sha256(json.dumps([training(cell).key, content]).encode()).hexdigest()[:KEY_LENGTH]
    return folder / "networks" / f"{name}.pt"


def read_trained(path: Path) -> Trained | None:
    """Read a trained network.

    Args:
        path: As of :func:`trained_path`.

    Returns:
        What was kept; None where there is no file, or one that cannot be read.
    """
    if not zipfile.is_zipfile(path):  # what torch.save writes is one
        return None
    try:
        return Trained(**torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError):
        return None


def write_trained(path: Path, trained: Trained) -> None:
    """Keep a trained network, unless it is too large to; warn where it cannot be written, as no result depends on it.

    Args:
        path: As of :func:`trained_path`.
        trained: What to keep.
    """
    if sum(tensor.nbytes for tensor in trained.weights.values()) > _MOST_BYTES:
        return
    try:
        with writing(path.parent, ADVICE):
            path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, ADVICE, keep=lambda there: read_trained(there) is not None) as temporary:
            torch.save({**vars(trained), "weights": dict(trained.weights), "errors": dict(trained.errors)}, temporary)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch's writer tells of a full disk
        warnings.warn(f"Cells that extract other kernels will train this network again. {error}", stacklevel=2)
