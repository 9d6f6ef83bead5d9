"""Rows of per-sample gradients: how they are laid out and multiplied, however they are made."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights

__all__ = ["AllocationMeter", "Part", "Rows", "real_flat"]


@dataclass(frozen=True)
class Part:
    """The parameters whose kernel is summed up by itself, and the columns that hold their gradients.

    One slice a group of outputs: all outputs are one group where their products are summed, else each is its own.

    Args:
        name: Of the module that owns them; empty for the whole network.
        weights: Names of parameters whose gradients are columns as they are.
        layers: Names of layers kept in factors.
        gradients: Columns of the weights' gradients, [u1: grad w1, grad w2, ...; u2: ...] for cotangents u1, u2, ...
        factors: For each layer the columns of (s a, t), and those of its cotangents g.
    """

    name: str
    weights: tuple[str, ...]
    layers: tuple[str, ...]
    gradients: list[slice]
    factors: list[tuple[slice, list[slice]]]


class Rows(ABC):
    """Gradients of the outputs of single samples, one row a sample.

    A row holds the parts one after another; a part its weights' gradients, then for each of its factored layers the
    input of the layer and the cotangents of its output:

        [ u1: grad w1, grad w2, ... | u2: grad w1, ... | layer 1: s a, t | g of u1 | g of u2 | layer 2: ... ]

    Args:
        function: What is differentiated.
        num_outputs: Its outputs.
        weights: Parameters whose gradients are kept as they are.
        layers: Layers kept in factors.
        per_layer: Make a part of every module that owns parameters, instead of one of all.
    """

    def __init__(
        self,
        function: NetworkFunction,
        num_outputs: int,
        weights: Weights,
        layers: dict[str, AffineLayer],
        per_layer: bool,
    ) -> None:
        self.function, self.num_outputs, self.weights, self.layers = function, num_outputs, weights, layers
        self.cotangents = function.cotangents(num_outputs)
        self.full, self.groups = function.full, len(self.cotangents) if function.full else 1
        self.partner: Rows = self  # makes the rows of the kernel's second argument, in the same parts
        self.width, self.parts = 0, []
        owners: dict[str, None] = dict.fromkeys(name.rpartition(".")[0] for name in function.trainable)
        for owner in owners if per_layer else [None]:
            own = tuple(name for name in weights if owner is None or name.rpartition(".")[0] == owner)
            factored = tuple(name for name in layers if owner is None or name == owner)
            gradients = self._columns(
                sum(torch.view_as_real(w).numel() if (w := weights[name]).is_complex() else w.numel() for name in own)
            )
            factors = []
            for layer in (layers[name] for name in factored):
                inputs = slice(self.width, self.width + layer.num_inputs)
                self.width = inputs.stop
                factors.append((inputs, self._columns(layer.module.out_features)))
            self.parts.append(Part(owner or "", own, factored, gradients, factors))

    def _columns(self, size: int) -> list[slice]:
        """Columns for a vector of this size for every cotangent: one slice a group of outputs."""
        size *= len(self.cotangents) // self.groups
        edges = [self.width + group * size for group in range(self.groups + 1)]
        self.width = edges[-1]
        return [slice(*pair) for pair in itertools.pairwise(edges)]

    @abstractmethod
    def fill(self, out: Tensor, x: Inputs) -> None:
        """Write the rows of n samples into ``out`` (n, width)."""

    @abstractmethod
    def vjp(self, x: Inputs, cotangent: Tensor) -> Weights:
        """J(x)^T u for cotangents u (n, C) of all outputs, summed over the samples."""

    @abstractmethod
    def jvp(self, x: Inputs, direction: Weights, cotangent: Tensor | None) -> Tensor:
        """J(x) d for a direction d of the weights, (n, C); or its inner products with a cotangent (C,), (n,)."""

    @property
    @abstractmethod
    def one_by_one(self) -> bool:
        """Whether gradients are made one sample at a time, so that chunks would only cost memory."""

    def workspace(self, x: Inputs) -> int:
        """Bytes that operations allocate while the rows of x are made, as if none were freed before the end."""
        meter = AllocationMeter()
        with meter:
            self.fill(torch.empty(len(x), self.width, dtype=self.function.dtype, device=x.device), x)
        return meter.nbytes

    def contract(self, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Inner products of rows a (n1, width) and the partner's rows b (n2, width), part by part.

        Args:
            a: Rows.
            b: Rows of the partner, which is this unless the kernel is one between two functions.
            product: Inner products of some columns of a with those of b, (n1, n2) or of whatever shape it gives.

        Returns:
            One tensor a part, of the shape that ``product`` gives, (..., C, C) where outputs are kept apart.
        """

        def kernel(mine: Part, theirs: Part, r: int, s: int) -> Tensor:
            total = product(a[:, mine.gradients[r]], b[:, theirs.gradients[s]])
            for (inputs, g), (inputs2, g2) in zip(mine.factors, theirs.factors, strict=True):
                # <g, g'> <(s a, t), (s a', t)>
                total += product(a[:, g[r]], b[:, g2[s]]).mul_(product(a[:, inputs], b[:, inputs2]))
            return total

        pairs = list(zip(self.parts, self.partner.parts, strict=True))
        if not self.full:
            return [kernel(*pair, 0, 0) for pair in pairs]
        rows, columns = range(self.groups), range(self.partner.groups)
        return [torch.stack([torch.stack([kernel(*p, r, s) for s in columns], -1) for r in rows], -2) for p in pairs]


class AllocationMeter(TorchDispatchMode):
    """Adds up the storage of every tensor that an operation makes, and notes their dtypes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no signature
        self.nbytes: int = 0
        self.dtypes: set[torch.dtype] = set()

    def rounded(self, dtype: torch.dtype) -> list[torch.dtype]:
        """Floating-point dtypes of less precision than this one that were met."""
        return [d for d in self.dtypes if d.is_floating_point and d.itemsize < dtype.itemsize]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation, whatever its arguments, and count what it made."""
        out = func(*args, **(kwargs or {}))
        known, made = _storages((args, kwargs)), _storages(out)
        self.dtypes.update(t.dtype for t in made.values())
        self.nbytes += sum(t.untyped_storage().nbytes() for pointer, t in made.items() if pointer not in known)
        return out


def _storages(values: Any) -> dict[int, Tensor]:  # noqa: ANN401 - whatever an operation takes or gives
    """The tensors among them by the address of their memory; symbolic zeros have none."""
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor) and not t._is_zerotensor())
    return {t.untyped_storage().data_ptr(): t for t in tensors}


def real_flat(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients as flat real vectors; a complex one by its two parts, whose inner product is Re <g, g'>."""
    return [(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in gradients]
