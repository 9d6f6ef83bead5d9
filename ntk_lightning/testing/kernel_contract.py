"""What every kernel must do, as a class of tests that the tests of one kernel inherit. It needs no test runner."""

from __future__ import annotations

import unittest
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ntk_lightning.pytrees import Tree, concatenate, map_tensors, named_tensors, take_samples, to_device

__all__ = ["KernelContract"]


class KernelContract(ABC):
    """Tests of a kernel that this package's stores, solvers and callbacks are to work with.

    Inherit from it in a class that pytest collects (``Test...``), and give :meth:`make_kernel` and :meth:`make_inputs`.
    A kernel maps inputs (n1, ...) and (n2, ...) to (n1, n2), or (n1, ...) alone to its symmetric Gram. Methods
    ``diag``, ``matvec`` and ``gram_and_cross`` are tested where the kernel has them, and skipped where it has not.
    Comparisons allow ``rtol`` times the largest entry of the Gram.

    Attributes:
        n1: Samples of the first set.
        n2: Samples of the second set.
        rtol: Relative tolerance in float64.
        rtol_float32: Relative tolerance between float32 and float64; None for a kernel of one precision.

    Example:
        >>> class TestLinear(KernelContract):
        ...     def make_kernel(self):
        ...         return lambda x1, x2=None: x1 @ (x1 if x2 is None else x2).T
        ...
        ...     def make_inputs(self, n, seed):
        ...         return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        >>> TestLinear().test_gram_is_positive_semidefinite()
    """

    n1: ClassVar[int] = 7
    n2: ClassVar[int] = 4
    rtol: ClassVar[float] = 1e-9
    rtol_float32: ClassVar[float | None] = 1e-4

    @abstractmethod
    def make_kernel(self) -> Any:  # noqa: ANN401 - any callable, with or without further methods
        """Make the kernel, the same one at every call."""

    @abstractmethod
    def make_inputs(self, n: int, seed: int) -> Tree:
        """Make n inputs in float64, the same ones for the same seed."""

    def make_variants(self) -> Sequence[Callable[..., Tensor]]:
        """Make kernels that compute the same by other means: another chunk size, memory budget or backend."""
        return ()

    def test_result_is_a_finite_matrix(self) -> None:
        """K(x) is (n1, n1) and K(x, y) is (n1, n2), in floating point, without NaN or infinity."""
        kernel, x, y = self._given()
        for found, shape in ((kernel(x), (self.n1, self.n1)), (kernel(x, y), (self.n1, self.n2))):
            assert found.shape == shape, f"The kernel has the shape {tuple(found.shape)} instead of {shape}."
            assert found.dtype in (torch.float32, torch.float64), f"The kernel's dtype is {found.dtype}."
            assert torch.isfinite(found).all(), "The kernel has entries that are NaN or infinite."

    def test_gram_is_symmetric(self) -> None:
        """K(x) = K(x)'."""
        kernel, x, _ = self._given()
        gram = kernel(x)
        self._compare(gram, gram.T, "The Gram is not symmetric")

    def test_gram_is_positive_semidefinite(self) -> None:
        """No eigenvalue of the Gram of both sets together lies below zero by more than rounding."""
        kernel, x, y = self._given()
        values = torch.linalg.eigvalsh(kernel(concatenate([x, y])).double())
        least = -self.rtol * len(values) * values.abs().max()
        assert values[0] >= least, f"The Gram has the eigenvalue {values[0]:.3g}, beside {values[-1]:.3g}."

    def test_gram_is_the_kernel_of_a_set_with_itself(self) -> None:
        """K(x) = K(x, x), also where x is given as another tensor."""
        kernel, x, _ = self._given()
        copy = map_tensors(torch.clone, x)
        self._compare(kernel(x, copy), kernel(x), "K(x, x) is not K(x)")

    def test_cross_is_a_block_of_the_gram(self) -> None:
        """K(x, y) is a block of the Gram of both sets together, and K(y, x) its transpose."""
        kernel, x, y = self._given()
        gram = kernel(concatenate([x, y]))
        self._compare(kernel(x, y), gram[: self.n1, self.n1 :], "K(x, y) is no block of the Gram of both sets")
        self._compare(kernel(y, x), kernel(x, y).T, "K(y, x) is not the transpose of K(x, y)")

    def test_entries_do_not_depend_on_their_batch(self) -> None:
        """Every entry is the same, whatever samples are computed with it, down to single pairs."""
        kernel, x, y = self._given()
        whole = kernel(x, y)
        for size in (1, 3):
            parts = [take_samples(x, slice(start, start + size)) for start in range(0, self.n1, size)]
            self._compare(torch.cat([kernel(part, y) for part in parts]), whole, f"K of batches of {size} differs")
        pair = kernel(take_samples(x, slice(1, 2)), take_samples(y, slice(2, 3)))
        self._compare(pair, whole[1:2, 2:3], "K of a single pair differs")

    def test_gram_follows_a_permutation(self) -> None:
        """K of permuted samples is the permuted Gram."""
        kernel, x, _ = self._given()
        order = torch.arange(self.n1).roll(3).flip(0)
        self._compare(kernel(take_samples(x, order)), kernel(x)[order][:, order], "The Gram depends on the order")

    def test_result_is_deterministic(self) -> None:
        """Two calls, and two kernels, give the same bits; inputs and the random state stay as they were."""
        kernel, x, y = self._given()
        before, state = map_tensors(torch.clone, x), torch.random.get_rng_state()
        first = kernel(x, y)
        assert torch.equal(first, kernel(x, y)), "A second call gives other values."
        assert torch.equal(state, torch.random.get_rng_state()), "The kernel draws from the global random state."
        assert torch.equal(first, self.make_kernel()(x, y)), "A second kernel gives other values."
        for (_, was), (name, now) in zip(named_tensors(before), named_tensors(x), strict=True):
            assert torch.equal(was, now), f"The kernel changes its input{name}."

    def test_precision(self) -> None:
        """Float32 inputs give the values of float64 ones to the rounding of float32."""
        if self.rtol_float32 is None:
            raise unittest.SkipTest("a kernel of one precision")
        kernel, x, y = self._given()
        single = [to_device(inputs, dtype=torch.float32) for inputs in (x, y)]
        exact = kernel(*(to_device(inputs, dtype=torch.float64) for inputs in single))
        self._compare(kernel(*single).double(), exact, "float32 is too far from float64", self.rtol_float32)

    def test_diag(self) -> None:
        """``kernel.diag(x)`` is the diagonal of K(x)."""
        kernel, x, _ = self._given("diag")
        self._compare(kernel.diag(x), kernel(x).diagonal(), "diag(x) is not the diagonal of K(x)")

    def test_matvec(self) -> None:
        """``kernel.matvec(x, v)`` is K(x) v, and ``kernel.matvec(x, v, y)`` is K(y, x) v, for one and several v."""
        kernel, x, y = self._given("matvec")
        generator = torch.Generator().manual_seed(0)
        for shape in ((self.n1,), (self.n1, 3)):
            v = torch.randn(shape, generator=generator, dtype=torch.float64)
            self._compare(kernel.matvec(x, v), kernel(x) @ v, "matvec(x, v) is not K(x) v")
            self._compare(kernel.matvec(x, v, y), kernel(y, x) @ v, "matvec(x, v, y) is not K(y, x) v")

    def test_gram_and_cross(self) -> None:
        """``kernel.gram_and_cross(x, y, x)`` is K(x), K(y, x) and K(x, x)."""
        kernel, x, y = self._given("gram_and_cross")
        found = kernel.gram_and_cross(x, y, x)
        for matrix, expected in zip(found, (kernel(x), kernel(y, x), kernel(x)), strict=True):
            self._compare(matrix, expected, "gram_and_cross differs from the kernel's own calls")

    def test_variants(self) -> None:
        """Kernels that compute the same by other means give the same values."""
        kernel, x, y = self._given()
        variants = self.make_variants()
        if not variants:
            raise unittest.SkipTest("no variants")
        for number, variant in enumerate(variants):
            self._compare(variant(x), kernel(x), f"The Gram of variant {number} differs")
            self._compare(variant(x, y), kernel(x, y), f"K(x, y) of variant {number} differs")

    def _given(self, method: str = "__call__") -> tuple[Any, Tree, Tree]:
        kernel = self.make_kernel()
        if not hasattr(kernel, method):
            raise unittest.SkipTest(f"the kernel has no method {method}")
        return kernel, self.make_inputs(self.n1, 0), self.make_inputs(self.n2, 1)

    def _compare(self, found: Tensor, expected: Tensor, message: str, rtol: float | None = None) -> None:
        assert found.shape == expected.shape, f"{message}: shapes {tuple(found.shape)} and {tuple(expected.shape)}."
        scale, gap = float(expected.abs().max()), float((found - expected).abs().max())
        allowed = (self.rtol if rtol is None else rtol) * scale
        assert gap <= allowed, f"{message}: by up to {gap:.3g}, where {allowed:.3g} is allowed."
