"""Corrected p-values, laws with a floor, bars with the test set's error, and what is said where a number is weak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import study_tables as tables
from matplotlib import pyplot as plt

from ntk_lightning.scaling import compare_exponents, fit_power_law
from ntk_lightning.scaling.multiple_tests import holm
from ntk_lightning.studies.figure import StudyFigure, study_figure
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_draw import draw_figure
from ntk_lightning.studies.figure_table import HEADER, exponent_cells, exponents_table, filled_columns
from ntk_lightning.studies.report_html import Section, html_page
from ntk_lightning.studies.results import read_study


def figure_of(folder: Path, curves: dict[str, np.ndarray], **columns: list[int]) -> StudyFigure:
    """A study of errors (seeds, sizes) by model."""
    rows = [
        tables.row(model, float(error), n=n, seed=seed, **{name: each[seed] for name, each in columns.items()})
        for model, table in curves.items()
        for seed, errors in enumerate(table)
        for n, error in zip(tables.SIZES, errors, strict=True)
    ]
    return study_figure(read_study(tables.write(folder, "made_up", "n", rows)))


def laws(alpha: float, beta: float, floor: float = 0.0, *, noise: float = 0.02, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sizes = np.array(tables.SIZES)
    return (alpha * sizes**-beta + floor) * np.exp(noise * rng.standard_normal((8, len(sizes))))


def test_holms_correction_is_that_of_the_textbook() -> None:
    # Holm (1979): p sorted times 4, 3, 2, 1, never less than the one before, and at most 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.8, None, 0.7]) == [1.0, None, 1.0]
    assert holm([None]) == [None]


def test_holms_correction_keeps_the_level_over_all_claims() -> None:
    rng = np.random.default_rng(0)
    wrong = sum(min(p for p in holm(rng.uniform(size=5).tolist()) if p is not None) < 0.05 for _ in range(4000))
    assert wrong / 4000 == pytest.approx(1 - (1 - 0.05 / 5) ** 5, abs=0.012)  # all true: Bonferroni's first step


def test_differences_have_intervals_and_p_values_corrected_for_their_number(tmp_path: Path) -> None:
    curves = {"network": laws(2, 0.3), "empirical": laws(1.5, 0.27, seed=1), "infinite": laws(1.5, 0.295, seed=2)}
    figure = figure_of(tmp_path, curves)
    first, *others = figure.exponents
    assert first.comparison is None
    fits = [fit_power_law(tables.SIZES, table) for table in curves.values()]
    expected = [compare_exponents(fits[0], fit, paired=True) for fit in fits[1:]]
    small, large = sorted(difference.p_value for difference in expected)
    corrected = {small: 2 * small, large: max(2 * small, large)}
    for exponent, difference in zip(others, expected, strict=True):
        assert exponent.comparison is not None
        assert exponent.comparison.difference == difference
        assert exponent.comparison.corrected_p_value == pytest.approx(min(1, corrected[difference.p_value]))
    caption = figure_caption(figure)
    assert "Exponent of network less that of: empirical 0.03" in caption
    assert "p-values corrected for 2 claims (Holm, 1979)." in caption
    row = dict(zip(HEADER, exponent_cells(others[0]), strict=True))
    assert row["first - this"].startswith("0.03")
    assert row["p, all claims"] == "< 0.001"


@pytest.mark.parametrize("floor", [0.0, 0.03])
def test_a_floor_that_explains_the_difference_changes_the_verdict(floor: float, tmp_path: Path) -> None:
    figure = figure_of(
        tmp_path, {"network": laws(2, 0.35), "infinite": laws(2, 0.35 - 0.1 * (not floor), floor, seed=1)}
    )
    network, infinite = figure.exponents
    assert infinite.comparison is not None
    assert infinite.floor_comparison is not None
    assert infinite.comparison.verdict == "different"
    assert infinite.floor_comparison.verdict == ("not told apart" if floor else "different")
    law = infinite.fitted.with_floor
    assert law is not None
    assert law.offset == pytest.approx(floor, abs=0.006)
    assert law.beta == pytest.approx(0.35 - 0.1 * (not floor), abs=0.06)
    for shown in (figure_caption(figure), str(exponents_table(figure.study).caption)):
        assert ("with a floor fitted too" in shown) == bool(floor)
    assert network.floor_comparison is None


def test_three_sizes_leave_nothing_for_a_floor(tmp_path: Path) -> None:
    rows = [tables.row("network", tables.law(2, 0.3, n), n=n) for n in tables.SIZES[:3]]
    (exponent,) = study_figure(read_study(tables.write(tmp_path, "three", "n", rows))).exponents
    assert exponent.fitted.with_floor is None


def test_bars_hold_the_error_of_seeds_and_of_the_test_set(tmp_path: Path) -> None:
    figure = figure_of(tmp_path, {"network": laws(2, 0.3, noise=0.2)})
    assert figure.test_images == 2000
    for quantity, images in ("error", 2000), ("loss", None):
        drawn = draw_figure(study_figure(figure.study, quantity), caption=False)
        (bars,) = drawn.axes[0].containers
        segments = bars.lines[2][0].get_segments()
        for segment, values in zip(segments, laws(2, 0.3, noise=0.2).T * (1 if images else 2), strict=True):
            mean, variance = values.mean(), values.var(ddof=1) / len(values)
            variance += mean * (1 - mean) / images if images else 0
            assert segment[:, 1] == pytest.approx([mean - variance**0.5, mean + variance**0.5])
        plt.close(drawn)
    assert "the standard error of the mean, with the binomial error of 2000 test images" in figure_caption(figure)
    assert "binomial" not in figure_caption(study_figure(figure.study, "loss"))


def test_an_error_of_few_test_images_has_a_note(tmp_path: Path) -> None:
    few, many = laws(0.7, 0.5, noise=0.0)[:1], laws(2, 0.3, noise=0.0)[:1]
    figure = figure_of(tmp_path, {"network": few, "infinite": many})
    wrong = 0.7 * 16000**-0.5 * 2000
    note = f"Its least error at 16000 is {wrong:.3g} of 2000 test images, with a binomial error of 30% of itself."
    assert figure.notes[note] == ["network"]
    assert note in figure_caption(figure)
    assert note in str(exponents_table(figure.study).caption)


def test_a_bend_that_is_not_certain_has_a_note_too(tmp_path: Path) -> None:
    sizes = np.array(tables.SIZES)
    bent = 0.4 * np.exp(-0.5 * np.log(sizes / 500) + 0.04 * np.log(sizes / 500) ** 2)
    noisy = bent * np.exp(0.06 * np.random.default_rng(3).standard_normal((5, 6)))
    figure = figure_of(tmp_path, {"network": noisy})
    (exponent,) = figure.exponents
    fit = exponent.fitted.fit
    assert fit is not None
    assert 0.01 <= fit.curvature_p_value < 0.1
    (note,) = [note for note in figure.notes if "may bend" in note]
    x, y = np.log(sizes), np.log(noisy.mean(0))
    design = np.stack([np.ones(6), x, x * x], 1)
    _, b, c = np.linalg.lstsq(design, y, rcond=None)[0]
    assert f"{-(b + 2 * c * x[0]):.2f} at 500 and {-(b + 2 * c * x[-1]):.2f} at 16000" in note
    assert note in html_page([Section(figure.study, [figure])])


def test_a_late_optimum_is_named_on_the_page(tmp_path: Path) -> None:
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n, curve_errors=[0.5, 0.3, 0.2]) for n in tables.SIZES]
    study = read_study(tables.write(tmp_path, "late", "n", rows))
    figure = study_figure(study)
    note = "The least test error of 6 of 6 fits lies in the last tenth of training: more epochs may lower it."
    assert figure.notes[note] == ["network"]
    assert note in html_page([Section(study, [figure])])


def test_columns_without_a_value_are_left_out() -> None:
    rows = [["x"] * 8 + [""] * (len(HEADER) - 9) + ["last"], ["y"] * 8 + [""] * (len(HEADER) - 8)]
    header, kept = filled_columns(rows)
    assert header == [*HEADER[:8], HEADER[-1]]
    assert kept == [["x"] * 8 + ["last"], ["y"] * 8 + [""]]
