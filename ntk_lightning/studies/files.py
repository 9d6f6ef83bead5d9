"""Files of results: there whole or not at all, and never written over by a second process."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from ntk_lightning import atomic_files

__all__ = ["Rows", "place_first", "read_cell", "write_table", "writing"]

Rows: TypeAlias = list[dict[str, Any]]
_ADVICE = "Make room there or choose another --output; finished cells are kept, and the same command goes on from them"


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


def write_table(path: Path, table: pa.Table, place: Callable[[Path, Path], None] = os.replace) -> None:
    """Write a table that is there whole or not at all, also after a power cut.

    Args:
        path: Of the table.
        table: Its rows.
        place: Gives a finished file its name.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with writing(path):
            with temporary.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def place_first(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless another process was first.

    Args:
        temporary: The file.
        path: Its name; a file there is replaced only if it cannot be read.

    Raises:
        OSError: The folder cannot be written to.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        if read_cell(path) is None:
            os.replace(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):  # what folders without hard links say
            raise
        os.replace(temporary, path)


def writing(path: Path) -> AbstractContextManager[None]:
    """Say what to do when the body cannot write.

    Args:
        path: What it writes.

    Returns:
        Raises an OSError that says so, where the body raises one.
    """
    return atomic_files.writing(path, _ADVICE)
