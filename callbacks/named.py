"""Names that tell several callbacks of one class apart: in files, metrics, tables and checkpoints."""

from __future__ import annotations

import re
from typing import ClassVar

from lightning import Callback, LightningModule, Trainer

from ntk_lightning.callbacks.measured import forget_samples
from ntk_lightning.callbacks.run_output import check_folder
from ntk_lightning.callbacks.steps import reset_steps, steps_of

__all__ = ["NamedCallback"]


class NamedCallback(Callback):
    """Base of the callbacks that keep a table: its name, and the steps that its rows count.

    Two callbacks of one class in a run need a name each.

    Args:
        name: Added to the table's, picture's and metrics' names as ``_NAME``; None adds nothing.

    Raises:
        ValueError: The name cannot be part of a file's name.
    """

    table: ClassVar[str] = ""  # of the file, without the name

    def __init__(self, name: str | None = None) -> None:
        if name is not None and not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name={name!r} becomes part of a file's name: use letters, digits, '.', '_' and '-'.")
        self.name = name

    @property
    def state_key(self) -> str:
        """Key of the callback's state in checkpoints: the class's name and the given one."""
        return type(self).__qualname__ if self.name is None else self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that the table can be written and is this callback's alone."""
        if stage != "fit":
            return
        check_folder(trainer)
        reset_steps(trainer)
        forget_samples(trainer)
        tables = [other.named(other.table) for other in trainer.callbacks if isinstance(other, NamedCallback)]  # type: ignore[attr-defined]  # callbacks exists
        if tables.count(self.named(self.table)) > 1:
            raise ValueError(
                f"Two callbacks of the run would write {self.named(self.table)}.csv: give each its own name=..."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count the steps of the run."""
        steps_of(trainer).start(trainer, pl_module, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Count the batch as a step, if it was one."""
        steps_of(trainer).end_batch(trainer, pl_module)

    def named(self, group: str) -> str:
        """Add the callback's name to that of a file or of a group of metrics.

        Args:
            group: Such as "after_kernel".

        Returns:
            The group, or group_NAME.
        """
        return group if self.name is None else f"{group}_{self.name}"

    def model_name(self, model: str) -> str:
        """Add the callback's name to that of a model in a table.

        Args:
            model: Such as "after-kernel".

        Returns:
            The model, or "model (NAME)".
        """
        return model if self.name is None else f"{model} ({self.name})"
