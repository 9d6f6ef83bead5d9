"""Pictures of a run's kernels: each function takes numbers and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ntk_lightning.callbacks.nested_fits import FIT_NAMES
from ntk_lightning.plotting import COLORS, time_axis

__all__ = ["draw_diagnostics", "draw_dynamics", "draw_layers"]

_LAYERS = 8  # that are drawn in colors of their own


def draw_dynamics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw test error (loss of real targets) against training time for a network and the kernels K^t extracted from it.

    Figure 1C of arXiv 2206.10012: both axes are logarithmic; step 0 stands at the left end.

    Args:
        rows: One a step, with "step", "n", "optimal_error" (of K^t_fit), "network_error" and "initial_error" (of K^0
            trained for as many steps, or None) and "fit", errors in [0, 1]; with "optimal_loss" and so on for real
            targets.

    Returns:
        The figure.
    """
    steps = [row["step"] for row in rows]
    quantity = "loss" if rows[-1].get("optimal_error") is None else "error"
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    time_axis(axes)
    axes.set_yscale("log")
    if quantity == "error":
        percent = FuncFormatter(lambda value, _: f"{100 * value:g}%")
        axes.yaxis.set_major_formatter(percent)
        axes.yaxis.set_minor_formatter(percent)
    initial_name = f"initial_{quantity}"
    started = [row for row in rows if row["step"] and row[initial_name] is not None]  # at step 0 it is 0 everywhere
    style: dict[str, Any] = {"markersize": 4, "linewidth": 1.8}
    axes.plot(
        steps, [row[f"network_{quantity}"] for row in rows], "o-", color=COLORS["network"], label="network", **style
    )
    if started:
        initial = [row["step"] for row in started], [row[initial_name] for row in started]
        axes.plot(*initial, "--", color=COLORS["initial"], label="$K^0$, trained by the same steps")
    fitted = [row[f"optimal_{quantity}"] for row in rows]
    label = f"$K^t$, fitted by {FIT_NAMES[rows[-1]['fit']]}"
    axes.plot(steps, fitted, "s-", color=COLORS["empirical"], label=label, **style)
    axes.set_ylabel(f"test {quantity}")
    axes.set_title(f"Empirical NTK during training, n = {rows[-1]['n']}", loc="left")
    axes.legend(frameon=False)
    return figure


def draw_diagnostics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw how the empirical NTK moves and turns during training.

    Args:
        rows: One a step, with the columns of :class:`~ntk_lightning.callbacks.KernelDiagnostics`.

    Returns:
        The figure: alignments, distance and velocity, effective rank, eigenvalues.
    """
    figure = Figure(figsize=(9.6, 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    eigenvalues = {name: f"$\\lambda_{{{name.split('_')[1]}}}$" for name in rows[0] if name.startswith("eigenvalue_")}
    contents = (
        (
            "alignment",
            {
                "alignment_with_initial": "CKA with $K^0$",
                "target_alignment": "with $yy'$",
                "target_share": "share of $y$",
            },
        ),
        ("movement", {"distance_to_initial": "distance to $K^0$", "velocity": "velocity per step"}),
        ("effective rank", {"effective_rank": "effective rank"}),
        ("leading eigenvalues", eigenvalues),
    )
    for axes, (title, columns) in zip(panels.flat, contents, strict=True):
        time_axis(axes)
        axes.set_title(title, loc="left")
        for (column, label), color in zip(columns.items(), cycle(COLORS.values())):
            points = [(row["step"], row[column]) for row in rows if row[column] is not None]
            axes.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=3.5, linewidth=1.6)
        if title == "leading eigenvalues":
            axes.set_yscale("log")
        axes.legend(frameon=False)
    return figure


def draw_layers(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw the kernels of a network's layers during training: shares of the trace, and alignments with the targets.

    Args:
        rows: One for each step and layer, with "step", "layer", "trace_share" and "target_alignment".

    Returns:
        The figure; the layers with the largest last shares have colors of their own, others are grey.
    """
    last = rows[-1]["step"]
    shares = {row["layer"]: row["trace_share"] for row in rows if row["step"] == last}
    leading = sorted(shares, key=lambda layer: -shares[layer])[:_LAYERS]
    figure = Figure(figsize=(9.6, 4.2), dpi=150, layout="constrained")
    for axes, (column, title) in zip(
        figure.subplots(1, 2),
        (("trace_share", "share of the trace of $K^t$"), ("target_alignment", "alignment with $yy'$")),
        strict=True,
    ):
        time_axis(axes)
        axes.set_title(title, loc="left")
        for layer in sorted(shares, key=lambda layer: layer in leading):  # grey lines lie below
            points = [(row["step"], row[column]) for row in rows if row["layer"] == layer]
            style: dict[str, Any] = {"color": "0.8", "linewidth": 1.0}
            if layer in leading:
                style = {"color": f"C{leading.index(layer)}", "linewidth": 1.6, "label": layer or "the module itself"}
            axes.plot(*zip(*points, strict=True), "o-", markersize=3, **style)
        axes.set_ylim(bottom=0)
    figure.axes[0].legend(frameon=False, fontsize="small")
    return figure
