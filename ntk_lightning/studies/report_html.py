"""A self-contained HTML page of studies: pictures, exponents, hyperparameters, in one file that needs no network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from io import BytesIO
from string import Template
from typing import Any, NamedTuple

from ntk_lightning.studies.figure import StudyFigure
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_draw import draw_figure
from ntk_lightning.studies.figure_table import exponent_cells, filled_columns
from ntk_lightning.studies.figure_text import html_text, plain_text
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import QUANTITIES

__all__ = ["TITLE", "Section", "html_page", "picture", "provenance"]

TITLE = "Scaling laws of networks and their kernels"
SETTINGS = ("arm", "model", "lr", "momentum", "batch size", "epochs", "width", "n", "m", "seeds", "fits")
PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 78rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 3rem; border-top: 1px solid #ddd; padding-top: 1rem; }
nav ul { columns: 18rem; padding-left: 1.2rem; }
a { color: #1b6ca8; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
img { width: 100%; height: auto; }
figcaption, .note { color: #555; font-size: 0.875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; margin: 0.5rem 0 1rem; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.75rem 0.25rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
pre { overflow-x: auto; background: #f6f6f6; padding: 0.75rem; font-size: 0.8rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$provenance</p>
<nav aria-label="Figures"><ul>
$links
</ul></nav>
<main>
$sections
</main>
</body>
</html>
""")


class Section(NamedTuple):
    """A study with those of its figures that have something to draw."""

    study: StudyResults
    figures: list[StudyFigure]


def html_page(sections: Sequence[Section]) -> str:
    """Write the page of some studies.

    Args:
        sections: One a study.

    Returns:
        HTML, with pictures inside and nothing to fetch.
    """
    studies = [section.study for section in sections]
    links = (f'<li><a href="#{_anchor(study)}">{html_text(study.title)}</a></li>' for study in studies)
    return PAGE.substitute(
        title=escape(TITLE),
        provenance=escape(provenance(studies)),
        links="\n".join(links),
        sections="\n".join(_section(*section) for section in sections),
    )


def picture(figure: StudyFigure) -> bytes:
    """Draw a figure without its caption.

    Args:
        figure: A figure of a study.

    Returns:
        The picture, as PNG.
    """
    file = BytesIO()
    draw_figure(figure, caption=False).savefig(file, format="png")
    return file.getvalue()


def provenance(studies: Iterable[StudyResults]) -> str:
    """Say with which versions the studies were run, and how long they took.

    Returns:
        One sentence.
    """
    rows = [row for study in studies for row in study.rows]
    versions = _values(
        f"{row['version']} ({row['git_revision']})" if row["git_revision"] else row["version"] for row in rows
    )
    seconds = sum({row["cell"]: row["seconds"] or 0.0 for row in rows}.values())
    work = f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{seconds / 60:.1f} minutes"
    return f"Run with ntk_lightning {versions}, in {work} of work altogether."


def settings(study: StudyResults) -> list[list[str]]:
    """Tabulate the hyperparameters that a study used.

    Returns:
        One row an arm and model, with the columns arm, model, lr, momentum, batch size, epochs, width, n, m,
        seeds, fits.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in study.rows:
        groups.setdefault((row["arm"], row["model"]), []).append(row)
    return [
        [
            *(plain_text(arm), model),
            *(_values(row[column] for row in rows) for column in ("lr", "momentum")),
            _values("all" if row["full_batch"] else row["batch_size"] for row in rows),
            _values(row["epochs"] for row in rows),
            _values("infinite" if row["width"] is None else row["width"] for row in rows),
            *(_values(row[column] for row in rows if row[column] is not None) for column in ("n", "m", "seed")),
            str(len(rows)),
        ]
        for (arm, model), rows in groups.items()
    ]


def _section(study: StudyResults, figures: Sequence[StudyFigure]) -> str:
    parts = [f'<section id="{_anchor(study)}">', f"<h2>{html_text(study.title)}</h2>", '<div class="pictures">']
    for figure in figures:
        names = plain_text(", ".join(line.label for line in figure.lines))
        alt = escape(f"{plain_text(study.title)}: test {figure.quantity} against {study.axis}, of {names}", quote=True)
        data = base64.b64encode(picture(figure)).decode()
        caption = html_text(figure_caption(figure))
        image = f'<img src="data:image/png;base64,{data}" alt="{alt}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    parts.append("</div>")
    for quantity in QUANTITIES:
        if quantity not in {figure.quantity for figure in figures}:
            parts.append(f'<p class="note">There is no finite test {quantity}, so no picture of it.</p>')
    for figure in figures:
        header, rows = filled_columns([exponent_cells(exponent) for exponent in figure.exponents])
        cells = [[html_text(e.label), *map(escape, row[1:])] for e, row in zip(figure.exponents, rows, strict=True)]
        if cells:
            parts.append(_table(f"Exponents of the test {figure.quantity}", header, cells))
    hyperparameters = [list(map(escape, row)) for row in settings(study)]
    parts.append(_table("Hyperparameters of these runs", SETTINGS, hyperparameters))
    config = escape(json.dumps(asdict(study.config), indent=2, ensure_ascii=False))
    parts.append(f"<details><summary>Configuration of the study</summary><pre>{config}</pre></details></section>")
    return "\n".join(parts)


def _table(caption: str, header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table whose cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table>{table}</table></div>'


def _anchor(study: StudyResults) -> str:
    return re.sub(r"[^\w-]+", "-", study.name)


def _values(values: Iterable[Any]) -> str:
    """The different values, in their order."""
    found = dict.fromkeys(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return ", ".join(found)
