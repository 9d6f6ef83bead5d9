"""Two classes of CIFAR-10, or two groups of classes, from the hub or from local parquet files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.parquet import column_names, read_parquet
from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.datamodules.two_classes import TwoClasses, binary_labels, check_classes, check_present, class_groups

__all__ = ["CIFAR10Binary"]

HUB_ID = "uoft-cs/cifar10"
REVISION = "0b2714987fa478483af9968de7c934580d0bb9a2"  # what the hub may change later is not loaded


class CIFAR10Binary(ImageDataModule):
    """Two classes of CIFAR-10 (Krizhevsky, 2009): by default dog (-1) against horse (+1), 10,000 + 2,000 images.

    Animals against vehicles, ``classes=[[2, 3, 4, 5, 6, 7], [0, 1, 8, 9]]``, are all 50,000 + 10,000 images.

    Args:
        path: Folder with parquet files of the hub's schema (columns ``img`` and ``label``) whose names contain "train"
            or "test"; by default the data set ``uoft-cs/cifar10`` of the Hugging Face hub is downloaded and cached.
        classes: Class numbers for the labels -1 and +1, one or several for each: airplane 0, automobile 1, bird 2, cat
            3, deer 4, dog 5, frog 6, horse 7, ship 8, truck 9.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Raises:
        FileNotFoundError: ``path`` has no such parquet files.
        ValueError: The classes are not two different numbers, or groups of different numbers, from 0 to 9, or a file
            is damaged.
    """

    side = 32

    def __init__(
        self,
        path: str | None = None,
        classes: tuple[int | list[int], int | list[int]] = (5, 7),
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__(**kwargs)
        check_classes(classes)
        self.path = None if path is None else Path(path).expanduser()
        self.classes: TwoClasses = classes
        if self.path is not None:
            for split in ("train", "test"):
                self._files(self.path, split)

    def prepare_data(self) -> None:
        """Download from the hub where no path was given."""
        if self.path is None:
            for split in ("train", "test"):
                _from_hub(split)

    def load(self, train: bool) -> Samples:
        """Read one pool (see the base class)."""
        split = "train" if train else "test"
        if self.path is not None:
            return read_parquet(self._files(self.path, split), "img", self.classes)
        dataset = _from_hub(split)
        labels = np.asarray(dataset["label"])
        rows = np.flatnonzero(np.isin(labels, [number for group in class_groups(self.classes) for number in group]))
        check_present(labels, self.classes, f"{HUB_ID}, {split},")
        pictures = np.stack([np.asarray(picture) for picture in dataset.select(rows)["img"]])
        images = torch.from_numpy(pictures).movedim(-1, 1).contiguous()
        return Samples(images, binary_labels(labels[rows], self.classes), torch.from_numpy(labels[rows]))

    @staticmethod
    def _files(path: Path, split: str) -> list[Path]:
        named = sorted(file for file in path.rglob("*.parquet") if split in file.name)
        files = [file for file in named if {"img", "label"} <= column_names(file)]
        if not files:
            raise FileNotFoundError(
                f"No parquet file under {path} has {split!r} in its name and the columns img and label: give the "
                f"folder that holds CIFAR-10 in the schema of {HUB_ID}, or leave path out to download it."
            )
        return files


def _from_hub(split: str) -> Any:  # noqa: ANN401 - datasets ships no types
    import datasets  # here, since its import takes a second that the other data sets need not spend

    try:
        return datasets.load_dataset(HUB_ID, split=split, revision=REVISION)
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"{HUB_ID} could not be downloaded from the Hugging Face hub ({error}). Check the network, or download its "
            "parquet files and give their folder as path."
        ) from error
