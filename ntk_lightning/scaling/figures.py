"""Figures of comparisons. Each function takes numbers and gives a matplotlib figure; it keeps and shows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

__all__ = ["draw_dynamics"]

COLORS = {"network": "#1b6ca8", "empirical": "#d1495b", "initial": "#8d6a9f", "infinite": "#2e8b57"}


def draw_dynamics(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw test error against training time for a network and the kernels K^t extracted from it.

    Figure 1C of arXiv 2206.10012: both axes are logarithmic; step 0 stands at the left end.

    Args:
        rows: One a step, with "step", "n", "optimal_error" (of K^t_fit) and "network_error", errors in [0, 1].

    Returns:
        The figure.
    """
    steps = [row["step"] for row in rows]
    figure, axes = _figure()
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_yscale("log")
    kernel_errors = [row["optimal_error"] for row in rows]
    style: dict[str, Any] = {"markersize": 4, "linewidth": 1.8}
    axes.plot(steps, [row["network_error"] for row in rows], "o-", color=COLORS["network"], label="network", **style)
    axes.plot(steps, kernel_errors, "s-", color=COLORS["empirical"], label="$K^t$, fitted to the whole set", **style)
    axes.axhline(kernel_errors[0], color=COLORS["initial"], linestyle="--", linewidth=1.4, label="$K^0$, fitted")
    axes.set_xlabel("training step $t$ (batches)")
    axes.set_ylabel("test error")
    axes.set_title(f"Empirical NTK during training, n = {rows[-1]['n']}", loc="left")
    axes.legend(frameon=False)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.grid(which="major", color="0.88", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    percent = FuncFormatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.set_major_formatter(percent)
    axes.yaxis.set_minor_formatter(percent)
    return figure, axes
