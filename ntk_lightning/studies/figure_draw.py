"""Figures of studies, from their tables of results: error against samples, time or width, with fitted exponents."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ntk_lightning.plotting import COLORS, clean_axes, time_axis
from ntk_lightning.studies.figure_captions import interval_text, number_text, plain_text, study_caption
from ntk_lightning.studies.figure_departure import timed_pairs
from ntk_lightning.studies.figure_fits import exponents, fit_series
from ntk_lightning.studies.figure_lines import Series, size_text, study_series
from ntk_lightning.studies.results import StudyResults, read_results
from ntk_lightning.studies.schema import DURING, MODELS, QUANTITIES, Quantity

__all__ = ["draw_study", "exponents_table", "figures"]

_OTHERS = "#4f6f52", "#8d6a9f", "#5b4a8a", "#b8860b", "#6b4226", "#d1495b"
MODEL_COLORS = dict(
    zip(MODELS, (*(COLORS[name] for name in ("network", "empirical", "infinite")), *_OTHERS), strict=True)
)
MARKERS = "osD^vPX*<>"
AXIS_LABELS = {
    "n": "training samples $n$",
    "m": "samples $m$ that the network was trained on",
    "width": "width",
}


def draw_study(results: StudyResults, quantity: Quantity = "error", *, caption: bool = True) -> Figure:
    """Draw the figure of a study: means over seeds, their spread, and power laws where the axis is n or m.

    Args:
        results: A study.
        quantity: Test error or test loss (mean squared error), the least over training or the last (``figure.value``).
        caption: Write the caption under the figure.

    Returns:
        The figure.

    Raises:
        ValueError: The study has no finite value of the quantity.
    """
    lines = study_series(results, quantity)
    if not lines:
        raise ValueError(f"The study {results.name} has no finite test {quantity} to draw.")
    text = textwrap.wrap(study_caption(results, quantity), 126) if caption else []
    entries = 2 * len(lines) if results.axis in ("n", "m") else len(lines) + 3
    figure = Figure(figsize=(7.2, 4.4 + 0.11 * entries + 0.14 * len(text)), dpi=150, layout="constrained")
    axes = figure.subplots()
    clean_axes(axes)
    axes.set_title("\n".join(textwrap.wrap(results.title, 74)), loc="left")
    axes.set_ylabel(f"test {quantity}")
    if results.axis == "t":
        _draw_time(axes, results, quantity)
    else:
        axes.set_xscale("log")
        axes.set_xlabel(AXIS_LABELS[results.axis])
        _draw_lines(axes, results, quantity)
        _ticks_at(axes, sorted({x for line in lines for x in line.places}))
    _log_values(axes, percent=quantity == "error")
    longest = max(len(plain_text(label)) for label in axes.get_legend_handles_labels()[1])
    columns = 2 if entries > 6 and longest < 45 else 1
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns)
    if text:
        figure.supxlabel("\n".join(text), x=0.015, ha="left", fontsize=7, color="0.3", linespacing=1.35)
    return figure


def exponents_table(results: StudyResults, quantity: Quantity = "error") -> Table:
    """Lay out the exponents of a study for a terminal.

    Args:
        results: A study whose axis is n or m.
        quantity: Test error or test loss.

    Returns:
        The table, with the notes of the fits under it.
    """
    table = Table(title=escape(f"{plain_text(results.title)}: exponents of the test {quantity}"))
    rows = exponents(results, quantity)
    for name in ("series", "beta", "95% interval", "R²", "sizes", "seeds", "published", "p (same as first)"):
        table.add_column(name, justify="left" if name == "series" else "right")
    for row in rows:
        table.add_row(*map(escape, exponent_cells(row)))
    notes = [f"{plain_text(row['series'])}: {note}" for row in rows for note in row["notes"]]
    table.caption, table.caption_justify = escape("\n".join(notes)) or None, "left"
    return table


def exponent_cells(row: dict[str, Any]) -> list[str]:
    """Write a row of :func:`exponents` as text.

    Returns:
        Series, exponent, interval, R², sizes, seeds, published exponent, p-value.
    """
    fitted, p_value = row["beta"] is not None, row["p_value"]
    sizes = [size_text(n) for n in row["sizes"]]
    return [
        plain_text(row["series"]),
        number_text(row["beta"], 3) if fitted else "none",
        interval_text(row["interval"]) if fitted else "",
        f"{row['r_squared']:.3f}" if fitted else "",
        f"{len(sizes)}, {sizes[0]} to {sizes[-1]}" if sizes else "",
        str(row["seeds"]),
        "" if row["published"] is None else f"{row['published']:g}",
        ""
        if p_value is None
        else ("< 0.001" if p_value < 1e-3 else f"{p_value:.3f}") + (" paired" if row["paired"] else ""),
    ]


def figures(results: str, output: str | None = None, format: Literal["png", "pdf", "svg"] = "png") -> list[Path]:
    """Draw the figures of all studies in a results folder, by test error and by test loss, and print their exponents.

    Args:
        results: Folder with the tables of studies.
        output: Folder for the pictures; by default the results folder.
        format: File format of the pictures.

    Returns:
        The pictures.
    """
    studies, folder = read_results(results), Path(output or results)
    folder.mkdir(parents=True, exist_ok=True)
    console, paths = Console(width=None if Console().is_terminal else 130), []
    for study in studies:
        for quantity in QUANTITIES:
            if not study_series(study, quantity):
                console.print(f"{study.name}: no finite test {quantity}, so no figure of it.", markup=False)
                continue
            if study.axis in ("n", "m"):
                console.print(exponents_table(study, quantity))
            for pair in timed_pairs(study, quantity):
                console.print(f"{plain_text(study.title)}, test {quantity}: {plain_text(str(pair))}", markup=False)
            path = folder / f"{study.name}{'_loss' * (quantity == 'loss')}.{format}"
            draw_study(study, quantity).savefig(path)
            paths.append(path)
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False)
    return paths


def _draw_lines(axes: Axes, results: StudyResults, quantity: Quantity) -> None:
    """Draw error against n, m or width, with its power law where it has one."""
    fits = {line.series.label: line.fit for line in fit_series(results, quantity)}
    lines = study_series(results, quantity)
    for line, color, marker in zip(lines, _colors(lines), cycle(MARKERS), strict=False):
        fit, label = fits.get(line.label), line.label
        if fit:
            label += f": β = {number_text(fit.beta, 3)} {interval_text(fit.beta_interval)}"
            ends = np.array([fit.n.min(), fit.n.max()])
            axes.plot(ends, fit.predict(ends), ":", color=color, linewidth=1.6)
        if line.places:
            mean, below, above = _spread([line.at(x) for x in line.places])
            axes.errorbar(
                line.places,
                mean,
                (mean - below, above - mean),
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.1 if fit else 1.6,
                linestyle="none" if fit else "-",
                capsize=2.5,
                label=label,
            )
        else:
            _horizontal(axes, line, color)


def _draw_time(axes: Axes, results: StudyResults, quantity: Quantity) -> None:
    """Draw networks, K^0 and the kernels K^t fitted to the whole set against t, and where network and K^0 part."""
    time_axis(axes)
    lines = study_series(results, quantity)
    for line, color in zip(lines, _colors(lines), strict=True):
        if not line.places:
            stop = ", last step" if results.value == "last" else ", optimal early stopping"
            _horizontal(axes, line, color, stop)
    pairs = timed_pairs(results, quantity)
    inks = _shades(MODEL_COLORS["network"], len(pairs)), _shades(MODEL_COLORS[DURING], len(pairs))
    for pair, *colors in zip(pairs, *inks, strict=True):
        kernel = pair.kernel
        fitted = " fitted" + (f" on n = {size_text(kernel.n)}" if kernel.n and len(pairs) == 1 else "")
        labels = pair.network.label, kernel.label + fitted
        for line, label, color, marker in zip((pair.network, kernel), labels, colors, "os", strict=True):
            if line.places:
                mean, below, above = _spread([line.at(x) for x in line.places])
                axes.plot(line.places, mean, marker + "-", color=color, markersize=4, linewidth=1.8, label=label)
                axes.fill_between(line.places, below, above, color=color, alpha=0.18, linewidth=0)
        if pair.initial.places:
            means = [pair.initial.at(t).mean() for t in pair.initial.places]
            label = f"{pair.initial.label}, trained by the same steps"
            axes.plot(pair.initial.places, means, "--", color=COLORS["initial"], linewidth=1.4, label=label)
    for step in sorted({pair.parting for pair in pairs if pair.parting is not None and pair.parting < pair.steps[-1]}):
        axes.axvline(step, color="0.35", linestyle="-.", linewidth=1.1)
        at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
        axes.annotate(f"they part after t = {step}", (step, 0.98), rotation=90, ha="right", va="top", fontsize=8, **at)


def _horizontal(axes: Axes, line: Series, color: str, suffix: str = "") -> None:
    """Draw a model without a place on the axis as a line across, with a band."""
    mean, below, above = _spread([line.at(None)])
    axes.axhline(mean[0], color=color, linestyle="--", linewidth=1.4, label=line.label + suffix)
    axes.axhspan(below[0], above[0], color=color, alpha=0.15, linewidth=0)


def _spread(values: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], ...]:
    """Mean over seeds with the ends of its bar: the standard error, the range of two seeds, nothing for one."""
    mean = np.array([v.mean() for v in values])
    error = np.array([v.std(ddof=1) / len(v) ** 0.5 if len(v) > 2 else np.ptp(v) / 2 for v in values])
    return mean, mean - error, mean + error


def _colors(lines: Sequence[Series]) -> list[str]:
    """Give each model its color, and lines of the same model shades of it."""
    shades = {
        model: iter(_shades(color, sum(line.model == model for line in lines))) for model, color in MODEL_COLORS.items()
    }
    return [next(shades[line.model]) for line in lines]


def _shades(color: str, count: int) -> list[str]:
    """Spread a color from dark to light."""
    amounts = [0.0] if count == 1 else np.linspace(-0.45, 0.5, count).tolist()
    mixed = (np.array(to_rgb(color)) * (1 - abs(a)) + max(a, 0) for a in amounts)
    return [to_hex(tuple(rgb)) for rgb in mixed]


def _ticks_at(axes: Axes, places: Sequence[int]) -> None:
    """Put ticks at the places of a logarithmic axis, as many as have room."""
    if not places:
        return
    room, ticks = math.log(places[-1] / places[0]) / 10, [places[0]]
    for x in places[1:]:
        if math.log(x / ticks[-1]) >= room:
            ticks.append(x)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_values(axes: Axes, *, percent: bool) -> None:
    """Make the vertical axis logarithmic, with as many labels as have room."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1, 1.5, *range(2, 10)) if high < 5 * low else (1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.4g}%" if percent else f"{v:.4g}"))
