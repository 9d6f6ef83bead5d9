"""Lightning's W&B logger without two warnings that its user can do nothing about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger

from ntk_lightning.progress import is_rank_zero

if TYPE_CHECKING:
    from wandb import Run
    from wandb.sdk.lib import RunDisabled

__all__ = ["QuietWandbLogger"]


class QuietWandbLogger(WandbLogger):
    """Logs to W&B, quietly.

    Lightning passes on the argument ``anonymous`` even where it was not given, and W&B warns that it has no effect; W&B
    warns too where the folder of its files does not exist yet, which is made here first.

    Args:
        *args: Those of Lightning's ``WandbLogger``.
        **kwargs: Those of Lightning's ``WandbLogger``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__(*args, **kwargs)
        if self._wandb_init.get("anonymous", "") is None:
            del self._wandb_init["anonymous"]

    @property
    def experiment(self) -> Run | RunDisabled:
        """The W&B run, which starts at the first access on rank zero."""
        if self._experiment is None and self.save_dir and is_rank_zero():
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
        run: Run | RunDisabled = super().experiment  # of the other ranks, Lightning's empty one
        return run
