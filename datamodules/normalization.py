"""Inputs of mean 0 and standard deviation 1 in every channel, in float64 and bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["as_loaded", "normalization"]

_CHUNK = 1024  # samples that are in float64 at a time
_CONSTANT = 1e-9  # a standard deviation of so little beside the mean is rounding


def normalization(x: Tensor) -> Callable[[Tensor], Tensor]:
    """Estimate mean and standard deviation of each channel, and make the function that normalizes by them.

    A channel that is constant is centered and not scaled (as scikit-learn's StandardScaler does), with a warning.

    Args:
        x: Samples (n, C, ...) of any dtype that the statistics are taken from.

    Returns:
        Maps samples (m, C, ...) to (x - mean) / standard deviation, float32.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
        >>> normalization(x)(x)
        tensor([[-1., -1.],
                [ 1.,  1.]])
    """
    over, count = (0, *range(2, x.dim())), x.numel() // x.shape[1]  # all dimensions but that of the channels
    total = sum(part.double().sum(over, keepdim=True) for part in x.split(_CHUNK))
    mean = torch.as_tensor(total) / count
    squares = sum((part.double() - mean).square().sum(over, keepdim=True) for part in x.split(_CHUNK))
    spread = (torch.as_tensor(squares) / count).sqrt()
    constant = spread <= _CONSTANT * mean.abs()
    if constant.any():
        first = x[:1].double().flatten(2)[:, :, :1].reshape(mean.shape) if x.dim() > 2 else x[:1].double()
        mean, spread = torch.where(constant, first, mean), torch.where(constant, 1.0, spread)
        channels = constant.flatten().nonzero().flatten().tolist()
        some = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        warnings.warn(
            f"{len(channels)} of {x.shape[1]} channels ({some}) are constant in the {len(x)} samples that the "
            "normalization is taken from: they are centered and not scaled. Drop them, take more samples "
            "(n_statistics), or switch it off by normalize=False.",
            stacklevel=4,  # who set the data module up
        )

    def normalize(samples: Tensor) -> Tensor:
        out = torch.empty(samples.shape)
        for part, normalized in zip(samples.split(_CHUNK), out.split(_CHUNK), strict=True):
            normalized.copy_((part.double() - mean) / spread)
        return out

    return normalize


def as_loaded(x: Tensor) -> Tensor:
    """Leave the values of inputs as they are.

    Args:
        x: Samples (n, ...).

    Returns:
        The same values in float32; whole numbers other than uint8 pixels stay what they are, such as an embedding's
        tokens.
    """
    return x.float() if x.is_floating_point() or x.dtype in (torch.uint8, torch.bool) else x
