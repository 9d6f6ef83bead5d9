"""A pool of images in one file that grows piece by piece, and is read memory-mapped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path

import numpy as np
import torch

from ntk_lightning.atomic_files import atomic_write, flush, writing
from ntk_lightning.datamodules.cache import ADVICE, locked
from ntk_lightning.datamodules.samples import Samples

__all__ = ["ImageFile", "key_of_files"]

SHAPE = (32, 32, 3)  # of an image: height, width, channel
SIZE = 32 * 32 * 3  # bytes of an image


def key_of_files(files: Sequence[Path]) -> str:
    """Name the contents of local files by their places, sizes and times of change.

    Args:
        files: Which ones.

    Returns:
        12 hexadecimal digits, different after a file was replaced.
    """
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


class ImageFile:
    """Labelled images of 32x32 pixels on disk: ``<stem>.images`` with the bytes, ``<stem>.labels`` with one byte each.

    A label is -1 or +1; where each stands for several classes c, it is -(1 + c) or 1 + c.

    ``<stem>.json`` lists the finished pieces and how many images each has; what a killed process wrote of the next
    piece lies behind them and is overwritten. Images are stored as (n, 32, 32, 3).

    Args:
        stem: Path without suffix.
    """

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self._images, self._labels, self._state = (Path(f"{stem}.{suffix}") for suffix in ("images", "labels", "json"))

    @property
    def pieces(self) -> dict[str, int]:
        """Number of images of each finished piece, in order."""
        found: dict[str, int] = json.loads(self._state.read_text()) if self._state.exists() else {}
        return found

    def holds(self, pieces: Iterable[str]) -> bool:
        """Tell whether all of these pieces are finished."""
        return set(pieces) <= set(self.pieces)

    def lock(self) -> AbstractContextManager[None]:
        """Make the lock to hold while pieces are added."""
        return locked(self.stem)

    def add(self, piece: str, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Append a piece; it is there as a whole or not at all.

        Args:
            piece: Its name.
            batches: Pairs of uint8 images (b, 32, 32, 3) and labels (b,) as above, in bounded memory.

        Raises:
            OSError: The disk is full or the folder cannot be written.
            ValueError: Images are not uint8 of that shape, or labels are not as many.
        """
        pieces = self.pieces
        start, count = sum(pieces.values()), 0
        with self._open_at(self._images, start * SIZE) as images, self._open_at(self._labels, start) as labels:
            for x, y in batches:
                if x.dtype != np.uint8 or x.shape != (len(y), *SHAPE):
                    raise ValueError(f"{piece}: {len(y)} labels need uint8 images {SHAPE}, got {x.dtype} {x.shape}.")
                with writing(self._images, ADVICE):
                    _write(images, x)
                    _write(labels, y.astype(np.int8))
                count += len(y)
        with writing(self._images, ADVICE):
            flush(self._images)
            flush(self._labels)
        with atomic_write(self._state, ADVICE) as temporary:
            temporary.write_text(json.dumps({**pieces, piece: count}))

    def samples(self) -> Samples:
        """Map the finished pieces into memory: only images that are used are read.

        Returns:
            uint8 images (n, 3, 32, 32), a view of the file that can be changed without changing the file, float32
            labels (n,) in {-1, +1}, and class numbers (n,) where a label stands for several.

        Raises:
            ValueError: There is no image, or a file is shorter than it was.
        """
        count = sum(self.pieces.values())
        if not count:
            raise ValueError(f"{self.stem.name} has no image: no class that was asked for is in the data.")
        if self._images.stat().st_size < count * SIZE or self._labels.stat().st_size < count:
            raise ValueError(f"{self._images} is shorter than it was written: delete {self.stem}.* and run again.")
        images = np.memmap(self._images, np.uint8, "c", shape=(count, *SHAPE))
        signed = torch.from_numpy(np.fromfile(self._labels, np.int8, count))
        classes = signed.abs() - 1 if (signed.abs() > 1).any() else None
        return Samples(torch.from_numpy(images).movedim(-1, 1), signed.sign().float(), classes)

    @staticmethod
    def _open_at(path: Path, size: int) -> FileIO:
        with writing(path, ADVICE):
            path.touch()
            file = path.open("r+b", buffering=0)  # nothing is left to be written, and to fail, when it is closed
            file.truncate(size)
            file.seek(size)
        return file


def _write(file: FileIO, array: np.ndarray) -> None:
    left = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    while left:
        left = left[file.write(left) :]
