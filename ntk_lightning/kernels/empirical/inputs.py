"""Inputs of any network: one tensor, positional arguments or keyword arguments, of which samples can be taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ntk_lightning.pytrees import Tree, map_tensors, named_tensors

__all__ = ["Inputs"]

_PLACE = torch.empty(0)  # stands where a tensor goes, so that a form keeps no data


@dataclass(frozen=True)
class Inputs:
    """The arguments of a network for n samples.

    One tensor is called as ``net(x)``, a tuple or list as ``net(*x)``, a mapping as ``net(**x)``. What is no tensor is
    passed on as it is.

    Args:
        leaves: All tensors, each with the n samples first.
        paths: Where each stands, as an index to be written behind the name of the inputs.
        form: The arguments as they were given, with an empty tensor in place of every tensor.

    Example:
        >>> x = Inputs.of((torch.ones(3, 2), {"mask": torch.zeros(3, 5)}))
        >>> len(x), x.paths, x[1:].call(lambda a, b: (a.shape, b["mask"].shape))
        (3, ('[0]', "[1]['mask']"), (torch.Size([2, 2]), torch.Size([2, 5])))
    """

    leaves: tuple[Tensor, ...]
    paths: tuple[str, ...]
    form: Tree

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
        if not isinstance(x, Tensor | tuple | list | Mapping):
            raise TypeError(
                f"Inputs must be a tensor, a tuple or list of arguments or a mapping of keywords, got "
                f"{type(x).__name__}: convert arrays by torch.from_numpy."
            )
        found = list(named_tensors(x))
        if not found or (isinstance(x, Mapping) and not all(isinstance(key, str) for key in x)):
            raise TypeError("Inputs must hold at least one tensor, and the keywords of a mapping must be strings.")
        paths, leaves = zip(*found, strict=True)
        return cls(leaves, paths, map_tensors(lambda _: _PLACE, x))

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
        """Positional and keyword arguments of a network: copies, which it may write into."""
        tensors = iter([leaf.clone() for leaf in (self.leaves if leaves is None else leaves)])
        filled = map_tensors(lambda _: next(tensors), self.form)
        if isinstance(filled, Tensor):
            return (filled,), {}
        return ((), dict(filled)) if isinstance(filled, Mapping) else (tuple(filled), {})
