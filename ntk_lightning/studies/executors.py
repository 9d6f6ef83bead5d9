"""Where cells run: one after another here, or many at once on Ray."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

from ntk_lightning.studies.cell import run_cell
from ntk_lightning.studies.config import Cell
from ntk_lightning.studies.files import Rows

__all__ = ["Run", "cells_at_once", "default_threads", "in_process", "on_ray"]

Run: TypeAlias = Callable[[Iterable[Cell]], Iterator[tuple[Cell, Rows | str]]]
Node: TypeAlias = Mapping[str, float]


@contextmanager
def in_process(grams: Path, cpus: int | None, memory: str) -> Iterator[tuple[int, Run]]:
    """Run cells one after another.

    Args:
        grams: Folder of the infinite-width Grams.
        cpus: CPU threads of a cell, by default all of this machine.
        memory: Budget of an extraction of an empirical NTK.

    Yields:
        How many cells run at once, 1, and a function that runs cells: it gives each with its rows, or with the
        traceback of its failure.
    """
    threads = cpus or os.cpu_count() or 1

    def run(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Rows | str]]:
        for cell in cells:
            yield cell, _attempt(cell, grams, threads, memory, progress=True)

    yield 1, run


@contextmanager
def on_ray(address: str, grams: Path, cpus: int | None, gpus: float, memory: str) -> Iterator[tuple[int, Run]]:
    """Run cells as Ray tasks, as many at once as the cluster's nodes have room for.

    Args:
        address: Of a cluster, or "local".
        grams: Folder of the infinite-width Grams, which all nodes must see.
        cpus: CPU threads of a cell, by default those of :func:`default_threads`.
        gpus: GPUs of a cell.
        memory: Budget of an extraction of an empirical NTK.

    Yields:
        The same as :func:`in_process`.

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
        threads = cpus or default_threads(nodes, gpus)
        slots = cells_at_once(nodes, threads, gpus)
        environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
        options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}

        def run(cells: Iterable[Cell]) -> Iterator[tuple[Cell, Rows | str]]:
            task = ray.remote(**options)(_attempt)
            running = {task.remote(cell, grams, threads, memory, False): cell for cell in cells}
            while running:
                for done in ray.wait(list(running))[0]:
                    cell = running.pop(done)
                    try:
                        yield cell, ray.get(done)
                    except ray.exceptions.RayError:  # the worker died
                        yield cell, traceback.format_exc()

        yield slots, run
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


def _attempt(cell: Cell, grams: Path, threads: int, memory: str, progress: bool) -> Rows | str:
    """Run a cell: its rows, or the traceback of its failure."""
    try:
        return run_cell(cell, grams, threads=threads, memory=memory, progress=progress)
    except Exception:  # whatever it was, it is reported, and the other cells go on
        return traceback.format_exc()
