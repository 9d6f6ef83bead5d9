"""Every example runs, on tiny settings, and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "kernel_of_your_cnn": (
        ["--n=12", "--probe=4", "--widths", "2", "64", "--seeds=1"],
        [r"width +2: relative distance \d", r"width +64: relative distance \d", r"infinite: test error [\d.]+%"],
    ),
    "watch_any_module": (
        ["--n=16", "--width=4", "--epochs=2", "--times=2", "--output=."],
        [r"\n +0 .*%.*% +1\.000 ", r"Tables and pictures"],
    ),
    "width_study": (
        ["--n", "6", "9", "12", "--n-test=16", "--widths", "2", "3", "--seeds=2", "--epochs=2", "--output=."],
        [r"width 2 ", r"width 3 ", r"infinite NTK ", r"Figure: width_study.png"],
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ci] * (name == "width_study")) for name in TINY]
)
def test_examples_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = TINY[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in expected:
        assert re.search(pattern, printed), pattern


def test_no_example_is_left_out() -> None:
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(TINY)
