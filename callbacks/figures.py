"""Pictures of a run's kernels: each function takes numbers and returns a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ntk_lightning.plotting import COLORS, time_axis

__all__ = ["draw_diagnostics", "draw_dynamics"]


def draw_dynamics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw test error against training time for a network and the kernels K^t extracted from it.

    Figure 1C of arXiv 2206.10012: both axes are logarithmic; step 0 stands at the left end.

    Args:
        rows: One a step, with "step", "n", "optimal_error" (of K^t_fit), "network_error" and "initial_error" (of K^0
            trained for as many steps, or None), errors in [0, 1].

    Returns:
        The figure.
    """
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    time_axis(axes)
    axes.set_yscale("log")
    percent = FuncFormatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.set_major_formatter(percent)
    axes.yaxis.set_minor_formatter(percent)
    started = [row for row in rows if row["step"] and row["initial_error"] is not None]  # at step 0 it is 0 everywhere
    style: dict[str, Any] = {"markersize": 4, "linewidth": 1.8}
    axes.plot(steps, [row["network_error"] for row in rows], "o-", color=COLORS["network"], label="network", **style)
    initial = [row["step"] for row in started], [row["initial_error"] for row in started]
    axes.plot(*initial, "--", color=COLORS["initial"], label="$K^0$, trained by the same steps")
    fitted = [row["optimal_error"] for row in rows]
    axes.plot(steps, fitted, "s-", color=COLORS["empirical"], label="$K^t$, fitted to the whole set", **style)
    axes.set_ylabel("test error")
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
