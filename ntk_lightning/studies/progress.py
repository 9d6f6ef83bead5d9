"""What a running study shows: cells done, failed and running, and the time left; in a log, one line a cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ntk_lightning.progress import shows_bars
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.schema import TRAINED

__all__ = ["StudyProgress", "seconds_left", "study_progress"]


Times: TypeAlias = Sequence[tuple[Cell, float]]  # finished cells, and the seconds that each took


def seconds_left(pending: Sequence[Cell], now: Times, earlier: Times, slots: int) -> tuple[float, bool]:
    """Estimate how long the cells take that are left.

    A cell is taken to cost what the finished one of the same model and width did that is closest in size, times the
    ratio of their work: samples times epochs for a network in training, squared samples for a kernel.

    Args:
        pending: The cells that are left.
        now: Those that this run has finished.
        earlier: Those that were there before, used where no cell of this run is of the kind.
        slots: Cells that run at once.

    Returns:
        The seconds, and whether they are of all that is left: cells of a kind that none has finished of count nothing.
    """
    known, total = True, 0.0
    for cell in pending:
        for finished in (now, earlier):
            alike = [
                (abs(_work(other) - _work(cell)), seconds / _work(other))
                for other, seconds in finished
                if (other.model, other.width) == (cell.model, cell.width)
            ]
            if alike:
                total += min(alike)[1] * _work(cell)  # seconds a unit of work, of the closest
                break
        else:
            known = False
    return total / slots, known


def _work(cell: Cell) -> int:
    return cell.n * cell.optimizer.epochs if cell.model in TRAINED else cell.n**2


class StudyProgress:
    """The state of a running study, and how it is shown.

    Args:
        name: Of the study.
        pending: Cells to run.
        earlier: Finished ones, with the seconds that each took.
        total: Cells of the study.
        slots: Cells that run at once.
        bar: Shows them in a terminal; None writes a line a cell.
    """

    def __init__(
        self,
        name: str,
        pending: Sequence[Cell],
        earlier: Times,
        total: int,
        slots: int,
        bar: Progress | None,
    ) -> None:
        self.name, self.pending, self.earlier, self.total, self.slots = name, list(pending), earlier, total, slots
        self.took: list[tuple[Cell, float]] = []
        self.failed, self.started = 0, time.monotonic()
        self.bar, self.console = bar, Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
        if bar is None:
            self.console.print(f"{name}: {self.counts()}")
        else:
            size = sum(cell.n for cell in pending)
            self.task = bar.add_task(name, total=size, counts=self.counts(), left=self.left())

    def report(self, cell: Cell, seconds: float | None) -> None:
        """Count a cell that has ended.

        Args:
            cell: The cell.
            seconds: That it took; None where it failed.
        """
        self.pending.remove(cell)
        if seconds is None:
            self.failed += 1
        else:
            self.took.append((cell, seconds))
        if self.bar is not None:
            self.bar.update(self.task, advance=cell.n, counts=self.counts(), left=self.left())
            return
        ended = "failed" if seconds is None else f"took {seconds:.1f} s"
        elapsed = f"{_clock(time.monotonic() - self.started)} elapsed"
        text = ", ".join(filter(None, (self.counts(), elapsed, self.left())))
        self.console.print(f"{self.name}: {text}; {cell} {ended}")

    def counts(self) -> str:
        """Write the numbers of cells done, running and failed."""
        done, failures = self.total - len(self.pending) - self.failed, f", {self.failed} failed" * (self.failed > 0)
        return f"{done}/{self.total} cells, {min(len(self.pending), self.slots)} running{failures}"

    def left(self) -> str:
        """Write the time left; nothing where nothing is known of it, or nothing is left."""
        seconds, known = seconds_left(self.pending, self.took, self.earlier, self.slots)
        return f"{'' if known else 'more than '}{_clock(seconds)} left" if seconds else ""


@contextmanager
def study_progress(
    name: str, pending: Sequence[Cell], earlier: Times, total: int, slots: int
) -> Iterator[StudyProgress]:
    """Show the progress of a study while the body runs: a bar in a terminal, a line a cell in a file or pipe.

    Args:
        name: As of :class:`StudyProgress`, like the others.
        pending: Cells to run.
        earlier: Finished ones, with the seconds that each took.
        total: Cells of the study.
        slots: Cells that run at once.

    Yields:
        The progress; its ``report`` is to be called with every cell that ends.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    if not shows_bars():
        yield StudyProgress(name, pending, earlier, total, slots, None)
        return
    with Progress(*columns) as bar:
        yield StudyProgress(name, pending, earlier, total, slots, bar)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
