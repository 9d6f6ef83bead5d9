"""Grids of cells, run here or on Ray, cell by cell, so that a killed study goes on where it was.

Longer than 300 lines, since what makes a study resumable (cells, tables, failures) is decided in one place.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias, cast

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ntk_lightning.scaling.cells import Cell, StudyConfig, check, read_config
from ntk_lightning.scaling.run_cell import run_cell
from ntk_lightning.scaling.wandb_runs import log_rows

__all__ = ["COLUMNS", "StudyError", "run_study", "study"]

COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("study", "arm", "model", "cell")),
        *((name, pa.int64()) for name in ("n", "m", "t", "width", "seed")),
        *((name, pa.float64()) for name in ("lr", "momentum")),
        ("batch_size", pa.int64()),
        ("full_batch", pa.bool_()),
        *((name, pa.int64()) for name in ("epochs", "steps")),
        *((name, pa.float64()) for name in ("optimal_error", "last_error", "optimal_loss", "last_loss")),
        ("optimal_step", pa.int64()),
        *((name, pa.float64()) for name in ("network_error", "network_loss")),
        ("curve_steps", pa.list_(pa.int64())),
        *((name, pa.list_(pa.float64())) for name in ("curve_errors", "curve_losses")),
        ("seconds", pa.float64()),
        *((name, pa.string()) for name in ("config", "git_revision", "version")),
    ]
)
Rows: TypeAlias = list[dict[str, Any]]
Run: TypeAlias = Callable[[Iterable[Cell], Path, int], Iterator[tuple[Cell, Rows | str]]]


class StudyError(RuntimeError):
    """Some cells of a study failed; the others are in the table."""


def study(
    config: Sequence[str],
    scale: str | None = None,
    output: str | None = None,
    ray: str | None = None,
    cpus: int | None = None,
    gpus: float = 0.0,
    wandb: str | None = None,
) -> Path:
    """Run a study: a grid of training runs and kernel fits, resumed cell by cell when run again.

    Args:
        config: Configurations; later ones change earlier ones.
        scale: One of the configuration's scales, such as "small".
        output: Folder of results; by default runs/studies/<scale>. Studies in one folder share their cells and Grams.
        ray: Run the cells on Ray: "local", or the address of a cluster.
        cpus: CPU threads of a cell, by default all of this machine.
        gpus: GPUs of a cell on Ray; a fraction lets several cells share one.
        wandb: W&B project to log every new cell to; by default none.

    Returns:
        The table of results.

    Raises:
        StudyError: Cells failed.
    """
    chosen = read_config(config, scale)
    folder = Path(output or f"runs/studies/{chosen.scale}")
    path = run_study(chosen, folder, ray=ray, cpus=cpus, gpus=gpus, wandb_project=wandb)
    Console().print(f"Results: {path}. Draw them: python -m ntk_lightning figures {folder}", soft_wrap=True)
    return path


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    ray: str | None = None,
    cpus: int | None = None,
    gpus: float = 0.0,
    wandb_project: str | None = None,
) -> Path:
    """Run those cells of a study that have no result yet, and gather the table.

    A finished cell is one file ``cells/<key>.parquet``, named by the content of its configuration and moved there when
    it is complete: what is there is never computed again, in whichever study it occurs, nor written again where two
    processes have computed it at the same time. Infinite-width Grams lie in
    ``grams``. The table ``<name>.parquet`` has one row for each fitted model (``COLUMNS``), with the study's
    configuration in its metadata; it is written when the study ends, however it ends.

    Args:
        config: The study.
        folder: Where results lie.
        ray: Run the cells on Ray: "local", or the address of a cluster, whose nodes must see ``folder``.
        cpus: CPU threads of a cell, by default all of this machine; the last digits of results depend on it.
        gpus: GPUs of a cell on Ray.
        wandb_project: W&B project to log new cells to.

    Returns:
        The table of results.

    Raises:
        OSError: A result cannot be written; the finished cells are kept.
        StudyError: Cells failed; their tracebacks are printed, and the others are in the table.
        ValueError: The configuration is wrong.
    """
    arms = config.cells()
    for group in arms.values():
        check(group[0])
    cells = {cell.key: cell for group in arms.values() for cell in group}
    results = {key: folder / "cells" / f"{key}.parquet" for key in cells}
    pending = [cell for key, cell in cells.items() if not results[key].exists()]
    with _writing(folder / "cells"):
        (folder / "cells").mkdir(parents=True, exist_ok=True)
    threads = cpus or os.cpu_count() or 1
    failures: dict[str, str] = {}
    origin = {"git_revision": _git_revision(), "version": version("ntk_lightning")}
    try:
        executor = _in_process() if ray is None else _on_ray(ray, threads, gpus)
        with executor as (slots, run), _progress(config.name, pending, len(cells), slots) as report:

            def left() -> Iterator[Cell]:
                for cell in pending:
                    if results[cell.key].exists():  # another process has run it meanwhile
                        report(cell)
                    else:
                        yield cell

            for cell, outcome in run(left(), folder.resolve() / "grams", threads):
                if isinstance(outcome, str):
                    failures[cell.key] = outcome
                else:
                    rows = [{**row, **origin} for row in outcome]
                    _write(results[cell.key], pa.Table.from_pylist(rows, COLUMNS), place=_place_first)
                    if wandb_project:
                        log_rows(rows, wandb_project, config.name, folder)
                report(cell)
    finally:
        path = _gather(config, arms, results, folder)
    if failures:
        for key, text in failures.items():
            Console(stderr=True).print(f"\n[bold red]Failed:[/] {cells[key]} (cell {key})\n{text}", highlight=False)
        raise StudyError(
            f"{len(failures)} of {len(cells)} cells of {config.name} failed, as printed above; the others are in "
            f"{path}. Run the same command again to retry the failed ones."
        )
    return path


def _attempt(cell: Cell, grams: Path, threads: int, progress: bool) -> Rows | str:
    """Run a cell: its rows, or the traceback of its failure."""
    try:
        return run_cell(cell, grams, threads=threads, progress=progress)
    except Exception:  # whatever it was, it is reported, and the other cells go on
        return traceback.format_exc()


@contextmanager
def _in_process() -> Iterator[tuple[int, Run]]:
    """Run cells one after another."""

    def run(cells: Iterable[Cell], grams: Path, threads: int) -> Iterator[tuple[Cell, Rows | str]]:
        for cell in cells:
            yield cell, _attempt(cell, grams, threads, progress=True)

    yield 1, run


@contextmanager
def _on_ray(address: str, threads: int, gpus: float) -> Iterator[tuple[int, Run]]:
    """Run cells as Ray tasks, as many at once as the cluster has room for."""
    try:
        import ray
    except ImportError as error:
        raise ModuleNotFoundError(
            'Ray is not installed: pip install "ntk_lightning[ray]", or leave --ray out to run the cells here.'
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=None if address == "local" else address, log_to_driver=False)
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    options: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": {"env_vars": environment}}

    def run(cells: Iterable[Cell], grams: Path, threads: int) -> Iterator[tuple[Cell, Rows | str]]:
        task = ray.remote(**options)(_attempt)
        running = {task.remote(cell, grams, threads, False): cell for cell in cells}
        while running:
            for done in ray.wait(list(running))[0]:
                cell = running.pop(done)
                try:
                    yield cell, ray.get(done)
                except ray.exceptions.RayError:  # the worker died
                    yield cell, traceback.format_exc()

    try:
        resources: dict[str, float] = cast(Any, ray).cluster_resources()
        rooms = [resources.get("CPU", 0) / threads, *([resources.get("GPU", 0) / gpus] if gpus else [])]
        if min(rooms) < 1:
            raise ValueError(
                f"The cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs, and a cell "
                f"asks for {threads} and {gpus:g}: lower --cpus or --gpus."
            )
        yield int(min(rooms)), run
    finally:
        if started:
            ray.shutdown()


@contextmanager
def _progress(name: str, pending: Sequence[Cell], total: int, slots: int) -> Iterator[Callable[[Cell], None]]:
    """Show the cells done and running, and the time left, counting a cell by its training samples."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[cells]} cells, {task.fields[running]} running"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    left = len(pending)
    with Progress(*columns) as progress:
        task = progress.add_task(
            name, total=sum(cell.n for cell in pending), done=total - left, cells=total, running=min(left, slots)
        )

        def report(cell: Cell) -> None:
            nonlocal left
            left -= 1
            progress.update(task, advance=cell.n, done=total - left, running=min(left, slots))

        yield report


def _gather(config: StudyConfig, cells: Mapping[str, Sequence[Cell]], results: dict[str, Path], folder: Path) -> Path:
    """Write the table of the cells that have results, and again where another process has finished some meanwhile."""
    path, written = folder / f"{config.name}.parquet", None
    while (done := [key for key, result in results.items() if result.exists()]) != written:
        rows = [
            {**row, "study": config.name, "arm": arm.label}
            for arm in config.arms
            for cell in cells[arm.label]
            if cell.key in done
            for row in pq.read_table(results[cell.key]).to_pylist()
            if config.shows(arm, row)
        ]
        metadata = {"study": json.dumps(asdict(config))}
        _write(path, pa.Table.from_pylist(rows, COLUMNS).replace_schema_metadata(metadata))
        written = done
    return path


def _write(path: Path, table: pa.Table, place: Callable[[Path, Path], None] = os.replace) -> None:
    """Write a table that is there whole or not at all."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with _writing(path):
            pq.write_table(table, temporary)
            place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _place_first(temporary: Path, path: Path) -> None:
    """Give a finished file its name, unless another process was first."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP):  # what folders without hard links say
            raise
        os.replace(temporary, path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say what to do when the body cannot write."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write {path}: {error.strerror or error}. Make room there or choose another --output; finished "
            "cells are kept, and the same command goes on from them",
        ) from error


def _git_revision() -> str | None:
    """The commit of the checkout that this file belongs to, None where it belongs to none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commands = (
        ["ls-files", "--error-unmatch", Path(__file__).name],
        ["describe", "--always", "--dirty", "--exclude=*"],
    )
    try:
        outputs = [subprocess.run([*git, *c], capture_output=True, check=True, text=True).stdout for c in commands]
    except (OSError, subprocess.CalledProcessError):
        return None
    return outputs[-1].strip()
