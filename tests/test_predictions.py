"""The predicted learning curve of a study's kernels: against fits, in the rows, in the figure and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import study_tables as tables
import torch
from matplotlib import pyplot as plt

from ntk_lightning.studies import run_study
from ntk_lightning.studies.config import Arm, FigureConfig, Grid, StudyConfig
from ntk_lightning.studies.figure import study_figure
from ntk_lightning.studies.figure_captions import figure_caption
from ntk_lightning.studies.figure_draw import draw_figure
from ntk_lightning.studies.figure_table import HEADER, exponent_cells
from ntk_lightning.studies.predictions import predicted_columns
from ntk_lightning.studies.results import read_study


def task(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram with eigenvalues near i^-1.5, and labels in its first directions, with noise."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, 300)) * np.arange(1, 301) ** -0.75
    y = np.sign(features[:, 0] + features[:, 1] + 0.5 * features[:, 3] + 0.3 * rng.standard_normal(n))
    return torch.from_numpy(features @ features.T), torch.from_numpy(y)


def measured(gram: np.ndarray, y: np.ndarray, n: int, draws: int = 16) -> tuple[float, float]:
    """Least error and loss over ridges of ridge regression on n of the samples, by the normal equations."""
    rng, ridges = np.random.default_rng(7), np.logspace(-5, 1, 25) * np.linalg.eigvalsh(gram)[-1] / len(gram)
    errors, losses = np.zeros((2, draws, len(ridges)))
    for draw in range(draws):
        train, test = np.split(rng.permutation(len(gram)), [n])
        for j, ridge in enumerate(ridges):
            a = np.linalg.solve(gram[np.ix_(train, train)] + n * ridge * np.eye(n), y[train])
            f = gram[np.ix_(test, train)] @ a
            errors[draw, j], losses[draw, j] = (f * y[test] <= 0).mean(), ((f - y[test]) ** 2).mean()
    return float(errors.mean(0).min()), float(losses.mean(0).min())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_are_what_ridge_regression_measures_at_its_best_ridge(dtype: torch.dtype) -> None:
    gram, y = task(512)
    columns = predicted_columns(gram.to(dtype), y)
    assert columns["predicted_sizes"] == [16, 32, 64, 128, 256, 512]
    for index, n in list(enumerate(columns["predicted_sizes"]))[2:5]:
        error, loss = measured(gram.numpy(), y.numpy(), n)
        assert columns["predicted_losses"][index] == pytest.approx(loss, rel=0.04)
        assert columns["predicted_errors"][index] == pytest.approx(error, rel=0.12)


def test_rounding_of_a_float32_gram_changes_no_prediction() -> None:
    features = torch.randn(600, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = features @ features.T + 1000 + 0.05 * torch.eye(600)  # an outlier, and a tail far below it
    y = features[:, 0].sign()
    exact, rounded = (predicted_columns(each, y) for each in (gram, gram.float()))
    for name in ("predicted_errors", "predicted_losses"):
        assert rounded[name] == pytest.approx(exact[name], rel=0.02)


def test_a_gram_of_few_or_too_many_samples_or_of_no_kernel_has_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, y = task(64)
    assert predicted_columns(gram[:31, :31], y[:31]) == {}
    monkeypatch.setattr("ntk_lightning.studies.predictions.PREDICT_MAX", 63)
    assert predicted_columns(gram, y) == {}
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="There is no predicted learning curve. kernel has no positive"):
        assert predicted_columns(-gram, y) == {}


def test_rows_of_kernels_have_predictions_and_the_figure_draws_them(tmp_path: Path) -> None:
    data = {
        "class_path": "ntk_lightning.datamodules.FashionMNISTBinary",
        "init_args": {"n_test": 200, "n_statistics": 64, "image_size": 8},
    }
    net = {"class_path": "ntk_lightning.networks.MLP", "init_args": {"in_features": 64, "depth": 2}}
    arms = [
        Arm("network", after=["m", 32], after_fresh=[64]),
        Arm("empirical NTK", "empirical"),
        Arm("infinite NTK", "infinite"),
    ]
    grid = Grid(n=[32, 64], width=[16], seed=[0], lr=[0.05], epochs=[2], batch_size=[16])
    study = read_study(run_study(StudyConfig("p", "P", data, net, arms, grid, FigureConfig(x="n")), tmp_path))
    with_predictions = {(r["model"], r["n"], r["m"]) for r in study.rows if r["predicted_sizes"]}
    sizes = (32, 64)
    assert with_predictions == {
        *((model, n, None) for model in ("empirical", "infinite") for n in sizes),
        *(("after-kernel", n, n) for n in sizes),
        *(("after-kernel, fresh", 64, n) for n in sizes),
    }
    figure = study_figure(study)
    predicted = {e.label: e.predicted for e in figure.exponents}
    assert predicted["network"] is None
    infinite = predicted["infinite NTK"]
    assert infinite is not None
    assert infinite.sizes.tolist() == [16, 32, 64]
    largest = [r for r in study.rows if r["model"] == "infinite" and r["n"] == 64]
    assert infinite.values.tolist() == pytest.approx(np.mean([r["predicted_errors"] for r in largest], 0).tolist())
    own = predicted["$K_n(n)$"]
    assert own is not None
    assert own.sizes.tolist() == [32, 64]
    ends = {
        n: [r["predicted_errors"][-1] for r in study.rows if (r["model"], r["n"], r["m"]) == ("after-kernel", n, n)]
        for n in sizes
    }
    assert own.values.tolist() == pytest.approx([np.mean(ends[n]) for n in sizes])
    assert "Thin: ridge regression at the best ridge, as predicted" in figure_caption(figure)


def made_up(folder: Path, **figure: Any) -> Path:  # noqa: ANN401 - of the study
    """The infinite kernel's curve lies at the prediction times 1.1, but for 4000 samples, where it is 0.8 times."""
    sizes, rows = list(tables.SIZES), []
    for seed in range(2):
        curve = [(0.5 + 0.02 * seed) * (n / 500) ** -0.25 for n in sizes]
        for n in sizes:
            columns: dict[str, Any] = {"predicted_sizes": None, "predicted_errors": None, "predicted_losses": None}
            rows.append(tables.row("network", 0.4 * (n / 500) ** -0.3, n=n, seed=seed, **columns))
            if n == sizes[-1]:
                columns = {"predicted_sizes": sizes, "predicted_errors": curve, "predicted_losses": curve}
            error = 0.51 * (n / 500) ** -0.25 / (0.8 if n == 4000 else 1.1)
            rows.append(tables.row("infinite", error, n=n, seed=seed, **columns))
    return tables.write(folder, "predicted", "n", rows, **figure)


def test_the_largest_deviation_and_the_predicted_exponent_are_told(tmp_path: Path) -> None:
    figure = study_figure(read_study(made_up(tmp_path)))
    _, infinite = figure.exponents
    prediction = infinite.predicted
    assert prediction is not None
    assert prediction.seeds == 2
    assert prediction.exponent == pytest.approx(0.25)
    assert (prediction.deviation, prediction.at) == (pytest.approx(-0.2), 4000)
    assert prediction.interpolate(707) == pytest.approx(0.51 * (707 / 500) ** -0.25)
    assert np.isnan(prediction.interpolate(100))
    cells = dict(zip(HEADER, exponent_cells(infinite), strict=True))
    assert cells["prediction off by"] == "-20% at 4000"
    assert cells["predicted β"] == "0.250"
    assert "furthest from the measured: infinite -20% at 4000." in figure_caption(figure)
    drawn = draw_figure(figure, caption=False)
    labels = [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]
    assert labels.count("predicted from the spectrum") == 1
    (thin,) = [line for line in drawn.axes[0].lines if line.get_label() == "predicted from the spectrum"]
    assert thin.get_ydata() == pytest.approx(prediction.values)
    plt.close(drawn)


def test_last_errors_are_not_compared_with_the_best_ridge(tmp_path: Path) -> None:
    figure = study_figure(read_study(made_up(tmp_path, value="last")))
    assert all(exponent.predicted is None for exponent in figure.exponents)
    assert "Thin" not in figure_caption(figure)


def test_tables_of_earlier_versions_have_no_predictions(tmp_path: Path) -> None:
    study = read_study(tables.scaling(tmp_path))
    assert all(row["predicted_sizes"] is None for row in study.rows)
