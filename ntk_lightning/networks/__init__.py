"""Networks in the neural tangent parameterization: layers, and the architectures of the source paper."""

from ntk_lightning.networks.architectures import MLP, FiveLayerCNN, MyrtleCNN
from ntk_lightning.networks.attention import SelfAttention
from ntk_lightning.networks.convolutions import NTKConv1d, NTKConv2d
from ntk_lightning.networks.layers import ChannelNorm, NTKLinear, Residual
from ntk_lightning.networks.parameterize import ntk_parameterize
from ntk_lightning.networks.pointwise import Erf, Pointwise

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
