"""Result tables of studies, read back: one parquet file a study, one row a model fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from ntk_lightning.studies.schema import COLUMNS, Value

__all__ = ["StudyResults", "read_results", "read_study"]

AXES = ("n", "m", "t", "width")


@dataclass(frozen=True)
class StudyResults:
    """The results of one study.

    Args:
        config: The study's configuration: name, title, scale and what its figure shows.
        rows: One a model fit, with the table's columns; errors in [0, 1].
    """

    config: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name, as in the file's."""
        return str(self.config["name"])

    @property
    def title(self) -> str:
        """The heading of its figures."""
        return str(self.config.get("title") or self.name)

    @property
    def axis(self) -> str:
        """The column on the figure's horizontal axis: n, m, t or width."""
        return str(self.config["figure"]["x"])

    @property
    def value(self) -> Value:
        """What is drawn of an error curve: its least value, "optimal", or its last."""
        return "last" if self.config["figure"].get("value") == "last" else "optimal"


def read_study(path: str | Path) -> StudyResults:
    """Read the table of one study.

    Args:
        path: A parquet file that a study has written.

    Returns:
        Its configuration and rows.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not the table of a study, or has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}: run the study first.")
    try:
        table = pq.read_table(path)
        config = json.loads((table.schema.metadata or {})[b"study"])
        problem = None if config["figure"]["x"] in AXES and config["name"] else f"its figure needs x in {AXES}"
    except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(
            f"{path} is not the table of a study (parquet with the study's configuration in its metadata): keep other "
            "files out of the results folder."
        ) from None
    missing = [column for column in COLUMNS.names if column not in table.column_names]
    if missing:
        problem = f"it lacks the columns {missing}"
    elif not table.num_rows:
        problem = "it has no rows"
    if problem:
        raise ValueError(f"The table {path} cannot be drawn, {problem}: run the study again.")
    return StudyResults(config, table.to_pylist())


def read_results(folder: str | Path) -> list[StudyResults]:
    """Read the tables of all studies in a folder; one that cannot be read is left out and told of.

    Args:
        folder: Where the studies wrote.

    Returns:
        The studies, by name of their files.

    Raises:
        FileNotFoundError: There is no such folder, or no table in it.
        ValueError: No table can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no results folder {folder}: give the folder that a study wrote to.")
    paths = sorted(folder.glob("*.parquet"))
    if not paths:
        raise FileNotFoundError(f"There are no tables (*.parquet) in {folder}: run a study first, with this folder.")
    studies, problems = [], []
    for path in paths:
        try:
            studies.append(read_study(path))
        except ValueError as error:
            problems.append(str(error))
    if not studies:
        raise ValueError(" ".join(problems))
    for problem in problems:
        Console(stderr=True).print(f"Left out: {problem}", soft_wrap=True, markup=False, emoji=False)
    return studies
