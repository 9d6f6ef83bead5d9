"""The finite network, trained as it is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ntk_lightning.modules.base import NTKModule
from ntk_lightning.optim import OptimizerConfig

__all__ = ["FiniteNetwork"]


class FiniteNetwork(NTKModule):
    """A network f(w, x) trained on the mean squared error.

    Args:
        net: Maps inputs (n, ...) to outputs (n, num_outputs).
        optimizer: Shared by all models of a comparison.

    Example:
        >>> import torch
        >>> from ntk_lightning.networks import MLP
        >>> FiniteNetwork(MLP(width=8, depth=1, in_features=4))(torch.ones(3, 4)).shape
        torch.Size([3, 1])
    """

    label: ClassVar[str] = "finite network"

    def __init__(self, net: nn.Module, optimizer: OptimizerConfig = OptimizerConfig()) -> None:
        super().__init__(optimizer)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the network: (n, ...) to (n, num_outputs)."""
        outputs: Tensor = self.net(x)
        return outputs
