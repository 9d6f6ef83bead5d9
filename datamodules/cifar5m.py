"""Two classes of CIFAR-5m, or two groups of classes, filtered once out of six files of 3 GB and read memory-mapped."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.lib import format as npy_format

from ntk_lightning.datamodules.download import delete_temporary, download_temporary
from ntk_lightning.datamodules.image_file import SHAPE, SIZE, ImageFile
from ntk_lightning.datamodules.prepared import PreparedDataModule
from ntk_lightning.datamodules.two_classes import TwoClasses, check_classes, class_groups, signed_classes
from ntk_lightning.progress import progress_bar

__all__ = ["CIFAR5mBinary", "read_part"]

URL = "https://storage.googleapis.com/gresearch/cifar5m"
PARTS = {"train": tuple(f"part{i}" for i in range(5)), "test": ("part5",)}
ROWS = 1024  # images held in memory at a time: 3 MiB


class CIFAR5mBinary(PreparedDataModule):
    """Two classes of CIFAR-5m (Nakkiran, Neyshabur, Sedghi, 2021, arXiv 2010.08127): by default dog (-1), horse (+1).

    Six million synthetic images like those of CIFAR-10, about 100,000 of each class a part; the training pool is from
    parts 0 to 4, the test pool from part 5. Each part is read once, in batches of 3 MiB; the images of the two classes
    go to the cache (about 3.7 GB) and are mapped into memory from there, so that only those of the chosen subsets are
    read. A killed preparation goes on with the part, or the byte of a download, at which it stopped.

    A download is checked by its length and, where the server sends one, its MD5 checksum; the CRC-32 that the archive
    carries of each array is checked while that is read. Pickled arrays are refused, and nothing is unpacked.

    Args:
        path: Folder that holds ``part0.npz`` to ``part5.npz`` (or ``cifar5m_part0.npz`` and so on), with keys ``X``,
            uint8 (n, 32, 32, 3), and ``Y``, class numbers (n,); by default they are downloaded one after the other.
        cache: Folder for downloads and filtered images; by default ``$NTK_LIGHTNING_CACHE`` or
            ``~/.cache/ntk_lightning``.
        classes: Class numbers, in the order of CIFAR-10, for the labels -1 and +1, one or several for each.
        keep_downloads: Keep each downloaded part of 3 GB after it was filtered, to filter other classes out of it. A
            part that was put into the cache by hand is kept in any case.
        url: Folder of the parts on the web.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Raises:
        FileNotFoundError: ``path`` lacks a part.
        ValueError: The classes are not two different numbers, or groups of different numbers, from 0 to 9.
    """

    def __init__(
        self,
        path: str | None = None,
        cache: str | None = None,
        classes: tuple[int | list[int], int | list[int]] = (5, 7),
        keep_downloads: bool = False,
        url: str = URL,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__("cifar5m", path, cache, keep_downloads, url, **kwargs)
        check_classes(classes)
        self.classes: TwoClasses = classes
        self.check_local()

    def parts(self, pool: str) -> tuple[str, ...]:
        """Name the parts of a pool (see the base class)."""
        return PARTS[pool]

    def pieces(self, pool: str) -> tuple[str, ...]:
        """Name the pieces of a pool: its parts."""
        return PARTS[pool]

    def stem(self, pool: str) -> str:
        """Name a pool's images by their classes."""
        return "-".join([pool, *("".join(map(str, group)) for group in class_groups(self.classes))])

    def find_local(self, folder: Path, part: str) -> list[Path]:
        """Find a part by either of its names (see the base class)."""
        for file in (folder / f"{part}.npz", folder / f"cifar5m_{part}.npz"):
            if file.is_file():
                return [file]
        raise FileNotFoundError(
            f"{folder} has no {part}.npz (nor cifar5m_{part}.npz): give the folder that holds parts 0 to 5 of "
            "CIFAR-5m, or leave path out to download them."
        )

    def convert(self, pool: str, images: ImageFile) -> None:
        """Filter the missing parts of a pool, one after the other (see the base class)."""
        for part in PARTS[pool]:
            if not images.holds([part]):
                self._filter(part, images)

    def _filter(self, part: str, images: ImageFile) -> None:
        if self.path is not None:
            (file,) = self.find_local(self.path, part)
            images.add(part, read_part(file, self.classes))
            return
        file = self.cache / (f"{part}.npz" if self.url == URL else f"{part}-{self.source}.npz")
        download_temporary(f"{self.url}/{part}.npz", file)
        try:
            images.add(part, read_part(file, self.classes))
        except ValueError:
            delete_temporary(file)
            raise
        if not self.keep_downloads:
            delete_temporary(file)


def read_part(file: Path, classes: TwoClasses) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Read the images of two classes, or of two groups of classes, out of a part, in bounded memory.

    Args:
        file: An ``.npz`` archive with ``X``, uint8 (n, 32, 32, 3), and ``Y``, integers (n,), compressed or not.
        classes: Class numbers for the labels -1 and +1, one or several for each.

    Yields:
        Images (b, 32, 32, 3) and labels (b,), at most 1024 at a time, in the order of the file. Labels are -1 or +1,
        times 1 + the class number where a label stands for several.

    Raises:
        ValueError: The archive is cut off or damaged, or its arrays have another type or shape.
    """
    groups = class_groups(classes)
    try:
        with zipfile.ZipFile(file) as archive, archive.open("Y.npy") as member:
            shape, dtype = _header(cast("BinaryIO", member))
            if dtype.kind not in "iu" or len(shape) != 1:
                raise ValueError(f"Y is {dtype} {shape} instead of integers (n,)")
            targets = np.frombuffer(member.read(), dtype)
        if targets.shape != shape:
            raise ValueError(f"Y ends after {len(targets)} of {shape[0]} labels")
        with zipfile.ZipFile(file) as archive, archive.open("X.npy") as member:
            shape, dtype = _header(cast("BinaryIO", member))
            if dtype != np.uint8 or shape != (len(targets), *SHAPE):
                raise ValueError(f"X is {dtype} {shape} instead of uint8 {(len(targets), *SHAPE)}")
            with progress_bar(f"filtering {file.name}", len(targets), "images") as advance:
                for start in range(0, len(targets), ROWS):
                    y = targets[start : start + ROWS]
                    data = member.read(len(y) * SIZE)
                    if len(data) < len(y) * SIZE:
                        raise ValueError("X ends early")
                    chosen = np.isin(y, [number for group in groups for number in group])
                    x = np.frombuffer(data, np.uint8).reshape(-1, *SHAPE)[chosen]
                    yield x, signed_classes(y[chosen], groups)
                    advance(len(y))
            if member.read(1):  # also has zipfile compare the CRC-32 at the end
                raise ValueError("X is longer than its header says")
    except (ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} is not a whole part of CIFAR-5m ({error}): delete it or get it again, and run again."
        ) from error


def _header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype from the header of an .npy file; never unpickles."""
    version = npy_format.read_magic(member)
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, fortran_order, dtype = read(member)
    if fortran_order and len(shape) > 1:
        raise ValueError("an array is in Fortran order")
    if dtype.hasobject:
        raise ValueError("an array holds pickled objects, which are never loaded")
    return shape, dtype
