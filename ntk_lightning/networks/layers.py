"""All layers under one name, which saved networks refer to; the two that have no weights stand here.

One module is the only definition of an architecture, whatever is done with it: the finite network runs it, the
linearized network differentiates it, :class:`~ntk_lightning.kernels.InfiniteNTK` reads it.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor, nn

from ntk_lightning.networks.affine import NTKLinear
from ntk_lightning.networks.attention import SelfAttention
from ntk_lightning.networks.convolutions import NTKConv1d, NTKConv2d
from ntk_lightning.networks.pointwise import Erf, Pointwise

__all__ = [
    "ChannelNorm",
    "Erf",
    "NTKConv1d",
    "NTKConv2d",
    "NTKLinear",
    "Pointwise",
    "Residual",
    "SelfAttention",
]


class ChannelNorm(nn.Module):
    """Layer normalization over the channels of each pixel, or over the features of a vector, without gain and bias.

    y_c = (x_c - mean(x)) / sqrt(var(x) + eps), mean and variance over the channels c at one position (Ba, Kiros and
    Hinton, 2016, arXiv 1607.06450). On vectors it is ``nn.LayerNorm(C, eps, elementwise_affine=False)``.

    Args:
        eps: Added to the variance.

    Raises:
        TypeError: ``eps`` is not a number.
        ValueError: ``eps`` is negative or infinite.

    Example:
        >>> x = ChannelNorm()(torch.arange(24.0).reshape(2, 3, 2, 2))
        >>> x.mean(1).abs().max().item() < 1e-6, x.square().mean(1).round(decimals=3).unique()
        (True, tensor([1.]))
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        if not isinstance(eps, Real) or isinstance(eps, bool):
            raise TypeError(
                f"ChannelNorm needs a number eps, got {eps!r}; the number of channels is that of the input."
            )
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be >= 0 and finite, got {eps!r}.")
        self.eps: float = float(eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (n, C) or (n, C, ...) over C."""
        if x.dim() < 2:
            raise ValueError(f"ChannelNorm needs inputs (n, C) or (n, C, ...), but gets {tuple(x.shape)}.")
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + self.eps)

    def extra_repr(self) -> str:
        """What is added to the variance, for printing."""
        return f"eps={self.eps:g}"


class Residual(nn.Module):
    """Residual sum ``body(x) + shortcut(x)``.

    For the infinite-width kernel both branches must be independent given the input, so ``body`` has to end in an
    affine layer, and so has ``shortcut`` unless it is the identity.

    Args:
        body: The residual branch.
        shortcut: The other branch; the identity by default.

    Example:
        >>> block = Residual(nn.Sequential(nn.ReLU(), NTKConv2d(4, 4, 3)))
        >>> block(torch.ones(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map x to the sum of both branches, which must agree in shape."""
        out: Tensor = self.body(x) + self.shortcut(x)
        return out
