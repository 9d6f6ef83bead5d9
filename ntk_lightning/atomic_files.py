"""Files that are there whole or not at all: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["SUFFIX", "atomic_write", "flush", "publish", "remove_stale", "writing"]

SUFFIX = ".partial"  # of a file that is not whole yet
_STALE_SECONDS = 3600.0  # a temporary file that was not written to for so long belongs to a killed process
_NO_HARD_LINKS = errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP  # what file systems without them answer


@contextmanager
def atomic_write(path: Path, advice: str, *, keep: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Write a file that is there whole or not at all, also after a kill or a power cut.

    Args:
        path: The file's final name, in a folder that exists.
        advice: What to do where it cannot be written.
        keep: Tells whether a file of that name which another process has finished meanwhile is whole and stays; without
            it the last writer wins.

    Yields:
        A temporary path in the same folder, for the body to write a file at. It is renamed when the body ends, and
        deleted where the body raises.

    Raises:
        OSError: The file cannot be written; one that was there before is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> with atomic_write(path, "Choose another folder") as temporary:
        ...     size = temporary.write_text("n, error")
        >>> [file.name for file in path.parent.iterdir()]
        ['table.csv']
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}{SUFFIX}")  # several processes may write the same file
    try:
        with writing(path, advice):
            yield temporary
            flush(temporary)
            publish(temporary, path, keep)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Add the path and advice to an OSError that the body raises.

    Args:
        path: What is being written.
        advice: What to do.

    Yields:
        Nothing.

    Raises:
        OSError: The body raised one.

    Example:
        >>> with writing(Path("table.csv"), "Choose another folder"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] Cannot write table.csv: No space left on device. Choose another folder
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"Cannot write {path}: {error.strerror or error}. {advice}") from error


def flush(path: Path) -> None:
    """Flush a file or folder to the disk (fsync).

    Args:
        path: Of the file or folder.
    """
    if path.is_dir() and os.name != "posix":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path, keep: Callable[[Path], bool] | None = None) -> None:
    """Give a finished and flushed file its final name.

    Args:
        temporary: The file.
        path: Its final name, in the same folder.
        keep: As for :func:`atomic_write`.
    """
    if keep is None or not _linked(temporary, path, keep):
        os.replace(temporary, path)
    flush(path.parent)  # the name, too, survives a power cut


def _linked(temporary: Path, path: Path, keep: Callable[[Path], bool]) -> bool:
    """Tell whether the name is settled: given to this file, which fails where there is one, or kept by another."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return keep(path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        return path.exists() and keep(path)
    return True


def remove_stale(folder: Path) -> None:
    """Delete the temporary files that killed processes left in a folder.

    Args:
        folder: Where :func:`atomic_write` has been writing.
    """
    for temporary in folder.glob(f".*{SUFFIX}"):
        with suppress(FileNotFoundError):  # its process has just renamed it
            if time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                temporary.unlink()
