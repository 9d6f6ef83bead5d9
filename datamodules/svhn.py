"""Parity of the digit of Street View House Numbers, from MATLAB files or from parquet."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from ntk_lightning.datamodules.download import delete_temporary, download_temporary
from ntk_lightning.datamodules.image_file import ImageFile
from ntk_lightning.datamodules.parquet import check_schema, column_names, decode, reading
from ntk_lightning.datamodules.prepared import PreparedDataModule
from ntk_lightning.progress import progress_bar

__all__ = ["SVHNParity"]

URL = "https://ufldl.stanford.edu/housenumbers"
MD5 = {
    "train": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test": "eb5a983be6a315427106f1b164d9cef3",
    "extra": "a93ce644f1a588dc4d68dda5feec44a7",
}
ROWS = 1024  # images converted at a time
_LOADMAT_ERRORS = OSError, EOFError, LookupError, ValueError, TypeError, NotImplementedError, MatReadError, zlib.error


class SVHNParity(PreparedDataModule):
    """Even (-1) against odd (+1) digits of SVHN, cropped to 32x32 (Netzer et al., 2011).

    The training pool is a balanced subset of the splits "train" and "extra", or of "train" alone: all digits of the
    rarer parity, and as many of the other, drawn with a fixed seed. The test pool is the split "test" as it is, in
    which about 54 % of the digits are odd. Both are converted once into the cache (about 1.8 GB) and mapped into memory
    from there. Converting the largest file, of 531,131 images, holds it in memory once as a whole (more than 1.6 GB).

    Args:
        path: Folder with ``train_32x32.mat``, ``extra_32x32.mat`` and ``test_32x32.mat``, in which ``X`` is uint8
            (32, 32, 3, n) and ``y`` (n, 1) has digit 0 as 10; or with parquet files of the hub's schema
            (``ufldl-stanford/svhn``, columns ``image`` and ``label``) whose names contain "train", "extra" or "test".
            By default the ``.mat`` files are downloaded and their MD5 checksums compared.
        cache: Folder for downloads and converted images; by default ``$NTK_LIGHTNING_CACHE`` or
            ``~/.cache/ntk_lightning``.
        keep_downloads: Keep the downloaded files (1.5 GB) after they were converted; files that were put into the
            cache by hand are kept in any case.
        url: Folder of the files on the web.
        extra: False leaves out the split "extra", of 531,131 easier digits and 1.3 GB: the 73,257 digits of "train" are
            the training pool, and nothing of "extra" is looked for.
        **kwargs: Those of :class:`~ntk_lightning.datamodules.ImageDataModule`.

    Raises:
        FileNotFoundError: ``path`` lacks a split that is asked for.
    """

    def __init__(
        self,
        path: str | None = None,
        cache: str | None = None,
        keep_downloads: bool = False,
        url: str = URL,
        extra: bool = True,
        **kwargs: Any,  # noqa: ANN401 - passed on
    ) -> None:
        super().__init__("svhn", path, cache, keep_downloads, url, **kwargs)
        self.extra = extra
        self.check_local()

    def parts(self, pool: str) -> tuple[str, ...]:
        """Name the splits of a pool (see the base class)."""
        return ("train", "extra") if pool == "train" and self.extra else (pool,)

    def pieces(self, pool: str) -> list[str]:
        """Name the pieces of a pool: local files, or splits that are downloaded."""
        return [str(file) for file in self.local_files(pool)] or list(self.parts(pool))

    def stem(self, pool: str) -> str:
        """Name a pool's images: another subset is balanced without "extra"."""
        return pool if pool == "test" or self.extra else "train-without-extra"

    def find_local(self, folder: Path, part: str) -> list[Path]:
        """Find a split as a MATLAB file, or as parquet files (see the base class)."""
        matlab = folder / f"{part}_32x32.mat"
        if matlab.is_file():
            return [matlab]
        named = sorted(file for file in folder.rglob("*.parquet") if part in file.name)
        files = [file for file in named if {"image", "label"} <= column_names(file)]
        if not files:
            raise FileNotFoundError(
                f"{folder} has neither {matlab.name} nor a parquet file with {part!r} in its name and the columns "
                "image and label: give the folder that holds train, extra and test of SVHN (extra=False does without "
                "extra), or leave path out to download them."
            )
        return files

    def convert(self, pool: str, images: ImageFile) -> None:
        """Balance and convert a pool, whose labels have to be known as a whole (see the base class)."""
        names = self.pieces(pool)
        if images.holds(names):
            return
        local = self.local_files(pool)
        files = local or [self._download(split) for split in self.parts(pool)]
        digits = [_digits(file) for file in files]
        odd = np.concatenate(digits) % 2
        chosen = _balanced(odd) if pool == "train" else np.ones(len(odd), bool)
        masks = np.split(chosen, np.cumsum([len(part) for part in digits])[:-1])
        for name, file, part, mask in zip(names, files, digits, masks, strict=True):
            if not images.holds([name]):
                images.add(name, _read(file, part, mask))
        if not (local or self.keep_downloads):
            for file in files:
                delete_temporary(file)

    def _download(self, split: str) -> Path:
        name = f"{split}_32x32.mat"
        return download_temporary(f"{self.url}/{name}", self.cache / name, MD5[split])


def _balanced(odd: np.ndarray) -> np.ndarray:
    """Mark as many odd as even digits (n,): all of the rarer ones, and a draw of the others that is always the same."""
    chosen = np.zeros(len(odd), bool)
    parities = [np.flatnonzero(odd == parity) for parity in (0, 1)]
    for name, rows in zip(("even", "odd"), parities, strict=True):
        if not len(rows):
            raise ValueError(f"The training splits have no {name} digit: give files of SVHN with both parities.")
    for rows in parities:
        chosen[np.random.default_rng(0).permutation(rows)[: min(map(len, parities))]] = True
    return chosen


def _digits(file: Path) -> np.ndarray:
    """Digits (n,) from 0 to 9 of all images in a file."""
    if file.suffix == ".mat":
        labels = _from_matlab(file, "y")
        if labels.ndim != 2 or labels.shape[1] != 1 or not np.isin(labels, range(1, 11)).all():
            raise ValueError(f"{file}: y must be (n, 1) with numbers from 1 to 10, of which 10 is digit 0.")
        return labels[:, 0] % 10
    import pyarrow.parquet as pq

    check_schema(file, "image")
    with reading(file):
        digits: np.ndarray = pq.read_table(file, columns=["label"])["label"].to_numpy()
    if not np.isin(digits, range(10)).all():
        raise ValueError(f"{file}: the column label must hold digits from 0 to 9.")
    return digits


def _read(file: Path, digits: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the chosen images (b, 32, 32, 3) of a file and their labels (b,), -1 for even and +1 for odd digits."""
    batches, start = _matlab_images(file, len(digits)) if file.suffix == ".mat" else _parquet_images(file), 0
    with progress_bar(f"converting {file.name}", len(digits), "images") as advance:
        for batch in batches:
            rows = slice(start, start + len(batch))
            images = batch[chosen[rows]]
            if images.dtype == object:
                images = decode(images.tolist(), file, (start + np.flatnonzero(chosen[rows])).tolist())
            yield images, np.where(digits[rows][chosen[rows]] % 2, 1, -1)
            start += len(batch)
            advance(len(batch))


def _matlab_images(file: Path, count: int) -> Iterator[np.ndarray]:
    images = _from_matlab(file, "X")
    if images.dtype != np.uint8 or images.shape != (32, 32, 3, count):
        raise ValueError(f"{file}: X must be uint8 (32, 32, 3, {count}), got {images.dtype} {images.shape}.")
    for start in range(0, count, ROWS):
        yield np.moveaxis(images[..., start : start + ROWS], -1, 0)


def _parquet_images(file: Path) -> Iterator[np.ndarray]:
    """Yield encoded pictures, so that only chosen ones are decoded."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with reading(file), pq.ParquetFile(file) as opened:
        for batch in opened.iter_batches(ROWS, columns=["image"]):
            yield np.array(pc.struct_field(batch["image"], "bytes").to_pylist(), dtype=object)


def _from_matlab(file: Path, name: str) -> np.ndarray:
    try:
        array: np.ndarray = loadmat(file, variable_names=[name])[name]
    except _LOADMAT_ERRORS as error:
        raise ValueError(f"{file} is not a whole MATLAB file of SVHN ({error!r}): get it again.") from error
    return array
