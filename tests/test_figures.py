"""Figures, captions and exponents say what made-up tables hold.

Longer than 300 lines, since every figure is drawn from the same made-up tables.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import study_tables as tables

from ntk_lightning.scaling import compare_exponents, fit_power_law
from ntk_lightning.studies.figure import study_figure
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_departure import Departure, departure_step
from ntk_lightning.studies.figure_draw import draw_study, figures
from ntk_lightning.studies.figure_fits import Exponent, fit_series
from ntk_lightning.studies.figure_lines import Line
from ntk_lightning.studies.figure_table import exponent_cells, exponents_table
from ntk_lightning.studies.figure_text import html_text, plain_text
from ntk_lightning.studies.results import StudyResults, read_results, read_study
from ntk_lightning.studies.schema import COLUMNS, Quantity


def study_lines(study: StudyResults) -> list[Line]:
    return study_figure(study).lines


def exponents(study: StudyResults, quantity: Quantity = "error") -> list[Exponent]:
    return study_figure(study, quantity).exponents


def departures(study: StudyResults, quantity: Quantity = "error") -> list[Departure]:
    return study_figure(study, quantity).departures


def study_caption(study: StudyResults, quantity: Quantity = "error") -> str:
    return figure_caption(study_figure(study, quantity))


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (tables.scaling, ["network", "empirical NTK", "infinite NTK"]),
        (
            tables.after_kernels,
            [
                *("network", "$K_n(n)$", "$K_{16k}(n)$", "$K^F_{1k}(n)$", "$K^F_{16k}(n)$"),
                *("$K^t$, t = 10", "$K^t$, t = 20 to 640"),
            ],
        ),
        (tables.fresh_samples, ["network", "$K^F_m(n)$, n = 1k", "$K^F_m(n)$, n = 4k"]),
        (tables.dynamics, ["network", "infinite NTK", "$K^t$"]),
        (tables.widths, ["network", "empirical NTK", "infinite NTK"]),
        (tables.orders, ["network, width 64", "network, width 128", "order 2", "order 3"]),
    ],
)
def test_every_kind_of_study_has_its_lines_and_a_figure(tmp_path: Path, make, labels: list[str]) -> None:  # noqa: ANN001
    study = read_study(make(tmp_path))
    assert [line.label for line in study_lines(study)] == labels
    axes = draw_study(study).axes[0]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert all(any(text.startswith(label) for text in shown) for label in labels)
    assert axes.get_yscale() == "log"


def test_exponents_are_those_of_the_made_up_laws(tmp_path: Path) -> None:
    rows = exponents(read_study(tables.scaling(tmp_path, seeds=6)))
    assert [row.fitted.fit.beta for row in rows] == pytest.approx([0.29, 0.19, 0.2], abs=0.02)
    assert [row.published for row in rows] == [0.291, 0.178, 0.195]
    assert rows[0].p_value is None
    assert rows[1].paired
    assert rows[1].p_value < 0.01
    assert [*rows[0].fitted.fit.n] == list(tables.SIZES)
    assert all(low < fit.beta < high for fit in [row.fitted.fit for row in rows] for low, high in [fit.beta_interval])
    losses = exponents(read_study(tmp_path / "figure_1a.parquet"), "loss")
    assert [row.published for row in losses] == [None] * 3


def test_published_exponents_are_found_by_label_and_never_said_to_share_hyperparameters(tmp_path: Path) -> None:
    study = read_study(tables.after_kernels(tmp_path))
    assert [row.published for row in exponents(study)][:3] == [0.291, 0.28, None]
    caption = study_caption(study)
    assert "not known to be the paper's" in caption
    assert "the range of 2 seeds" in caption
    assert "Exponents that the paper" not in study_caption(study, "loss")


def test_warnings_of_fits_are_in_the_caption_and_not_raised(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n) for n in (1000, 2000, 4000)]
    study = read_study(tables.write(tmp_path, "short", "n", rows))
    assert "A power law fitted to 3 sizes is weak evidence" in study_caption(study)
    assert not recwarn.list


def test_one_size_or_errors_of_zero_have_no_fit_but_a_note(tmp_path: Path) -> None:
    rows = [tables.row("network", 0.2, n=1000)] + [tables.row("infinite", 0.0, n=n) for n in tables.SIZES]
    study = read_study(tables.write(tmp_path, "bare", "n", rows))
    assert [row.fitted.fit for row in exponents(study)] == [None, None]
    assert "needs 2 or more sizes" in study_caption(study)
    assert "0 of 6 sizes have a positive error" in study_caption(study)
    draw_study(study).draw_without_rendering()


def test_diverged_fits_are_left_out_of_losses_and_named(tmp_path: Path) -> None:
    study = read_study(tables.orders(tmp_path))
    by_label = {row.label: [*row.fitted.fit.n] for row in exponents(study, "loss")}
    assert by_label["order 3"] == [n for n in tables.SIZES if n != 2000]
    assert by_label["order 2"] == list(tables.SIZES)
    assert "not finite (1): order 3 at n = 2000, seed 0" in study_caption(study, "loss")
    assert "last test loss is not finite (1; their best error is shown): order 3" in study_caption(study)


@pytest.mark.parametrize(
    ("lacking", "seeds", "sizes"),
    [
        ([(2, 16000)], (0, 1, 2), 5),
        ([(2, 4000), (2, 8000), (2, 16000)], (0, 1), 6),
        ([(0, 500), (1, 500), (2, 500)], (0, 1, 2), 5),
    ],
)
def test_a_fit_uses_a_full_table_of_seeds_and_sizes(tmp_path: Path, lacking, seeds, sizes: int) -> None:  # noqa: ANN001
    rows = [
        tables.row("network", tables.law(1.9, 0.3, n, seed), n=n, seed=seed)
        for n in tables.SIZES
        for seed in range(3)
        if (seed, n) not in lacking
    ]
    fitted = fit_series(read_study(tables.write(tmp_path, "gaps", "n", rows)))[0]
    assert (fitted.seeds, len(fitted.fit.n)) == (seeds, sizes)
    assert ("leaves out" in " ".join(fitted.notes)) == (len(fitted.series.xs) == 6)


def test_hyperparameters_that_an_arm_varies_make_lines(tmp_path: Path) -> None:
    rows = [
        tables.row(model, 0.3, arm=arm, lr=lr, momentum=momentum)
        for model, arm, momentum in (("network", "network, momentum 0.9", 0.9), ("empirical", "empirical NTK", 0.0))
        for lr in (1.0, 0.25)
    ]
    labels = [line.label for line in study_lines(read_study(tables.write(tmp_path, "settings", "n", rows)))]
    assert labels == [
        *("network, momentum 0.9, lr 0.25", "network, momentum 0.9, lr 1"),
        *("empirical NTK, lr 0.25", "empirical NTK, lr 1"),
    ]


def test_the_final_step_of_an_after_kernel_is_not_a_time_on_the_axis(tmp_path: Path) -> None:
    rows = [tables.row("after-kernel", 0.2, m=1000, t=t, seed=seed) for seed, t in enumerate((2000, 1900))]
    during = [tables.row("kernel during training", 0.3, t=t, network_error=0.3) for t in (0, 10)]  # no errors of K^0
    study = read_study(tables.write(tmp_path, "after", "t", [*rows, *during]))
    assert [line.xs for line in study_lines(study)] == [[], [0, 10]]
    [pair] = departures(study)
    assert (pair.network.xs, pair.initial.xs, pair.steps) == ([0, 10], [], [])
    assert "never measured at the same step" in str(pair)
    rows += [tables.row("after-kernel", 0.1, n=2000, m=2000, t=4000, seed=seed) for seed in (0, 1)]
    [line] = study_lines(read_study(tables.write(tmp_path, "after", "n", rows)))
    assert (line.label, line.xs, line.at(1000).size) == ("$K_n(n)$", [1000, 2000], 2)


def test_two_fits_at_one_place_are_an_error(tmp_path: Path) -> None:
    rows = [tables.row("network", 0.2), tables.row("network", 0.3)]
    with pytest.raises(ValueError, match="network has two fits at n = 1000 with seed 0"):
        study_lines(read_study(tables.write(tmp_path, "twice", "n", rows)))


def test_lines_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rows = [tables.row("after-kernel", 0.2, m=1000, arm=arm) for arm in ("lr 1", "lr 3")]
    rows += [tables.row(model, 0.3, arm="default") for model in ("network", "infinite")]
    labels = [line.label for line in study_lines(read_study(tables.write(tmp_path, "same", "n", rows)))]
    assert labels == ["default (network)", "default (infinite)", "$K_n(n)$ (lr 1)", "$K_n(n)$ (lr 3)"]


@pytest.mark.parametrize(
    ("network", "kernel", "expected"),
    [
        ([0.5, 0.3, 0.2, 0.1], [0.3, 0.29, 0.2, 0.15], 10),  # behind at first, together, ahead
        ([0.5, 0.3, 0.2, 0.1], [0.5, 0.3, 0.2, 0.1], 100),
        ([0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.3, 0.3], 100),  # never ahead
        ([0.2, 0.2, 0.2, 0.2], [0.3, 0.3, 0.3, 0.3], None),  # ahead at once
        ([0.5, 0.1, 0.1, 0.3], [0.5, 0.2, 0.3, 0.3], 0),  # what comes back does not matter
        ([0.5, 0.1, 0.3, 0.1], [0.5, 0.2, 0.3, 0.3], 10),  # nor does a single step
        ([0.46, 0.46, 0.3, 0.2], [0.55, 0.55, 0.4, 0.3], 1),  # nor luck where K^0 guesses
        ([0.2, 0.2, 0.0, 0.0], [0.2, 0.2, 0.0, 0.1], 10),
        ([0.1, 0.1, 0.1, 0.1], [0.1, 0.1 / 0.91, 0.1 / 0.89, 0.2], 1),
    ],
)
def test_departure_step(network: list[float], kernel: list[float], expected: int | None) -> None:
    assert departure_step([0, 1, 10, 100], network, kernel, guessing=0.5) == expected


@pytest.mark.parametrize("quantity", ["error", "loss"])
def test_the_figure_over_time_marks_where_network_and_kernel_part(tmp_path: Path, quantity: Quantity) -> None:
    study = read_study(tables.dynamics(tmp_path))
    [pair] = departures(study, quantity)
    assert pair.step == 100
    assert pair.initial.xs == pair.steps == [1, 3, 10, 32, 100, 320, 1000]  # not 0, where K^0 is 0 everywhere
    assert pair.network.xs == [0, *pair.steps]
    axes = draw_study(study, quantity).axes[0]
    assert [text.get_text() for text in axes.texts] == ["they part after t = 100"]
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    assert shown[2:] == ["network", "$K^t$ fitted on n = 4k", "$K^0$, trained by the same steps"]
    assert "Network and $K^0$ part after t = 100: at the next measured step" in study_caption(study, quantity)


def test_learning_rates_of_one_arm_part_at_their_own_steps(tmp_path: Path) -> None:
    rows = []
    for lr, ahead in ((0.1, 100), (1.0, 10)):
        for t in (0, 1, 10, 100, 1000):
            errors = {"network_error": 0.3 if t <= ahead else 0.1, "initial_error": 0.3}
            rows.append(tables.row("kernel during training", 0.2, arm="network", t=t, m=1000, lr=lr, **errors))
    pairs = departures(read_study(tables.write(tmp_path, "rates", "t", rows)))
    assert [(pair.network.label, pair.step) for pair in pairs] == [("network, lr 0.1", 100), ("network, lr 1", 10)]


def test_a_figure_of_last_errors_shows_and_fits_them(tmp_path: Path) -> None:
    rows = [
        tables.row("network", tables.law(1.9, 0.1, n, 0, 0), n=n, last_error=tables.law(1.9, 0.3, n, 0, 0))
        for n in tables.SIZES
    ]
    study = read_study(tables.write(tmp_path, "converged", "n", rows, value="last"))
    assert study_lines(study)[0].at(500) == pytest.approx(1.9 * 500**-0.3)
    assert exponents(study)[0].fitted.fit.beta == pytest.approx(0.3)
    caption = study_caption(study)
    assert "Each test error is that of the fit's last step." in caption
    assert "oracle" not in caption
    bands = [*rows, tables.row("infinite", 0.3)]
    axes = draw_study(read_study(tables.write(tmp_path, "converged", "t", bands, value="last"))).axes[0]
    assert any(text.get_text() == "infinite, last step" for text in axes.get_legend().get_texts())


def test_the_caption_names_data_network_and_optimizer(tmp_path: Path) -> None:
    text = study_caption(read_study(tables.widths(tmp_path)))
    start = (
        "CIFAR10Binary (n test 2000), MyrtleCNN (depth 5), $n$ = 1000, width 16, 32, 64, 128, 256, learning rate 1, "
    )
    assert f"{start}momentum 0.9, batches of 50, 100 epochs." in text
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n, full_batch=True, lr=n / 500) for n in (500, 1000)]
    text = study_caption(read_study(tables.write(tmp_path, "full", "n", rows)))
    assert "MyrtleCNN (depth 5), width 64, learning rate 1, 2, momentum 0.9, full batch, 100 epochs." in text


def test_full_batches_and_mini_batches_make_two_lines(tmp_path: Path) -> None:
    rows = [tables.row("network", 0.2, n=n, full_batch=full) for n in tables.SIZES for full in (True, False)]
    labels = [line.label for line in study_lines(read_study(tables.write(tmp_path, "full", "n", rows)))]
    assert labels == ["network, mini-batches", "network, full batch"]


def test_p_values_of_lines_on_other_sizes_and_errors_near_the_studys_chance_are_noted(tmp_path: Path) -> None:
    rows = [tables.row("network", tables.law(1.9, 0.3, n), n=n) for n in tables.SIZES]
    rows += [tables.row("infinite", tables.law(1.9, 0.2, n), n=n) for n in tables.SIZES[1:]]
    first, second = exponents(read_study(tables.write(tmp_path, "sizes", "n", rows)))
    assert not first.notes
    assert second.notes == ["The p-value compares it with network on the 5 sizes that both have."]
    first, _ = exponents(read_study(tables.write(tmp_path, "sizes", "n", rows, chance=0.3)))
    assert "at chance (0.3)" in " ".join(first.notes)


def test_lines_of_other_sizes_are_compared_on_those_that_both_have(tmp_path: Path) -> None:
    few = tables.SIZES[2:5]
    rows = [
        tables.row("network", tables.law(1.9, 0.3, n, seed), n=n, seed=seed) for n in tables.SIZES for seed in range(3)
    ]
    rows += [tables.row("infinite", tables.law(1.9, 0.25, n, seed), n=n, seed=seed) for n in few for seed in range(3)]
    rows += [
        tables.row("nngp", tables.law(1.9, 0.25, n, seed), n=n, seed=seed) for n in (8000, 32000) for seed in range(3)
    ]
    network, infinite, nngp = exponents(read_study(tables.write(tmp_path, "sizes", "n", rows)))
    assert [*network.fitted.fit.n] == list(tables.SIZES)
    with pytest.warns(UserWarning, match="weak evidence"):
        fits = [
            fit_power_law(few, [[tables.law(1.9, beta, n, seed) for n in few] for seed in range(3)])
            for beta in (0.3, 0.25)
        ]
    assert infinite.p_value == compare_exponents(*fits, paired=True).p_value
    assert infinite.paired
    assert (nngp.p_value, nngp.paired) == (None, False)
    assert nngp.notes[-1] == "No p-value: fewer than 2 of its sizes are those of network."


def test_no_p_value_stands_where_no_test_was_made(tmp_path: Path) -> None:
    rows = [tables.row(model, 1 / n, n=n) for model in ("network", "infinite") for n in (10, 20)]
    study = read_study(tables.write(tmp_path, "two", "n", rows))
    _, infinite = exponents(study)
    assert infinite.p_value is None
    assert exponent_cells(infinite)[-1] == ""
    assert exponent_cells(infinite)[2] == "[no interval]"


@pytest.mark.parametrize("bent", [True, False])
def test_a_law_that_bends_has_a_note(bent: bool, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.02, (4, len(tables.SIZES)))
    rows = [
        tables.row("network", float(2 * n ** (-0.6 + 0.03 * bent * np.log(n / 500)) * np.exp(z)), n=n, seed=seed)
        for seed in range(4)
        for n, z in zip(tables.SIZES, noise[seed], strict=True)
    ]
    study = read_study(tables.write(tmp_path, "bent", "n", rows))
    [line] = fit_series(study)
    text = f"from {line.fit.local_exponents[0]:.2g} to {line.fit.local_exponents[-1]:.2g}."
    for shown in (study_caption(study), str(exponents_table(study).caption)):
        assert ("The errors are not a power law" in shown) == bent
        assert (text in shown) == bent


def test_optima_at_the_end_of_training_are_noted_and_counted(tmp_path: Path) -> None:
    rows = []
    for number, n in enumerate(tables.SIZES):
        early = {} if number == 0 else {"curve_errors": [0.5, 0.3, 0.2]}  # the best is at step 2000 of 2000
        rows.append(tables.row("network", tables.law(1.9, 0.3, n), n=n, **early))
        rows.append(tables.row("infinite", tables.law(1.9, 0.3, n), n=n))
    study = read_study(tables.write(tmp_path, "short", "n", rows))
    note = "network: The least test error of 5 of 6 fits lies in the last tenth of training: more epochs may lower it."
    assert note in study_caption(study)
    assert note in exponents_table(study).caption
    assert "last tenth" not in study_caption(study, "loss")
    last = read_study(tables.write(tmp_path, "short", "n", rows, value="last"))
    assert "last tenth" not in study_caption(last)


def test_the_caption_counts_the_test_images_of_an_error(tmp_path: Path) -> None:
    rows = [tables.row("network", error, n=n) for n, error in ((500, 0.1), (1000, 0.0075))]
    study = read_study(tables.write(tmp_path, "counted", "n", rows))
    caption = study_caption(study)
    assert "All seeds share the 2000 test images, whose choice no exponent's interval covers" in caption
    assert "the least error of a seed, 0.75%, is 15 of them." in caption
    assert "test images" not in study_caption(study, "loss")


def test_a_model_without_width_is_a_band(tmp_path: Path) -> None:
    study = read_study(tables.widths(tmp_path))
    infinite = study_lines(study)[-1]
    axes = draw_study(study).axes[0]
    level = next(line for line in axes.lines if line.get_linestyle() == "--")
    assert level.get_ydata()[0] == pytest.approx(infinite.at(None).mean())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["16", "32", "64", "128", "256"]


def test_nothing_is_cut_off_and_no_ticks_overlap(tmp_path: Path) -> None:
    for study in read_results(tables.all_kinds(tmp_path)):
        figure = draw_study(study)
        figure.draw_without_rendering()
        box, axes = figure.bbox, figure.axes[0]
        for artist in (axes.get_legend(), axes.title, *figure.texts, figure._supxlabel):
            extent = artist.get_window_extent()
            assert extent.x0 >= 0, (study.name, artist)
            assert extent.y0 >= 0, (study.name, artist)
            assert extent.x1 <= box.x1, (study.name, artist)
        low, high = axes.get_ylim()
        extents = [
            tick.label1.get_window_extent() for tick in axes.yaxis.get_major_ticks() if low <= tick.get_loc() <= high
        ]
        assert len(extents) >= 2
        assert not any(a.overlaps(b) for i, a in enumerate(extents) for b in extents[:i]), study.name


def test_figures_writes_two_pictures_a_study_and_prints_exponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.scaling(tmp_path)
    tables.dynamics(tmp_path)
    paths = figures(str(tmp_path), str(tmp_path / "pictures"), "svg")
    names = ["figure_1a.svg", "figure_1a_loss.svg", "figure_1c.svg", "figure_1c_loss.svg"]
    assert [path.name for path in paths] == names
    assert all("<svg" in path.read_text()[:1000] for path in paths)
    printed = capsys.readouterr().out
    assert "exponents of the test loss" in printed
    assert "0.178" in printed
    assert "network and K^0 part after t = 100" in printed
    assert all(str(path) in printed for path in paths)


def test_a_study_without_losses_has_a_figure_of_errors_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [tables.row("network", 0.2 / n, arm="net [a]", n=n, optimal_loss=None) for n in (1, 2)]
    tables.write(tmp_path, "bare", "n", [*rows, tables.row("infinite", 0.3, n=2)])
    rows = [tables.row("network", 0.2, n=n, optimal_loss=None) for n in tables.SIZES]
    study = read_study(tables.write(tmp_path, "silent", "n", rows))
    with pytest.raises(ValueError, match="no finite test loss to draw"):
        draw_study(study, "loss")
    paths = figures(str(tmp_path))
    assert [path.name for path in paths] == ["bare.png", "bare_loss.png", "silent.png"]
    printed = capsys.readouterr().out
    assert "silent: no finite test loss, so no figure of it." in printed
    assert "net [a]" in printed  # no markup
    assert "[no interval]" in printed


STUDY = {"study": json.dumps({"name": "empty", "title": "", "data": {}, "net": {}, "arms": [], "grid": {}})}


def test_folders_and_files_that_are_not_results_are_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FileNotFoundError, match="no results folder"):
        read_results(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no tables"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="no table"):
        read_study(tmp_path / "nothing.parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), other)
    with pytest.raises(ValueError, match=r"other.parquet is not the table of a study"):
        read_results(tmp_path)
    tables.scaling(tmp_path)
    pq.write_table(COLUMNS.empty_table().replace_schema_metadata(STUDY), tmp_path / "empty.parquet")
    assert [study.name for study in read_results(tmp_path)] == ["figure_1a"]
    told = capsys.readouterr().err
    assert told.count("Left out") == 2
    assert "other.parquet is not the table of a study" in told
    assert "empty.parquet cannot be drawn, it has no rows" in told
    other.write_text("not parquet")
    with pytest.raises(ValueError, match="is not the table of a study"):
        read_study(other)
    with pytest.raises(ValueError, match="lacks the columns"):
        read_study(tables.write(tmp_path, "other", "n", [{"arm": "a"}]))
    with pytest.raises(ValueError, match=r"its configuration is wrong .*figure.x.*Got value: z"):
        read_study(tables.write(tmp_path, "other", "z", [tables.row("network", 0.2)]))


def test_labels_as_text_and_html() -> None:
    assert plain_text("$K^F_{16k}(n)$, n = 1") == "K^F_16k(n), n = 1"
    assert html_text("$K^F_{16k}(n)$ <b>") == "<i>K<sup>F</sup><sub>16k</sub>(n)</i> &lt;b&gt;"
