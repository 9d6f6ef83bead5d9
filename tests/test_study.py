"""Every shipped study runs; a study that is killed, or has a cell that fails, loses nothing else."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from studies import CONFIGS, SHIPPED, table, tiny
from tiny import file_size_limit

from ntk_lightning.cli import main
from ntk_lightning.scaling.cells import Cell, read_config
from ntk_lightning.scaling.run_cell import run_cell
from ntk_lightning.scaling.study import COLUMNS, StudyError, run_study

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
def test_every_shipped_study_runs(file: Path, tmp_path: Path) -> None:
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
        run_cell(cell, tmp_path / "grams")
    assert len([path for path in (tmp_path / "grams").iterdir() if path.is_dir()]) == 1


KILLED = """
import os, sys, time
from ntk_lightning.cli import main
args, delays = sys.argv[1].split("\\n"), [float(delay) for delay in sys.argv[2].split()]
cells = os.path.join(args[args.index("--output") + 1], "cells")
seen = {}
for delay in [*delays, None]:
    child = os.fork()
    if child == 0:
        main(args)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    assert delay is not None or status == 0, status
    now = {name: os.stat(os.path.join(cells, name)).st_mtime_ns
           for name in (os.listdir(cells) if os.path.isdir(cells) else []) if name.endswith(".parquet")}
    assert all(now.get(name) == time for name, time in seen.items()), "a finished cell was run again or lost"
    print("after", delay, "s:", len(now), "cells")
    seen = now
"""


def test_a_study_killed_five_times_ends_in_the_undisturbed_table(tmp_path: Path) -> None:
    file = CONFIGS / "figure_4a.yaml"
    (tmp_path / "killed").mkdir()
    chance = random.Random(0)
    delays = " ".join(f"{chance.uniform(0.2, 1.5):.2f}" for _ in range(5))
    arguments = "\n".join(command(file, tmp_path / "killed"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, arguments, delays], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    main(command(file, tmp_path))
    name = Path("results") / "figure_4a.parquet"
    assert table(tmp_path / "killed" / name) == table(tmp_path / name)


def test_a_full_disk_is_told_and_keeps_the_finished_cells(tmp_path: Path) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config, folder = read_config([file, tiny(file, tmp_path)]), tmp_path / "results"
    with file_size_limit(0), pytest.raises(OSError, match=r"\.parquet: .*Make room there.*finished cells are kept"):
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
        return run_cell(cell, tmp_path)

    seen: dict[Path, int] = {}
    monkeypatch.setattr("ntk_lightning.scaling.study.run_cell", overtaken)
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


def test_a_failed_cell_is_reported_and_the_others_finish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = CONFIGS / "figure_2a.yaml"
    arguments = command(file, tmp_path)
    change = {"grid": {"n": [6, 4000]}, "data": {"init_args": {"n_statistics": 6}}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(StudyError, match="4 of 8 cells of figure_2a failed"):
        main([*arguments, "--config", str(tmp_path / "more.yaml")])
    assert "ask for fewer" in capsys.readouterr().err
    assert [row["n"] for row in table(tmp_path / "results" / "figure_2a.parquet")] == [6] * 4


def test_an_interrupted_study_keeps_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_2a.yaml"
    config = read_config([file, tiny(file, tmp_path)])
    ran: list[Cell] = []

    def interrupted(cell: Cell, *args: object, **kwargs: object) -> object:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return run_cell(cell, tmp_path)

    monkeypatch.setattr("ntk_lightning.scaling.study.run_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_study(config, tmp_path / "results")
    assert [row["cell"] for row in table(tmp_path / "results" / "figure_2a.parquet")] == [cell.key for cell in ran]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"n": []}}, "no values for n"),
        ({"grid": {"widht": [2]}}, "widht"),
        ({"arms": [{"label": "a", "model": "finite"}]}, "finite"),
        ({"arms": [{"label": "a"}, {"label": "a"}]}, "different labels"),
        ({"arms": [{"label": "a", "model": "infinite", "after": [3]}]}, "only a network can"),
        ({"data": {"class_path": "ntk_lightning.datamodules.Nothing"}}, "Nothing"),
        ({"net": {"init_args": {"wdith": 3}}}, "wdith"),
        ({"grid": {"lr": ["fast"]}}, "fast"),
        ({"figure": {"x": "depth"}}, "depth"),
    ],
)
def test_wrong_configurations_are_refused_before_any_cell(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(change))
    with pytest.raises(ValueError, match=message):
        main([*command(CONFIGS / "figure_1a.yaml", tmp_path), "--config", str(tmp_path / "wrong.yaml")])
    assert not (tmp_path / "results").exists()


def test_missing_files_and_scales_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cli_configs/studies has one per figure"):
        read_config([tmp_path / "nothing.yaml"])
    with pytest.raises(ValueError, match=r"no scale 'huge'.*cifar10.*small"):
        read_config([CONFIGS / "figure_1a.yaml"], "huge")


def test_a_cell_leaves_no_file_where_it_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / "figure_5a.yaml"
    cell = read_config([file, tiny(file, tmp_path)]).cells()["network"][0]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_cell(cell, tmp_path / "grams")
    assert not list((tmp_path / "here").iterdir())


def test_new_cells_are_logged_to_wandb_one_run_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    file = CONFIGS / "figure_4b.yaml"
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"grid": {"n": [6], "seed": [0]}}))
    arguments = [*command(file, tmp_path, "--wandb", "a_project"), "--config", str(tmp_path / "one.yaml")]
    main(arguments)
    runs = list((tmp_path / "results" / "wandb").glob("offline-run-*"))
    assert len(runs) == 2  # the network, and its after-kernel on fresh samples
    main(arguments)
    assert list((tmp_path / "results" / "wandb").glob("offline-run-*")) == runs
