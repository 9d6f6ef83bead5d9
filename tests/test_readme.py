"""The README's code and commands run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from studies import tiny as tiny_study
from test_cli import tiny

import ntk_lightning
from ntk_lightning.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def runs(*names: str) -> list[list[str]]:
    commands = re.findall(rf"python -m ntk_lightning ((?:{'|'.join(names)}) .+)", "\n".join(blocks("bash")))
    assert len(commands) >= 3
    return [shlex.split(command) for command in commands]


def test_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("python")
    names: dict[str, object] = {}
    exec(block, names)
    assert names["infinite"].shape == (8, 8)  # type: ignore[attr-defined]  # a tensor
    assert 0.2 < names["law"].beta < 0.5  # type: ignore[attr-defined]  # a PowerLawFit


@pytest.mark.parametrize("arguments", runs("fit"), ids=" ".join)
def test_commands_run(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main([*arguments, f"--config={tiny(tmp_path)}", f"--trainer.default_root_dir={tmp_path}"])
    assert (tmp_path / "comparison.csv").exists()


@pytest.mark.ci
def test_study_its_figures_and_its_report_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_configs").symlink_to(ROOT / "cli_configs")
    study, figures, report = runs("study", "figures", "report")
    overlay = tiny_study(ROOT / "cli_configs" / "studies" / "figure_1a.yaml", tmp_path)
    main([*study, "--config", str(overlay)])
    main(figures)
    main(report)
    assert {"figure_1a.parquet", "figure_1a.png", "figure_1a_loss.png", "report.html"} <= {
        path.name for path in (tmp_path / "runs" / "studies" / "small").iterdir()
    }


def test_setup_takes_two_commands_and_ci_runs_the_second() -> None:
    installs = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("pip install")]
    assert len(installs) == 2
    assert installs[0].endswith("python -m ntk_lightning fit --config cli_configs/myrtle64.yaml")
    assert installs[1].endswith("&& python -m pytest")
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_links_and_names_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for module, names in re.findall(r"^\| `ntk_lightning\.(\w+)` \| (.+) \|$", README, re.MULTILINE):
        exported = getattr(__import__(f"ntk_lightning.{module}", fromlist=["*"]), "__all__")  # noqa: B009 - by name
        missing = set(re.findall(r"`(\w+)`", names)) - set(exported)
        assert not missing, f"{module}: {missing}"
    assert ntk_lightning.__doc__
