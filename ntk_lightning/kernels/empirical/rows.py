"""Rows of per-sample gradients: how they are laid out and multiplied, however they are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.kernels.empirical.inner_products import Pairs, by_factors, by_kept, least_kept_bytes, multiply
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights

__all__ = ["AllocationMeter", "Part", "Rows", "real_flat"]


@dataclass(frozen=True)
class Part:
    """The parameters whose kernel is summed up by itself, and the columns that hold their gradients.

    Args:
        name: Of the module that owns them; empty for the whole network.
        weights: Names of parameters whose gradients are made by vmap or one by one.
        own: Columns of these gradients, [u1: grad w1, grad w2, ... | u2: ...] for cotangents u1, u2, ...
        products: For each layer whose gradients are wide products, the columns of its weight, one slice for each block
            of inputs, and those of its bias, each [u1 | u2 | ...]; empty where not trained.
        factors: For each layer kept in factors the columns of its inputs, and those of its cotangents.
        kept: For each layer whose gradients are formed when they are multiplied, the same.
    """

    name: str
    weights: tuple[str, ...]
    own: slice
    products: dict[str, tuple[tuple[slice, ...], slice]]
    factors: dict[str, tuple[slice, slice]]
    kept: dict[str, tuple[slice, slice]]

    def gradients(self, full: bool) -> list[slice]:
        """Columns of all gradients that are formed: at once, or those that hold outputs side by side."""
        blocks = [self.own]
        for weight, bias in self.products.values():
            blocks += [*weight, bias]
        return blocks if full else [slice(self.own.start, blocks[-1].stop)]


class Rows(ABC):
    """Gradients of the outputs of single samples, one row a sample.

    A row holds the parts one after another; a part its weights' gradients, then the gradients of each layer that are
    wide products, then for each of its factored or kept layers the input of the layer and the cotangents of its output:

        [ u1: grad w1, grad w2, ... | u2: grad w1, ... ]
        [ layer 1: u1: grad W | u2: grad W | u1: grad b | u2: grad b | layer 2: ... ]
        [ layer 3: s a, t | g of u1 | g of u2 | layer 4: ... ]

    Args:
        function: The network and its outputs.
        num_outputs: Its outputs.
        weights: Parameters whose gradients are made by vmap or one by one.
        layers: Layers whose gradients are made by a rule.
        per_layer: Make a part of every module that owns parameters, instead of one of all.
        keep: Keep layers' inputs and cotangents, where that is less than their gradients.
        partners: Samples that a sample is multiplied with.
    """

    def __init__(
        self,
        function: NetworkFunction,
        num_outputs: int,
        weights: Weights,
        layers: dict[str, AffineLayer],
        per_layer: bool,
        keep: bool = False,
        partners: int = 128,
    ) -> None:
        self.function, self.num_outputs, self.weights, self.layers = function, num_outputs, weights, layers
        self.cotangents = function.cotangents(num_outputs)
        self.full, self.groups = function.full, len(self.cotangents) if function.full else 1
        self.partner: Rows = self  # makes the rows of the kernel's second argument, in the same parts
        self.kept = function.dtype  # of rows that stay
        self.scratch = 2**25  # bytes for products of all positions, and for gradients that are formed to be multiplied
        self.measured: dict[Hashable, int] = {}  # bytes, by number of samples, precision and width
        self.ways = {name: layer.way(len(self.cotangents), self.full, keep, partners) for name, layer in layers.items()}
        self.keeps = "kept" in self.ways.values()
        self.together = 2**31  # how many vectors products take at once
        self.width, self.parts = 0, []
        owners: dict[str, None] = dict.fromkeys(name.rpartition(".")[0] for name in function.trainable)
        for owner in owners if per_layer else [None]:
            own = tuple(name for name in weights if owner is None or name.rpartition(".")[0] == owner)
            sizes = [(torch.view_as_real(w) if w.is_complex() else w).numel() for w in map(weights.__getitem__, own)]
            part = Part(owner or "", own, self._columns(sum(sizes) * len(self.cotangents)), {}, {}, {})
            ruled = {name: layer for name, layer in layers.items() if owner is None or name == owner}
            for name, layer in ruled.items():
                if self.ways[name] == "product":
                    part.products[name] = self._of_gradients(layer)
            for name, layer in ruled.items():
                if self.ways[name] == "factors":
                    inputs = self._columns(layer.positions * layer.num_inputs)
                    part.factors[name] = inputs, self._columns(layer.kept(len(self.cotangents))[1])
                elif self.ways[name] == "kept":
                    held = layer.kept(len(self.cotangents))
                    part.kept[name] = self._columns(held[0]), self._columns(held[1])
            self.parts.append(part)

    def _columns(self, size: int) -> slice:
        """The next columns of this number."""
        start, self.width = self.width, self.width + size
        return slice(start, self.width)

    def _of_gradients(self, layer: AffineLayer) -> tuple[tuple[slice, ...], slice]:
        """Columns of the gradients of a weight, block by block, and of a bias."""
        weight, bias = layer.weight is not None, layer.bias is not None
        channels = layer.count(len(self.cotangents)) * layer.d_out
        blocks = [self._columns(weight * channels * (layer.d_in // layer.blocks)) for _ in range(layer.blocks)]
        return tuple(blocks), self._columns(bias * channels)

    @abstractmethod
    def fill(self, out: Tensor, x: Inputs) -> None:
        """Write the rows of n samples into ``out`` (n, width)."""

    @abstractmethod
    def vjp(self, x: Inputs, cotangents: Tensor) -> Weights:
        """J(x)^T u for cotangents u (k, n, C) of all outputs, summed over the samples: (k, ...)."""

    @abstractmethod
    def jvp(self, x: Inputs, directions: Weights, cotangent: Tensor | None) -> Tensor:
        """J(x) d for directions d (k, ...), (k, n, C); or their inner products with a cotangent (C,), (k, n)."""

    @property
    @abstractmethod
    def one_by_one(self) -> bool:
        """Whether gradients are made one sample at a time, so that chunks would only cost memory."""

    def layer_by_layer(self) -> Rows | None:
        """Rows of the same gradients that keep layers' inputs and cotangents, if there are any that hold less so."""
        return None

    def workspace(self, x: Inputs) -> int:
        """Bytes that operations allocate while the rows of x are made, as if none were freed before the end."""
        key = len(x), self.kept, self.width
        if key not in self.measured:
            meter = AllocationMeter()
            with meter:
                self.fill(torch.empty(len(x), self.width, dtype=self.kept, device=x.device), x)
            self.measured[key] = meter.nbytes
        return self.measured[key]

    def least_scratch(self, n: int) -> int:
        """Bytes without which products of n rows would be slow, or could not be made."""
        item = self.function.dtype.itemsize
        least = [0]
        for name, layer in self.layers.items():
            if self.ways[name] == "factors" and (layer.positions > 1 or layer.embeds):
                least.append(3 * item * (layer.positions * self.groups) ** 2)
            elif self.ways[name] == "kept":
                least.append(least_kept_bytes(layer, len(self.cotangents), item, n))
        return max(least)

    def contract(self, a: Tensor, b: Tensor, pairs: Pairs = "all") -> list[Tensor]:
        """Inner products of rows a (n1, width) and the partner's rows b (n2, width), part by part.

        Args:
            a: Rows.
            b: Rows of the partner, which is this unless the kernel is one between two functions.
            pairs: Of all pairs of rows, or of each row with the same of b.

        Returns:
            One tensor a part, (n1, n2, C, C') or (n1, C, C'), without C and C' where outputs are not kept apart.
        """

        def kernel(mine: Part, theirs: Part) -> Tensor:
            groups = self.groups, self.partner.groups
            (i, j), *others = zip(mine.gradients(self.full), theirs.gradients(self.full), strict=True)
            total = multiply(_apart(a, i, groups[0]), _apart(b, j, groups[1]), pairs)
            for i, j in others:
                total += multiply(_apart(a, i, groups[0]), _apart(b, j, groups[1]), pairs)
            for name, (x, g) in mine.factors.items():
                left, right = ((rows[:, x], rows[:, g]) for rows in (a, b))
                total += by_factors(self.layers[name], left, right, groups, self.scratch, pairs)
            for name, (x, g) in mine.kept.items():
                left, right = ((rows[:, x], rows[:, g]) for rows in (a, b))
                total += by_kept(self.layers[name], left, right, groups, self.scratch)
            return total if self.full else total[..., 0, 0]

        return [kernel(*pair) for pair in zip(self.parts, self.partner.parts, strict=True)]


def _apart(rows: Tensor, columns: slice, groups: int) -> Tensor:
    """Columns that hold vectors of several outputs side by side, (n, groups, p)."""
    vectors: Tensor = rows[:, columns].unflatten(1, (groups, (columns.stop - columns.start) // groups))
    return vectors


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
    """The tensors among them by the address of their memory."""
    tensors = (t for t in tree_leaves(values) if isinstance(t, Tensor) and _has_storage(t))
    return {t.untyped_storage().data_ptr(): t for t in tensors}


def _has_storage(tensor: Tensor) -> bool:
    """Symbolic zeros, sparse tensors and the wrappers of torch.func have no memory of their own."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return tensor.layout == torch.strided and not wrapped and not tensor._is_zerotensor()


def real_flat(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients as flat real vectors; a complex one by its two parts, whose inner product is Re <g, g'>."""
    return [(torch.view_as_real(g) if g.is_complex() else g).flatten() for g in gradients]
