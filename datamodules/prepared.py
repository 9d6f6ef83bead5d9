"""The base of data sets whose files are converted once into the cache, and mapped into memory from there."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.datamodules.cache import cache_folder
from ntk_lightning.datamodules.image_file import SHAPE, ImageFile, key_of_files
from ntk_lightning.datamodules.samples import Samples

__all__ = ["PreparedDataModule"]


class PreparedDataModule(ImageDataModule):
    """Two pools, "train" and "test", that come in parts: local files, or downloads.

    A subclass tells the parts of a pool, finds those of a local folder, and converts what is missing of a pool.

    Args:
        name: Of the data set's folder in the cache.
        path: Folder with the user's own files; None downloads them.
        cache: Folder for downloads and converted images; None is ``$NTK_LIGHTNING_CACHE`` or
            ``~/.cache/ntk_lightning``.
        keep_downloads: Keep the downloaded files after they were converted.
        url: Folder of the files on the web.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Raises:
        FileNotFoundError: ``path`` lacks a part.
    """

    side = SHAPE[0]

    def __init__(
        self,
        name: str,
        path: str | None,
        cache: str | None,
        keep_downloads: bool,
        url: str,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__(**kwargs)
        self.path = None if path is None else Path(path).expanduser()
        self.cache = (cache_folder() if cache is None else Path(cache).expanduser()) / name
        self.keep_downloads, self.url = keep_downloads, url.rstrip("/")

    @abstractmethod
    def parts(self, pool: str) -> Sequence[str]:
        """Name the parts of a pool, "train" or "test"."""

    @abstractmethod
    def find_local(self, folder: Path, part: str) -> list[Path]:
        """Find the files of a part in the user's folder, or raise FileNotFoundError."""

    @abstractmethod
    def pieces(self, pool: str) -> Sequence[str]:
        """Name the pieces of a pool's converted images, in order."""

    @abstractmethod
    def convert(self, pool: str, images: ImageFile) -> None:
        """Add those pieces of a pool that the file of converted images does not hold yet."""

    def stem(self, pool: str) -> str:
        """Name a pool's converted images, by all arguments that they depend on but the source of the files."""
        return pool

    def prepare_data(self) -> None:
        """Download and convert what is not in the cache yet."""
        for pool in ("train", "test"):
            self._prepared(pool)

    def load(self, train: bool) -> Samples:
        """Map one pool into memory (see the base class)."""
        return self._prepared("train" if train else "test").samples()

    def check_local(self) -> None:
        """Look for all parts in the user's folder, if one was given."""
        for pool in ("train", "test"):
            self.local_files(pool)

    def local_files(self, pool: str) -> list[Path]:
        """Find the files of a pool in the user's folder; none where no folder was given."""
        if self.path is None:
            return []
        return [file for part in self.parts(pool) for file in self.find_local(self.path, part)]

    @property
    def source(self) -> str:
        """Key of the address that files are downloaded from."""
        return hashlib.sha256(self.url.encode()).hexdigest()[:12]

    def _prepared(self, pool: str) -> ImageFile:
        key = self.source if self.path is None else key_of_files(self.local_files(pool))
        images = ImageFile(self.cache / f"{self.stem(pool)}-{key}")
        if not images.holds(self.pieces(pool)):
            with images.lock():  # another process may have converted it meanwhile: convert looks again
                self.convert(pool, images)
        return images
