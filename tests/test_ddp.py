"""The number of processes changes no result: every module and callback under DDP against one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ddp_run
import pytest
import torch

SCRIPT = Path(ddp_run.__file__)
TOLERANCE = {"rel": 1e-10, "abs": 1e-10}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def environment(**variables: object) -> dict[str, str]:
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in variables.items()}


def torchrun(processes: int, folder: Path) -> None:
    """One machine, as a user starts it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [*launcher, f"--master_port={free_port()}", str(SCRIPT), str(folder), str(processes), "1"]
    subprocess.run(command, check=True, env=environment(), timeout=200)


def start_nodes(processes: int, script: Path, *arguments: object) -> list[int]:
    """One process on each of several "machines", which know of each other by environment variables."""
    port = free_port()
    nodes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env=environment(
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=processes, NODE_RANK=rank, LOCAL_RANK=0
            ),
        )
        for rank in range(processes)
    ]
    return [node.wait(200) for node in nodes]


def two_nodes(processes: int, folder: Path) -> None:
    """Several machines."""
    assert start_nodes(processes, SCRIPT, folder, 1, processes) == [0] * processes


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ddp_run.train_all(tmp_path_factory.mktemp("one"))


def cells(tables: dict[str, list[dict[str, str]]]) -> list[tuple[Any, ...]]:
    """List all cells, numbers as numbers."""

    def number(cell: str) -> float | str:
        try:
            return float(cell)
        except ValueError:
            return cell

    return [
        (table, i, column, number(cell))
        for table, rows in tables.items()
        for i, row in enumerate(rows)
        for column, cell in row.items()
    ]


@pytest.mark.parametrize(
    ("launch", "processes"),
    [(torchrun, 2), *(pytest.param(*case, marks=pytest.mark.ci) for case in ((torchrun, 3), (two_nodes, 2)))],
)
def test_processes_change_nothing(
    launch: Any,  # noqa: ANN401 - one of the two above
    processes: int,
    tmp_path: Path,
    one_process: dict[str, Any],
) -> None:
    launch(processes, tmp_path)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found["world_size"] == processes
    for name in ddp_run.modules():
        expected, measured = one_process[name], found[name]
        for key, weight in expected["weights"].items():
            torch.testing.assert_close(measured["weights"][key], weight, rtol=1e-10, atol=1e-10)
        assert measured["logged"] == pytest.approx(expected["logged"], **TOLERANCE)
        assert {"error_curve", "comparison"} <= set(expected["tables"])
        for cell, wanted in zip(cells(measured["tables"]), cells(expected["tables"]), strict=True):
            assert cell[:3] == wanted[:3]
            assert cell[3] == (pytest.approx(wanted[3], **TOLERANCE) if isinstance(wanted[3], float) else wanted[3])
    assert len(one_process["finite"]["tables"]) == 7


@pytest.mark.ci
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = SCRIPT.with_name("ddp_resume.py")
    assert start_nodes(2, script, tmp_path / "calm", 0) == [0, 0]
    assert start_nodes(2, script, tmp_path / "stopped", 5) == [128 + signal.SIGTERM] * 2
    assert (tmp_path / "stopped" / "resume.ckpt").exists()
    assert start_nodes(2, script, tmp_path / "stopped", 0) == [0, 0]
    calm, resumed = (torch.load(tmp_path / name / "weights.pt", weights_only=True) for name in ("calm", "stopped"))
    assert all(torch.equal(weight, resumed[key]) for key, weight in calm.items())
    for table in ("after_kernel.csv", "kernel_dynamics.csv"):
        assert (tmp_path / "calm" / table).read_bytes() == (tmp_path / "stopped" / table).read_bytes()


@pytest.mark.ci
def test_a_kernel_that_overflows_on_one_process_leaves_none_waiting(tmp_path: Path) -> None:
    assert start_nodes(2, SCRIPT.with_name("ddp_resume.py"), tmp_path, -1) == [0, 0]


@pytest.fixture(scope="module")
def agreement(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("agreement")
    assert start_nodes(2, SCRIPT.with_name("ddp_agreement.py"), folder) == [0, 0]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", ["batch norm", "own buffers"])
def test_processes_with_other_buffers_compute_the_kernel_of_the_first(name: str, agreement: dict[str, Any]) -> None:
    first, second = agreement[name]["buffers"]
    assert first != second  # else there would be nothing to show
    for measured, expected in agreement[name]["rows"]:
        assert measured == pytest.approx(expected, rel=1e-9)


def test_processes_with_other_sets_or_weights_are_all_told(agreement: dict[str, Any]) -> None:
    cases = {name: told for name, told in agreement.items() if isinstance(told, list)}
    assert cases.pop("sharded, rounding") == ["nothing", "nothing"]
    assert len(cases) == 9 * 4 + 13
    for name, (first, second) in cases.items():
        assert first == second, name
        assert ("differ from those of process 0" in first) or ("Processes differ in their" in first), (name, first)
    assert "train labels" in cases["one training label, AfterKernel"][0]
    assert "parameter 'net.weight'" in cases["sharded, other weights"][0]
