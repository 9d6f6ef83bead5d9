"""One block of a Gram in one file: a Zarr v3 array in a zip archive, neither of them compressed.

The array has one chunk, which carries Zarr's crc32c checksum; Grams hardly shrink, so compression would cost time only.
The archive has no times in it: the same values are the same bytes. Zarr opens it as a ``zarr.storage.ZipStore``.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

__all__ = ["read_block", "write_block"]

_DAMAGED = (  # what zipfile and Zarr raise of broken archives, wrong checksums, lost or broken metadata
    *(KeyError, TypeError, ValueError, EOFError, RuntimeError, NotImplementedError),
    *(zipfile.BadZipFile, struct.error, zlib.error),
)


def write_block(path: Path, values: Tensor) -> None:
    """Write a block.

    Args:
        path: Of the file, which is overwritten.
        values: Finite values (n1, n2), float32 or float64.
    """
    import zarr  # here and below: half a second that only stores need to spend
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    members: dict[str, Buffer] = {}
    zarr.create_array(
        MemoryStore(members),
        data=values.contiguous().numpy(),
        chunks=tuple(values.shape),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=float("nan"),
        zarr_format=3,
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in sorted(members.items()):
            archive.writestr(zipfile.ZipInfo(name), content.to_bytes())  # dated 1980, as zip counts from there


def read_block(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Read a block.

    Args:
        path: Of the file, or of the folder in which version 0.1 kept the array.
        shape: What the block must have.

    Returns:
        Its values (n1, n2); None where there is no block, or a damaged one.

    Raises:
        OSError: The file is there but cannot be read.
    """
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    try:
        members: MemoryStore | Path = path
        if not path.is_dir():
            as_buffer = default_buffer_prototype().buffer.from_bytes
            with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:  # zipfile compares its own checksums too
                members = MemoryStore({name: as_buffer(archive.read(name)) for name in archive.namelist()})
        array = zarr.open_array(members, mode="r", zarr_format=3)
        if array.shape != shape or array.dtype.name not in ("float32", "float64"):
            return None
        values = torch.from_numpy(array[:])
    except (FileNotFoundError, NotADirectoryError, *_DAMAGED):
        return None
    return None if values[0, 0].isnan() else values  # what is stored is finite: a lost chunk reads as its fill value
