"""Rows of per-sample gradients: how they are laid out and multiplied, however they are made."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
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

    Args:
        name: Of the module that owns them; empty for the whole network.
        weights: Names of parameters whose gradients are made by vmap or one by one.
        own: Columns of these gradients, [u1: grad w1, grad w2, ... | u2: ...] for cotangents u1, u2, ...
        products: For each layer whose gradients are one wide product, the columns of its weight and of its bias, each
            [u1 | u2 | ...]; empty where not trained.
        factors: For each layer kept in factors the columns of (s a, t), and those of its cotangents g, [u1 | u2 | ...].
    """

    name: str
    weights: tuple[str, ...]
    own: slice
    products: dict[str, tuple[slice, slice]]
    factors: dict[str, tuple[slice, slice]]

    def gradients(self, full: bool) -> list[slice]:
        """Columns of all gradients that are not in factors: at once, or those that hold outputs side by side."""
        blocks = [self.own, *itertools.chain.from_iterable(self.products.values())]
        return blocks if full else [slice(self.own.start, blocks[-1].stop)]


class Rows(ABC):
    """Gradients of the outputs of single samples, one row a sample.

    A row holds the parts one after another; a part its weights' gradients, then the gradients of each layer that are
    one product, then for each of its factored layers the input of the layer and the cotangents of its output:

        [ u1: grad w1, grad w2, ... | u2: grad w1, ... ]
        [ layer 1: u1: grad W | u2: grad W | u1: grad b | u2: grad b | layer 2: ... ]
        [ layer 3: s a, t | g of u1 | g of u2 | layer 4: ... ]

    Args:
        function: What is differentiated.
        num_outputs: Its outputs.
        weights: Parameters whose gradients are made by vmap or one by one.
        layers: Layers whose gradients are made by a rule.
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
        self.kept = function.dtype  # of rows that stay
        self.together = 2**31  # how many vectors products take at once
        self.measured: dict[Hashable, int] = {}  # bytes, by number of samples and precision
        self.width, self.parts = 0, []
        owners: dict[str, None] = dict.fromkeys(name.rpartition(".")[0] for name in function.trainable)
        for owner in owners if per_layer else [None]:
            own = tuple(name for name in weights if owner is None or name.rpartition(".")[0] == owner)
            sizes = [(torch.view_as_real(w) if w.is_complex() else w).numel() for w in map(weights.__getitem__, own)]
            part = Part(owner or "", own, self._columns(sum(sizes)), {}, {})
            ruled = {name: layer for name, layer in layers.items() if owner is None or name == owner}
            for name, layer in ruled.items():
                if layer.way(len(self.cotangents)) == "product":
                    weight, bias = layer.weight is not None, layer.bias is not None
                    part.products[name] = (
                        self._columns(weight * layer.d_out * layer.d_in),
                        self._columns(bias * layer.d_out),
                    )
            for name, layer in ruled.items():
                if layer.way(len(self.cotangents)) == "factors":
                    inputs = slice(self.width, self.width + layer.num_inputs)
                    self.width = inputs.stop
                    part.factors[name] = inputs, self._columns(layer.d_out)
            self.parts.append(part)

    def _columns(self, size: int) -> slice:
        """Columns for a vector of this size for every cotangent."""
        start, self.width = self.width, self.width + size * len(self.cotangents)
        return slice(start, self.width)

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

    def workspace(self, x: Inputs) -> int:
        """Bytes that operations allocate while the rows of x are made, as if none were freed before the end."""
        key = len(x), self.kept
        if key not in self.measured:
            meter = AllocationMeter()
            with meter:
                self.fill(torch.empty(len(x), self.width, dtype=self.kept, device=x.device), x)
            self.measured[key] = meter.nbytes
        return self.measured[key]

    def contract(self, a: Tensor, b: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Inner products of rows a (n1, width) and the partner's rows b (n2, width), part by part.

        Args:
            a: Rows.
            b: Rows of the partner, which is this unless the kernel is one between two functions.
            product: Inner products of columns of a, (n1, C, p), with those of b, (n2, C', p): (n1, n2, C, C'), or
                (..., C, C') of whatever other pairs of rows. C = C' = 1 where outputs are not kept apart.

        Returns:
            One tensor a part, of the shape that ``product`` gives, without C and C' where outputs are not kept apart.
        """

        def kernel(mine: Part, theirs: Part) -> Tensor:
            first, second = self.groups, self.partner.groups
            (i, j), *others = zip(mine.gradients(self.full), theirs.gradients(self.full), strict=True)
            total = product(_apart(a, i, first), _apart(b, j, second))
            for i, j in others:
                total += product(_apart(a, i, first), _apart(b, j, second))
            for (inputs, g), (inputs2, g2) in zip(mine.factors.values(), theirs.factors.values(), strict=True):
                # <g, g'> <(s a, t), (s a', t)>
                factor = product(_apart(a, g, first), _apart(b, g2, second))
                total += factor.mul_(product(_apart(a, inputs, 1), _apart(b, inputs2, 1)))
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
