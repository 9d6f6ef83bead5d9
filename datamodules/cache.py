"""The folder of downloaded and converted data, and what is said where it cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock

from ntk_lightning import atomic_files

__all__ = ["cache_folder", "locked", "writing"]

_ADVICE = "Make room there or choose another cache folder; what is finished is kept and the next run goes on from it"


def cache_folder() -> Path:
    """Find the folder of downloaded and converted data.

    Returns:
        ``$NTK_LIGHTNING_CACHE``, or else ``ntk_lightning`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
    """
    if own := os.environ.get("NTK_LIGHTNING_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ntk_lightning"


def writing(path: Path) -> AbstractContextManager[None]:
    """Say what to do when the body cannot write.

    Args:
        path: What is being written.

    Returns:
        Raises an OSError that says so, where the body raises one.
    """
    return atomic_files.writing(
        path,
        "Make room there or choose another cache folder; what is finished is kept and the next run goes on from it",
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the body.

    Args:
        path: What the body writes; its folder is made, and ``<path>.lock`` in it.

    Yields:
        Nothing.
    """
    lock = FileLock(f"{path}.lock")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
