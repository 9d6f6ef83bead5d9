"""Networks in the neural tangent parameterization: layers, and the architectures of the source paper."""

from ntk_lightning.networks.architectures import MLP, FiveLayerCNN, MyrtleCNN
from ntk_lightning.networks.layers import (
    ChannelNorm,
    Erf,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Pointwise,
    Residual,
    SelfAttention,
)
from ntk_lightning.networks.parameterize import ntk_parameterize

__all__ = [
    "MLP",
    "ChannelNorm",
    "Erf",
    "FiveLayerCNN",
    "MyrtleCNN",
    "NTKConv1d",
    "NTKConv2d",
    "NTKLinear",
    "Pointwise",
    "Residual",
    "SelfAttention",
    "ntk_parameterize",
]
