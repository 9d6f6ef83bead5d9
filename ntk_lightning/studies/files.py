"""Files of results: there whole or not at all, and never written over by a second process."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from ntk_lightning.atomic_files import writing

__all__ = ["ADVICE", "Rows", "read_cell", "read_digest", "write_cell", "write_table"]

Rows: TypeAlias = list[dict[str, Any]]
_DIGEST = b"data"  # in a cell's metadata
ADVICE = "Make room there or choose another --output; finished cells are kept, and the same command goes on from them"


def read_cell(path: Path) -> Rows | None:
    """Read the rows of a finished cell.

    Args:
        path: Of its file.

    Returns:
        The rows; None where there is no file, or one that cannot be read.
    """
    try:
        return list(pq.read_table(path).to_pylist())
    except (OSError, pa.ArrowException):  # OSError also where a parquet file is damaged
        return None


def read_digest(path: Path) -> str | None:
    """Read of which data a finished cell is.

    Args:
        path: Of its file.

    Returns:
        The digest of the data; None where none is noted.
    """
    digest = (pq.read_schema(path).metadata or {}).get(_DIGEST)
    return None if digest is None else digest.decode()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table that is there whole or not at all, also after a power cut.

    Args:
        path: Of the table.
        table: Its rows.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    _write(path, table, os.replace)


def write_cell(path: Path, table: pa.Table, digest: str | None) -> None:
    """Write the rows of a finished cell, unless another process was first.

    Args:
        path: Of its file; a file there is replaced only if it cannot be read.
        table: Its rows.
        digest: Of the data that they were computed from.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    _write(path, table.replace_schema_metadata({_DIGEST: digest} if digest else None), _link)


def _write(path: Path, table: pa.Table, rename: Callable[[Path, Path], None]) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with writing(path, ADVICE):
            with temporary.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _link(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless a file that can be read has it."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if read_cell(path) is None:
            os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):  # what folders without hard links say
            raise
        os.replace(temporary, path)
