"""What the figure of a study shows, computed once for picture, caption, table and reports."""

from __future__ import annotations

from dataclasses import dataclass

from ntk_lightning.studies.figure_departure import Departure, find_departures
from ntk_lightning.studies.figure_fits import Exponent, compare_lines, fit_lines
from ntk_lightning.studies.figure_lines import Line, study_lines
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import QUANTITIES, Quantity

__all__ = ["StudyFigure", "study_figure", "study_figures"]


@dataclass(frozen=True)
class StudyFigure:
    """What the figure of a study shows of one quantity.

    Args:
        study: The study.
        quantity: Test error or test loss.
        lines: Its lines that have values.
        exponents: Their power laws, compared; none where the axis is time or width.
        departures: Where networks depart from their initial kernels; none where the axis is not time.
        left_out: The fits without a finite value, by label of their line.
    """

    study: StudyResults
    quantity: Quantity
    lines: list[Line]
    exponents: list[Exponent]
    departures: list[Departure]
    left_out: dict[str, list[str]]

    @property
    def notes(self) -> dict[str, list[str]]:
        """What a reader must know of the lines: for each note the labels that it is true of."""
        labels: dict[str, list[str]] = {}
        for exponent in self.exponents:
            for note in exponent.notes:
                labels.setdefault(note, []).append(exponent.label)
        return labels


def study_figure(study: StudyResults, quantity: Quantity = "error") -> StudyFigure:
    """Compute what the figure of a study shows.

    Args:
        study: A study.
        quantity: Test error or test loss.

    Returns:
        Lines, fits and what else is drawn and said.
    """
    lines = study_lines(study, quantity)
    shown = [line for line in lines if line.values]
    return StudyFigure(
        study,
        quantity,
        shown,
        compare_lines(study, fit_lines(study, shown, quantity), quantity),
        find_departures(study, shown, quantity),
        {line.label: line.left_out for line in lines if line.left_out},
    )


def study_figures(study: StudyResults) -> list[StudyFigure]:
    """Compute the figures of a study by test error and by test loss.

    Args:
        study: A study.

    Returns:
        Those that have something to draw.
    """
    return [figure for figure in (study_figure(study, quantity) for quantity in QUANTITIES) if figure.lines]
