"""Progress of long work, on rank zero only: a bar on a terminal, and now and then a line in a log or a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

import rich
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

__all__ = ["ProgressLines", "is_rank_zero", "progress_bar", "shows_bars"]

_AT_LEAST, _AT_MOST = 10.0, 60.0  # seconds between two lines: a quarter of the work counts after the first


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


def shows_bars() -> bool:
    """Tell whether standard output can show a bar that moves.

    Returns:
        True on a terminal and in a notebook; False in a pipe or a file.
    """
    console = rich.get_console()
    return console.is_terminal or console.is_jupyter


class ProgressLines:
    """Prints how far work has come: a line a minute, or at each quarter of work that takes longer than seconds.

    Args:
        description: What is being done.
        total: Units of work in all.
        unit: Name of a unit, in the plural.
        done: Units that were finished before.
    """

    def __init__(self, description: str, total: float, unit: str, done: float = 0.0) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = self._before = done
        self._start = self._last = monotonic()
        self._quarter = self._quarters()

    def advance(self, units: float, note: str = "") -> None:
        """Count finished units, and print a line if one is due.

        Args:
            units: How many were finished since the last call.
            note: Appended to the line.
        """
        self.done += units
        now = monotonic()
        quarter = self._quarters()
        if now - self._last < (_AT_LEAST if quarter > self._quarter else _AT_MOST):
            return
        self._last, self._quarter = now, quarter
        rate = (self.done - self._before) / (now - self._start)
        left = (self.total - self.done) / rate if rate else float("inf")
        ends = "done" if self.done >= self.total else f"{_clock(left)} left"
        share = f"{min(1.0, self.done / self.total):.0%}"
        line = f"{self.description}: {self.done:,.0f}/{self.total:,.0f} {self.unit} ({share}), {rate:,.3g}/s, {ends}"
        print(line + (f", {note}" if note else ""), flush=True)

    def _quarters(self) -> int:
        return int(4 * self.done / self.total) if self.total else 0


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    if seconds == float("inf"):
        return "-:--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


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
    """Show a progress bar while the body runs; lines of text where standard output cannot show one.

    Args:
        description: What is being done.
        total: Units of work in all.
        unit: Name of a unit, in the plural.
        enabled: Show nothing where False, and nowhere but on rank zero.

    Yields:
        A function to call with the number of units just finished.
    """
    if not (enabled and is_rank_zero()):
        yield lambda units: None
        return
    if not shows_bars():
        yield ProgressLines(description, total, unit).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda units: progress.advance(task, units)
