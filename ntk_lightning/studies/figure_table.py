"""The table of a figure's exponents, in a terminal and as cells of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from ntk_lightning.studies.figure import StudyFigure, study_figure
from ntk_lightning.studies.figure_fits import Exponent
from ntk_lightning.studies.figure_text import interval_text, number_text, plain_text, size_text
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["HEADER", "comparison_table", "exponent_cells", "exponents_table", "figure_table", "filled_columns"]

HEADER = (
    *("line", "β", "95% interval", "R²", "sizes", "seeds", "published", "p (same as first)"),
    *("first - this", "p, all claims", "β with a floor", "floor", "p with floors", "predicted β", "prediction off by"),
)
_FIRST = 8  # columns that stand in every table; the others are a table of their own in a terminal


def exponents_table(results: StudyResults, quantity: Quantity = "error") -> Table:
    """Lay out the exponents of a study for a terminal.

    Args:
        results: A study whose axis is n or m.
        quantity: Test error or test loss.

    Returns:
        The table, with the notes of the fits under it.
    """
    return figure_table(study_figure(results, quantity))


def figure_table(figure: StudyFigure) -> Table:
    """Lay out the exponents of a figure for a terminal (see :func:`exponents_table`).

    Args:
        figure: A figure whose axis is n or m.

    Returns:
        The table.
    """
    table = Table(title=escape(f"{plain_text(figure.study.title)}: exponents of the test {figure.quantity}"))
    for name in HEADER[:_FIRST]:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for exponent in figure.exponents:
        table.add_row(*map(escape, exponent_cells(exponent)[:_FIRST]))
    notes = [f"{plain_text('; '.join(labels))}: {note}" for note, labels in figure.notes.items()]
    table.caption, table.caption_justify = escape("\n".join(notes)) or None, "left"
    return table


def comparison_table(figure: StudyFigure) -> Table | None:
    """Lay out the differences of a figure's exponents, its laws with a floor and its predictions for a terminal.

    Args:
        figure: A figure whose axis is n or m.

    Returns:
        The table; None where it has none of these.
    """
    header, rows = filled_columns([exponent_cells(exponent) for exponent in figure.exponents])
    if len(header) == _FIRST:
        return None
    title = f"{plain_text(figure.study.title)}: exponents of the test {figure.quantity}, compared"
    table = Table(title=escape(title))
    for name in (header[0], *header[_FIRST:]):
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for row in rows:
        table.add_row(*map(escape, (row[0], *row[_FIRST:])))
    return table


def filled_columns(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns of the table that are empty in every row.

    Args:
        rows: Of :func:`exponent_cells`.

    Returns:
        The names of the columns that stay, and the rows.
    """
    kept = [column for column in range(len(HEADER)) if column < _FIRST or any(row[column] for row in rows)]
    return [HEADER[column] for column in kept], [[row[column] for column in kept] for row in rows]


def exponent_cells(exponent: Exponent) -> list[str]:
    """Write an exponent as the cells of a table row.

    Returns:
        One text for each column of ``HEADER``.
    """
    fitted, predicted = exponent.fitted, exponent.predicted
    fit, floor = fitted.fit, fitted.with_floor
    sizes = [size_text(int(n)) for n in fit.n] if fit else []
    test, floor_test = exponent.comparison, exponent.floor_comparison
    return [
        plain_text(exponent.label),
        number_text(fit.beta, 3) if fit else "none",
        interval_text(fit.beta_interval) if fit else "",
        f"{fit.r_squared:.3f}" if fit else "",
        f"{len(sizes)}, {sizes[0]} to {sizes[-1]}" if sizes else "",
        str(len(fitted.seeds)),
        "" if exponent.published is None else f"{exponent.published:g}",
        _p_text(test.difference.p_value) + " paired" * test.paired if test else "",
        f"{number_text(test.difference.difference, 3)} {interval_text(test.difference.interval)}" if test else "",
        _p_text(test.corrected_p_value) if test else "",
        f"{number_text(floor.beta, 3)} {interval_text(floor.beta_interval)}" if floor else "",
        number_text(floor.offset, 4) if floor else "",
        _p_text(floor_test.corrected_p_value) if floor_test else "",
        number_text(predicted.exponent, 3) if predicted and not math.isnan(predicted.exponent) else "",
        f"{100 * predicted.deviation:+.0f}% at {predicted.at}" if predicted and predicted.at is not None else "",
    ]


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 1e-3 else f"{p_value:.3f}"
