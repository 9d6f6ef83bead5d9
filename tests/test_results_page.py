"""The results page is what the rows say: collected from a results folder, judged, and written as tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import study_tables
from scipy import stats

ROOT = Path(__file__).parents[1]
for folder in ("docs/plugins", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

import claims  # noqa: E402 - found by the lines above
import collect_results  # noqa: E402
import results  # noqa: E402

from ntk_lightning.studies import read_study  # noqa: E402
from ntk_lightning.studies.results import StudyResults  # noqa: E402


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The collected table of two studies."""
    study_tables.scaling(tmp_path, seeds=8)
    study_tables.dynamics(tmp_path)
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "figure_1a.json").write_text(json.dumps({"seconds": 30.0, "cells": []}))
    (tmp_path / "collected").mkdir()
    path = tmp_path / "collected" / "two_cores.parquet"
    assert collect_results.collect(tmp_path, path) == ["figure_1a", "figure_1c"]
    return path


def test_rows_are_collected_without_where_the_data_lie(table: Path) -> None:
    read = pq.read_table(table)
    assert read.num_rows == len(read_study(table.parents[1] / "figure_1a.parquet").rows) + 3 * (2 + 8)
    assert set(read["config"].to_pylist()) == {None}
    config = {"data": {"init_args": {"path": "/somewhere", "n_test": 5}}, "name": "a"}
    assert collect_results.without_paths(config) == {"data": {"init_args": {"n_test": 5}}, "name": "a"}


def test_a_thinned_curve_keeps_its_first_epochs_its_best_and_its_last() -> None:
    errors = [0.5 - 0.0001 * i for i in range(1000)]
    errors[700] = 0.01
    steps = [2 * (i + 1) for i in range(1000)]  # two batches an epoch
    row = study_tables.row("network", 0.01, n=100, batch_size=50)
    row |= {"curve_steps": steps, "curve_errors": errors, "curve_losses": [2 * error for error in errors]}
    thinned = collect_results.thin(row)
    assert thinned["curve_steps"][:20] == steps[:20]
    assert thinned["curve_steps"][-1] == 2000
    assert len(thinned["curve_steps"]) < 70
    assert min(thinned["curve_errors"]) == 0.01
    at = dict(zip(steps, errors, strict=True))
    assert thinned["curve_errors"] == [at[step] for step in thinned["curve_steps"]]
    assert thinned["curve_losses"] == [2 * at[step] for step in thinned["curve_steps"]]


def test_the_page_has_the_means_of_the_rows_and_every_claim(table: Path) -> None:
    parts = results.tables(table)
    rows = pq.read_table(table).to_pylist()
    found = [row["optimal_error"] for row in rows if (row["arm"], row["n"]) == ("network", 4000)]
    section = parts["figures"].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith("| network |"))
    assert line.split("|")[5].strip() == f"{100 * np.mean(found[:8]):.1f}%"
    assert "![Figure 1A](results/figure_1a.svg)" in section
    for claim, line in zip(claims.CLAIMS, parts["claims"].splitlines()[2:], strict=True):
        assert claim.text in line
        assert claim.refuted in line
    assert "| `figure_1a` |" in parts["runs"]
    assert {*results.pictures(table)} == {"figure_1a", "figure_1c"}


def test_without_rows_the_page_says_so(tmp_path: Path) -> None:
    parts = results.tables(tmp_path / "none.parquet")
    assert parts["runs"] == results.NOT_RUN
    assert parts["claims"].count("not measured") + parts["claims"].count("not of this budget") == 2 * len(claims.CLAIMS)
    assert results.pictures(tmp_path / "none.parquet") == {}


def studies(table: Path) -> dict[str, StudyResults]:
    return results.collected(table).studies


def test_claims_of_exponents_are_judged_by_the_laws_that_made_the_rows(table: Path) -> None:
    judged = {claim.text: (evidence, verdict) for claim, evidence, verdict in claims.judge(studies(table))}
    evidence, verdict = next(iter(judged.values()))
    assert evidence is not None
    assert evidence.effect == pytest.approx(0.29 - 0.19, abs=0.03)
    assert evidence.interval[0] < 0.1 < evidence.interval[1]
    assert verdict.startswith("shows")


@pytest.mark.parametrize(
    ("evidence", "least", "corrected", "verdict"),
    [
        (claims.Evidence(0.1, (0.05, 0.15), 0.0), 0.05, 0.01, "shows"),
        (claims.Evidence(0.1, (0.05, 0.15), 0.0), 0.05, 0.2, "cannot tell"),
        (claims.Evidence(0.01, (-0.02, 0.04), 0.5), 0.05, 0.5, "does not show"),
        (claims.Evidence(-0.1, (-0.2, 0.0), 0.01), 0.05, 0.01, "does not show"),
        (claims.Evidence(0.01, (-0.03, 0.04), 0.5), None, 0.5, "shows"),
        (claims.Evidence(0.04, (-0.03, 0.1), 0.3), None, 0.3, "cannot tell"),
        (claims.Evidence(0.1, (0.05, 0.15), 0.0), None, 0.01, "does not show"),
    ],
)
def test_verdicts(evidence: claims.Evidence, least: float | None, corrected: float, verdict: str) -> None:
    claim = claims.Claim("1A", "a claim", "figure_1a", lambda study: None, least)
    assert claim.verdict(evidence, corrected) == verdict


def test_differences_of_errors_are_paired_t_intervals_with_the_test_set_s_error(table: Path) -> None:
    study = studies(table)["figure_1a"]
    evidence = claims.errors("empirical NTK", "network")(study)
    assert evidence is not None
    at = {
        arm: [row["optimal_error"] for row in study.rows if (row["arm"], row["n"]) == (arm, 16000)]
        for arm in ("network", "empirical NTK")
    }
    difference = np.array(at["empirical NTK"]) - np.array(at["network"])
    of_test = (np.mean(at["network"]) + np.mean(at["empirical NTK"])) / 2000
    error = np.sqrt(np.var(difference, ddof=1) / 8 + of_test)
    assert evidence.effect == pytest.approx(difference.mean())
    assert evidence.interval[1] == pytest.approx(difference.mean() + stats.t.ppf(0.975, 7) * error)
