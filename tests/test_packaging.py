"""The wheel built from the source distribution holds the whole package and runs with no checkout at hand."""

from __future__ import annotations

import ast
import csv
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import studies
import test_cli
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = "ntk_lightning", "callbacks", "datamodules", "tests", "benchmarks", "examples", "docs"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a source distribution."""
    folder = tmp_path_factory.mktemp("build")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    subprocess.run([*build, folder / "sdist", "--sdist", ROOT], check=True, capture_output=True)
    (archive,) = (folder / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    subprocess.run([*build, folder / "wheel", "--wheel", source], check=True, capture_output=True)
    (built,) = (folder / "wheel").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, "--target", folder, wheel], check=True)
    return folder


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """Run the interpreter in a folder, with the installed wheel before everything else; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_wheel_from_sdist_holds_the_linked_folders_and_their_data(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for folder in ("", "callbacks", "datamodules", "cli_configs")
        for pattern in ("**/*.py", "**/*.parquet", "**/*.yaml")
        for path in (ROOT / "ntk_lightning" / folder).glob(pattern)
    }
    assert here <= packed
    assert {"ntk_lightning/callbacks/__init__.py", "ntk_lightning/py.typed"} <= packed
    assert "ntk_lightning/datamodules/data/fashion_mnist_pullover_coat_train.parquet" in packed
    assert {"ntk_lightning/cli_configs/myrtle64.yaml", "ntk_lightning/cli_configs/studies/figure_1a.yaml"} <= packed
    tops = {name.split("/")[0] for name in packed}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ntk_lightning"}


@pytest.mark.ci
@pytest.mark.slow
def test_main_job_runs_from_the_wheel_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    file = python(installed, tmp_path, "-c", "import ntk_lightning; print(ntk_lightning.__file__)")
    assert Path(file.strip()).is_relative_to(installed)
    overlay = test_cli.tiny(tmp_path)
    python(
        installed,
        tmp_path,
        *("-m", "ntk_lightning", "fit", "--config", "cli_configs/myrtle64.yaml", f"--config={overlay}"),
    )
    with (tmp_path / "comparison.csv").open() as lines:
        assert len(list(csv.DictReader(lines))) == 5
    assert (tmp_path / "kernel_dynamics.png").stat().st_size > 0


@pytest.mark.ci
@pytest.mark.slow
def test_a_shipped_study_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    overlay = studies.tiny(studies.CONFIGS / "figure_1a.yaml", tmp_path)
    arms = {"arms": [{"label": "network"}]}
    overlay.write_text(yaml.safe_dump(yaml.safe_load(overlay.read_text()) | arms))
    config = ("--config", "cli_configs/studies/figure_1a.yaml", "--config", overlay.name)
    python(installed, tmp_path, "-m", "ntk_lightning", "study", *config, "--output", "results", "--cpus", "1")
    assert pq.read_table(tmp_path / "results" / "figure_1a.parquet").num_rows == 6


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


@pytest.mark.parametrize(
    "file", [".pre-commit-config.yaml", *sorted((ROOT / ".github").rglob("*.yml"))], ids=lambda file: Path(file).name
)
def test_configurations_of_the_checkout_are_yaml(file: str | Path) -> None:
    assert isinstance(yaml.safe_load((ROOT / file).read_text()), dict)


def test_long_files_say_why() -> None:
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        text = file.read_text()
        assert text.count("\n") <= 300 or "Longer than 300 lines" in (ast.get_docstring(ast.parse(text)) or ""), file


def test_the_map_of_files_is_complete() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("## Words")[0]
    folders = ("ntk_lightning", "callbacks", "datamodules")
    files = {file.resolve() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    names = [file.name for file in files if file.name != "__init__.py"]
    assert sorted(re.findall(r"(\w+\.py)", text)) == sorted(names)
