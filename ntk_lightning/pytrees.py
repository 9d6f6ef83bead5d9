"""Inputs of any network: a tensor, or tensors in tuples, lists and mappings, that each have the n samples first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Tree",
    "concatenate",
    "count_samples",
    "map_tensors",
    "named_tensors",
    "rebuild_mapping",
    "take_samples",
    "to_device",
]

Tree: TypeAlias = Any  # a tensor, a tuple, list or mapping of inputs, or what is no tensor and goes along as it is


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Apply a function to every tensor of a tree.

    Args:
        function: Of one tensor.
        tree: A tensor, or tuples, lists and mappings of them; what is no tensor stays as it is.

    Returns:
        A tree of the same form.

    Example:
        >>> map_tensors(torch.neg, {"tokens": torch.tensor([1, 2]), "name": "a"})
        {'tokens': tensor([-1, -2]), 'name': 'a'}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return rebuild_mapping(tree, {key: map_tensors(function, value) for key, value in tree.items()})
    if isinstance(tree, (tuple, list)):
        return _rebuild_sequence(tree, [map_tensors(function, value) for value in tree])
    return tree


def named_tensors(tree: Tree, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a tree in order, each with its place.

    Args:
        tree: As of :func:`map_tensors`.
        name: Place of the tree itself.

    Yields:
        Place, such as "[0]['mask']", and tensor.
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from named_tensors(value, f"{name}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for position, value in enumerate(tree):
            yield from named_tensors(value, f"{name}[{position}]")


def count_samples(tree: Tree) -> int:
    """Count the samples, which every tensor of a tree has first.

    Args:
        tree: As of :func:`map_tensors`.

    Returns:
        The number n.

    Raises:
        ValueError: There is no tensor, one has no dimension, or two have different numbers of samples.

    Example:
        >>> count_samples(({"tokens": torch.zeros(3, 7), "mask": torch.ones(3)}, "a"))
        3
    """
    found = list(named_tensors(tree))
    if not found:
        raise ValueError(
            f"There is no tensor in inputs of type {type(tree).__name__}: give at least one, samples first."
        )
    scalars = [name for name, tensor in found if not tensor.dim()]
    if scalars:
        raise ValueError(
            f"The tensor{scalars[0] and f' at {scalars[0]}'} has no dimension: every tensor has the n samples first "
            "(a plain number goes along as it is)."
        )
    if len({len(tensor) for _, tensor in found}) > 1:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in found)
        raise ValueError(f"Every tensor of the inputs must have the n samples first, got {shapes}.")
    return len(found[0][1])


def take_samples(tree: Tree, index: slice | Tensor) -> Tree:
    """Take some samples of every tensor.

    Args:
        tree: As of :func:`map_tensors`.
        index: A slice, or positions (m,).

    Returns:
        A tree of the same form with those samples, a view where ``index`` is a slice.

    Example:
        >>> take_samples((torch.tensor([3, 4, 5]), None), slice(2))
        (tensor([3, 4]), None)
    """
    return map_tensors(lambda tensor: tensor[index], tree)


def to_device(tree: Tree, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tree:
    """Move every tensor, and cast those of floating-point numbers only: token ids stay integers.

    Args:
        tree: As of :func:`map_tensors`.
        device: Where to; None leaves each where it is.
        dtype: Of the floating-point tensors; None leaves each as it is.

    Returns:
        A tree of the same form; the same tensors where nothing changes.

    Example:
        >>> to_device((torch.tensor([1, 2]), torch.tensor([0.5])), dtype=torch.float64)
        (tensor([1, 2]), tensor([0.5000], dtype=torch.float64))
    """
    return map_tensors(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None), tree)


def concatenate(trees: Sequence[Tree]) -> Tree:
    """Join the samples of several trees of one form.

    Args:
        trees: At least one; what is no tensor is the first tree's.

    Returns:
        A tree of the same form with all samples.

    Raises:
        ValueError: The trees differ in form, or in a shape beyond the number of samples.

    Example:
        >>> concatenate([{"x": torch.tensor([1])}, {"x": torch.tensor([2, 3])}])
        {'x': tensor([1, 2, 3])}
    """
    columns = [dict(named_tensors(tree)) for tree in trees]
    first = columns[0]
    for column in columns[1:]:
        if column.keys() != first.keys():
            raise ValueError(f"Batches differ in form: one has tensors at {list(first)}, another at {list(column)}.")
        for name, tensor in column.items():
            if tensor.shape[1:] != first[name].shape[1:]:
                raise ValueError(
                    f"Tensors{name and f' at {name}'} of shapes {tuple(first[name].shape)} and {tuple(tensor.shape)} "
                    "cannot be joined: pad or crop the samples to one size."
                )
    joined = iter([torch.cat([column[name] for column in columns]) for name in first])
    return map_tensors(lambda _: next(joined), trees[0])


def rebuild_mapping(like: Mapping[Any, Any], entries: dict[Any, Any]) -> Mapping[Any, Any]:
    """Make a mapping of the type of another, or a dict where that type cannot be made from its entries.

    Args:
        like: Gives the type, such as transformers' ``BatchEncoding``.
        entries: Of the new mapping.

    Returns:
        The new mapping.
    """
    if type(like) is dict:
        return entries
    try:
        rebuilt = type(like)(entries)  # type: ignore[call-arg]  # what a subclass takes is its own affair
    except TypeError:
        return entries
    return rebuilt if list(rebuilt) == list(entries) else entries


def _rebuild_sequence(like: tuple[Any, ...] | list[Any], values: list[Any]) -> tuple[Any, ...] | list[Any]:
    if hasattr(like, "_fields"):  # a named tuple
        return type(like)(*values)
    return type(like)(values)
