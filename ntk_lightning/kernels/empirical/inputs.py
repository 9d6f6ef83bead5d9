"""Inputs of any network: one tensor, positional arguments or keyword arguments, of which samples can be taken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

__all__ = ["Inputs"]


@dataclass(frozen=True)
class _Leaf:
    """The place of a tensor among the arguments."""

    index: int


@dataclass(frozen=True)
class Inputs:
    """The arguments of a network for n samples.

    One tensor is called as ``net(x)``, a tuple or list as ``net(*x)``, a mapping as ``net(**x)``. What is no tensor is
    passed on as it is.

    Args:
        leaves: All tensors, each with the n samples first.
        paths: Where each stands, as an index to be written behind the name of the inputs.
        args: Positional arguments, with a ``_Leaf`` in place of every tensor.
        kwargs: Keyword arguments, likewise.

    Example:
        >>> x = Inputs.of((torch.ones(3, 2), {"mask": torch.zeros(3, 5)}))
        >>> len(x), x.paths, x[1:].call(lambda a, b: (a.shape, b["mask"].shape))
        (3, ('[0]', "[1]['mask']"), (torch.Size([2, 2]), torch.Size([2, 5])))
    """

    leaves: tuple[Tensor, ...]
    paths: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, x: Any) -> Inputs:  # noqa: ANN401 - whatever a network takes
        """Take the tensors out of a network's arguments.

        Args:
            x: A tensor, a tuple or list, a mapping, or what this returned.

        Returns:
            The inputs.

        Raises:
            TypeError: They hold no tensor, or a keyword is no string.
        """
        if isinstance(x, Inputs):
            return x
        leaves: list[Tensor] = []
        paths: list[str] = []

        def without(value: Any, path: str) -> Any:  # noqa: ANN401
            if isinstance(value, Tensor):
                leaves.append(value)
                paths.append(path)
                return _Leaf(len(leaves) - 1)
            return _rebuilt(value, lambda key, item: without(item, f"{path}[{key!r}]"))

        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        if isinstance(x, Tensor):
            args = (without(x, ""),)
        elif isinstance(x, Mapping):
            kwargs = {key: without(value, f"[{key!r}]") for key, value in x.items()}
        elif isinstance(x, tuple | list):
            args = tuple(without(value, f"[{i}]") for i, value in enumerate(x))
        else:
            raise TypeError(
                f"Inputs must be a tensor, a tuple or list of arguments or a mapping of keywords, got "
                f"{type(x).__name__}: convert arrays by torch.from_numpy."
            )
        if not leaves or not all(isinstance(key, str) for key in kwargs):
            raise TypeError("Inputs must hold at least one tensor, and the keywords of a mapping must be strings.")
        return cls(tuple(leaves), tuple(paths), args, kwargs)

    def __len__(self) -> int:
        return len(self.leaves[0])

    def __getitem__(self, index: slice | Tensor) -> Self:
        return self.with_leaves(leaf[index] for leaf in self.leaves)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.leaves[0].device

    def with_leaves(self, leaves: Iterator[Tensor] | tuple[Tensor, ...]) -> Self:
        """The same arguments with other tensors."""
        return replace(self, leaves=tuple(leaves))

    def split(self, size: int) -> list[Self]:
        """Cut into so many samples at a time."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def first(self, copies: int = 1) -> Self:
        """Repeat the first sample."""
        return self.with_leaves(leaf[:1].expand(copies, *leaf.shape[1:]) for leaf in self.leaves)

    def cat(self, other: Inputs) -> Self:
        """Append the samples of other inputs of the same structure."""
        return self.with_leaves(torch.cat(pair) for pair in zip(self.leaves, other.leaves, strict=True))

    def cast(self, dtype: torch.dtype | None) -> Self:
        """Detach, and bring floating-point tensors to a precision; copy inference tensors, which autograd refuses."""

        def cast(leaf: Tensor) -> Tensor:
            leaf = leaf.clone() if leaf.is_inference() else leaf.detach()
            return leaf if dtype is None or not leaf.is_floating_point() else leaf.to(dtype)

        return self.with_leaves(map(cast, self.leaves))

    def call(self, net: Callable[..., Any], leaves: tuple[Tensor, ...] | None = None) -> Any:  # noqa: ANN401
        """Call a network, with other tensors in the places of these where given."""
        args, kwargs = self.arguments(leaves)
        return net(*args, **kwargs)

    def arguments(self, leaves: tuple[Tensor, ...] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a network."""
        tensors = self.leaves if leaves is None else leaves

        def filled(value: Any) -> Any:  # noqa: ANN401
            if isinstance(value, _Leaf):
                return tensors[value.index]
            return _rebuilt(value, lambda _, item: filled(item))

        return tuple(map(filled, self.args)), {key: filled(value) for key, value in self.kwargs.items()}


def _rebuilt(value: Any, change: Callable[[Any, Any], Any]) -> Any:  # noqa: ANN401
    """A tuple, list or mapping of the same kind with changed items; anything else as it is."""
    if isinstance(value, Mapping):
        items = {key: change(key, item) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        same = copy.copy(value)  # a transformers BatchEncoding, for example
        for key, item in items.items():
            same[key] = item
        return same
    if isinstance(value, tuple | list):
        changed = [change(i, item) for i, item in enumerate(value)]
        return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    return value
