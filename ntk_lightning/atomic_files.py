"""What is said where a file cannot be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["writing"]


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Say what to do when the body cannot write.

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
