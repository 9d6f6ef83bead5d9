r"""Networks in the neural tangent parameterization.

Every weight and bias is drawn from N(0, 1); a layer computes

    z = weight_std / sqrt(fan_in) * (W x) + bias_std * b,

with ``fan_in = in_features`` (linear) or ``in_channels * kernel_height * kernel_width`` (convolution). In this
parameterization the neural tangent kernel has a finite limit at infinite width (Jacot, Gabriel and Hongler, 2018,
arXiv 1806.07572; Sohl-Dickstein et al., 2020, arXiv 2001.07301).

An architecture is one plain :class:`torch.nn.Sequential`, whatever is done with it: the finite network runs it, the
linearized network differentiates it, :class:`ntk_lightning.kernels.InfiniteNTK` walks it.

Longer than 300 lines for the documentation of seven small public names, which belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "Erf", "FiveLayerCNN", "MyrtleCNN", "NTKConv2d", "NTKLinear", "Residual"]

_MYRTLE_BLOCKS = {5: (2, 1, 1), 7: (2, 2, 2), 10: (3, 3, 3)}


def _check_whole(owner: str, **sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{owner} needs sizes that are whole numbers, got {name}={size!r}: give one int.")


class _NTKLayer(nn.Module):
    """What the two affine layers share: N(0, 1) parameters and the scales that stand outside them."""

    def __init__(self, weight_shape: tuple[int, ...], weight_std: float, bias_std: float) -> None:
        super().__init__()
        scales: tuple[object, ...] = weight_std, bias_std
        if not all(isinstance(scale, Real) for scale in scales):
            raise TypeError(f"weight_std and bias_std must be numbers, got {weight_std=} and {bias_std=}.")
        if not (0 < weight_std < math.inf and 0 <= bias_std < math.inf):
            raise ValueError(f"weight_std must be > 0 and bias_std >= 0, got {weight_std=} and {bias_std=}.")
        if min(weight_shape) < 1:
            raise ValueError(f"{type(self).__name__} needs positive sizes, got a weight of shape {weight_shape}.")
        self.weight_std, self.bias_std = float(weight_std), float(bias_std)
        self.fan_in = math.prod(weight_shape[1:])
        self.weight = nn.Parameter(torch.empty(weight_shape))
        self.bias = nn.Parameter(torch.empty(weight_shape[0])) if bias_std > 0 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from N(0, 1)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def _check_input(self, x: Tensor, dim: int, name: str) -> None:
        size = getattr(self, name)
        if x.dim() < -dim or x.shape[dim] != size:
            advice = f"set {name}={x.shape[dim]}" if x.dim() >= -dim else "give it images (n, C, H, W)"
            raise ValueError(f"{type(self).__name__} has {name}={size}, but gets {tuple(x.shape)}: {advice}.")

    def _scaled(self) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias_std * self.bias
        return self.weight * (self.weight_std / math.sqrt(self.fan_in)), bias


class NTKLinear(_NTKLayer):
    """Fully connected layer in NTK parameterization.

    Args:
        in_features: Size of the last dimension of the input, the fan-in.
        out_features: Size of the last dimension of the output.
        weight_std: Standard deviation of the weights at unit fan-in; sqrt(2) keeps ReLU networks' scale.
        bias_std: Standard deviation of the biases; with 0 the layer has none.

    Raises:
        TypeError: A size is not a whole number, or a standard deviation not a number.
        ValueError: A size is not positive or a standard deviation is out of range.

    Example:
        >>> NTKLinear(8, 3)(torch.ones(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, in_features: int, out_features: int, weight_std: float = 2**0.5, bias_std: float = 0.0) -> None:
        _check_whole("NTKLinear", in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), weight_std, bias_std)
        self.in_features, self.out_features = int(in_features), int(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        self._check_input(x, -1, "in_features")
        return F.linear(x, *self._scaled())

    def extra_repr(self) -> str:
        """Sizes and scales, for printing."""
        return (
            f"{self.in_features}, {self.out_features}, weight_std={self.weight_std:.4g}, bias_std={self.bias_std:.4g}"
        )


class NTKConv2d(_NTKLayer):
    """Two-dimensional convolution in NTK parameterization.

    The fan-in counts padded zeros as inputs, as neural-tangents does.

    Args:
        in_channels: Channels of the input (n, in_channels, H, W).
        out_channels: Channels of the output.
        kernel_size: Side of the square filter in pixels.
        padding: ``"same"`` pads (kernel_size - 1) / 2 zeros on each side (odd filters only), ``"valid"`` pads none.
        weight_std: Standard deviation of the weights at unit fan-in.
        bias_std: Standard deviation of the biases; with 0 the layer has none.
        stride: Step of the filter in pixels, the same in both directions.

    Raises:
        TypeError: A size is not one whole number, or a standard deviation not a number.
        ValueError: An unknown padding, an even filter with ``"same"``, a size that is not positive, or a standard
            deviation out of range.

    Example:
        >>> NTKConv2d(3, 16, 3)(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: Literal["same", "valid"] = "same",
        weight_std: float = 2**0.5,
        bias_std: float = 0.0,
        stride: int = 1,
    ) -> None:
        sizes = {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size, "stride": stride}
        _check_whole("NTKConv2d", **sizes)
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be "same" or "valid", got {padding!r}.')
        if padding == "same" and kernel_size % 2 == 0:
            raise ValueError(f'padding="same" needs an odd kernel_size, got {kernel_size}; use "valid" or an odd one.')
        if stride < 1:
            raise ValueError(f"stride must be at least 1, got {stride}.")
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), weight_std, bias_std)
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.kernel_size, self.padding, self.stride = int(kernel_size), padding, int(stride)

    @property
    def pad(self) -> int:
        """Zeros added on each side, in pixels."""
        return (self.kernel_size - 1) // 2 if self.padding == "same" else 0

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, H, W) to (n, out_channels, H', W')."""
        self._check_input(x, -3, "in_channels")
        return F.conv2d(x, *self._scaled(), stride=self.stride, padding=self.pad)

    def extra_repr(self) -> str:
        """Sizes and scales, for printing."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, padding={self.padding!r}, "
            f"stride={self.stride}, weight_std={self.weight_std:.4g}, bias_std={self.bias_std:.4g}"
        )


class Erf(nn.Module):
    """Pointwise error function, the activation of Williams (1997), "Computing with infinite networks".

    Example:
        >>> Erf()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8427])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply erf to every entry."""
        return torch.erf(x)


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
        >>> MLP(width=32, depth=2, in_features=12)(torch.ones(4, 3, 2, 2)).shape
        torch.Size([4, 1])
    """
    _check_whole("MLP", width=width, depth=depth, in_features=in_features, num_outputs=num_outputs)
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
        >>> MyrtleCNN(width=8, depth=7)(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 1])
    """
    _check_whole("MyrtleCNN", width=width, depth=depth, in_channels=in_channels, num_outputs=num_outputs)
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
        >>> FiveLayerCNN(width=8, in_channels=1)(torch.ones(2, 1, 16, 16)).shape
        torch.Size([2, 1])
    """
    _check_whole("FiveLayerCNN", width=width, in_channels=in_channels, num_outputs=num_outputs)
    layers: list[nn.Module] = []
    for _ in range(3):
        conv = NTKConv2d(width if layers else in_channels, width, 3, "same", weight_std, bias_std)
        layers += [conv, nn.ReLU(), nn.AvgPool2d(2)]
    layers += [NTKConv2d(width, width, 3, "same", weight_std, bias_std), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(width, num_outputs, weight_std, bias_std)
    )
