"""Progress of long work: one rich bar with rate and time left, on rank zero only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

__all__ = ["is_rank_zero", "progress_bar"]


def is_rank_zero() -> bool:
    """Tell whether this process is the one that prints.

    The process group knows, and before there is one, the launcher's environment variables.

    Returns:
        True outside distributed runs and on their first process.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    names = "RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID"
    return all(int(os.environ.get(name) or 0) == 0 for name in names)


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Show finished units a second."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self.unit}/s", style="progress.data.speed")


@contextmanager
def progress_bar(
    description: str, total: float, unit: str, *, enabled: bool = True
) -> Iterator[Callable[[float], None]]:
    """Show a progress bar while the body runs.

    Args:
        description: What is being done.
        total: Units of work in all.
        unit: Name of a unit, in the plural.
        enabled: Show nothing where False, and nowhere but on rank zero.

    Yields:
        A function to call with the number of units just finished.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not (enabled and is_rank_zero()), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda units: progress.advance(task, units)
