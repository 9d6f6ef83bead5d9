"""Kernels that two processes compute together: the values of one process, in their dtype, and errors on both."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.kernels.grams.distributed import (
    distributed_cross,
    distributed_gram,
    distributed_gram_and_cross,
    rank_and_world_size,
)
from ntk_lightning.kernels.grams.gram_and_cross import gram_and_cross
from ntk_lightning.networks import MLP

SECONDS = 60.0  # that a collective waits for a process which does not come


def linear(x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
    """A kernel that is no object, and whose precision is not that of its inputs."""
    return x1.double() @ (x1 if x2 is None else x2).double().T


def kernels() -> dict[str, Callable[..., Tensor]]:
    torch.manual_seed(0)
    net = MLP(6, 2, 5, num_outputs=2, bias_std=0.3)
    return {
        "empirical": EmpiricalNTK(net),
        "empirical in float64": EmpiricalNTK(net, dtype=torch.float64),
        "full": EmpiricalNTK(net, dtype=torch.float64, full=True),
        "infinite": InfiniteNTK(net),
        "linear": linear,
    }


def inputs(n: int, seed: int) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))


X, Y, Z = inputs(11, 0), inputs(4, 1), inputs(7, 2)


def both(kernel: Callable[..., Tensor], x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return distributed_gram_and_cross(gram_and_cross(kernel))(x, *others)


def results() -> dict[str, tuple[Tensor, ...]]:
    """Every kernel of every kind of call; by one process the plain one, by two the shared one."""
    found: dict[str, tuple[Tensor, ...]] = {}
    for name, kernel in kernels().items():
        found[f"{name}, gram"] = (distributed_gram(kernel, X),)
        found[f"{name}, cross"] = (distributed_cross(kernel, Y, X),)
        found[f"{name}, both"] = both(kernel, X, Y, Z)
        found[f"{name}, one sample"] = (*both(kernel, X[:1], Y), distributed_cross(kernel, X[:1], Y))
    found["infinite, bfloat16"] = (distributed_gram(InfiniteNTK(MLP(1, 1, 5)), X.bfloat16()),)
    return found


def failing_on_one(x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
    if rank_and_world_size()[0] == 1:
        raise FloatingPointError("the network has diverged")
    return linear(x1, x2)


def attempt(call: Callable[[], object]) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.perf_counter() - start
    return "no error", time.perf_counter() - start


def errors() -> dict[str, tuple[str, float]]:
    broken = X.clone()
    broken[9] = torch.nan
    diverged = EmpiricalNTK(MLP(6, 2, 5))
    huge = torch.cat([X[:1] * 1e38, X[1:]])  # only in the rows of rank 0
    return {
        "gram": attempt(lambda: distributed_gram(failing_on_one, X)),
        "cross": attempt(lambda: distributed_cross(failing_on_one, Y, X)),
        "both": attempt(lambda: both(failing_on_one, X, Y)),
        "overflow": attempt(lambda: distributed_gram(diverged, huge)),
        "inputs": attempt(lambda: distributed_gram(linear, broken)),
        "nothing": attempt(lambda: distributed_gram(linear, X[:0])),
    }


def share(rank: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    torch.save((results(), errors()), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("shards")
    multiprocessing.spawn(share, (str(folder),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]  # torch's
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_end_with_the_values_and_dtype_of_one(processes: list[Any]) -> None:
    for name, expected in results().items():
        first, second = (found[name] for found, _ in processes)
        for alone, a, b in zip(expected, first, second, strict=True):
            assert a.dtype == alone.dtype, name
            assert torch.equal(a, b), name
            tolerance = 1e-12 if a.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(a, alone, rtol=tolerance, atol=tolerance)
        if first[0].shape[:2] == (len(X), len(X)):
            assert torch.equal(first[0], first[0].transpose(0, 1).mT if first[0].dim() == 4 else first[0].T), name


@pytest.mark.parametrize("call", ["gram", "cross", "both"])
def test_an_error_on_one_process_ends_the_call_on_both(call: str, processes: list[Any]) -> None:
    (waiting, waited), (failed, _) = (found[call] for _, found in processes)
    assert failed == "FloatingPointError: the network has diverged"
    assert waiting == failed.replace("FloatingPointError: ", "FloatingPointError: Process 1 failed: ")
    assert waited < SECONDS / 2


def test_an_overflow_in_one_share_is_an_error_on_both(processes: list[Any]) -> None:
    failed, waiting = (found["overflow"][0] for _, found in processes)
    assert failed.startswith("FloatingPointError: The kernel of inputs 0 and 0")
    assert failed.removeprefix("FloatingPointError: ") in waiting


@pytest.mark.parametrize(("call", "message"), [("inputs", "first in sample 9"), ("nothing", "at least one sample")])
def test_malformed_inputs_are_told_by_every_process(call: str, message: str, processes: list[Any]) -> None:
    for _, found in processes:
        assert found[call][0].startswith("ValueError")
        assert message in found[call][0]
