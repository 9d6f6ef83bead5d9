"""Progress without a terminal: a line a minute or at each quarter, nothing of what takes seconds, on rank zero only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import rich
import tiny

from ntk_lightning import progress
from ntk_lightning.callbacks.training_lines import TrainingLines
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.progress import ProgressLines, progress_bar
from ntk_lightning.wandb_logger import QuietWandbLogger

ROOT = Path(__file__).parent.parent


class Clock:
    """A clock that a test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 1000.0
        monkeypatch.setattr(progress, "monotonic", lambda: self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lines(clock: Clock, capsys: pytest.CaptureFixture[str], seconds_per_unit: float) -> list[str]:
    with progress_bar("kernel", 100, "pairs") as advance:
        for _ in range(100):
            clock.seconds += seconds_per_unit
            advance(1)
    return capsys.readouterr().out.splitlines()


def test_long_work_prints_a_line_a_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(clock, capsys, 12.0)
    assert len(found) == 20  # of twenty minutes
    assert found[0] == "kernel: 5/100 pairs (5%), 0.0833/s, 0:19:00 left"
    assert found[-1] == "kernel: 100/100 pairs (100%), 0.0833/s, done"


def test_work_of_a_minute_or_two_prints_its_quarters(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(clock, capsys, 0.5)
    assert [line.split()[1] for line in found] == ["25/100", "50/100", "75/100", "100/100"]


def test_work_of_seconds_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(clock, capsys, 0.05) == []


@pytest.mark.parametrize("why", ["disabled", "another rank"])
def test_nothing_is_printed_where_no_bar_would_be(
    why: str, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "another rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    with progress_bar("kernel", 2, "pairs", enabled=why != "disabled") as advance:
        clock.seconds += 1000
        advance(1)
    assert capsys.readouterr().out == ""


def test_a_terminal_has_a_bar_and_no_lines(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich, "get_console", lambda: rich.console.Console(force_terminal=True, width=100))
    with progress_bar("kernel", 2, "pairs") as advance:
        clock.seconds += 1000
        advance(1)
    out = capsys.readouterr().out
    assert "kernel: 1/2" not in out


def test_resumed_work_measures_its_speed_from_where_it_began(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work = ProgressLines("training", 100, "steps", done=60)
    clock.seconds += 60
    work.advance(6)
    assert capsys.readouterr().out == "training: 66/100 steps (66%), 0.1/s, 0:05:40 left\n"


def test_training_prints_steps_and_metrics(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(TrainingLines):
        def on_train_batch_end(self, *args: object) -> None:
            clock.seconds += 61
            super().on_train_batch_end(*args)  # type: ignore[arg-type]

    tiny.fit(FiniteNetwork(tiny.net(), tiny.OPTIMIZER), tiny.data(), epochs=2, callbacks=[Slow()])
    found = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training:")]
    assert len(found) == 8
    assert found[-1].startswith("training: 8/8 steps (100%), 0.0164/s, done")
    assert "train/error" in found[-1]


QUIET_RUN = """
import sys
from ntk_lightning.wandb_logger import QuietWandbLogger
logger = QuietWandbLogger(project="test", save_dir=sys.argv[1] + "/runs", offline=True)
logger.log_metrics({"x": 1.0}, step=0)
logger.experiment.finish()
"""


@pytest.mark.ci
def test_the_logger_of_the_first_command_does_not_warn(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", QUIET_RUN, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "wandb" in told.stderr  # it does speak
    assert "WARNING" not in told.stderr + told.stdout
    assert list((tmp_path / "runs" / "wandb").glob("offline-run-*"))


def test_the_first_command_uses_that_logger() -> None:
    text = (ROOT / "cli_configs" / "myrtle64.yaml").read_text()
    assert f"{QuietWandbLogger.__module__}.{QuietWandbLogger.__name__}" in text
