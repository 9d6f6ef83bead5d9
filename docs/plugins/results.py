"""The results page's tables and pictures, made of nothing but ``benchmarks/results/two_cores.parquet``."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import claims
import pyarrow.parquet as pq
from matplotlib import rc_context

from ntk_lightning.studies.config_yaml import parse_config
from ntk_lightning.studies.figure import study_figure
from ntk_lightning.studies.figure_draw import draw_figure
from ntk_lightning.studies.figure_lines import study_lines
from ntk_lightning.studies.figure_table import HEADER, exponent_cells
from ntk_lightning.studies.figure_text import plain_text, size_text
from ntk_lightning.studies.results import StudyResults

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "two_cores.parquet"
FIRST_EPOCHS = 20  # the fixed budget
NOT_RUN = "`benchmarks/results/two_cores.parquet` is not there yet: the studies have not run."


@dataclass(frozen=True)
class Collected:
    """What the parquet holds.

    Args:
        studies: By name.
        plans: What ``--plan`` had said, by name of the study.
        machine: Where they ran.
    """

    studies: dict[str, StudyResults]
    plans: dict[str, dict[str, Any]]
    machine: dict[str, Any]


@cache
def collected(path: Path = TABLE) -> Collected:
    """Read the studies; none where there is no such file.

    Returns:
        Studies, plans and machine.
    """
    if not path.is_file():
        return Collected({}, {}, {})
    table = pq.read_table(path)
    metadata = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
    rows = table.to_pylist()
    configs = [parse_config(raw) for raw in metadata["studies"]]
    studies = {
        config.name: StudyResults(config, [row for row in rows if row["study"] == config.name]) for config in configs
    }
    return Collected(studies, metadata["plans"], metadata["machine"])


def tables(path: Path = TABLE) -> dict[str, str]:
    """Write the parts of the page in Markdown.

    Returns:
        The parts by the names that the page asks for.
    """
    found = collected(path)
    return {
        "claims": _claims(found),
        "runs": _runs(found) if found.studies else NOT_RUN,
        "figures": "\n\n".join(_section(study) for study in found.studies.values()) or NOT_RUN,
    }


def pictures(path: Path = TABLE) -> dict[str, str]:
    """Draw the figures of the page.

    Returns:
        SVG by name of the study.
    """
    drawn = {}
    for name, study in collected(path).studies.items():
        figure = study_figure(study)
        if figure.lines:
            buffer = io.StringIO()
            with rc_context({"svg.hashsalt": "ntk_lightning"}):
                draw_figure(figure, caption=False).savefig(buffer, format="svg", metadata={"Date": None})
            drawn[name] = buffer.getvalue()
    return drawn


def _claims(found: Collected) -> str:
    """Each claim, what would refute it, and the verdicts at sufficient and at fixed epochs."""
    sufficient, fixed = claims.judge(found.studies), claims.judge(found.studies, FIRST_EPOCHS)
    header = ["figure", "claim", "refuted by", "effect", "verdict", f"effect, {FIRST_EPOCHS} epochs", "verdict"]
    rows = [
        [claim.figure, claim.text, claim.refuted, *_judged(evidence, verdict), *_judged(early, early_verdict)]
        for (claim, evidence, verdict), (_, early, early_verdict) in zip(sufficient, fixed, strict=True)
    ]
    return _table(header, rows)


def _judged(evidence: claims.Evidence | None, verdict: str) -> tuple[str, str]:
    return "" if evidence is None else evidence.text(), verdict


def _runs(found: Collected) -> str:
    """Cells and time of each study beside what ``--plan`` had said."""
    rows = []
    for name, study in found.studies.items():
        seconds = {row["cell"]: row["seconds"] or 0.0 for row in study.rows}
        plan = found.plans.get(name)
        rates = sorted({row["lr"] for row in study.rows})
        critical = [row["critical_lr"] for row in study.rows if row["critical_lr"]]
        rows.append(
            [
                f"`{name}`",
                str(len(seconds)),
                str(len({row["seed"] for row in study.rows})),
                ", ".join(f"{rate:g}" for rate in rates),
                f"{min(critical):.3g}" if critical else "",
                _clock(sum(seconds.values())),
                _clock(plan["seconds"]) if plan else "",
                f"{plan['seconds'] / plan['took']:.2f}" if plan and plan.get("took") else "",
            ]
        )
    machine = ", ".join(str(found.machine[key]) for key in ("cpu", "cores", "torch") if key in found.machine)
    header = ["study", "cells", "seeds", "rates", "least critical rate", "its cells took", "planned", "planned / taken"]
    told = f"Processor, cores and PyTorch: {machine}. A cell counts in every study that shows it."
    return f"{_table(header, rows)}\n\n{told}"


def _section(study: StudyResults) -> str:
    """Picture, errors and exponents of a study."""
    figure = study_figure(study)
    lines = [line for line in study_lines(study, "error") if line.values]
    if not lines:
        return f"## {study.title}\n\nNo fit has a finite error."
    axis = sorted({x for line in lines for x in line.xs if x is not None})
    parts = [f"## {study.title}"]
    if len(axis) <= 12:
        rows = []
        for line in lines:
            values = {x: line.at(x) for x in axis}
            rows.append([line.label, *(f"{100 * v.mean():.1f}%" if len(v) else "" for v in values.values())])
        parts.append(_table([f"test error at {study.axis} =", *(size_text(x) for x in axis)], rows))
    parts.append(f"![{plain_text(study.title)}](results/{study.name}.svg)")
    if figure.exponents:
        cells = [exponent_cells(exponent) for exponent in figure.exponents]
        kept = [i for i in range(len(HEADER)) if any(row[i] for row in cells)]
        parts.append(_table([HEADER[i] for i in kept], [[row[i] for i in kept] for row in cells]))
    notes = [f"- {plain_text('; '.join(labels))}: {note}" for note, labels in figure.notes.items()]
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
