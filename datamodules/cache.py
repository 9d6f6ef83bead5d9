"""The folder of downloaded and converted data, and the lock of a file in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ntk_lightning.atomic_files import writing

__all__ = ["ADVICE", "cache_folder", "locked"]

ADVICE = "Make room there or choose another cache folder; what is finished is kept and the next run goes on from it"


def cache_folder() -> Path:
    """Find the folder of downloaded and converted data.

    Returns:
        ``$NTK_LIGHTNING_CACHE``, or else ``ntk_lightning`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``.
    """
    if own := os.environ.get("NTK_LIGHTNING_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ntk_lightning"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the body.

    Args:
        path: What the body writes; its folder is made, and ``<path>.lock`` in it.

    Yields:
        Nothing.
    """
    lock = FileLock(f"{path}.lock")
    with writing(path, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
