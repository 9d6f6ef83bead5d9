"""The shipped contract holds for this package's kernels and a toy one, and every clause of it finds a broken kernel."""

from __future__ import annotations

import subprocess
import sys
import unittest
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.networks import MLP, MyrtleCNN
from ntk_lightning.testing import KernelContract


def gaussian(n: int, seed: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Vectors(KernelContract):
    def make_inputs(self, n: int, seed: int) -> Tensor:
        return gaussian(n, seed, 5)


class Images(KernelContract):
    def make_inputs(self, n: int, seed: int) -> Tensor:
        return gaussian(n, seed, 3, 8, 8)


class TestEmpiricalOfVectors(Vectors):
    outputs = 1

    def kernel(self, memory: str = "4GB") -> EmpiricalNTK:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EmpiricalNTK(MLP(6, 2, 5, num_outputs=self.outputs, bias_std=0.3), memory=memory)

    def make_kernel(self) -> EmpiricalNTK:
        return self.kernel()

    def make_variants(self) -> list[EmpiricalNTK]:
        return [self.kernel("100KB")]


class TestEmpiricalOfSeveralOutputs(TestEmpiricalOfVectors):
    outputs = 3


class TestEmpiricalOfImages(Images):
    def make_kernel(self) -> EmpiricalNTK:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return EmpiricalNTK(MyrtleCNN(3))


class TestInfiniteReference(Vectors):
    def make_kernel(self) -> InfiniteNTK:
        return InfiniteNTK(MLP(1, 2, 5, bias_std=0.3), backend="reference")


class TestInfiniteReferenceOfImages(Images):
    def make_kernel(self) -> InfiniteNTK:
        return InfiniteNTK(MyrtleCNN(1), backend="reference")


class TestInfiniteCPU(Images):
    rtol = 1e-8  # of its polynomial for the arc cosine

    def make_kernel(self) -> InfiniteNTK:
        return InfiniteNTK(MyrtleCNN(1), backend="cpu")

    def make_variants(self) -> list[InfiniteNTK]:
        return [InfiniteNTK(MyrtleCNN(1), backend="reference")]


class TestNNGP(Images):
    def make_kernel(self) -> InfiniteNTK:
        return InfiniteNTK(MyrtleCNN(1), kind="nngp")


class Toy:
    """exp(-|x - y|^2), of tensors in a mapping."""

    def __call__(self, x1: dict[str, Tensor], x2: dict[str, Tensor] | None = None) -> Tensor:
        a, b = x1["a"], x1["a"] if x2 is None else x2["a"]
        return torch.exp(-(a[:, None] - b).square().sum(-1))

    def diag(self, x: dict[str, Tensor]) -> Tensor:
        return torch.ones(len(x["a"]), dtype=x["a"].dtype)


class TestToy(KernelContract):
    def make_kernel(self) -> Toy:
        return Toy()

    def make_inputs(self, n: int, seed: int) -> dict[str, Tensor]:
        return {"a": gaussian(n, seed, 2)}


def linear(x1: Tensor, x2: Tensor | None = None) -> Tensor:
    return x1 @ (x1 if x2 is None else x2).T


class Linear:
    """A right kernel with every method, for broken ones to inherit."""

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        return linear(x1, x2)

    def diag(self, x: Tensor) -> Tensor:
        return linear(x).diagonal()

    def matvec(self, x: Tensor, v: Tensor, x2: Tensor | None = None) -> Tensor:
        return linear(x if x2 is None else x2, x) @ v

    def gram_and_cross(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return linear(x), *(linear(other, x) for other in others)


class Broken(Linear):
    """Wrong as it is told."""

    def __init__(self, how: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        self.how = how

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        return self.how(x1, x2)


def changing(x1: Tensor, x2: Tensor | None) -> Tensor:
    gram = linear(x1, x2)
    x1 *= 2
    return gram


class Wrong(Linear):
    """One method is wrong."""

    def __init__(self, method: str) -> None:
        right = getattr(self, method)
        setattr(self, method, lambda *args: tuple(2 * m for m in right(*args)) if "and" in method else 2 * right(*args))


BROKEN: dict[str, tuple[str, Callable[[], Any]]] = {
    "NaN": ("result_is_a_finite_matrix", lambda: Broken(lambda a, b: linear(a, b) * torch.nan)),
    "shape": ("result_is_a_finite_matrix", lambda: Broken(lambda a, b: linear(a, b)[0])),
    "half": ("result_is_a_finite_matrix", lambda: Broken(lambda a, b: linear(a, b).half())),
    "asymmetric": ("gram_is_symmetric", lambda: Broken(lambda a, b: linear(a, b).cumsum(1))),
    "indefinite": ("gram_is_positive_semidefinite", lambda: Broken(lambda a, b: -linear(a, b))),
    "gram": (
        "gram_is_the_kernel_of_a_set_with_itself",
        lambda: Broken(lambda a, b: linear(a, b) + (torch.eye(len(a), dtype=a.dtype) if b is None else 0)),
    ),
    "cross": ("cross_is_a_block_of_the_gram", lambda: Broken(lambda a, b: linear(a, b) * (1 if b is None else 2))),
    "batch": ("entries_do_not_depend_on_their_batch", lambda: Broken(lambda a, b: linear(a - a.mean(0), b))),
    "order": ("gram_follows_a_permutation", lambda: Broken(lambda a, b: linear(a, b) * torch.arange(len(a))[:, None])),
    "random": ("result_is_deterministic", lambda: Broken(lambda a, b: linear(a, b) + torch.rand(1))),
    "state": ("result_is_deterministic", lambda: Broken(lambda a, b: linear(a, b) + 0 * torch.rand(1))),
    "in place": ("result_is_deterministic", lambda: Broken(changing)),
    "precision": ("precision", lambda: Broken(lambda a, b: linear(a, b) * (1 + 1e-3 * (a.dtype == torch.float32)))),
    "diag": ("diag", lambda: Wrong("diag")),
    "matvec": ("matvec", lambda: Wrong("matvec")),
    "gram_and_cross": ("gram_and_cross", lambda: Wrong("gram_and_cross")),
}


def contract(make: Callable[[], Any], variants: Sequence[Callable[..., Tensor]] = ()) -> KernelContract:
    class Case(Vectors):
        def make_kernel(self) -> Any:  # noqa: ANN401 - any kernel
            return make()

        def make_variants(self) -> Sequence[Callable[..., Tensor]]:
            return variants

    return Case()


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_kernel_is_found(how: str) -> None:
    clause, make = BROKEN[how]
    with pytest.raises(AssertionError, match=r"[a-z]"):
        getattr(contract(make), f"test_{clause}")()


def test_a_right_kernel_passes_every_clause() -> None:
    case = contract(Linear, [linear])
    clauses = [name for name in dir(KernelContract) if name.startswith("test_")]
    assert {f"test_{clause}" for clause, _ in BROKEN.values()} | {"test_variants"} == set(clauses)
    for name in clauses:
        getattr(case, name)()


def test_a_variant_with_other_values_is_found() -> None:
    with pytest.raises(AssertionError, match="variant 0 differs"):
        contract(Linear, [lambda a, b=None: 2 * linear(a, b)]).test_variants()


@pytest.mark.parametrize("name", ["test_diag", "test_matvec", "test_gram_and_cross", "test_variants"])
def test_what_a_kernel_has_not_is_skipped(name: str) -> None:
    with pytest.raises(unittest.SkipTest):
        getattr(contract(lambda: linear), name)()


def test_the_contract_needs_no_pytest() -> None:
    program = "import sys, ntk_lightning.testing; print('pytest' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
