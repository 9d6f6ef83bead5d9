"""What a study will cost: cells, pairs, gradients, peak memory and time, told before it runs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from ntk_lightning.atomic_files import atomic_write, writing
from ntk_lightning.callbacks.scheduled import steps_to_measure
from ntk_lightning.kernels.empirical.memory_plan import parse_bytes
from ntk_lightning.studies.build import LoadedData
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.files import ADVICE, Rows
from ntk_lightning.studies.plan_rates import Rates
from ntk_lightning.studies.predictions import PREDICT_MAX
from ntk_lightning.studies.schema import TRAINED, WIDTH_FREE
from ntk_lightning.studies.shared_gram import count_pairs, missing_pairs
from ntk_lightning.studies.trained import trained_path, training

__all__ = ["Plan", "plan_cells", "print_plan", "write_plan"]


@dataclass
class Plan:
    """The work of the cells that a study has yet to run.

    Args:
        keys: Of the cells.
        samples: Samples that networks are trained on, each epoch anew.
        gradients: Gradients of single samples that are formed.
        products: Pairs of them that are multiplied.
        pairs: Pairs of images whose infinite-width kernel is computed.
        memory: Bytes at the peak of the largest cell.
        largest: That cell.
        seconds: By kind of work.
    """

    keys: list[str] = field(default_factory=list)
    samples: int = 0
    gradients: int = 0
    products: int = 0
    pairs: int = 0
    memory: int = 0
    largest: Cell | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, kind: str, seconds: float) -> None:
        """Add seconds to a kind of work."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())


class _Planner:
    """Adds up the work of cells; what one has computed costs the next ones nothing."""

    def __init__(
        self,
        loaded: LoadedData,
        rates: Rates,
        folder: Path,
        pooled: Iterable[str],
        finished: Sequence[tuple[Cell, Rows]],
    ) -> None:
        self.loaded, self.rates, self.folder, self.pooled = loaded, rates, folder, frozenset(pooled)
        self.finished = finished
        self.plan = Plan()
        self._trained = {training(cell).key for cell, _ in finished if cell.model == "network"}
        self._grams: dict[str, int] = {}

    def add(self, cell: Cell) -> None:
        """Add a cell."""
        self.plan.keys.append(cell.key)
        if cell.model in TRAINED:
            self._train(cell)
            for sizes in filter(None, (cell.after, cell.after_fresh)):
                self._empirical(cell, max(sizes), times=1)
                self._fit(cell, sizes)
            if cell.kernels_at or cell.log_spaced:
                total = cell.optimizer.steps_per_epoch(cell.n) * self._epochs(cell)
                steps = steps_to_measure(total, None, cell.log_spaced or 1, cell.kernels_at)
                count = sum(step <= total for step in steps)
                self._empirical(cell, cell.n, times=count)
                self._fit(cell, [cell.n] * (count + 1))  # K^0 once more, at the steps of the schedule
            return
        if cell.model in WIDTH_FREE:
            self._infinite(cell)
        else:
            self._empirical(cell, cell.n, times=1)
        self._fit(cell, [cell.n])

    def _train(self, cell: Cell) -> None:
        """Count a training run, if its network is not there yet."""
        key = training(cell).key
        there = key in self._trained or trained_path(self.folder, cell, None, self.loaded).exists()
        if cell.model == "network" and there and not (cell.kernels_at or cell.log_spaced):
            return
        self._trained.add(key)
        rates, epochs = self.rates.training(cell), self._epochs(cell)
        measured = cell.num_evaluated + (cell.n if cell.until_train_error is not None else 0)
        self.plan.samples += epochs * cell.n
        self.plan.spend("training", rates.start + epochs * cell.n * rates.sample)
        self.plan.spend("evaluating networks", epochs * measured * rates.forward / cell.evaluate_every)
        self._remember(cell, 0)

    def _epochs(self, cell: Cell) -> int:
        """The epochs of a network; where it ends by itself those of the closest finished size, else of a small one."""
        if cell.until_train_error is None:
            return cell.optimizer.epochs
        alike = [
            (abs(other.n - cell.n), row["curve_steps"][-1] / other.optimizer.steps_per_epoch(other.n))
            for other, rows in self.finished
            for row in rows
            if row["model"] == cell.model == other.model
            and (other.width, other.until_train_error, other.optimizer.lr, other.optimizer.epochs)
            == (cell.width, cell.until_train_error, cell.optimizer.lr, cell.optimizer.epochs)
        ]
        if not alike:
            return self.rates.epochs_to_fit(cell)
        closest = min(distance for distance, _ in alike)
        epochs = [float(count) for distance, count in alike if distance == closest]
        return max(1, round(sum(epochs) / len(epochs)))

    def _empirical(self, cell: Cell, n: int, times: int) -> None:
        """Count the Grams of an empirical NTK."""
        rates, m = self.rates.gradients(cell), cell.num_evaluated
        budget = int(0.9 * parse_bytes(self.rates.memory))
        panels = max(1, -(-n * rates.row_bytes // budget))
        gradients = times * (n * (panels + 1) // 2 + m * panels)  # those that are not in a panel are made anew
        products = times * count_pairs(n, m)
        self.plan.gradients += gradients
        self.plan.products += products
        self.plan.spend("empirical NTKs", gradients * rates.gradient + products * rates.product)
        self._remember(cell, min(budget, (n + 128) * rates.row_bytes) + 4 * n * (n + m))

    def _infinite(self, cell: Cell) -> None:
        """Count the pairs of an infinite-width Gram, or of what is larger than another of its seed."""
        m, key = cell.num_evaluated, f"{cell.model} {cell.net}"
        if cell.key in self.pooled:
            pairs = missing_pairs(cell, self.loaded, self.folder / "grams") if key not in self._grams else 0
            self._grams[key] = pairs
        else:
            key += f" {cell.seed}"
            pairs = max(0, count_pairs(cell.n, m) - self._grams.get(key, 0))
            self._grams[key] = self._grams.get(key, 0) + pairs
        self.plan.pairs += pairs
        self.plan.spend("infinite NTKs", pairs * self.rates.pair(cell))
        self._remember(cell, 4 * cell.n * (cell.n + m))

    def _fit(self, cell: Cell, sizes: Sequence[int]) -> None:
        """Count fits by kernel SGD."""
        m = cell.num_evaluated
        for n in sizes:
            self.plan.spend("kernel SGD", cell.optimizer.epochs * self.rates.fit_epoch(n, m, cell.optimizer))
        if max(sizes) <= PREDICT_MAX:
            self.plan.spend("predicted curves", self.rates.eigenvectors(max(sizes)))

    def _remember(self, cell: Cell, extra: int) -> None:
        """Keep the cell with the highest peak: what the process has, with a quarter for temporaries of the matrices."""
        peak = resident_bytes() + extra + extra // 4
        if peak > self.plan.memory:
            self.plan.memory, self.plan.largest = peak, cell


def plan_cells(
    pending: Sequence[Cell],
    finished: Sequence[tuple[Cell, Rows]],
    loaded: LoadedData,
    pooled: Iterable[str],
    folder: Path,
    memory: str,
) -> Plan:
    """Estimate what cells will cost, from small measurements of each kind of work on this machine.

    Args:
        pending: The cells.
        finished: Those that are there, with their rows.
        loaded: Their data.
        pooled: Keys of the cells that share one Gram of the whole pool.
        folder: Of the results.
        memory: Budget of an extraction, such as "4GB".

    Returns:
        The plan.

    Raises:
        ValueError: A cell would not fit in the memory that is free.
    """
    planner = _Planner(loaded, Rates(loaded, memory), folder, pooled, finished)
    for cell in pending:
        planner.add(cell)
    plan = planner.plan
    free = free_bytes()
    if free is not None and plan.memory > free + resident_bytes():
        raise ValueError(
            f"The study would not fit in memory: {plan.largest} takes {plan.memory / 2**30:.1f} GiB, and "
            f"{(free + resident_bytes()) / 2**30:.1f} GiB are there. Take smaller n, a lower --memory, or a machine "
            "with more."
        )
    return plan


def print_plan(name: str, plan: Plan, finished: int, threads: int) -> None:
    """Print a plan.

    Args:
        name: Of the study.
        plan: What is left of it.
        finished: Cells that are there.
        threads: CPU threads of a cell.
    """
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"{name}: {len(plan.keys)} cells to run, {finished} finished")
    for what, amount in (
        ("samples trained on, over all epochs", plan.samples),
        ("gradients of single samples", plan.gradients),
        ("products of two gradients", plan.products),
        ("pairs of the infinite NTK", plan.pairs),
    ):
        if amount:
            console.print(f"  {amount:,} {what}")
    if plan.largest is not None:
        console.print(f"  {plan.memory / 2**30:.1f} GiB at the peak ({plan.largest})")
    for kind, seconds in plan.seconds.items():
        console.print(f"  {timedelta(seconds=round(seconds))} {kind}")
    console.print(f"  about {timedelta(seconds=round(plan.total))} left on this machine, with threads: {threads}")


def write_plan(path: Path, plan: Plan) -> None:
    """Keep a plan, to be compared with what its cells take.

    Args:
        path: Of the file.
        plan: The plan.
    """
    with writing(path.parent, ADVICE):
        path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: getattr(plan, name) for name in ("samples", "gradients", "products", "pairs", "memory")}
    with atomic_write(path, ADVICE) as temporary:
        temporary.write_text(json.dumps({**kept, "seconds": plan.total, "kinds": plan.seconds, "cells": plan.keys}))


def resident_bytes() -> int:
    """The most memory that this process has had; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def free_bytes() -> int | None:
    """The memory that is free for this process, None where the system does not tell."""
    free = []
    meminfo, limits = Path("/proc/meminfo"), ("memory.max", "memory.current")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = [Path("/sys/fs/cgroup") / name for name in limits]
    if all(path.is_file() for path in group):
        most, now = (path.read_text().strip() for path in group)
        if most != "max":
            free.append(int(most) - int(now))
    return min(free, default=None)
