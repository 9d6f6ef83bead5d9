"""How a collated batch becomes inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ntk_lightning.datamodules.samples import Samples
from ntk_lightning.pytrees import Tree, count_samples, map_tensors, rebuild_mapping

__all__ = ["Unpack", "unpack_batch", "unpack_samples"]

Unpack: TypeAlias = Callable[[Any], tuple[Tree, Tensor]]  # of a collated batch

_LABELS = ("labels", "label", "targets", "target", "y")
_GIVE = "give samples=, a function of a collated batch to (inputs, targets)."


def unpack_batch(batch: object) -> tuple[Tree, Tensor]:
    """Part a batch into inputs and targets.

    Args:
        batch: A tuple or list (x, y, ...), or a mapping with one of the keys "labels", "label", "targets", "target"
            and "y", such as a ``BatchEncoding``.

    Returns:
        x and y; or the mapping without its targets, and the targets.

    Raises:
        ValueError: The batch is neither, or a mapping has none or several of the keys.

    Example:
        >>> unpack_batch({"tokens": torch.tensor([[5, 6]]), "labels": torch.tensor([1])})
        ({'tokens': tensor([[5, 6]])}, tensor([1]))
    """
    if isinstance(batch, Mapping):
        keys = [key for key in _LABELS if key in batch]
        if len(keys) != 1:
            raise ValueError(
                f"A batch with the keys {list(batch)} has {f'several targets, {keys}' if keys else 'no targets'}: name "
                f"them by one of {', '.join(_LABELS)}, or {_GIVE}"
            )
        inputs = {key: value for key, value in batch.items() if key != keys[0]}
        return rebuild_mapping(batch, inputs), batch[keys[0]]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[0], batch[1]
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise ValueError(
        f"A batch of type {type(batch).__name__}{size} is neither (x, y, ...) nor a mapping with targets: {_GIVE}"
    )


def unpack_samples(batch: object, unpack: Unpack = unpack_batch) -> Samples:
    """Part a batch and check it; a single number as target makes it a batch of one sample.

    Args:
        batch: Collated.
        unpack: Function of a batch to (inputs, targets).

    Returns:
        The samples of the batch.

    Raises:
        TypeError: ``unpack`` gives no pair, or targets that are no tensor.
        ValueError: The batch cannot be parted, or its tensors have different numbers of samples.
    """
    parts = unpack(batch)
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        raise TypeError(f"samples= must give (inputs, targets), got {type(parts).__name__}: return a pair.")
    x, y = parts
    if isinstance(y, (int, float)):
        y = torch.tensor(y)
    if not isinstance(y, Tensor):
        raise TypeError(f"The targets of a batch must be a tensor, got {type(y).__name__}: {_GIVE}")
    if not y.dim():
        x, y = map_tensors(lambda tensor: tensor[None], (x, y))
    n = count_samples(x)
    if n != len(y):
        raise ValueError(f"A batch has {n} inputs and {len(y)} targets: every tensor must have the n samples first.")
    return Samples(x, y)
