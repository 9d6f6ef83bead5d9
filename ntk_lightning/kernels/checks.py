"""Checks of what goes into a kernel, before any long work starts, and of what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_finite", "check_inputs"]


def check_inputs(x1: Tensor, x2: Tensor | None = None) -> None:
    """Check that inputs can be paired by a kernel.

    Args:
        x1: Inputs (n1, ...), floating point.
        x2: Inputs (n2, ...) of the same shape after the first dimension, dtype and device, or None.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Shapes, dtypes or devices do not agree, a set is empty, or an entry is NaN or infinite.
    """
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name} must be a floating-point tensor, got {type(x).__name__}: convert arrays by torch.from_numpy."
            )
        if not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}: call .float() first.")
        if x.dim() < 2 or 0 in x.shape:
            raise ValueError(
                f"{name} must hold at least one sample, (n, features) or (n, C, H, W); got {tuple(x.shape)}."
            )
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x.flatten(1)).all(1)).nonzero()[0])
            raise ValueError(f"{name} has a NaN or infinite entry, first in sample {bad}: clean the data.")
    if x2 is not None:
        for what in ("dtype", "device"):
            if getattr(x1, what) != getattr(x2, what):
                raise ValueError(f"x1 and x2 differ in {what}: {getattr(x1, what)} and {getattr(x2, what)}.")
        if x1.shape[1:] != x2.shape[1:]:
            raise ValueError(
                f"x1 and x2 hold samples of different shapes: {tuple(x1.shape[1:])} and {tuple(x2.shape[1:])}."
            )


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
