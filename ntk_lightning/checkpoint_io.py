"""Checkpoint files that are either whole or not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError  # what torch.load raises; nothing is unpickled here
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from ntk_lightning.atomic_files import atomic_write, remove_stale, writing

__all__ = ["AtomicCheckpointIO"]

_ADVICE = "Make room there or choose another folder; the checkpoint before it is kept, and the same command resumes"
_FAILURES = EOFError, OSError, RuntimeError, UnpicklingError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill in mid-write leaves the one before.

    Lightning's own writes to the system's temporary folder and moves the file from there, which on another file system
    is a copy that a kill cuts short. Remote addresses (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:  # noqa: ANN401 - Lightning's signature
        """Write a checkpoint.

        Args:
            checkpoint: What to save.
            path: The file's final name; its folder is made if missing.
            storage_options: Not supported.

        Raises:
            OSError: It cannot be written; the one before is kept.
            RuntimeError: Something in it cannot be saved.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        final = Path(path)
        with writing(final, _ADVICE):
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_stale(final.parent)
        with atomic_write(final, _ADVICE) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                cause = error.__context__  # torch ends a file that has failed with an error of its own
                if not isinstance(cause, OSError):
                    raise
                raise OSError(cause.errno, cause.strerror or str(cause)) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: The file.
            map_location: As of ``torch.load``.
            weights_only: As of ``torch.load``.

        Returns:
            What was saved.

        Raises:
            FileNotFoundError: There is no such file.
            RuntimeError: The file is not a whole checkpoint.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except _FAILURES as error:
            if isinstance(error, FileNotFoundError) or "Weights only load failed" in str(error):  # the file is whole
                raise
            raise RuntimeError(
                f"{path} is not a whole checkpoint: it is truncated or damaged. Remove it to start the run anew, or "
                "give an older checkpoint as ckpt_path."
            ) from error
