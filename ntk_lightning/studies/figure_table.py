"""The table of a figure's exponents, in a terminal and as cells of text."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ntk_lightning.studies.figure import StudyFigure, study_figure
from ntk_lightning.studies.figure_fits import Exponent
from ntk_lightning.studies.figure_text import interval_text, number_text, plain_text, size_text
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import Quantity

__all__ = ["HEADER", "exponent_cells", "exponents_table", "figure_table"]

HEADER = ("line", "β", "95% interval", "R²", "sizes", "seeds", "published", "p (same as first)")


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
    for name in HEADER:
        table.add_column(name, justify="left" if name == HEADER[0] else "right")
    for exponent in figure.exponents:
        table.add_row(*map(escape, exponent_cells(exponent)))
    notes = [f"{plain_text('; '.join(labels))}: {note}" for note, labels in figure.notes.items()]
    table.caption, table.caption_justify = escape("\n".join(notes)) or None, "left"
    return table


def exponent_cells(exponent: Exponent) -> list[str]:
    """Write an exponent as the cells of a table row.

    Returns:
        One text for each column of ``HEADER``.
    """
    fit, p_value = exponent.fitted.fit, exponent.p_value
    sizes = [size_text(int(n)) for n in fit.n] if fit else []
    return [
        plain_text(exponent.label),
        number_text(fit.beta, 3) if fit else "none",
        interval_text(fit.beta_interval) if fit else "",
        f"{fit.r_squared:.3f}" if fit else "",
        f"{len(sizes)}, {sizes[0]} to {sizes[-1]}" if sizes else "",
        str(len(exponent.fitted.seeds)),
        "" if exponent.published is None else f"{exponent.published:g}",
        ""
        if p_value is None
        else ("< 0.001" if p_value < 1e-3 else f"{p_value:.3f}") + (" paired" if exponent.paired else ""),
    ]
