"""Where cells run, one after another here or many at once on Ray, and the resources of each."""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

from rich.console import Console

from ntk_lightning.kernels.empirical.memory_plan import parse_bytes
from ntk_lightning.studies.build import LoadedData
from ntk_lightning.studies.cell import Outcome, attempt
from ntk_lightning.studies.cell_config import Cell

__all__ = ["Executor", "Resources", "cells_at_once", "default_threads", "in_process", "on_ray"]

Node: TypeAlias = Mapping[str, float]


@dataclass(frozen=True)
class Resources:
    """Where cells run, and what each may use. These are the defaults of the command and of ``run_study``.

    Args:
        ray: Run the cells on Ray: "local", or the address of a cluster. None runs them here, one after another.
        cpus: CPU threads of a cell; the last digits of results depend on it. By default those of this machine that
            other processes leave free when the study starts, which says so: threads that wait for a core make networks
            and empirical kernels many times slower. On Ray those of the smallest node, or with ``gpus`` so many that a
            node's GPUs are all used.
        gpus: GPUs of a cell on Ray: a fraction, so that several cells share one, or a whole number.
        memory: Budget of an extraction of an empirical NTK, such as "4GB"; one that is too small fails the cell.

    Raises:
        ValueError: A value is out of range, or GPUs are asked for without Ray.

    Example:
        >>> Resources(cpus=2).gpus
        0.0
    """

    ray: str | None = None
    cpus: int | None = None
    gpus: float = 0.0
    memory: str = "4GB"

    def __post_init__(self) -> None:
        if self.cpus is not None and self.cpus < 1:
            raise ValueError(f"--cpus must be at least 1, got {self.cpus}: leave it out for all CPUs.")
        if not self.gpus >= 0 or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise ValueError(f"--gpus must be a fraction of one GPU or a whole number of them, got {self.gpus}.")
        if self.gpus and self.ray is None:
            raise ValueError("--gpus needs --ray, which gives cells their GPUs; without it a cell takes the first GPU.")
        parse_bytes(self.memory)


def free_cpus(seconds: float = 0.2) -> int:
    """Count the CPUs that this process may use and others leave free, and say so where they are fewer than all.

    Args:
        seconds: How long to watch, where the system tells what its CPUs do; else the load average counts.

    Returns:
        The number, at least 1.
    """
    known = hasattr(os, "sched_getaffinity")
    cpus = sorted(os.sched_getaffinity(0)) if known else range(os.cpu_count() or 1)
    before = _cpu_times()
    if before:
        time.sleep(seconds)
        after = _cpu_times()
        free = sum(_idle_share(before[cpu], after[cpu]) for cpu in cpus if cpu in before and cpu in after)
    else:
        free = len(cpus) - os.getloadavg()[0] if hasattr(os, "getloadavg") else len(cpus)
    chosen = min(len(cpus), max(1, round(free)))
    if chosen < len(cpus):
        Console(soft_wrap=True, markup=False, emoji=False, highlight=False).print(
            f"{len(cpus) - chosen} of {len(cpus)} CPUs are busy with other work: cells take {chosen} (--cpus "
            f"{len(cpus)} takes all)"
        )
    return chosen


def _cpu_times() -> dict[int, list[int]]:
    """Linux's counters of each CPU; empty elsewhere."""
    stat = Path("/proc/stat")
    lines = stat.read_text().splitlines() if stat.is_file() else []
    fields = (line.split() for line in lines if re.match(r"cpu\d", line))
    return {int(name[3:]): [int(value) for value in values] for name, *values in fields}


def _idle_share(before: Sequence[int], after: Sequence[int]) -> float:
    """The share of a while in which a CPU had nothing to do (idle and waiting for a disk: counters 3 and 4)."""
    spent = [b - a for a, b in zip(before, after, strict=True)]
    return (spent[3] + spent[4]) / max(1, sum(spent[:8]))


class Executor(NamedTuple):
    """How many cells run at once, and a function that runs cells and yields each with its outcome."""

    slots: int
    run: Callable[[Iterable[Cell]], Iterator[tuple[Cell, Outcome]]]


def in_process(folder: Path, resources: Resources, loaded: LoadedData | None, pooled: Collection[str]) -> Executor:
    """Run cells here, one after another.

    Args:
        folder: Of the results.
        resources: Of a cell.
        loaded: What the study has seen of its data.
        pooled: Keys of the cells that share one Gram of the whole pool.

    Returns:
        The executor.
    """
    threads = resources.cpus or free_cpus()

    def run(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome]]:
        for cell in cells:
            whole_pool = cell.key in pooled
            yield cell, attempt(cell, folder, loaded, whole_pool, threads, resources.memory, progress=True)

    return Executor(1, run)


@contextmanager
def on_ray(
    address: str, folder: Path, resources: Resources, loaded: LoadedData | None, pooled: Collection[str]
) -> Iterator[Executor]:
    """Run cells as Ray tasks, as many at once as the cluster's nodes have room for.

    Args:
        address: Of a cluster, or "local".
        folder: Of the results, which all nodes must see.
        resources: Of a cell; without ``cpus`` it has the threads of :func:`default_threads`.
        loaded: What the study has seen of its data.
        pooled: Keys of the cells that share one Gram of the whole pool.

    Yields:
        The executor.

    Raises:
        ConnectionError: There is no cluster at the address.
        ModuleNotFoundError: Ray is not installed.
        ValueError: No node has room for a cell.
    """
    try:
        import ray
    except ImportError as error:
        raise ModuleNotFoundError(
            "Ray is not installed: pip install ray, or leave --ray out to run the cells here."
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False)
        except (OSError, OverflowError, RuntimeError, ValueError) as error:
            raise ConnectionError(
                f"Ray cannot be reached at {address!r} ({error}): start it there (ray start --head prints its "
                "address), or give --ray alone to run on this machine."
            ) from error
    try:
        nodes = [node["Resources"] for node in cast(Any, ray).nodes() if node["Alive"]]
        threads = resources.cpus or default_threads(nodes, resources.gpus)
        slots = cells_at_once(nodes, threads, resources.gpus)
        environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        options: dict[str, Any] = {
            "num_cpus": threads,
            "num_gpus": resources.gpus,
            "runtime_env": {"env_vars": environment},
        }

        def run(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome]]:
            task = ray.remote(**options)(attempt)
            running = {
                task.remote(cell, folder, loaded, cell.key in pooled, threads, resources.memory, False): cell
                for cell in cells
            }
            while running:
                for done in ray.wait(list(running))[0]:
                    cell = running.pop(done)
                    try:
                        yield cell, ray.get(done)
                    except ray.exceptions.RayError:  # the worker died
                        yield cell, Outcome(failure=traceback.format_exc())

        yield Executor(slots, run)
    finally:
        if started:
            ray.shutdown()


def _knock(address: str) -> None:
    """Raise an OSError where nobody answers at a host and port, which Ray would try to reach for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def default_threads(nodes: Sequence[Node], gpus: float) -> int:
    """Choose the CPU threads of a cell on a cluster, so that a cell fits everywhere.

    Args:
        nodes: Resources of each node, "CPU" and "GPU".
        gpus: GPUs of a cell.

    Returns:
        With ``gpus``, the least share of a node's CPUs that the cells have which its GPUs have room for; else the CPUs
        of the smallest node. At least 1; nodes without CPUs, or without the GPUs, do not count.

    Example:
        >>> nodes = [{"CPU": 16, "GPU": 2}, {"CPU": 4}]
        >>> default_threads(nodes, 0), default_threads(nodes, 0.25)
        (4, 2)
    """
    shares = [int(node.get("CPU", 0)) // room for node in nodes if (room := _gpu_room(node, gpus) if gpus else 1)]
    return max(1, min(filter(None, shares), default=1))


def cells_at_once(nodes: Sequence[Node], threads: int, gpus: float) -> int:
    """Count the cells that a cluster has room for at a time, each on one node.

    Args:
        nodes: Resources of each node, "CPU" and "GPU".
        threads: CPUs of a cell.
        gpus: GPUs of a cell.

    Returns:
        The number, at least 1.

    Raises:
        ValueError: No node has room for one.

    Example:
        >>> cells_at_once([{"CPU": 16, "GPU": 2}, {"CPU": 4}], 2, 0.25)
        8
    """
    cpu_rooms = [int(node.get("CPU", 0)) // threads for node in nodes]
    rooms = [min(room, _gpu_room(node, gpus)) if gpus else room for room, node in zip(cpu_rooms, nodes, strict=True)]
    if not sum(rooms):
        have = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ValueError(
            f"A cell asks for {threads} CPUs and {gpus:g} GPUs, which no node of the cluster has (they have {have}): "
            "lower --cpus or --gpus."
        )
    return sum(rooms)


def _gpu_room(node: Node, gpus: float) -> int:
    """Cells that a node's GPUs have room for; Ray puts a cell's fraction on one GPU."""
    count = int(node.get("GPU", 0))
    return count * int(1 / gpus + 1e-9) if gpus < 1 else int(count // gpus)
