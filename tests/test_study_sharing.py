"""What cells of a study share, and what is told before it runs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ntk_lightning.callbacks import AfterKernel
from ntk_lightning.datamodules import SyntheticTeacher
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, KernelStore
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.networks import MLP
from ntk_lightning.studies import Arm, FigureConfig, Grid, StudyConfig, read_study, run_study
from ntk_lightning.studies import executors as executors_module
from ntk_lightning.studies import plan as plan_module
from ntk_lightning.studies import study as study_module
from ntk_lightning.studies.build import build, set_up_data
from ntk_lightning.studies.cell import run_cell
from ntk_lightning.studies.critical import critical_rates, print_critical_rates, tell_above_critical
from ntk_lightning.studies.executors import free_cpus
from ntk_lightning.studies.first_epochs import after_first_epochs
from ntk_lightning.studies.shared_gram import cells_of_pools
from ntk_lightning.studies.study import plan_study

POOL = 48


def study(*arms: Arm, **changes: Any) -> StudyConfig:  # noqa: ANN401
    data = {
        "class_path": "ntk_lightning.datamodules.SyntheticTeacher",
        "init_args": {"shape": [1, 8, 8], "pool_size": POOL, "n_test": 20, "n_statistics": POOL},
    }
    net = {"class_path": "ntk_lightning.networks.MLP", "init_args": {"in_features": 64, "depth": 2}}
    grid = Grid(n=[12, 24], width=[8], seed=[0, 1, 2], lr=[0.1], batch_size=[6], epochs=[3])
    return StudyConfig("shared", "Shared", data, net, [*arms], replace(grid, **changes))


def pairs_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the pairs that infinite-width kernels compute."""
    counted, call = [], InfiniteNTK.__call__

    def counting(kernel: InfiniteNTK, x1: torch.Tensor, x2: torch.Tensor | None = None, **options: Any) -> Any:  # noqa: ANN401
        counted.append(len(x1) * (len(x1) + 1) // 2 if x2 is None else len(x1) * len(x2))
        return call(kernel, x1, x2, **options)

    monkeypatch.setattr(InfiniteNTK, "__call__", counting)
    return counted


def test_one_gram_of_the_pool_serves_all_seeds_sizes_and_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = pairs_of(monkeypatch)
    config = study(Arm("infinite NTK", "infinite"), n=[12, 24, 40])
    pooled = read_study(run_study(config, tmp_path / "pooled", cpus=1)).rows
    assert sum(counted) == (20 + POOL) * (20 + POOL + 1) // 2  # one block
    counted.clear()
    more = replace(config, name="more", grid=replace(config.grid, n=[6], seed=[7]))
    run_study(more, tmp_path / "pooled", cpus=1)  # one seed with few samples alone would not ask for the pool's
    assert counted == []
    for row, cell in zip(pooled, config.cells()["infinite NTK"], strict=True):
        (apart,) = run_cell(cell, tmp_path / "apart", "1GB", threads=1)
        assert row["curve_losses"] == pytest.approx(apart["curve_losses"], rel=1e-5)
        assert (row["n"], row["seed"]) == (cell.n, cell.seed)


def test_a_pool_that_costs_more_than_its_subsets_is_left_alone(tmp_path: Path) -> None:
    config = study(Arm("infinite NTK", "infinite"), n=[2], seed=[0])
    cells = config.cells()["infinite NTK"]
    loaded = set_up_data(cells)
    assert loaded is not None
    assert loaded.pool == POOL
    assert cells_of_pools(cells, loaded, tmp_path) == frozenset()
    many = study(Arm("infinite NTK", "infinite"), n=[24]).cells()["infinite NTK"]
    assert cells_of_pools(many, loaded, tmp_path) == {cell.key for cell in many}
    arguments = {k: value for k, value in many[0].data["init_args"].items() if k != "n_statistics"}
    own = [replace(cell, data={**cell.data, "init_args": arguments}) for cell in many]
    assert cells_of_pools(own, loaded, tmp_path) == frozenset()  # each seed's samples are numbers of its own


def test_cells_that_differ_in_their_kernels_train_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(Arm("network"))
    rows = read_study(run_study(config, tmp_path, cpus=1)).rows

    def no_training(*args: Any) -> None:  # noqa: ANN401
        raise AssertionError("trained again")

    monkeypatch.setattr("ntk_lightning.studies.cell.train", no_training)
    after = replace(study(Arm("network", after=["m"], after_fresh=["m"])), name="after")
    again = read_study(run_study(after, tmp_path, cpus=1)).rows
    varying = {"cell", "study", "seconds", "config"}
    trained = [row for row in again if row["model"] == "network"]
    assert [{k: v for k, v in row.items() if k not in varying} for row in trained] == [
        {k: v for k, v in row.items() if k not in varying} for row in rows
    ]
    assert {row["model"] for row in again} == {"network", "after-kernel", "after-kernel, fresh"}


def test_after_kernels_of_cells_are_those_of_the_callback(tmp_path: Path) -> None:
    from lightning import Trainer

    from ntk_lightning.modules import FiniteNetwork

    cell = study(Arm("network", after=[6, "m"], after_fresh=[6])).cells()["network"][0]
    rows = run_cell(cell, tmp_path, "1GB")[1:]
    with torch.random.fork_rng():
        torch.manual_seed(cell.seed)
        data, net = build(cell)
        callback = AfterKernel(cell.after, cell.after_fresh, memory="1GB")
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(max_epochs=3, callbacks=[callback], default_root_dir=tmp_path / "run", **options)
        trainer.fit(FiniteNetwork(net, cell.optimizer), datamodule=data)
    assert [row["curve_losses"] for row in rows] == [each.curve["losses"] for each in callback.model_errors()]
    assert {row["t"] for row in rows} == {trainer.global_step}


def test_a_damaged_network_is_trained_again(tmp_path: Path) -> None:
    cell = study(Arm("network")).cells()["network"][0]
    before = run_cell(cell, tmp_path, "1GB")
    (file,) = (tmp_path / "networks").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    after = run_cell(cell, tmp_path, "1GB")
    assert before[0]["curve_losses"] == after[0]["curve_losses"]
    assert file.stat().st_size > 100


def test_a_network_that_is_measured_seldom_ends_with_a_measurement(tmp_path: Path) -> None:
    arm = Arm("network", evaluate_every=2, until_train_error=1.0 - 1e-9)
    cell = study(arm, epochs=[8]).cells()["network"][0]
    (row,) = run_cell(cell, tmp_path, "1GB")
    assert row["curve_steps"] == [4]  # it fits at once, and may stop after two epochs of two steps


def test_a_run_must_end_with_a_measurement() -> None:
    with pytest.raises(ValueError, match="evaluate_every = 2 must divide epochs = 3"):
        study(Arm("network", evaluate_every=2)).cells()


def test_critical_rates_are_those_of_the_grams(capsys: pytest.CaptureFixture[str]) -> None:
    config = study(Arm("empirical NTK", "empirical"), Arm("infinite NTK", "infinite"))
    rates = {(each.arm, each.n, each.seed): each.rate for each in critical_rates(config, [5], "1GB")}
    assert {seed for _, _, seed in rates} == {5}
    torch.manual_seed(5)
    data = SyntheticTeacher(shape=(1, 8, 8), pool_size=POOL, n_train=24, n_test=20, n_statistics=POOL, subset_seed=5)
    net = MLP(8, 2, 64)
    data.setup()
    assert data.train_set is not None
    for arm, kernel in (("empirical NTK", EmpiricalNTK(net)), ("infinite NTK", InfiniteNTK(net))):
        for n in (12, 24):
            largest = torch.linalg.eigvalsh(kernel(data.train_set.x[:n]).double())[-1].item()
            assert rates[arm, n, 5] == pytest.approx(1.9 * n / largest, rel=2e-3)
    half = print_critical_rates(config, [5], "1GB")
    assert half == pytest.approx(min(rates.values()) / 2)
    assert "infinite NTK, n 24: " in capsys.readouterr().out


def test_a_study_below_critical_says_which_arms_are_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = Arm("low", "empirical"), Arm("high", "empirical", Grid(lr=[50.0]))
    config = replace(study(*arms, n=[12], seed=[0]), below_critical=True)
    with pytest.warns(UserWarning, match="expect divergence"):
        rows = read_study(run_study(config, tmp_path, cpus=1)).rows
    printed = capsys.readouterr().out
    assert "lr 50 of high is" in printed
    assert "of low" not in printed
    assert {row["critical_lr"] < row["lr"] for row in rows if row["arm"] == "high"} == {True}
    assert tell_above_critical(replace(config, arms=[arms[0]]), "1GB") == []
    assert "all learning rates are below critical" in capsys.readouterr().out


def test_a_fixed_budget_of_epochs_is_the_beginning_of_a_sufficient_one(tmp_path: Path) -> None:
    arms = [Arm("network"), Arm("empirical NTK", "empirical")]
    long = study(*arms, epochs=[6])
    short = replace(study(*arms, epochs=[2]), name="short")
    first = replace(long, name="first", figure=FigureConfig(first_epochs=2))
    run_study(long, tmp_path, cpus=1)
    count = len(list((tmp_path / "cells").iterdir()))
    cut, run = (read_study(run_study(each, tmp_path, cpus=1)).rows for each in (first, short))
    assert len(list((tmp_path / "cells").iterdir())) == 2 * count  # of the short one alone
    names = ("optimal_error", "optimal_step", "last_error", "optimal_loss", "last_loss", "epochs", "curve_steps")
    assert [[row[name] for name in names] for row in cut] == [[row[name] for name in names] for row in run]
    assert after_first_epochs(run[0], 2) is run[0]
    with pytest.raises(ValueError, match="first_epochs must be at least 1"):
        FigureConfig(first_epochs=0)


def test_a_plan_counts_what_will_be_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(
        Arm("network", after=["m"]), Arm("empirical NTK", "empirical"), Arm("infinite NTK", "infinite"), n=[12, 40]
    )
    plan = plan_study(config, tmp_path)
    assert len(plan.keys) == 2 * 3 * 3
    assert plan.samples == 3 * 3 * (12 + 40)  # epochs, seeds
    assert plan.gradients == 2 * 3 * (12 + 40 + 2 * 20)  # of networks at both ends
    assert plan.products == 2 * 3 * sum(n * (n + 1) // 2 + 20 * n for n in (12, 40))
    assert plan.pairs == (POOL + 20) * (POOL + 21) // 2
    assert plan.total > 0
    assert json.loads((tmp_path / "plans" / "shared.json").read_text())["seconds"] == plan.total
    counted = pairs_of(monkeypatch)
    run_study(config, tmp_path, cpus=1)
    assert sum(counted) == plan.pairs
    rest = plan_study(replace(config, arms=[*config.arms, Arm("more", after=[6])]), tmp_path)
    assert (len(rest.keys), rest.samples, rest.pairs) == (6, 0, 0)  # their networks are trained


def test_a_plan_takes_the_epochs_of_networks_that_have_ended(tmp_path: Path) -> None:
    config = study(Arm("network", until_train_error=1.0 - 1e-9), n=[12], seed=[0], epochs=[50])
    run_study(config, tmp_path, cpus=1)
    more = replace(config, grid=replace(config.grid, n=[12, 24], seed=[0, 1]))
    assert plan_study(more, tmp_path).samples == 12 + 24 + 24  # one epoch each
    assert plan_study(more, tmp_path / "elsewhere").samples == 2 * (12 + 24)


def test_a_study_that_does_not_fit_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "free_bytes", lambda: 10)
    config = study(Arm("empirical NTK", "empirical"))
    with pytest.raises(ValueError, match=r"would not fit in memory: empirical, n 24.*Take smaller n"):
        plan_study(config, tmp_path)


def test_plan_and_critical_run_no_cell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ntk_lightning.cli import main

    file = tmp_path / "own.yaml"
    config = study(Arm("empirical NTK", "empirical"))
    file.write_text(
        json.dumps(
            {
                **{"name": "own", "title": "Own", "data": config.data, "net": config.net},
                **{"arms": [{"label": "empirical NTK", "model": "empirical"}]},
                "grid": {"n": [12], "width": [8], "seed": [0], "batch_size": [6]},
            }
        )
    )
    main(["study", "--config", str(file), "--output", str(tmp_path / "results"), "--plan"])
    main(["study", "--config", str(file), "--output", str(tmp_path / "results"), "--critical", "3"])
    printed = capsys.readouterr().out
    assert "own: 1 cells to run, 0 finished" in printed
    assert "least and largest of seeds 3" in printed
    assert not (tmp_path / "results" / "cells").exists()


@pytest.mark.parametrize(("busy", "free"), [((0, 0, 0, 0), 4), ((100, 0, 0, 0), 3), ((100, 100, 100, 100), 1)])
def test_busy_cpus_are_left_to_others(
    busy: tuple[int, ...], free: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    idle = [[0, 0, 0, 0, 0, 0, 0, 0]] * 4
    times = iter([dict(enumerate(idle)), {k: [b, 0, 0, 100 - b, 0, 0, 0, 0] for k, b in enumerate(busy)}])
    monkeypatch.setattr(executors_module, "_cpu_times", lambda: next(times))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert free_cpus(0.0) == free
    assert ("--cpus 4 takes all" in capsys.readouterr().out) == (free < 4)


def test_a_finished_study_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(study(Arm("network"), Arm("infinite NTK", "infinite"), n=[12]), below_critical=True)
    first = read_study(run_study(config, tmp_path, cpus=1)).rows
    monkeypatch.setattr(study_module, "tell_above_critical", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", lambda *_, **__: pytest.fail("run again"))
    assert read_study(run_study(config, tmp_path, cpus=1)).rows == first


def linear(counted: list[int]) -> Any:  # noqa: ANN401 - a kernel with a name
    def kernel(x1: torch.Tensor, x2: torch.Tensor | None = None, *, progress: bool = False) -> torch.Tensor:
        counted.append(len(x1) * (len(x1) + 1) // 2 if x2 is None else len(x1) * len(x2))
        return x1 @ (x1 if x2 is None else x2).T

    kernel.fingerprint = "linear"  # type: ignore[attr-defined]
    return kernel


@pytest.mark.parametrize("m", [20, 130, 600])
def test_stored_grams_have_hardly_a_pair_of_test_samples(m: int, tmp_path: Path) -> None:
    x, test, counted = torch.randn(30, 3), torch.randn(m, 3), list[int]()
    gram, cross = stored_gram_and_cross(linear(counted), tmp_path, progress=False)(x, test)
    torch.testing.assert_close(gram, x @ x.T)
    torch.testing.assert_close(cross, test @ x.T)
    needed = 30 * 31 // 2 + 30 * m
    assert needed <= sum(counted) <= 1.1 * needed


def test_blocks_that_an_earlier_version_stored_are_read(tmp_path: Path) -> None:
    x, test, counted = torch.randn(30, 3), torch.randn(600, 3), list[int]()
    KernelStore(tmp_path, linear([]), torch.cat([test, x]), block=64).compute(progress=False)
    stored_gram_and_cross(linear(counted), tmp_path, progress=False)(x, test)
    assert counted == []
