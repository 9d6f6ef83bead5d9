"""Networks in the neural tangent parameterization: layers, and the architectures of the source paper."""

from ntk_lightning.networks.architectures import MLP, FiveLayerCNN, MyrtleCNN
from ntk_lightning.networks.layers import Erf, NTKConv2d, NTKLinear, Pointwise, Residual

__all__ = ["MLP", "Erf", "FiveLayerCNN", "MyrtleCNN", "NTKConv2d", "NTKLinear", "Pointwise", "Residual"]
