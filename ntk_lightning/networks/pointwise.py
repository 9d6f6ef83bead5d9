"""Activations that PyTorch has no module for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor, nn

__all__ = ["Erf", "Pointwise"]


class Erf(nn.Module):
    """Pointwise error function, the activation of Williams (1997), "Computing with infinite networks".

    Example:
        >>> Erf()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8427])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply erf to every entry."""
        return torch.erf(x)


class Pointwise(nn.Module):
    """Any function of one number, applied to every entry.

    Its infinite-width kernel has a closed form where the package knows one (``torch.abs``, ``sin``, ``cos``, ``exp``,
    ``sign``, ``erf``, ``relu``, ``F.gelu``), and is integrated numerically otherwise. a f(b x) needs no function of its
    own: a is a factor of the ``weight_std`` of the layer after it, b of both standard deviations of that before it.

    Args:
        function: Maps a tensor to one of the same shape, every entry by itself, and is differentiable by autograd.
            Stored kernels need one that is defined by ``def`` in a module.
        kinks: Where the function's first or second derivative jumps, other than at 0. The integration ends its panels
            there; without them it is less accurate, and says so.

    Raises:
        TypeError: The function cannot be called or is a module, or kinks are not numbers.
        ValueError: A kink is not finite.

    Example:
        >>> Pointwise(torch.sin)(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8415])
    """

    def __init__(self, function: Callable[[Tensor], Tensor], kinks: Sequence[float] = ()) -> None:
        super().__init__()
        if not callable(function) or isinstance(function, nn.Module | type):
            raise TypeError(f"Pointwise takes a function of a tensor, got {function!r}; put a module where it is used.")
        if not all(isinstance(kink, Real) for kink in kinks):
            raise TypeError(f"kinks must be numbers, got {kinks!r}.")
        if not all(math.isfinite(kink) for kink in kinks):
            raise ValueError(f"kinks must be finite, got {kinks!r}.")
        self.function, self.kinks = function, tuple(float(kink) for kink in kinks)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function to every entry."""
        return self.function(x)

    def extra_repr(self) -> str:
        """The function's name, for printing."""
        return getattr(self.function, "__name__", repr(self.function))
