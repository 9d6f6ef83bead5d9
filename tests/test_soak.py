"""The soak itself, for seconds: it finds nothing, and it would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the soak limits its children by prlimit")
SCRIPT = Path(__file__).parent / "soak.py"


def soak(folder: Path, *arguments: str) -> tuple[int, dict[str, int], str]:
    """Run the script: its exit status, the counts of its last line, and all that it printed."""
    command = [sys.executable, str(SCRIPT), f"--folder={folder}", f"--json={folder / 'counts.json'}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.stdout, done.stderr
    counts = {name: int(number) for name, number in (word.split("=") for word in done.stdout.splitlines()[-1].split())}
    assert counts.items() <= json.loads((folder / "counts.json").read_text()).items()
    return done.returncode, counts, done.stdout + done.stderr


@pytest.mark.ci
def test_nothing_is_lost_or_wrong(tmp_path: Path) -> None:
    status, counts, printed = soak(tmp_path, "--rounds=3", "--seed=0")
    assert (status, counts["lost"], counts["wrong"]) == (0, 0, 0), printed
    assert counts["kills"] > 0
    assert counts["rounds"] == 3
    assert (counts["fits"], counts["cells"], counts["blocks"]) == (1, 6, 33)
    assert [path.name for path in tmp_path.iterdir()] == ["counts.json"]


@pytest.mark.ci
@pytest.mark.parametrize(("damage", "tasks"), [("lost", ["study", "store"]), ("wrong", ["fit", "store"])])
def test_what_is_lost_or_wrong_is_found_and_kept(damage: str, tasks: list[str], tmp_path: Path) -> None:
    status, counts, printed = soak(tmp_path, f"--rounds={len(tasks)}", "--tasks", *tasks, "--damage", damage)
    assert status == 1
    assert counts[damage] >= len(tasks), printed
    assert [path.name.split("-")[1] for path in sorted(tmp_path.glob("soak-*/0*"))] == tasks
