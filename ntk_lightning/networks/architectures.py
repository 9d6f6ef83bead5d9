"""Networks of the source paper and of the tests, each one plain ``nn.Sequential`` in NTK parameterization."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ntk_lightning.networks.affine import NTKLinear
from ntk_lightning.networks.convolutions import NTKConv2d
from ntk_lightning.whole_number import check_whole

__all__ = ["MLP", "FiveLayerCNN", "MyrtleCNN"]

_MYRTLE_BLOCKS = {5: (2, 1, 1), 7: (2, 2, 2), 10: (3, 3, 3)}


def MLP(
    width: int,
    depth: int,
    in_features: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    num_outputs: int = 1,
    weight_std: float = 2**0.5,
    bias_std: float = 0.0,
) -> nn.Sequential:
    """Fully connected network with ``depth`` hidden layers; images are flattened first.

    Args:
        width: Units of every hidden layer.
        depth: Number of hidden layers; 0 gives a linear model.
        in_features: Entries of one flattened input.
        activation: Makes one activation module; called once a hidden layer.
        num_outputs: Units of the readout.
        weight_std: Standard deviation of all weights at unit fan-in.
        bias_std: Standard deviation of all biases.

    Returns:
        The network, mapping (n, in_features) or (n, C, H, W) with C*H*W = in_features to (n, num_outputs).

    Raises:
        TypeError: ``depth`` or a size is not a whole number, or a standard deviation not a number.
        ValueError: ``depth`` is negative, a size is not positive or a standard deviation is out of range.

    Example:
        >>> import torch
        >>> MLP(width=32, depth=2, in_features=12)(torch.ones(4, 3, 2, 2)).shape
        torch.Size([4, 1])
    """
    check_whole("MLP", width=width, depth=depth, in_features=in_features, num_outputs=num_outputs)
    if depth < 0:
        raise ValueError(f"depth counts hidden layers and cannot be negative, got {depth}.")
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in in [in_features, *[width] * (depth - 1)][:depth]:
        layers += [NTKLinear(fan_in, width, weight_std, bias_std), activation()]
    readout = NTKLinear(width if depth else in_features, num_outputs, weight_std, bias_std)
    return nn.Sequential(*layers, readout)


def MyrtleCNN(
    width: int = 64,
    depth: int = 5,
    in_channels: int = 3,
    num_outputs: int = 1,
    weight_std: float = 2**0.5,
    bias_std: float = 0.0,
) -> nn.Sequential:
    """Myrtle network of Shankar et al. (2020), "Neural Kernels Without Tangents", arXiv 2003.02237.

    Blocks of [2, 1, 1], [2, 2, 2] or [3, 3, 3] convolutions (3x3, "same") with ReLU for depth 5, 7 or 10; 2x2 average
    pooling after the first two blocks; global average pooling and a linear readout.

    Args:
        width: Channels of every convolution.
        depth: Number of affine layers: 5, 7 or 10.
        in_channels: Channels of the images.
        num_outputs: Units of the readout.
        weight_std: Standard deviation of all weights at unit fan-in.
        bias_std: Standard deviation of all biases.

    Returns:
        The network, mapping (n, in_channels, H, W) to (n, num_outputs); H and W must be divisible by 4.

    Raises:
        TypeError: ``depth`` or a size is not a whole number, or a standard deviation not a number.
        ValueError: ``depth`` is not 5, 7 or 10, a size is not positive or a standard deviation is out of range.

    Example:
        >>> import torch
        >>> MyrtleCNN(width=8, depth=7)(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 1])
    """
    check_whole("MyrtleCNN", width=width, depth=depth, in_channels=in_channels, num_outputs=num_outputs)
    if depth not in _MYRTLE_BLOCKS:
        raise ValueError(f"MyrtleCNN is defined for depth {sorted(_MYRTLE_BLOCKS)}, got {depth}.")
    first, second, third = _MYRTLE_BLOCKS[depth]
    layers: list[nn.Module] = []
    for step in ["conv"] * first + ["pool"] + ["conv"] * second + ["pool"] + ["conv"] * third:
        if step == "pool":
            layers.append(nn.AvgPool2d(2))
        else:
            layers += [NTKConv2d(width if layers else in_channels, width, 3, "same", weight_std, bias_std), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(width, num_outputs, weight_std, bias_std)
    )


def FiveLayerCNN(
    width: int = 64,
    in_channels: int = 3,
    num_outputs: int = 1,
    weight_std: float = 2**0.5,
    bias_std: float = 0.0,
) -> nn.Sequential:
    """Five-layer network that is cheap enough for width 4096.

    Three times convolution-ReLU-2x2 average pooling, then convolution-ReLU, global average pooling and a linear
    readout. The source paper (arXiv 2206.10012) names a five-layer network without a layer list: this list is ours.

    Args:
        width: Channels of every 3x3 convolution.
        in_channels: Channels of the images.
        num_outputs: Units of the readout.
        weight_std: Standard deviation of all weights at unit fan-in.
        bias_std: Standard deviation of all biases.

    Returns:
        The network, mapping (n, in_channels, H, W) to (n, num_outputs); H and W must be divisible by 8.

    Raises:
        TypeError: A size is not a whole number, or a standard deviation not a number.
        ValueError: A size is not positive or a standard deviation is out of range.

    Example:
        >>> import torch
        >>> FiveLayerCNN(width=8, in_channels=1)(torch.ones(2, 1, 16, 16)).shape
        torch.Size([2, 1])
    """
    check_whole("FiveLayerCNN", width=width, in_channels=in_channels, num_outputs=num_outputs)
    layers: list[nn.Module] = []
    for _ in range(3):
        conv = NTKConv2d(width if layers else in_channels, width, 3, "same", weight_std, bias_std)
        layers += [conv, nn.ReLU(), nn.AvgPool2d(2)]
    layers += [NTKConv2d(width, width, 3, "same", weight_std, bias_std), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(width, num_outputs, weight_std, bias_std)
    )
