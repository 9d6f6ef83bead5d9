"""What the figure of a study shows, computed once for picture, caption, table and reports."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan

from ntk_lightning.studies.figure_departure import Departure, find_departures
from ntk_lightning.studies.figure_fits import Exponent, compare_lines, fit_lines
from ntk_lightning.studies.figure_lines import Line, study_lines
from ntk_lightning.studies.results import StudyResults
from ntk_lightning.studies.schema import QUANTITIES, Quantity

__all__ = ["StudyFigure", "study_figure", "study_figures"]

_FEW_IMAGES = 25  # wrong ones, whose number is known to a fifth
CURVES: dict[Quantity, str] = {"error": "curve_errors", "loss": "curve_losses"}


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
        notes: What a reader must know of the lines: for each note the labels that it is true of.
    """

    study: StudyResults
    quantity: Quantity
    lines: list[Line]
    exponents: list[Exponent]
    departures: list[Departure]
    left_out: dict[str, list[str]]
    notes: dict[str, list[str]]

    @property
    def test_images(self) -> int | None:
        """Test images behind each error, where the study's configuration tells their number."""
        count = (self.study.config.data.get("init_args") or {}).get("n_test")
        return count if self.quantity == "error" and isinstance(count, int) else None


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
    exponents = compare_lines(study, fit_lines(study, shown, quantity), quantity)
    departures = find_departures(study, shown, quantity)
    left_out = {line.label: line.left_out for line in lines if line.left_out}
    notes: dict[str, list[str]] = {}
    for label, note in [(exponent.label, note) for exponent in exponents for note in exponent.notes]:
        notes.setdefault(note, []).append(label)
    for exponent in exponents:
        test, floor_test = exponent.comparison, exponent.floor_comparison
        if test and floor_test and test.verdict != floor_test.verdict:
            note = (
                f"Its exponent and that of {exponents[0].label} are {test.verdict} as power laws (p = "
                f"{test.corrected_p_value:.2g}), and {floor_test.verdict} with a floor fitted too (p = "
                f"{floor_test.corrected_p_value:.2g})."
            )
            notes.setdefault(note, []).append(exponent.label)
    figure = StudyFigure(study, quantity, shown, exponents, departures, left_out, notes)
    for line in shown:
        late = _late_optimum(line, quantity) if study.value == "optimal" else None
        for about in filter(None, (late, _few_images(line, figure.test_images))):
            notes.setdefault(about, []).append(line.label)
    return figure


def _few_images(line: Line, count: int | None) -> str | None:
    """A note where a line's least error is that of a handful of test images."""
    errors = [(float(line.at(x).mean()), x) for x in [*line.xs, None] if line.at(x).size]
    error, x = min(errors, key=lambda pair: pair[0])
    if count is None or error * count >= _FEW_IMAGES:
        return None
    wrong, at = error * count, "" if x is None else f" at {x}"
    return (
        f"Its least error{at} is {wrong:.3g} of {count} test images, with a binomial error of "
        f"{100 / max(wrong, 1) ** 0.5:.0f}% of itself."
    )


def _late_optimum(line: Line, quantity: Quantity) -> str | None:
    """A note where most fits of a line were best at the end of their training, which may have been too short."""
    late = 0
    for row in line.rows:
        curve = [inf if value is None or isnan(value) else value for value in row[CURVES[quantity]]]
        if curve and row["curve_steps"][curve.index(min(curve))] > 0.9 * row["curve_steps"][-1]:
            late += 1
    if 2 * late <= len(line.rows):
        return None
    return (
        f"The least test {quantity} of {late} of {len(line.rows)} fits lies in the last tenth of training: more epochs "
        "may lower it."
    )


def study_figures(study: StudyResults) -> list[StudyFigure]:
    """Compute the figures of a study by test error and by test loss.

    Args:
        study: A study.

    Returns:
        Those that have something to draw.
    """
    return [figure for figure in (study_figure(study, quantity) for quantity in QUANTITIES) if figure.lines]
