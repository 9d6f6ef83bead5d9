"""Result tables of studies, read back: one parquet file a study, one row a fitted model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from ntk_lightning.studies.config import StudyConfig
from ntk_lightning.studies.config_yaml import parse_config
from ntk_lightning.studies.schema import COLUMNS, LATER, Axis, Value

__all__ = ["StudyResults", "read_results", "read_study"]


@dataclass(frozen=True)
class StudyResults:
    """The results of one study.

    Args:
        config: The study, with what its figure shows.
        rows: One a fitted model, with the table's columns; errors in [0, 1].
    """

    config: StudyConfig
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The name, as in the file's."""
        return self.config.name

    @property
    def title(self) -> str:
        """The heading of its figures."""
        return self.config.title or self.name

    @property
    def axis(self) -> Axis:
        """The column on the figure's horizontal axis."""
        return self.config.figure.x

    @property
    def value(self) -> Value:
        """What is drawn of an error curve: its least value, "optimal", or its last."""
        return self.config.figure.value


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
        raw = json.loads((table.schema.metadata or {})[b"study"])
    except (OSError, pa.ArrowException, KeyError, json.JSONDecodeError):
        raise ValueError(
            f"{path} is not the table of a study (parquet with the study's configuration in its metadata): keep other "
            "files out of the results folder."
        ) from None
    missing = [name for name in COLUMNS.names if name not in table.column_names and name not in LATER]
    problem = f"it lacks the columns {missing}" if missing else "" if table.num_rows else "it has no rows"
    try:
        config = parse_config(raw)
    except ValueError as error:
        problem = f"its configuration is wrong ({' '.join(str(error).split())})"
    if problem:
        raise ValueError(f"The table {path} cannot be drawn, {problem}: run the study again.")
    return StudyResults(config, [{**dict.fromkeys(LATER), **row} for row in table.to_pylist()])


def read_results(folder: str | Path) -> list[StudyResults]:
    """Read the tables of all studies in a folder; one that cannot be read is left out, with a message.

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
