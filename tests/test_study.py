"""Every shipped study runs; a study that is killed, or has a cell that fails, loses nothing else.

Longer than 300 lines, since kills, failures and wrong configurations are tried on the same tiny studies.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from studies import CHROMIUM, CONFIGS, SHIPPED, browse, table, tiny
from tiny import file_size_limit

from ntk_lightning.cli import main
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.cell import run_cell
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.config import Arm, Grid, StudyConfig
from ntk_lightning.studies.config_yaml import read_config
from ntk_lightning.studies.executors import Resources, cells_at_once, default_threads, on_ray
from ntk_lightning.studies.figure_draw import figures
from ntk_lightning.studies.progress import seconds_left
from ntk_lightning.studies.report_wandb import report
from ntk_lightning.studies.results import read_study
from ntk_lightning.studies.schema import COLUMNS
from ntk_lightning.studies.study import StudyError, run_study

MODELS = {
    "figure_1a": {"network", "empirical", "infinite"},
    "figure_4a": {"network", "after-kernel", "after-kernel, fresh"},
    "figure_4b": {"after-kernel, fresh"},
    "figure_4c": {"network", "empirical", "after-kernel"},
    "figure_5a": {"network", "kernel during training"},
    "figure_5b": {"network", "kernel during training"},
    "orders": {"network", "empirical", "order 2", "order 3"},
}


def command(file: Path, folder: Path, *extra: str) -> list[str]:
    configs = ("--config", str(file), "--config", str(tiny(file, folder)))
    return ["study", *configs, "--output", str(folder / "results"), "--cpus", "1", *extra]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_shipped_study_runs_and_is_drawn(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    main(command(file, tmp_path))
    read = pq.read_table(tmp_path / "results" / f"{file.stem}.parquet")
    assert read.schema.names == COLUMNS.names
    config = json.loads(read.schema.metadata[b"study"])
    assert config["name"] == file.stem
    rows = read.to_pylist()
    assert {row["arm"] for row in rows} == {arm["label"] for arm in config["arms"]}
    if file.stem in MODELS:
        assert {row["model"] for row in rows} == MODELS[file.stem]
    for row in rows:
        assert len(row["curve_steps"]) == len(row["curve_errors"]) == len(row["curve_losses"])
        assert row["optimal_error"] == min(row["curve_errors"])
        assert json.loads(row["config"])["seed"] == row["seed"]
    results = str(tmp_path / "results")
    assert len(figures(results)) == 2
    page = report(results)
    if CHROMIUM is not None:
        assert browse(page, tmp_path / "profile").count("<img ") == 2


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
@pytest.mark.parametrize("scale", [None, "small", "cifar10"])
def test_every_scale_of_a_study_expands(file: Path, scale: str | None) -> None:
    config = read_config([file], scale)
    cells = [cell for group in config.cells().values() for cell in group]
    assert len(cells) >= 3
    assert config.name == file.stem


def test_cells_of_two_studies_are_shared_and_not_run_again(tmp_path: Path) -> None:
    main(command(CONFIGS / "figure_1a.yaml", tmp_path))
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "results" / "cells").iterdir()}
    main(command(CONFIGS / "figure_3a.yaml", tmp_path))
    assert {path: path.stat().st_mtime_ns for path in cells} == cells
    first, second = (table(tmp_path / "results" / f"figure_{name}.parquet") for name in ("1a", "3a"))
    shared = [row for row in second if row["arm"] == "network"]
    assert [{**row, "study": "figure_1a"} for row in shared] == [row for row in first if row["arm"] == "network"]


def test_nested_infinite_cells_share_one_store(tmp_path: Path) -> None:
    file = CONFIGS / "figure_1a.yaml"
    group = read_config([file, tiny(file, tmp_path)]).cells()["infinite NTK"]
    for cell in group:
        run_cell(cell, tmp_path, "1GB")
    assert len([path for path in (tmp_path / "grams").iterdir() if path.is_dir()]) == 1


KILLED = """
import os, random, sys, time
from ntk_lightning.cli import main
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies import cell as cell_module

args, log, chance, run_cell = sys.argv[1].split("\\n"), sys.argv[2], random.Random(0), cell_module.run_cell
cells = os.path.join(args[args.index("--output") + 1], "cells")

def logged(cell, *rest, **options):
    with open(log, "a") as file:
        file.write(cell.key + "\\n")
    return run_cell(cell, *rest, **options)

def started():
    return open(log).read().split() if os.path.exists(log) else []

def finished():
    names = os.listdir(cells) if os.path.isdir(cells) else []
    return {name.removesuffix(".parquet") for name in names if name.endswith(".parquet")}

cell_module.run_cell = logged
for number in [1, 2, 3, 4, 5, None]:
    before, count, deadline = finished(), len(started()), time.monotonic() + 120
    child = os.fork()
    if child == 0:
        main(args)
        os._exit(0)
    if number is not None:
        while len(finished()) < number and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    assert number is not None or status == 0, status
    again = before & {*started()[count:]}
    assert not again, f"finished cells were run again: {again}"
    assert before <= finished(), "a finished cell was lost"
    print(len(finished()))
"""


@pytest.mark.ci
def test_a_study_killed_five_times_ends_in_the_undisturbed_table_and_runs_no_finished_cell_again(
    tmp_path: Path,
) -> None:
    file = CONFIGS / "figure_4a.yaml"
    (tmp_path / "killed").mkdir()
    arguments = "\n".join(command(file, tmp_path / "killed"))
    program = [sys.executable, "-c", KILLED, arguments, str(tmp_path / "started.txt")]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    main(command(file, tmp_path))
    finished = [int(line) for line in done.stdout.splitlines() if line.isdecimal()]
    total = len(list((tmp_path / "results" / "cells").iterdir()))
    assert len(finished) == 6
    assert any(0 < number < total for number in finished)
    name = Path("results") / "figure_4a.parquet"
    assert table(tmp_path / "killed" / name) == table(tmp_path / name)


def test_a_damaged_cell_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config, folder = read_config([file, tiny(file, tmp_path)]), tmp_path / "results"
    before = table(run_study(config, folder))
    damaged = sorted((folder / "cells").iterdir())[:2]
    damaged[0].write_bytes(damaged[0].read_bytes()[:-20])
    damaged[1].write_bytes(b"")
    ran: list[Cell] = []

    def counted(cell: Cell, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        ran.append(cell)
        return run_cell(cell, *args, **kwargs)

    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", counted)
    assert table(run_study(config, folder)) == before
    assert sorted(cell.key for cell in ran) == [path.stem for path in damaged]
    assert all(pq.read_table(path).num_rows for path in damaged)


def test_a_cell_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_5a.yaml"
    calls: list[str] = []
    for name in ("fsync", "link", "replace"):
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real) -> object:  # noqa: ANN401
            calls.append(f"{name} {Path(args[-1]).suffix}" if name != "fsync" else name)
            return real(*args)

        monkeypatch.setattr(os, name, call)
    run_study(read_config([file, tiny(file, tmp_path)]), tmp_path / "results")
    of_cells = [number for number, call in enumerate(calls) if call == "link .parquet"]
    (of_table,) = [number for number, call in enumerate(calls) if call == "replace .parquet"]
    assert len(of_cells) == 2
    for number in (*of_cells, of_table):
        assert (calls[number - 1], calls[number + 1]) == ("fsync", "fsync")  # the file, then its folder


@pytest.mark.ci
@pytest.mark.usefixtures("capsys")  # what is printed goes to no file
def test_a_full_disk_is_told_and_keeps_the_finished_cells(tmp_path: Path) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config, folder = read_config([file, tiny(file, tmp_path)]), tmp_path / "results"
    with file_size_limit(1000), pytest.raises(OSError, match=r"\.parquet: .*Make room there.*finished cells are kept"):
        run_study(config, folder)
    assert not list(folder.rglob("*.parquet"))
    run_study(config, folder)
    cells = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    with file_size_limit(1000), pytest.raises(OSError, match=r"figure_2a\.parquet: .*Make room there"):
        run_study(config, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == cells


def test_a_cell_that_another_process_has_finished_meanwhile_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config, folder = read_config([file, tiny(file, tmp_path)]), tmp_path / "results"
    cells = [cell for group in config.cells().values() for cell in group]
    ran: list[Cell] = []

    def overtaken(cell: Cell, *args: object, **kwargs: object) -> object:
        if not ran:
            ran.append(cell)
            run_study(config, folder)  # the other process: it runs all
            seen.update({path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()})
        else:
            ran.append(cell)
        return run_cell(cell, tmp_path, "1GB")

    seen: dict[Path, int] = {}
    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", overtaken)
    run_study(config, folder)
    assert [cell.key for cell in ran] == [cells[0].key, *(cell.key for cell in cells)]
    assert {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == seen
    assert len(seen) == len(cells)


def test_ray_gives_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    file = CONFIGS / "figure_1a.yaml"
    folders = [tmp_path / "here", tmp_path / "ray"]
    for folder, extra in zip(folders, ([], ["--ray"]), strict=True):
        folder.mkdir()
        main(command(file, folder, *extra))
    here, ray = (table(folder / "results" / "figure_1a.parquet") for folder in folders)
    assert here == ray


def failing(cell: Cell, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
    if cell.n == 9:
        raise KeyError("values[name] of [/x] :x:")
    return run_cell(cell, *args, **kwargs)


def test_a_failed_cell_is_reported_and_the_others_finish(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", failing)
    with pytest.raises(StudyError, match="4 of 12 cells of figure_2a failed"):
        main(command(CONFIGS / "figure_2a.yaml", tmp_path))
    printed = capsys.readouterr()
    assert printed.err.count("Failed: network, n 9") == 4
    assert "KeyError: 'values[name] of [/x] :x:'" in printed.err  # no markup
    assert "8/12 cells, 0 running, 4 failed" in printed.out
    lines = printed.out.splitlines()  # no terminal: a line a cell
    assert lines[0] == "figure_2a: 0/12 cells, 1 running"
    assert sum(line.startswith("figure_2a: ") for line in lines) == 13
    assert sum(", seed 0 took " in line for line in lines) == 4
    assert sum(line.endswith(" failed") and "network, n 9, width" in line for line in lines) == 4
    clock = r"\d:\d\d:\d\d"
    assert re.match(
        rf"figure_2a: 1/12 cells, 1 running, {clock} elapsed, more than {clock} left; network, n 6,", lines[1]
    )
    assert sorted({row["n"] for row in table(tmp_path / "results" / "figure_2a.parquet")}) == [6, 12]


def test_failures_are_reported_when_the_study_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(cell: Cell, *args: Any, **kwargs: Any) -> object:  # noqa: ANN401
        if cell.n == 12:
            raise KeyboardInterrupt
        return failing(cell, *args, **kwargs)

    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(command(CONFIGS / "figure_2a.yaml", tmp_path))
    assert capsys.readouterr().err.count("Failed: network, n 9") == 2


def test_a_study_without_rows_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise RuntimeError

    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", broken)
    with pytest.raises(StudyError, match="12 of 12 cells of figure_2a failed, as printed above; there is no table"):
        main(command(CONFIGS / "figure_2a.yaml", tmp_path))
    assert not list((tmp_path / "results").rglob("*.parquet"))


def test_a_small_memory_budget_fails_cells_and_a_larger_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = {
        "grid": {"n": [6], "seed": [0]},
        "arms": [
            {"label": "after", "after": ["m"]},
            {"label": "during", "kernels_at": 2},
            {"label": "empirical", "model": "empirical"},
        ],
    }
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(overlay))
    arguments = [*command(CONFIGS / "figure_1a.yaml", tmp_path), "--config", str(tmp_path / "arms.yaml")]
    with pytest.raises(StudyError, match="3 of 3 cells of figure_1a failed"):
        main([*arguments, "--memory", "1KB"])
    assert capsys.readouterr().err.count("memory") >= 3
    main(arguments)
    with pytest.raises(ValueError, match="memory must be a number of bytes"):
        main([*arguments, "--memory", "much"])


def test_cells_share_the_nodes_of_a_cluster() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0}, {"memory": 1e9}]
    assert cells_at_once(nodes, 3, 0) == 2 + 2 + 1
    assert cells_at_once(nodes, 1, 0.6) == 4  # two fractions of 0.6 do not fit one GPU
    assert cells_at_once(nodes, 1, 0.1) == 16
    assert cells_at_once(nodes, 4, 2) == 2
    assert [default_threads(nodes, gpus) for gpus in (0, 0.5, 1, 2, 0.1)] == [3, 2, 4, 8, 1]
    for threads, gpus in ((9, 0), (1, 3), (9, 0.5)):  # the cluster has 19 CPUs and 4 GPUs
        with pytest.raises(
            ValueError, match=r"which no node of the cluster has \(they have 8 CPUs and 2 GPUs, .*--cpus"
        ):
            cells_at_once(nodes, threads, gpus)
        assert default_threads(nodes, gpus) >= 1


def test_nodes_that_are_gone_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": cpus}} for alive, cpus in ((True, 2.0), (True, 4.0), (False, 64.0))]
    ray = SimpleNamespace(is_initialized=lambda: True, nodes=lambda: nodes)
    monkeypatch.setitem(sys.modules, "ray", ray)
    for cpus, slots in ((None, 3), (1, 6)):
        with on_ray("local", Path(), Resources("local", cpus), None, ()) as executor:
            assert executor.slots == slots
    with (
        pytest.raises(ValueError, match="A cell asks for 8 CPUs"),
        on_ray("local", Path(), Resources("local", 8), None, ()),
    ):
        pass


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_ray_that_is_not_there_is_one_error(address: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConnectionError, match=rf"Ray cannot be reached at '{address}'.*ray start --head"):
        main(command(CONFIGS / "figure_2a.yaml", tmp_path, "--ray", address))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cpus", "0"], "--cpus must be at least 1, got 0"),
        (["--cpus", "-1"], "--cpus must be at least 1, got -1"),
        (["--gpus", "0.5"], "--gpus needs --ray"),
        (["--ray", "--gpus", "-1"], "--gpus must be a fraction"),
        (["--ray", "--gpus", "1.5"], "--gpus must be a fraction"),
    ],
)
def test_resources_that_cannot_be_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        main([*command(CONFIGS / "figure_2a.yaml", tmp_path), *options])
    assert not (tmp_path / "results").exists()


def test_an_interrupted_study_keeps_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config = read_config([file, tiny(file, tmp_path)])
    ran: list[Cell] = []

    def interrupted(cell: Cell, *args: object, **kwargs: object) -> object:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return run_cell(cell, tmp_path, "1GB")

    monkeypatch.setattr("ntk_lightning.studies.cell.run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, tmp_path / "results")
    assert [row["cell"] for row in table(tmp_path / "results" / "figure_2a.parquet")] == [cell.key for cell in ran]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"n": []}}, "no values for n"),
        ({"grid": {"n": [0]}}, "n of the grid must be at least 1, got 0"),
        ({"grid": {"width": [2, 0]}}, "width of the grid must be at least 1, got 0"),
        ({"grid": {"epochs": [0]}}, "epochs must be at least 1, got 0"),
        ({"grid": {"widht": [2]}}, "widht"),
        ({"grid": {"lr": ["fast"]}}, "fast"),
        ({"grid": {"n": [6, 41]}}, "n_train [+] n_val [+] fresh = 41.*ask for fewer"),
        ({"arms": [{"label": "a", "after_fresh": [29]}]}, "n_train [+] n_val [+] fresh = 41.*ask for fewer"),
        ({"arms": [{"label": "a", "model": "finite"}]}, "finite"),
        ({"arms": [{"label": "a"}, {"label": "a"}]}, "different labels"),
        ({"arms": [{"label": "a", "model": "infinite", "after": [3]}]}, "only a network can"),
        ({"arms": [{"label": "a", "model": "infinite", "until_train_error": 0.0}]}, "only a network can"),
        ({"arms": [{"label": "a", "model": "infinite", "kernels_at": []}]}, "only a network can"),
        (
            {"arms": [{"label": "a", "after": [13]}]},
            r"after = \[13\] of arm 'a' is more than any of its n = \[6, 9, 12\]",
        ),
        ({"arms": [{"label": "a", "after_fresh": [0]}]}, "after_fresh of arm 'a' must be sizes of at least 1"),
        ({"arms": [{"label": "a", "kernels_at": 0}]}, "kernels_at of arm 'a' must be steps of at least 1"),
        ({"arms": [{"label": "a", "kernels_at": [0, 2]}]}, "kernels_at of arm 'a' must be steps of at least 1"),
        ({"arms": [{"label": "a", "until_train_error": 5.0}]}, r"until_train_error of arm 'a' must be in \[0, 1\]"),
        ({"arms": [{"label": "a", "show": ["after kernel"]}]}, "after kernel"),
        ({"arms": [{"label": "a", "show": ["after-kernel"]}]}, "must name some of what it makes"),
        (
            {"arms": [{"label": "a", "after": ["m"]}], "figure": {"fitted_on": 5}},
            "fitted_on = 5.*fitted on .6, 9, 12. samples",
        ),
        ({"figure": {"fitted_on": "m"}}, "fitted_on = 'm'.*matches none"),
        (
            {"arms": [{"label": "a", "kernels_at": [1]}], "figure": {"at": [1, 3]}},
            r"no arm shows a kernel at t = \[3\]",
        ),
        ({"arms": [{"label": "a", "kernels_at": [1, 99]}], "figure": {"at": [99]}}, r"kernel at t = \[99\]"),
        ({"data": {"class_path": "ntk_lightning.datamodules.Nothing"}}, "Nothing"),
        ({"net": {"init_args": {"wdith": 3}}}, "wdith"),
        ({"figure": {"x": "depth"}}, "depth"),
        ({"figure": {"value": "least"}}, "least"),
        ({"name": "../elsewhere"}, "must be a file's name"),
        ({"name": ""}, "must be a file's name"),
        ({"scales": ["small"]}, "scales in .* must map names to changes"),
        ({"scales": {"small": 3}}, "scales in .* must map names to changes"),
    ],
)
def test_wrong_configurations_are_refused_before_any_cell(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(ValueError, match=message):
        main([*command(CONFIGS / "figure_1a.yaml", tmp_path), "--config", str(tmp_path / "wrong.yaml")])
    assert not (tmp_path / "results").exists()


def test_sizes_that_only_some_networks_have_are_left_out(tmp_path: Path) -> None:
    file = CONFIGS / "figure_1a.yaml"
    (tmp_path / "after.yaml").write_text(yaml.safe_dump({"arms": [{"label": "a", "after": [9]}]}))
    cells = read_config([file, tiny(file, tmp_path), tmp_path / "after.yaml"]).cells()["a"]
    assert {cell.n: cell.after for cell in cells} == {6: (), 9: (9,), 12: (9,)}


def test_an_arm_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="must name some of what it makes: \\['infinite'\\]"):
        Arm("limit", "infinite", show=["network"])


def test_null_removes_a_key(tmp_path: Path) -> None:
    files = [tmp_path / "base.yaml", tmp_path / "change.yaml"]
    file = CONFIGS / "figure_1a.yaml"
    figure = {"published": {"network": 0.291, "infinite NTK": 0.2}, "fitted_on": 3}
    files[0].write_text(yaml.safe_dump({"figure": figure, "scales": {"small": {"figure": {"published": None}}}}))
    files[1].write_text(yaml.safe_dump({"figure": {"published": {"infinite NTK": None}, "fitted_on": None}}))
    assert read_config([file, files[0]], "small").figure.published == {}
    figure_of = read_config([file, *files]).figure
    assert (figure_of.published, figure_of.fitted_on) == ({"network": 0.291, "empirical NTK": 0.185}, None)


@pytest.mark.parametrize("content", [b"grid: {n: [1", b"title: \xff", b"- a list"])
def test_a_file_that_is_no_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.yaml is not"):
        read_config([CONFIGS / "figure_1a.yaml", tmp_path / "broken.yaml"])


def test_missing_files_and_scales_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml, name one of your own, or one that comes with"):
        read_config([tmp_path / "nothing.yaml"])
    with pytest.raises(ValueError, match=r"no scale 'huge'.*cifar10.*small"):
        read_config([CONFIGS / "figure_1a.yaml"], "huge")


def test_a_cell_leaves_no_file_where_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_5a.yaml"
    cell = read_config([file, tiny(file, tmp_path)]).cells()["network"][0]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_cell(cell, tmp_path, "1GB")
    assert not list((tmp_path / "here").iterdir())


class Run:
    """Stands for a run of W&B."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        self.options, self.history, self.summary = options, [], {}
        self.log = lambda values, step: self.history.append((step, values["test/error"]))

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_every_row_is_logged_to_wandb_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Run] = []
    monkeypatch.setattr("wandb.init", lambda **options: runs.append(Run(**options)) or runs[-1])
    file = CONFIGS / "figure_4a.yaml"
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"grid": {"n": [6], "seed": [0]}}))
    arguments = [*command(file, tmp_path), "--config", str(tmp_path / "one.yaml")]
    main(arguments)
    main([*arguments, "--wandb", "a_project"])  # the cell is not new, its rows are
    assert [run.options["name"] for run in runs] == [
        "network, n 6, width 2, lr 0.1, seed 0",
        *(
            f"network, {kernel}, n 6, m 6, t 2, width 2, lr 0.1, seed 0"
            for kernel in ("after-kernel", "after-kernel, fresh")
        ),
    ]
    assert {run.options["group"] for run in runs} == {"figure_4a"}
    assert {run.options["config"]["arm"] for run in runs} == {"network"}
    assert len({run.options["id"] for run in runs}) == 3
    rows = table(tmp_path / "results" / "figure_4a.parquet")
    for run, row in zip(runs, rows, strict=True):
        assert run.history == list(zip(row["curve_steps"], row["curve_errors"], strict=True))
        assert run.summary["test/last_error"] == row["last_error"]
    main([*arguments, "--wandb", "a_project"])
    assert len(runs) == 3
    main([*arguments, "--wandb", "another"])
    assert [run.options["id"] for run in runs[3:]] == [run.options["id"] for run in runs[:3]]


def test_a_failure_of_wandb_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(**_: object) -> object:
        raise ConnectionError("api.wandb.ai [no answer]")

    monkeypatch.setattr("wandb.init", unreachable)
    main(command(CONFIGS / "figure_5a.yaml", tmp_path, "--wandb", "a_project"))
    assert "has not taken all rows (api.wandb.ai [no answer])" in capsys.readouterr().err
    assert (tmp_path / "results" / "figure_5a.parquet").exists()


def test_wandb_keeps_runs_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    file = CONFIGS / "figure_4b.yaml"
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"grid": {"n": [6], "seed": [0]}}))
    main([*command(file, tmp_path, "--wandb", "a_project"), "--config", str(tmp_path / "one.yaml")])
    assert len(list((tmp_path / "results" / "wandb").glob("offline-run-*"))) == 1


EARLIER = Path(__file__).parent / "data" / "study_of_0_1"  # what version 0.1.0 wrote of a tiny figure 1A


def test_tables_of_an_earlier_version_are_drawn_and_its_cells_refused_in_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(EARLIER, tmp_path / "results")
    results = str(tmp_path / "results")
    assert len(figures(results)) == 2
    assert report(results).exists()
    study = read_study(tmp_path / "results" / "figure_1a.parquet")
    assert len(study.rows) == 18
    with pytest.raises(ValueError, match=r"results are of an earlier version.*choose another --output") as refused:
        main(command(CONFIGS / "figure_1a.yaml", tmp_path))
    assert str(refused.value).count(". ") == 0
    assert len(list((tmp_path / "results" / "cells").iterdir())) == 1


def a_cell(**changes: Any) -> Cell:  # noqa: ANN401
    return Cell(**{"model": "network", "n": 8, "width": 2, "seed": 1, "optimizer": OptimizerConfig(lr=0.5), **changes})


@dataclass(frozen=True)
class LaterOptimizer(OptimizerConfig):
    nesterov: bool = False


@dataclass(frozen=True)
class LaterCell(Cell):
    augment: bool = False
    widths: list[int] = field(default_factory=list)


def test_a_new_option_with_a_default_leaves_finished_cells_finished() -> None:
    later = LaterCell(**{**vars(a_cell()), "optimizer": LaterOptimizer(lr=0.5)})
    assert "nesterov" in later.config
    assert "widths" in later.config
    assert later.key == a_cell().key
    changed = [replace(later, augment=True), replace(later, widths=[1])]
    changed.append(replace(later, optimizer=LaterOptimizer(lr=0.5, nesterov=True)))
    assert len({cell.key for cell in (later, *changed)}) == 4


@pytest.mark.parametrize(
    "change",
    [
        {"model": "order 2"},
        {"n": 9},
        {"width": 3},
        {"seed": 2},
        {"optimizer": OptimizerConfig(lr=0.25)},
        {"optimizer": OptimizerConfig(lr=0.5, full_batch=True)},
        {"after": (4,)},
        {"after_fresh": (4,)},
        {"kernels_at": (4,)},
        {"log_spaced": 4},
        {"until_train_error": 0.0},
        {"evaluate_every": 2},
        {"data": {"class_path": "a"}},
        {"net": {"class_path": "a"}},
        {"net": {"class_path": "a", "init_args": {"width": 2}}},
    ],
)
def test_every_value_that_is_no_default_changes_the_key(change: dict[str, Any]) -> None:
    assert a_cell(**change).key != a_cell().key


def test_the_defaults_behind_the_keys_are_those_of_finished_cells() -> None:
    # A key leaves defaults out: one that changed would give the results of the old default the key of the new one.
    assert vars(OptimizerConfig()) == {
        **{"lr": 0.1, "momentum": 0.9, "batch_size": 200, "epochs": 20, "steps": None, "full_batch": False, "seed": 0}
    }
    defaults = vars(Cell("network", 1, 1, 0, OptimizerConfig()))
    assert {
        name: value for name, value in defaults.items() if name not in ("model", "n", "width", "seed", "optimizer")
    } == {
        **{"after": (), "after_fresh": (), "kernels_at": None, "log_spaced": None, "until_train_error": None},
        **{"evaluate_every": 1, "data": {}, "net": {}},
    }
    assert a_cell().key == "fb61656bb600884da78514fe"


def sized(model: str, n: int, width: int | None = None, epochs: int = 20) -> Cell:
    return a_cell(model=model, n=n, width=width, optimizer=OptimizerConfig(epochs=epochs))


def test_the_time_left_is_that_of_the_closest_cell_of_the_kind() -> None:
    now = [(sized("network", 100, 8), 10.0), (sized("network", 400, 8), 20.0), (sized("infinite", 100), 5.0)]
    assert seconds_left([sized("network", 800, 8)], now, [], 1) == (40.0, True)
    assert seconds_left([sized("network", 50, 8)], now, [], 1) == (5.0, True)
    assert seconds_left([sized("network", 100, 8, epochs=40)], now, [], 1) == (20.0, True)
    assert seconds_left([sized("infinite", 300)], now, [], 1) == (45.0, True)
    assert seconds_left([sized("infinite", 300), sized("network", 800, 8)], now, [], 2) == (42.5, True)
    assert seconds_left([sized("infinite", 300), sized("network", 800, 16)], now, [], 1) == (45.0, False)
    assert seconds_left([sized("network", 800, 8)], [], now, 1) == (40.0, True)
    assert seconds_left([sized("network", 800, 8)], [(sized("network", 100, 8), 1.0)], now, 1) == (8.0, True)
    assert seconds_left([], now, [], 1) == (0.0, True)


OWN_DATA = """
import torch
from ntk_lightning.datamodules import ImageDataModule, Samples

class OwnData(ImageDataModule):
    sign, loaded = 1.0, 0

    def load(self, train):
        type(self).loaded += 1
        x = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(int(train)))
        return Samples(x, self.sign * x.mean((1, 2, 3)).sign())

class Downloaded(OwnData):
    def prepare_data(self):
        pass
"""


@pytest.mark.parametrize("name", ["OwnData", "Downloaded"])
def test_data_that_have_changed_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_data.py").write_text(OWN_DATA)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    classes = import_module("own_data")
    grid = Grid(n=[6], width=[2], seed=[0], epochs=[1], batch_size=[6])
    net = {"class_path": "ntk_lightning.networks.MLP", "init_args": {"in_features": 64, "depth": 2}}
    data = {"class_path": f"own_data.{name}", "init_args": {"n_test": 8, "n_statistics": 12}}
    config = StudyConfig("own", "Own data", data, net, [Arm("network")], grid)
    folder = tmp_path / "results"
    before = table(run_study(config, folder))
    loaded = getattr(classes, name)
    assert loaded.loaded == 4  # both pools before the study, and in its cell
    assert table(run_study(config, folder)) == before
    monkeypatch.setattr(classes.OwnData, "sign", -1.0)
    larger = replace(config, grid=replace(grid, n=[6, 12]))
    with pytest.raises(ValueError, match=rf"own have changed: 1 finished cells .*own_data\.{name} loads now"):
        run_study(larger, folder)
    if name == "OwnData":
        with pytest.raises(ValueError, match=r"have changed.*another --output"):
            run_study(config, folder)
    else:  # nothing is left to run, and the data may not be here: they are not downloaded to be compared
        count = loaded.loaded
        assert table(run_study(config, folder)) == before
        assert loaded.loaded == count
    monkeypatch.setattr(classes.OwnData, "sign", 1.0)
    assert len(table(run_study(larger, folder))) == 2


def test_a_base_is_found_beside_its_file_or_among_those_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no checkout
    (tmp_path / "mine").mkdir()
    own = tmp_path / "mine" / "own.yaml"
    own.write_text("base: cli_configs/studies/figure_1a.yaml\nname: own\n")
    assert read_config([own]).arms == read_config(["cli_configs/studies/figure_1a.yaml"]).arms
    (tmp_path / "mine" / "second.yaml").write_text("base: own.yaml\ntitle: Second\n")
    second = read_config([tmp_path / "mine" / "second.yaml"])
    assert (second.name, second.title) == ("own", "Second")
    own.write_text("base: figure_1a.yaml\nname: own\n")
    with pytest.raises(FileNotFoundError, match=r"mine/figure_1a\.yaml, the base of .*own\.yaml: name a file beside"):
        read_config([own])


def test_the_papers_exponents_and_scale_are_not_those_of_other_data(tmp_path: Path) -> None:
    shipped = "cli_configs/studies/figure_1a.yaml"
    paper = read_config([shipped])
    assert (paper.scale, len(paper.figure.published)) == ("paper", 3)
    files = [tmp_path / name for name in ("same.yaml", "other.yaml", "own.yaml")]
    files[0].write_text(yaml.safe_dump({"data": {"init_args": {"path": "elsewhere"}}}))
    files[1].write_text(yaml.safe_dump({"data": {"class_path": "my_data.Mine"}}))
    files[2].write_text(yaml.safe_dump({"base": shipped, "name": "own", "data": {"class_path": "my_data.Mine"}}))
    assert read_config([shipped, files[0]]).figure == paper.figure
    for own in (read_config([shipped, files[1]]), read_config([files[2]])):
        assert (own.scale, own.figure.published) == ("", {})
    assert len(read_config([shipped], "small").figure.published) == 3  # a scale is the project's, and says so
    change = {"data": {"class_path": "my_data.Mine"}, "scale": "mine", "figure": {"published": {"network": 0.5}}}
    files[1].write_text(yaml.safe_dump(change))
    own = read_config([shipped, files[1]])
    assert (own.scale, own.figure.published) == ("mine", {"network": 0.5})


def test_resources_have_one_default_each(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {item.name: item.default for item in fields(Resources)}
    parameters = inspect.signature(run_study).parameters
    assert {name: parameters[name].default for name in defaults} == defaults
    with pytest.raises(SystemExit):
        main(["study", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {defaults['gpus']:g})" in shown
    assert f"(default: {defaults['memory']})" in shown
