"""Targets are told apart as class numbers, two classes, one-hot or real, and brought to what a kernel is fitted to."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from ntk_lightning import targets
from ntk_lightning.objective import check_labels, encode_targets
from ntk_lightning.targets import describe_targets, targets_for

CASES: dict[str, tuple[Any, int, str, Any]] = {
    "class numbers": ([2, 0], 3, "classes", [[0, 0, 1], [1, 0, 0]]),
    "class numbers as floats": ([2.0, 0.0], 3, "classes", [[0, 0, 1], [1, 0, 0]]),
    "two classes on two outputs": ([True, False], 2, "classes", [[0, 1], [1, 0]]),
    "zero and one": ([0, 1, 1], 1, "binary", [-1, 1, 1]),
    "zero only": ([0, 0], 1, "binary", [-1, -1]),
    "booleans": ([True, False], 1, "binary", [1, -1]),
    "zero and one as floats": ([0.0, 1.0], 1, "binary", [-1, 1]),
    "a column": ([[0.0], [1.0]], 1, "binary", [-1, 1]),
    "plus and minus one": ([-1, 1], 1, "binary", [-1, 1]),
    "plus and minus one as floats": ([-1.0, 1.0], 1, "binary", [-1, 1]),
    "one only": ([1.0, 1.0], 1, "binary", [1, 1]),
    "real": ([0.25, 1.0], 1, "real", [0.25, 1]),
    "three real values": ([-1.0, 0.0, 1.0], 1, "real", [-1, 0, 1]),
    "zeros of an equation": ([0.0, 0.0], 1, "real", [0, 0]),
    "a real column": ([[0.5], [2.0]], 1, "real", [0.5, 2]),
    "one-hot": ([[0, 1, 0], [1, 0, 0]], 3, "one-hot", [[0, 1, 0], [1, 0, 0]]),
    "one against the rest": ([[-1.0, 1.0], [1.0, -1.0]], 2, "one-hot", [[-1, 1], [1, -1]]),
    "several labels a sample": ([[0, 1, 1], [1, 0, 0]], 3, "real", [[0, 1, 1], [1, 0, 0]]),
    "mixed labels": ([[0.25, 0.75], [1.0, 0.0]], 2, "real", [[0.25, 0.75], [1, 0]]),
}


@pytest.mark.parametrize("case", CASES)
def test_targets_by_hand(case: str) -> None:
    given, outputs, kind, wanted = CASES[case]
    y = torch.tensor(given)
    assert describe_targets(y, outputs) == kind
    found = targets_for(y, outputs, torch.float64)
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float64))
    check_labels(found if kind == "binary" else found[:0], 1)
    assert torch.equal(encode_targets(found, outputs, torch.float64), found.reshape(len(y), outputs))


@pytest.mark.parametrize(
    ("y", "outputs", "error", "message"),
    [
        (torch.tensor([0, 3]), 3, ValueError, r"class numbers 0 to 2, got \[3\]"),
        (torch.tensor([0, -100]), 3, ValueError, r"got \[-100\]"),
        (torch.tensor([0.5, 1.0]), 3, ValueError, r"class numbers 0 to 2, got \[0.5\]"),
        (torch.tensor([0, 7]), 1, ValueError, r"must be 0 and 1 or -1 and \+1, got \[0, 7\]"),
        (torch.tensor([-1, 0, 1]), 1, ValueError, "must be 0 and 1 or -1"),
        (torch.tensor([0.0, float("nan")]), 1, ValueError, "NaN or infinite"),
        (torch.tensor([[0.0, float("inf")]]), 2, ValueError, "NaN or infinite"),
        (torch.zeros(4, 2), 3, ValueError, r"\(4, 2\) do not fit a network with 3 output\(s\), which needs \(n,\)"),
        (torch.zeros(4, 2), 1, ValueError, r"needs \(n,\) or \(n, 1\)"),
        (torch.zeros(4, 1), 3, ValueError, "do not fit"),
        (torch.zeros(2, 3, 3), 3, ValueError, "do not fit"),
        (torch.tensor(1.0), 1, ValueError, "do not fit"),
        (torch.zeros(0), 1, ValueError, "empty"),
        (torch.zeros(2, dtype=torch.complex64), 1, TypeError, "complex64"),
        ([0, 1], 1, TypeError, "got list"),
    ],
)
def test_targets_that_do_not_fit_are_refused(y: Any, outputs: int, error: type[Exception], message: str) -> None:  # noqa: ANN401
    with pytest.raises(error, match=message):
        describe_targets(y, outputs)
    with pytest.raises(error, match=message):
        targets_for(y, outputs, torch.float32)


def test_another_set_is_read_as_the_training_targets_are() -> None:
    zeros = torch.zeros(2)  # the test samples of class 0 come first
    assert targets_for(zeros, 1, torch.float32, "binary").tolist() == [-1, -1]
    assert targets_for(zeros, 1, torch.float32, "real").tolist() == [0, 0]
    assert targets_for(torch.tensor([0.0, 1.0]), 1, torch.float32, "real").tolist() == [0, 1]
    assert targets_for(torch.eye(2), 2, torch.float32, "real").tolist() == [[1, 0], [0, 1]]
    with pytest.raises(ValueError, match="training targets are binary, but targets of another set are real"):
        targets_for(torch.tensor([0.5]), 1, torch.float32, "binary")
    with pytest.raises(ValueError, match="training targets are one-hot"):
        targets_for(torch.tensor([0, 1]), 2, torch.float32, "one-hot")


def test_what_class_1_becomes_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    targets._say_once.cache_clear()
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            targets_for(torch.tensor([-1, 1]), 1, torch.float32)
            assert not caplog.messages
            targets_for(torch.tensor([0, 1]), 1, torch.float32)
            said = len(caplog.messages)
            targets_for(torch.tensor([0, 1]), 1, torch.float32)
    finally:
        logger.removeHandler(caplog.handler)
    assert said == len(caplog.messages) > 0
    assert "class 1 is +1" in caplog.messages[0]
