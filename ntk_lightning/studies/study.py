"""Grids of cells, run here or on Ray, cell by cell, so that a killed study goes on where it was."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
from rich.console import Console

from ntk_lightning.atomic_files import writing
from ntk_lightning.studies.build import check_study, set_up_data
from ntk_lightning.studies.cell import cpu_threads, quiet_lightning
from ntk_lightning.studies.cell_config import KEY_LENGTH, Cell
from ntk_lightning.studies.config import StudyConfig
from ntk_lightning.studies.config_yaml import read_config
from ntk_lightning.studies.critical import print_critical_rates, tell_above_critical
from ntk_lightning.studies.executors import Resources, free_cpus, in_process, on_ray
from ntk_lightning.studies.files import ADVICE, Rows, read_cell, read_digest, write_cell, write_table
from ntk_lightning.studies.first_epochs import after_first_epochs
from ntk_lightning.studies.plan import Plan, plan_cells, print_plan, write_plan
from ntk_lightning.studies.progress import study_progress
from ntk_lightning.studies.schema import COLUMNS
from ntk_lightning.studies.shared_gram import cells_of_pools
from ntk_lightning.studies.wandb_runs import log_rows

__all__ = ["StudyError", "plan_study", "run_study", "study"]


class StudyError(RuntimeError):
    """Some cells of a study failed; the others are in the table."""


def study(
    config: Sequence[str],
    scale: str | None = None,
    output: str | None = None,
    wandb: str | None = None,
    resources: Resources | None = None,
    critical: Sequence[int] | None = None,
    plan: bool = False,
) -> Path | None:
    """Run a study: a grid of training runs and kernel fits, resumed cell by cell when run again.

    Args:
        config: Configurations; later ones change earlier ones.
        scale: One of the configuration's scales, such as "small".
        output: Folder of results; by default runs/studies/<scale>, or <name> where there is no scale. Studies in one
            folder share their cells and Grams.
        wandb: W&B project to log the study's rows to; by default none.
        resources: Where its cells run, and what each may use; by default one after another, with all CPUs.
        plan: Only print what its cells will cost, measured on small ones.
        critical: Only print the critical learning rates of its kernels on these seeds, and run no cell.

    Returns:
        The table of results; None where no cell was to run.

    Raises:
        StudyError: Cells failed.
    """
    chosen = read_config(config, scale)
    resources = resources or Resources()
    if critical:
        print_critical_rates(chosen, critical, resources.memory)
        return None
    folder = Path(output or f"runs/studies/{chosen.scale or chosen.name}")
    if plan:
        plan_study(chosen, folder, resources)
        return None
    path = run_study(chosen, folder, wandb_project=wandb, **vars(resources))
    text = f"Results: {path}. Draw them: python -m ntk_lightning figures {folder}"
    Console().print(text, soft_wrap=True, markup=False, emoji=False)
    return path


def plan_study(config: StudyConfig, folder: Path, resources: Resources | None = None) -> Plan:
    """Estimate and print what the cells of a study will cost that have no result yet; measuring takes seconds.

    What it finds is also kept in ``plans/<name>.json``, beside which the time of the cells can be held.

    Args:
        config: The study.
        folder: Where results lie.
        resources: What a cell may use. Ray is not asked: the time is that of one cell after another on this machine.

    Returns:
        The plan.

    Raises:
        ValueError: The configuration is wrong, or a cell would not fit in memory.
    """
    resources = resources or Resources()
    arms = config.cells()
    check_study(config, arms)
    cells = {cell.key: cell for group in arms.values() for cell in group}
    rows = {key: read_cell(folder / "cells" / f"{key}.parquet") for key in cells}
    finished = [(cells[key], found) for key, found in rows.items() if found is not None]
    pending = [cell for key, cell in cells.items() if rows[key] is None]
    loaded = set_up_data([*cells.values()])
    assert loaded is not None, "not finished"
    threads = resources.cpus or free_cpus()
    with quiet_lightning(), cpu_threads(threads):
        pooled = cells_of_pools(pending, loaded, folder.resolve() / "grams")
        plan = plan_cells(pending, finished, loaded, pooled, folder.resolve(), resources.memory)
    write_plan(folder / "plans" / f"{config.name}.json", plan)
    print_plan(config.name, plan, len(finished), threads)
    return plan


def run_study(
    config: StudyConfig,
    folder: Path,
    *,
    ray: str | None = Resources.ray,
    cpus: int | None = Resources.cpus,
    gpus: float = Resources.gpus,
    memory: str = Resources.memory,
    wandb_project: str | None = None,
) -> Path:
    """Run those cells of a study that have no result yet, and gather the table.

    A finished cell is one file ``cells/<key>.parquet``, named by what its configuration changes of the defaults and
    moved there when it is complete: what is there is never computed again, in whichever study it occurs, nor written
    again where two processes have computed it at the same time. Only a file that cannot be read is replaced. A cell
    notes a digest of the data that it was computed from, and data that have changed since are refused. Infinite-width
    Grams lie in ``grams``, one of the whole pool for all seeds where that costs less; trained networks in ``networks``.
    The table ``<name>.parquet`` has one row for each fitted model (the columns of
    :mod:`~ntk_lightning.studies.schema`), with the study's configuration in its metadata; it is written when the study
    ends, however it ends, once it has a row.

    Args:
        config: The study.
        folder: Where results lie.
        ray: Run the cells on Ray: "local", or the address of a cluster, whose nodes must see ``folder``.
        cpus: CPU threads of a cell, see :class:`~ntk_lightning.studies.executors.Resources`.
        gpus: GPUs of a cell on Ray.
        memory: Budget of an extraction of an empirical NTK.
        wandb_project: W&B project to log the study's rows to, those that are not there yet.

    Returns:
        The table of results.

    Raises:
        OSError: A result cannot be written; the finished cells are kept.
        StudyError: Cells failed; their tracebacks are printed, and the others are in the table.
        ValueError: The configuration is wrong, or finished cells are of other data, or of an earlier version.
    """
    resources = Resources(ray, cpus, gpus, memory)
    arms = config.cells()
    check_study(config, arms)
    cells = {cell.key: cell for group in arms.values() for cell in group}
    files = {key: folder / "cells" / f"{key}.parquet" for key in cells}
    _refuse_earlier_cells(folder)
    finished = {key: rows for key, file in files.items() if (rows := read_cell(file)) is not None}
    earlier = [(cells[key], _seconds(rows)) for key, rows in finished.items()]
    pending = [cell for key, cell in cells.items() if key not in finished]
    failures, pooled = dict[str, str](), frozenset[str]()
    origin = {"git_revision": _git_revision(), "version": version("ntk_lightning")}
    try:
        data = set_up_data([*cells.values()], finished=not pending)
        digest = None if data is None else data.digest
        _check_data(digest, [files[key] for key in finished], config)
        with writing(folder / "cells", ADVICE):
            (folder / "cells").mkdir(parents=True, exist_ok=True)
        if config.below_critical and pending:
            tell_above_critical(config, memory)
        if data is not None:
            pooled = cells_of_pools(pending, data, folder.resolve() / "grams")
        where = folder.resolve(), resources, data, pooled
        made = nullcontext(in_process(*where)) if ray is None else on_ray(ray, *where)
        shown = partial(study_progress, config.name, pending, earlier, len(cells))
        with made as executor, shown(executor.slots) as progress:

            def left() -> Iterator[Cell]:
                for cell in pending:
                    if (rows := read_cell(files[cell.key])) is None:
                        yield cell
                    else:  # another process has run it meanwhile
                        progress.report(cell, _seconds(rows))

            for cell, outcome in executor.run(left()):
                if outcome.failure is None:
                    rows = [{**row, **origin} for row in outcome.rows]
                    write_cell(files[cell.key], pa.Table.from_pylist(rows, COLUMNS), digest)
                    progress.report(cell, _seconds(rows))
                else:
                    failures[cell.key] = outcome.failure
                    progress.report(cell, None)
    finally:
        _print_failures(failures, cells)
        path = folder / f"{config.name}.parquet"
        gathered = _gather(config, arms, files, path)
    if wandb_project:
        log_rows(gathered, wandb_project, folder)
    if failures:
        others = f"the others are in {path}" if gathered else "there is no table"
        raise StudyError(
            f"{len(failures)} of {len(cells)} cells of {config.name} failed, as printed above; {others}. Run the same "
            "command again to retry the failed ones."
        )
    if not gathered:
        raise StudyError(
            f"None of the {len(cells)} cells of {config.name} has a row that its figure shows; a network that diverges "
            "has no kernels, for instance. Change show of its arms, or lower the learning rate."
        )
    return path


def _refuse_earlier_cells(folder: Path) -> None:
    """Raise a ValueError where a folder has cells whose keys an earlier version made."""
    if any(len(path.stem) < KEY_LENGTH for path in (folder / "cells").glob("[0-9a-f]*.parquet")):
        raise ValueError(
            f"The cells in {folder} are of an earlier version and cannot be gone on with: choose another --output for "
            "this study (figures and report still read the tables there)."
        )


def _check_data(digest: str | None, files: Sequence[Path], config: StudyConfig) -> None:
    """Raise a ValueError where finished cells were computed from data that are not those of now."""
    stale = [file for file in files if digest is not None and read_digest(file) not in (None, digest)]
    if stale:
        raise ValueError(
            f"The data of study {config.name} have changed: {len(stale)} finished cells in {stale[0].parent} were "
            f"computed from other samples than {config.data.get('class_path')} loads now. Choose another --output for "
            "the changed data, or undo the change."
        )


def _seconds(rows: Rows) -> float:
    """The seconds that a cell took, from its rows."""
    return max((row["seconds"] or 0.0 for row in rows), default=0.0)


def _print_failures(failures: Mapping[str, str], cells: Mapping[str, Cell]) -> None:
    console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
    for key, text in failures.items():
        console.print(f"\nFailed: {cells[key]} (cell {key})", style="bold red")
        console.print(text)


def _gather(config: StudyConfig, arms: Mapping[str, Sequence[Cell]], files: Mapping[str, Path], path: Path) -> Rows:
    """Write the table of the cells that have results, and again where another process has finished some meanwhile."""
    finished: dict[str, Rows] = {}
    rows: Rows = []
    while new := {key: read for key, file in files.items() if key not in finished and (read := read_cell(file))}:
        finished |= new
        rows = [
            {**after_first_epochs(row, config.figure.first_epochs), "study": config.name, "arm": arm.label}
            for arm in config.arms
            for cell in arms[arm.label]
            for row in finished.get(cell.key, [])
            if config.shows(arm, row)
        ]
        if rows:
            metadata = {"study": json.dumps(asdict(config))}
            write_table(path, pa.Table.from_pylist(rows, COLUMNS).replace_schema_metadata(metadata))
    return rows


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
