"""The empirical NTK of a network as it predicts, whatever mode training has put it in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ntk_lightning.kernels.empirical.empirical_ntk import EmpiricalNTK

__all__ = ["evaluation_ntk"]


def evaluation_ntk(
    net: nn.Module, memory: str | int = "4GB", output: int | Callable[[Any], Tensor] | None = None
) -> EmpiricalNTK:
    """Make the empirical NTK of a network in evaluation mode: dropout off, batch normalization by running statistics.

    Args:
        net: Maps (n, ...) to (n,) or (n, C). It is copied and stays as it is.
        memory: Budget of the kernel, as of :class:`~ntk_lightning.kernels.EmpiricalNTK`.
        output: As of the kernel.

    Returns:
        The kernel at the network's current weights.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))
        >>> evaluation_ntk(net).net.training, net.training
        (False, True)
    """
    kernel = EmpiricalNTK(net, memory=memory, output=output)
    kernel.net.eval()
    return kernel
