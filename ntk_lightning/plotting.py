"""Colours and axes that all pictures share."""

from __future__ import annotations

from matplotlib.axes import Axes

__all__ = ["COLORS", "clean_axes", "time_axis"]

COLORS = {"network": "#1b6ca8", "empirical": "#d1495b", "initial": "#8d6a9f", "infinite": "#2e8b57"}


def clean_axes(axes: Axes) -> None:
    """Draw a faint grid and no frame above and at the right."""
    axes.grid(which="major", color="0.88", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def time_axis(axes: Axes) -> None:
    """Make the horizontal axis training time in batches, logarithmic from step 1 on, with step 0 at its left end."""
    clean_axes(axes)
    axes.set_xscale("symlog", linthresh=1, linscale=0.3)
    axes.set_xlabel("training step $t$ (batches)")
