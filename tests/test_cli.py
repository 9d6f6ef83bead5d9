"""Every shipped configuration runs; a wrong one is refused by name."""

from __future__ import annotations

import csv
import os
import struct
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
import yaml
from test_datamodules import cifar_folder
from wandb.proto.wandb_internal_pb2 import Record

import ntk_lightning
from ntk_lightning.cli import main
from ntk_lightning.commands import COMMANDS, OWN
from ntk_lightning.shipped_configs import find_config, find_configs
from ntk_lightning.studies import read_config

CONFIGS = Path(__file__).parents[1] / "cli_configs"
MAIN = CONFIGS / "myrtle64.yaml"
OVERLAYS = CONFIGS / "overlays"
TINY: dict[str, Any] = {
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False},
    "model": {"init_args": {"net": {"init_args": {"width": 4}}, "optimizer": {"batch_size": 8}}},
    "data": {"init_args": {"n_train": 16, "n_test": 12, "fresh": 8}},
}


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def tiny(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write an overlay that makes a run tiny."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | (changes or {})))
    return path


def run(*configs: Path, extra: tuple[str, ...] = ()) -> Any:  # noqa: ANN401 - the CLI
    return main(["fit", *(f"--config={config}" for config in configs), *extra])


def arms(file: Path) -> list[tuple[str, int]]:
    with file.open() as lines:
        return [(row["name"], int(row["n"])) for row in csv.DictReader(lines)]


def records(file: Path) -> list[Record]:
    """Read an offline W&B run: LevelDB's log format, 7 bytes of header, blocks of 32 KiB, records in pieces."""
    data, offset, piece, found = file.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[offset : offset + 7])
        if offset + 7 + length > len(data):
            break  # not yet written whole
        piece += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(piece))
            piece = b""
        left = 32768 - offset % 32768
        offset += left if left < 7 else 0
    return found


def history_keys(file: Path) -> set[str]:
    """Names of everything logged; a table's or picture's is the first part of a nested key."""
    items = [item for record in records(file) for item in record.history.item]
    return {item.key for item in items} | {key for item in items for key in item.nested_key[:1]}


def test_main_configuration_compares_every_arm_and_logs_to_wandb(tmp_path: Path) -> None:
    changes = {"trainer": {"max_epochs": 2, "accelerator": "cpu"}}
    run(MAIN, tiny(tmp_path, changes))
    wandb.finish()
    (folder,) = (tmp_path / "runs" / "ntk_lightning").iterdir()
    assert arms(folder / "comparison.csv") == [
        ("finite network", 16),
        ("empirical NTK at initialization", 16),
        ("infinite NTK", 16),
        ("after-kernel", 16),
        ("after-kernel, fresh samples", 8),
    ]
    for name in ("kernel_dynamics.png", "kernel_dynamics.csv", "after_kernel.csv", "error_curve.csv", "config.yaml"):
        assert (folder / name).stat().st_size > 0
    (log,) = (tmp_path / "runs" / "wandb").glob("offline-run-*/run-*.wandb")
    expected = {
        *("train/loss", "test/error", "test/optimal_error", "empirical_ntk/test_error", "infinite_ntk/test_error_16"),
        *("kernel_dynamics", "kernel_dynamics_figure", "comparison", "after_kernel"),
    }
    deadline = time.monotonic() + 120  # W&B's own process may still be writing on a busy machine
    while not expected <= (logged := history_keys(log)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert expected <= logged


def test_two_runs_with_the_same_seed_end_in_the_same_table(tmp_path: Path) -> None:
    tables = []
    for name in ("first", "second"):
        extra = (f"--trainer.default_root_dir={tmp_path / name}",)
        run(MAIN, tiny(tmp_path), extra=extra)
        tables.append((tmp_path / name / "comparison.csv").read_bytes())
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("overlay", "arm"), [("linearized", "linearized network"), ("infinite_ntk", "infinite NTK")])
def test_overlays_train_one_model_alone(overlay: str, arm: str, tmp_path: Path) -> None:
    run(MAIN, OVERLAYS / f"{overlay}.yaml", tiny(tmp_path), extra=(f"--trainer.default_root_dir={tmp_path}",))
    assert arms(tmp_path / "comparison.csv") == [(arm, 16)]


def test_cifar_overlay_takes_local_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "cifar"
    folder.mkdir()
    cifar_folder(folder, 36)
    extra = (f"--data.init_args.path={folder}", "--data.init_args.fresh=8", f"--trainer.default_root_dir={tmp_path}")
    cli = run(MAIN, OVERLAYS / "cifar10.yaml", OVERLAYS / "linearized.yaml", tiny(tmp_path), extra=extra)
    assert cli.datamodule.train_set.x.shape == (16, 3, 32, 32)
    assert arms(tmp_path / "comparison.csv") == [("linearized network", 16)]


@pytest.mark.ci
def test_ddp_overlay_runs_two_processes(tmp_path: Path) -> None:
    configs = [MAIN, OVERLAYS / "linearized.yaml", OVERLAYS / "ddp.yaml", tiny(tmp_path)]
    command = [sys.executable, "-m", "ntk_lightning", "fit", *(f"--config={config}" for config in configs)]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"--trainer.default_root_dir={tmp_path}"], check=True, cwd=tmp_path, env=environment)
    run(MAIN, OVERLAYS / "linearized.yaml", tiny(tmp_path), extra=(f"--trainer.default_root_dir={tmp_path / 'one'}",))
    with (tmp_path / "error_curve.csv").open() as two, (tmp_path / "one" / "error_curve.csv").open() as one:
        for row, expected in zip(csv.DictReader(two), csv.DictReader(one), strict=True):
            assert row["step"] == expected["step"]
            assert float(row["test_error"]) == pytest.approx(float(expected["test_error"]), abs=1e-6)


def test_online_overlay_asks_wandb_for_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked(Exception):
        pass

    def init(**options: Any) -> None:  # noqa: ANN401 - W&B's
        raise Asked(options["mode"], options["project"])

    monkeypatch.setattr(wandb, "init", init)
    overlay = tiny(tmp_path, {"trainer": {"max_epochs": 1, "accelerator": "cpu"}})
    with pytest.raises(Asked, match=r"\('online', 'ntk_lightning'\)"):
        run(MAIN, OVERLAYS / "wandb_online.yaml", overlay)


LIGHTNING = [name for name in COMMANDS if name not in OWN]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code in (0, None)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith(f"example: python -m ntk_lightning {name} ")]


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_the_overview_lists_every_command(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ntk_lightning", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    told = capsys.readouterr()
    text = told.err if code else told.out
    assert set(COMMANDS) == {"fit", "validate", "test", "predict", "study", "figures", "report"}
    for name in COMMANDS:
        assert f"\n  {name} " in text
        assert f"\n  python -m ntk_lightning {name} " in text


@pytest.mark.parametrize("name", LIGHTNING)
def test_examples_of_runs_are_whole_configurations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, *COMMANDS[name].example.split(), "--print_config"])
    assert ended.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"].endswith("FiniteNetwork")
    assert name == "fit" or config["ckpt_path"] == "FILE"


@pytest.mark.parametrize(
    ("name", "function"),
    [("study", "study.study"), ("figures", "figure_draw.figures"), ("report", "report_wandb.report")],
)
def test_examples_of_the_other_commands_parse(name: str, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    module, _, attribute = function.partition(".")
    monkeypatch.setattr(
        import_module(f"ntk_lightning.studies.{module}"), attribute, lambda **options: given.update(options)
    )
    main([name, *COMMANDS[name].example.split()])
    if name == "study":
        assert read_config(given["config"], given["scale"]).name == "figure_1a"
    else:
        assert given["results"] == "runs/studies/small"  # where the study's example puts them


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what a machine without a GPU is told")
def test_gpu_overlay_says_that_there_is_none(tmp_path: Path) -> None:
    overlay = {"trainer": {"logger": False}}
    (tmp_path / "quiet.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(Exception, match="No supported gpu backend"):
        run(MAIN, OVERLAYS / "gpu.yaml", tmp_path / "quiet.yaml")


def test_a_misspelled_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("model: {init_args: {optimizer: {learning_rte: 0.1}}}")
    with pytest.raises(SystemExit) as ended:
        run(MAIN, wrong)
    assert ended.value.code not in (0, None)
    assert "learning_rte" in capsys.readouterr().err


def test_a_missing_configuration_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(Path("nowhere.yaml"))
    assert ended.value.code not in (0, None)
    assert "nowhere.yaml" in capsys.readouterr().err


def test_shipped_configurations_are_found_where_there_is_no_checkout(tmp_path: Path) -> None:
    shipped = str(Path(ntk_lightning.__file__).parent / "cli_configs" / "myrtle64.yaml")
    arguments = [
        "fit",
        "--config",
        "cli_configs/myrtle64.yaml",
        "--config=myrtle64.yaml",
        "-c",
        "a.yaml",
        "--config=b: 1",
    ]
    assert find_configs(arguments) == [
        "fit",
        "--config",
        shipped,
        f"--config={shipped}",
        "-c",
        "a.yaml",
        "--config=b: 1",
    ]
    (tmp_path / "myrtle64.yaml").write_text("{}")  # what is there comes first
    assert find_config("myrtle64.yaml") == "myrtle64.yaml"
    assert read_config(["cli_configs/studies/figure_1a.yaml"]).name == "figure_1a"
