"""A report of studies: in W&B beside the logged runs, or as a page and a JSON file where nobody is logged in."""

from __future__ import annotations

import json
import os
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import wandb
from PIL import Image
from rich.console import Console

from ntk_lightning.studies.figure import StudyFigure, study_figures
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_table import exponent_cells, filled_columns
from ntk_lightning.studies.figure_text import plain_text
from ntk_lightning.studies.report_html import TITLE, Section, html_page, picture, provenance
from ntk_lightning.studies.results import read_results
from ntk_lightning.studies.schema import QUANTITIES

__all__ = ["report"]

INSTALL = "The W&B report needs the extra `report`: pip install wandb-workspaces."


def report(results: str, project: str = "ntk_lightning", entity: str | None = None) -> Path:
    """Write a report of all studies in a results folder: a section a figure, with pictures, exponents, hyperparameters.

    The page ``report.html`` is always written and needs nothing else. Logged in to W&B and not offline, the same
    sections are saved as a W&B report of the project, with panels on each study's logged runs (the runs whose group is
    the study's name) and the pictures, which a run named "figures" holds. Otherwise the W&B report is written to
    ``report.json``.

    Args:
        results: Folder with the tables of studies.
        project: W&B project that the studies logged to.
        entity: W&B user or team of the project; by default the user's own.

    Returns:
        The page.

    Raises:
        ModuleNotFoundError: Logged in to W&B, but wandb-workspaces is not installed.
    """
    sections = [Section(study, study_figures(study)) for study in read_results(results)]
    console = Console()
    page = Path(results) / "report.html"
    page.write_text(html_page(sections), encoding="utf-8")
    console.print(f"Page: {page}", soft_wrap=True, markup=False)
    online = _logged_in()
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        if online:
            raise ModuleNotFoundError(INSTALL) from error
        console.print(INSTALL, soft_wrap=True, markup=False)
        return page
    if online:
        with wandb.init(project=project, entity=entity, name="figures", group="figures", job_type="report") as run:
            run.log(_pictures(sections))
            built = _build(wr, sections, run.project, run.entity, run.id)
        built.save()
        console.print(f"W&B report: {built.url}", soft_wrap=True, markup=False)
    else:
        built = _build(wr, sections, project, entity or "", None)
        spec = built._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)  # what save() would send
        path = Path(results) / "report.json"
        path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
        console.print(
            f"W&B report, kept here while W&B is offline or not logged in (wandb login; WANDB_MODE=online): {path}",
            soft_wrap=True,
            markup=False,
        )
    return page


def _logged_in() -> bool:
    """Tell whether W&B is online and has credentials, without asking for them."""
    return os.environ.get("WANDB_MODE", "online") == "online" and wandb.login(prompt=False)


def _pictures(sections: list[Section]) -> dict[str, wandb.Image]:
    figures = [figure for section in sections for figure in section.figures]
    return {_key(figure): wandb.Image(Image.open(BytesIO(picture(figure)))) for figure in figures}


def _key(figure: StudyFigure) -> str:
    """The name of a picture in W&B."""
    return f"{figure.study.name}/{figure.quantity}"


def _build(wr: ModuleType, sections: list[Section], project: str, entity: str, figures: str | None) -> Any:  # noqa: ANN401 - wandb_workspaces ships no types
    """Build the W&B report.

    Args:
        wr: wandb_workspaces.reports.v2.
        sections: The studies and their figures.
        project: W&B project.
        entity: Its owner; empty where the report is not saved.
        figures: The run that holds the pictures, if there is one.

    Returns:
        The report.
    """
    owner = {"project": project, "entity": entity}
    blocks = [wr.P(provenance([section.study for section in sections])), wr.TableOfContents()]
    for study, drawn in sections:
        blocks.append(wr.H1(plain_text(study.title)))
        blocks += [wr.MarkdownBlock(text) for figure in drawn for text in _markdown(figure)]
        if figures:
            pictures = wr.Runset(**owner, name="figures", filters=f'Metric("ID") == "{figures}"')
            shown = wr.MediaBrowser(media_keys=list(map(_key, drawn)), num_columns=2, layout=wr.Layout(w=24, h=12))
            blocks.append(wr.PanelGrid(runsets=[pictures], panels=[shown], hide_run_sets=True))
        runs = wr.Runset(**owner, name=study.title, filters=f'Metric("Group") == {json.dumps(study.name)}')
        panels: list[Any] = [
            wr.LinePlot(title=f"Test {quantity}", x="Step", y=[f"test/{quantity}"], log_x=True, log_y=True)
            for quantity in QUANTITIES
        ]
        summary = wr.SummaryMetric(f"test/{study.value}_error")
        panels.append(wr.ScatterPlot(title="Test error", x=wr.Config("n"), y=summary, log_x=True, log_y=True))
        blocks.append(wr.PanelGrid(runsets=[runs], panels=panels))
    return wr.Report(**owner, title=TITLE, description=f"{len(sections)} figures", blocks=blocks, width="fixed")


def _markdown(figure: StudyFigure) -> list[str]:
    """Caption and exponents of a figure in Markdown."""
    texts = [f"**Test {figure.quantity}.** {_escaped(figure_caption(figure))}"]
    header, rows = filled_columns([exponent_cells(exponent) for exponent in figure.exponents])
    if rows:
        lines = [header, ["---"] * len(header), *(list(map(_escaped, row)) for row in rows)]
        texts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return texts


def _escaped(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{sign}" if sign in "\\`*_|<>[]#" else sign for sign in plain_text(text))
