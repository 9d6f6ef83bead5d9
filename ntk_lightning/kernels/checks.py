"""Checks of what goes into a kernel, before any long work starts, and of what comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_finite", "check_inputs"]


def check_inputs(x1: Any, x2: Any = None) -> None:  # noqa: ANN401 - wrong kinds are what it looks for
    """Check that inputs can be paired by a kernel.

    Args:
        x1: Inputs (n1, ...), floating point; or ``Inputs`` of several tensors of any dtype, each (n1, ...).
        x2: Inputs (n2, ...) of the same structure, shapes after the first dimension, dtypes and device, or None.

    Raises:
        TypeError: An input is not a floating-point tensor, or the two have not the same structure.
        ValueError: Shapes, dtypes or devices do not agree, a set is empty, or an entry is NaN or infinite.
    """
    left = _tensors("x1", x1)
    if x2 is None:
        return
    right = _tensors("x2", x2)
    if left.keys() != right.keys():
        raise TypeError(f"x1 and x2 differ in structure: x1 has {_names('x1', left)}, x2 has {_names('x2', right)}.")
    for path, a in left.items():
        b = right[path]
        for what in ("dtype", "device"):
            if getattr(a, what) != getattr(b, what):
                raise ValueError(f"x1{path} and x2{path} differ in {what}: {getattr(a, what)} and {getattr(b, what)}.")
        if a.shape[1:] != b.shape[1:]:
            raise ValueError(
                f"x1{path} and x2{path} hold samples of different shapes: {tuple(a.shape[1:])} and "
                f"{tuple(b.shape[1:])}."
            )


def _tensors(name: str, x: Any) -> dict[str, Tensor]:  # noqa: ANN401
    """The checked tensors of some inputs, by their paths."""
    if isinstance(x, Tensor):
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}: call .float() first.")
        tensors = {"": x}
    elif hasattr(x, "leaves"):  # Inputs, whose package imports this file
        tensors = dict(zip(x.paths, x.leaves, strict=True))
    else:
        raise TypeError(
            f"{name} must be a floating-point tensor, got {type(x).__name__}: convert arrays by torch.from_numpy."
        )
    n = len(next(iter(tensors.values()))) if all(t.dim() for t in tensors.values()) else 0
    for path, tensor in tensors.items():
        alone = path == ""  # among several tensors one may be empty but for its samples, or hold one number a sample
        if n == 0 or (alone and (0 in tensor.shape or tensor.dim() < 1 + tensor.is_floating_point())):
            raise ValueError(
                f"{name}{path} must hold at least one sample, (n, features) or (n, C, H, W); got {tuple(tensor.shape)}."
            )
        if len(tensor) != n:
            raise ValueError(
                f"{name}{path} holds {len(tensor)} samples and another tensor of {name} holds {n}: every tensor needs "
                "the samples first; pass what is the same for all samples by output=... or within the network."
            )
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]).all(1)).nonzero()[0])
            raise ValueError(f"{name}{path} has a NaN or infinite entry, first in sample {bad}: clean the data.")
    devices = {tensor.device for tensor in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"The tensors of {name} are on different devices, {sorted(map(str, devices))}: use one.")
    return tensors


def _names(name: str, tensors: dict[str, Tensor]) -> str:
    return ", ".join(name + path for path in tensors)


def check_finite(values: Tensor, advice: str, what: str = "kernel of inputs", sides: int = 2) -> None:
    """Check that nothing overflowed while a kernel was computed.

    Args:
        values: Of n1 and n2 inputs, (n1, n2, ...), or of one side's, (n, ...).
        advice: What to do where something did.
        what: Name of an entry, to stand before the numbers of its inputs.
        sides: How many leading dimensions count inputs.

    Raises:
        FloatingPointError: An entry is NaN or infinite.
    """
    finite = torch.isfinite(values)
    if not finite.all():
        numbers = " and ".join(map(str, finite.logical_not().nonzero()[0, :sides].tolist()))
        raise FloatingPointError(f"The {what} {numbers} is NaN or infinite: {advice}.")
