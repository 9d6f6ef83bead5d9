"""Products of the kernel with vectors, many at once, without rows of gradients: K v = J (J^T v)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_products import LayerProducts, products_of_layers
from ntk_lightning.kernels.empirical.memory_plan import chunk_size
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.kernels.empirical.rows import Rows
from ntk_lightning.kernels.empirical.trial import choose_products

__all__ = ["multiply"]


class _Linearization(Protocol):
    """J at some samples: of u^T f for one cotangent u, or of all outputs."""

    def transposed(self, v: Tensor) -> Weights:
        """J^T of vectors (k, n), or (k, n, C): (k, ...)."""

    def forward(self, directions: Weights) -> Tensor:
        """J of directions (k, ...): (k, n), or (k, n, C)."""


class _OfRows:
    """The linearization as of any network."""

    def __init__(self, rows: Rows, x: Inputs, cotangent: Tensor | None) -> None:
        self.rows, self.x, self.cotangent = rows, x, cotangent

    def transposed(self, v: Tensor) -> Weights:
        """J^T v."""
        return self.rows.vjp(self.x, v if self.cotangent is None else v[:, :, None] * self.cotangent)

    def forward(self, directions: Weights) -> Tensor:
        """J d."""
        return self.rows.jvp(self.x, directions, self.cotangent)


def multiply(rows: Rows, inputs: list[Inputs], v: Tensor, budget: int) -> Tensor:
    """Multiply the kernel with vectors.

    K v sums over samples j and outputs b: sum_jb <grad f_a(x_i), grad f_b(x_j)> v_jb. With ``full`` the cotangents of
    J^T are v itself, all outputs at once. The normalized trace pairs equal outputs only, a = b: one product for every
    cotangent c, which already holds the factor 1 / sqrt(C).

    Args:
        rows: Layout of the gradients of the product's rows; its partner is that of the other side.
        inputs: x (n, ...) that v belongs to and, where others, x2 (m, ...) of the product's rows.
        v: (n,) or (n, k); with ``full``, (n, C).
        budget: Bytes of memory.

    Returns:
        (m,) or (m, k); with ``full``, (m, C).
    """
    x, x2 = inputs[0], inputs[-1]
    chunk, nbytes = chunk_size(budget, rows, x)
    left, right = _Side(rows, inputs), _Side(rows.partner, inputs)
    vectors = v[None] if rows.full else v.reshape(len(x), -1).T  # (k, n) or (1, n, C)
    pairs = [(None, None)] if rows.full else list(zip(left.rows.cotangents, right.rows.cotangents, strict=True))
    together = min(left.together, right.together, _vectors_at_once(budget, rows, nbytes))
    groups = vectors.split(together)
    products = [v.new_zeros(0)] * len(groups)
    same = len(inputs) == 1 and rows.partner is rows
    for c, c2 in pairs:
        kept = _Kept(right, x, c2, chunk, budget // 4 // nbytes)
        for i, group in enumerate(groups):
            directions = _summed(part.transposed(u) for part, u in zip(kept, group.split(chunk, 1), strict=True))
            others = kept if same else _Kept(left, x2, c, chunk, 0)
            product = torch.cat([part.forward(directions) for part in others], 1)
            products[i] = products[i] + product if len(products[i]) else product
    product = torch.cat(products)
    return product[0] if rows.full or v.dim() == 1 else product.T


class _Side:
    """One side of the kernel: how J and J^T are made there."""

    def __init__(self, rows: Rows, inputs: list[Inputs]) -> None:
        self.layers: LayerProducts | None = products_of_layers(rows.function, inputs[0])
        self.rows = rows if self.layers is not None else choose_products(rows, inputs)
        self.together = self.rows.together if self.layers is None else 2**31

    def linearize(self, x: Inputs, cotangent: Tensor | None) -> _Linearization:
        """Linearize at some samples, for one cotangent or all outputs."""
        if self.layers is None:
            return _OfRows(self.rows, x, cotangent)
        return self.layers.linearize(x, cotangent, self.rows.num_outputs)


class _Kept:
    """Linearizations of a set, chunk by chunk; the first so many are kept for the next pass."""

    def __init__(self, side: _Side, x: Inputs, cotangent: Tensor | None, chunk: int, count: int) -> None:
        self.side, self.parts, self.cotangent, self.count = side, x.split(chunk), cotangent, count
        self.known: dict[int, _Linearization] = {}

    def __iter__(self) -> Iterator[_Linearization]:
        for i, part in enumerate(self.parts):
            if i in self.known:
                yield self.known[i]
                continue
            made = self.side.linearize(part, self.cotangent)
            if i < self.count:
                self.known[i] = made
            yield made


def _vectors_at_once(budget: int, rows: Rows, nbytes: int) -> int:
    """How many vectors fit: their directions in a quarter of the memory, what a chunk makes of each in another."""
    weights = sum(p.numel() for name, p in rows.function.net.named_parameters() if name in rows.function.trainable)
    direction = 4 * rows.function.dtype.itemsize * weights  # a sum, a term, and what is made of both
    return max(1, budget // 4 // max(direction, nbytes))


def _summed(terms: Iterator[Weights]) -> Weights:
    """Add directions, in place of the first."""
    total = next(terms)
    for term in terms:
        for name, gradient in term.items():
            total[name] += gradient
    return total
