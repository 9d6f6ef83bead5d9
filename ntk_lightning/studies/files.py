"""Files of results: there whole or not at all, and never written over by a second process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from ntk_lightning.atomic_files import atomic_write

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
    with atomic_write(path, ADVICE) as temporary:
        pq.write_table(table, temporary)


def write_cell(path: Path, table: pa.Table, digest: str | None) -> None:
    """Write the rows of a finished cell, unless another process was first.

    Args:
        path: Of its file; a file there is replaced only if it cannot be read.
        table: Its rows.
        digest: Of the data that they were computed from.

    Raises:
        OSError: It cannot be written; the message says what to do.
    """
    described = table.replace_schema_metadata({_DIGEST: digest} if digest else None)
    with atomic_write(path, ADVICE, keep=lambda there: read_cell(there) is not None) as temporary:
        pq.write_table(described, temporary)
