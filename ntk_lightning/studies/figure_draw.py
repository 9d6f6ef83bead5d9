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

from ntk_lightning.plotting import COLORS, clean_axes, time_axis
from ntk_lightning.studies.figure import StudyFigure, study_figure, study_figures
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_lines import Line
from ntk_lightning.studies.figure_table import comparison_table, figure_table
from ntk_lightning.studies.figure_text import interval_text, number_text, plain_text, size_text
from ntk_lightning.studies.results import StudyResults, read_results
from ntk_lightning.studies.schema import DURING, MODELS, QUANTITIES, Quantity

__all__ = ["draw_figure", "draw_study", "figures"]

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
    figure = study_figure(results, quantity)
    if not figure.lines:
        raise ValueError(f"The study {results.name} has no finite test {quantity} to draw.")
    return draw_figure(figure, caption=caption)


def draw_figure(figure: StudyFigure, *, caption: bool = True) -> Figure:
    """Draw a figure that has lines (see :func:`draw_study`).

    Args:
        figure: What it shows.
        caption: Write the caption under it.

    Returns:
        The picture.
    """
    study, lines = figure.study, figure.lines
    text = textwrap.wrap(figure_caption(figure), 126) if caption else []
    entries = 2 * len(lines) if study.axis in ("n", "m") else len(lines) + 3
    picture = Figure(figsize=(7.2, 4.4 + 0.11 * entries + 0.14 * len(text)), dpi=150, layout="constrained")
    axes = picture.subplots()
    clean_axes(axes)
    axes.set_title("\n".join(textwrap.wrap(study.title, 74)), loc="left")
    axes.set_ylabel(f"test {figure.quantity}")
    if study.axis == "t":
        _draw_time(axes, figure)
    else:
        axes.set_xscale("log")
        axes.set_xlabel(AXIS_LABELS[study.axis])
        _draw_lines(axes, figure)
        _ticks_at(axes, sorted({x for line in lines for x in line.xs}))
    _log_values(axes, percent=figure.quantity == "error")
    longest = max(len(plain_text(label)) for label in axes.get_legend_handles_labels()[1])
    columns = 2 if entries > 6 and longest < 45 else 1
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns)
    if text:
        picture.supxlabel("\n".join(text), x=0.015, ha="left", fontsize=7, color="0.3", linespacing=1.35)
    return picture


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
        drawn = {figure.quantity: figure for figure in study_figures(study)}
        for quantity in QUANTITIES:
            if quantity not in drawn:
                console.print(f"{study.name}: no finite test {quantity}, so no figure of it.", markup=False)
                continue
            figure = drawn[quantity]
            if figure.exponents:
                for table in filter(None, (figure_table(figure), comparison_table(figure))):
                    console.print(table)
            for departure in figure.departures:
                text = f"{plain_text(study.title)}, test {quantity}: {plain_text(str(departure))}"
                console.print(text, markup=False)
            path = folder / f"{study.name}{'_loss' * (quantity == 'loss')}.{format}"
            draw_figure(figure).savefig(path)
            paths.append(path)
    for path in paths:
        console.print(str(path), soft_wrap=True, markup=False)
    return paths


def _draw_lines(axes: Axes, figure: StudyFigure) -> None:
    """Draw error against n, m or width, with its power law where it has one."""
    exponents = {exponent.label: exponent for exponent in figure.exponents}
    predicted = "predicted from the spectrum"  # named once in the legend
    for line, color, marker in zip(figure.lines, _colors(figure.lines), cycle(MARKERS), strict=False):
        exponent, label = exponents.get(line.label), line.label
        fit, prediction = (exponent.fitted.fit, exponent.predicted) if exponent else (None, None)
        if fit:
            label += f": β = {number_text(fit.beta, 3)} {interval_text(fit.beta_interval)}"
            ends = np.array([fit.n.min(), fit.n.max()])
            axes.plot(ends, fit.predict(ends), ":", color=color, linewidth=1.6)
        if line.xs:
            mean, below, above = _spread([line.at(x) for x in line.xs], figure.test_images)
            axes.errorbar(
                line.xs,
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
            _horizontal(axes, line, color, figure.test_images)
        if prediction is not None and line.xs:
            shown = prediction.sizes >= line.xs[0]
            style: dict[str, Any] = {"color": color, "linewidth": 0.7, "zorder": 1}
            axes.plot(prediction.sizes[shown], prediction.values[shown], "-", label=predicted, **style)
            predicted = "_"  # a label that no legend shows


def _draw_time(axes: Axes, figure: StudyFigure) -> None:
    """Draw networks, K^0 and the kernels K^t fitted to the whole set against t, and where network and K^0 part."""
    time_axis(axes)
    for line, color in zip(figure.lines, _colors(figure.lines), strict=True):
        if not line.xs:
            stop = ", last step" if figure.study.value == "last" else ", optimal early stopping"
            _horizontal(axes, line, color, figure.test_images, stop)
    departures = figure.departures
    inks = _shades(MODEL_COLORS["network"], len(departures)), _shades(MODEL_COLORS[DURING], len(departures))
    for departure, *colors in zip(departures, *inks, strict=True):
        kernel = departure.kernel
        fitted = " fitted" + (f" on n = {size_text(kernel.n)}" if kernel.n and len(departures) == 1 else "")
        labels = departure.network.label, kernel.label + fitted
        for line, label, color, marker in zip((departure.network, kernel), labels, colors, "os", strict=True):
            if line.xs:
                mean, below, above = _spread([line.at(x) for x in line.xs], figure.test_images)
                axes.plot(line.xs, mean, marker + "-", color=color, markersize=4, linewidth=1.8, label=label)
                axes.fill_between(line.xs, below, above, color=color, alpha=0.18, linewidth=0)
        initial = departure.initial
        if initial.xs:
            means = [initial.at(t).mean() for t in initial.xs]
            label = f"{initial.label}, trained by the same steps"
            axes.plot(initial.xs, means, "--", color=COLORS["initial"], linewidth=1.4, label=label)
    marked = {d.step for d in departures if d.step is not None and d.step < d.steps[-1]}  # those that do part
    for step in sorted(marked):
        axes.axvline(step, color="0.35", linestyle="-.", linewidth=1.1)
        at: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
        axes.annotate(f"they part after t = {step}", (step, 0.98), rotation=90, ha="right", va="top", fontsize=8, **at)


def _horizontal(axes: Axes, line: Line, color: str, images: int | None, suffix: str = "") -> None:
    """Draw a model that has no x as a line across, with a band."""
    mean, below, above = _spread([line.at(None)], images)
    axes.axhline(mean[0], color=color, linestyle="--", linewidth=1.4, label=line.label + suffix)
    axes.axhspan(below[0], above[0], color=color, alpha=0.15, linewidth=0)


def _spread(values: Sequence[NDArray[np.float64]], images: int | None) -> tuple[NDArray[np.float64], ...]:
    """Mean over seeds with the ends of its bar: the standard error, the range of two seeds, nothing for one."""
    mean = np.array([v.mean() for v in values])
    error = np.array([v.std(ddof=1) / len(v) ** 0.5 if len(v) > 2 else np.ptp(v) / 2 for v in values])
    if images is not None:  # errors on so many test images, which all seeds share
        error = np.hypot(error, np.sqrt(mean * (1 - mean) / images))
    return mean, mean - error, mean + error


def _colors(lines: Sequence[Line]) -> list[str]:
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


def _ticks_at(axes: Axes, xs: Sequence[int]) -> None:
    """Put ticks at the given values of a logarithmic axis, as many as have room."""
    if not xs:
        return
    room, ticks = math.log(xs[-1] / xs[0]) / 10, [xs[0]]
    for x in xs[1:]:
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
