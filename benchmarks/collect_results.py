"""Turn a results folder of studies into the one parquet of errors that docs/results.md is drawn from.

python benchmarks/collect_results.py runs/studies/two-cores

Of each curve every evaluation of the first 20 epochs stays, of the rest 40 and the best one. Where the data lie is left
out of the configurations. A plan that ``study --plan`` wrote there is kept beside the time that its cells took.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from machine import machine

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies import read_results
from ntk_lightning.studies.files import read_cell
from ntk_lightning.studies.schema import COLUMNS

OUTPUT = Path(__file__).parent / "results" / "two_cores.parquet"
FIRST_EPOCHS = 20  # the fixed budget of the page
_REST = 40
_CURVES = ("curve_steps", "curve_errors", "curve_losses")


def collect(folder: Path, output: Path) -> list[str]:
    """Write the rows of every study in a folder into one table, with the configurations and plans in its metadata.

    Args:
        folder: Of the results.
        output: The table.

    Returns:
        The names of the studies.
    """
    studies = read_results(folder)
    rows = [thin({**row, "study": study.name, "config": None}) for study in studies for row in study.rows]
    plans = {file.stem: with_time(file, folder) for file in sorted((folder / "plans").glob("*.json"))}
    metadata = {
        "studies": json.dumps([without_paths(asdict(study.config)) for study in studies]),
        "plans": json.dumps(plans),
        "machine": json.dumps(machine()),
    }
    pq.write_table(pa.Table.from_pylist(rows, COLUMNS).replace_schema_metadata(metadata), output, compression="zstd")
    return [study.name for study in studies]


def thin(row: dict[str, Any]) -> dict[str, Any]:
    """Drop most of the later evaluations of a curve; its best and its last stay."""
    steps, errors = row["curve_steps"], row["curve_errors"]
    optimizer = OptimizerConfig(batch_size=row["batch_size"], full_batch=row["full_batch"])
    first = sum(step <= FIRST_EPOCHS * optimizer.steps_per_epoch(row["n"]) for step in steps)
    if len(steps) <= first + _REST:
        return row
    spread = np.geomspace(max(first, 1), len(steps) - 1, _REST).round().astype(int).tolist()
    losses = [loss if math.isfinite(loss) else math.inf for loss in row["curve_losses"]]
    best = errors.index(min(errors)), losses.index(min(losses))
    kept = sorted({*range(first), *spread, *best, len(steps) - 1})
    return {**row, **{name: [row[name][i] for i in kept] for name in _CURVES}}


def with_time(plan: Path, folder: Path) -> dict[str, Any]:
    """Read a plan, and add the seconds that its cells took once all of them have finished."""
    planned: dict[str, Any] = json.loads(plan.read_text())
    cells = [read_cell(folder / "cells" / f"{key}.parquet") for key in planned.pop("cells")]
    if all(cells):
        planned["took"] = sum(max(row["seconds"] for row in rows) for rows in cells if rows)
    return planned


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out where the data lie."""
    arguments = {k: value for k, value in config["data"].get("init_args", {}).items() if k != "path"}
    return {**config, "data": {**config["data"], "init_args": arguments}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="that the studies wrote to")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    print(f"{given.output}: {', '.join(collect(given.folder, given.output))}")
