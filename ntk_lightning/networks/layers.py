r"""Layers in the neural tangent parameterization.

Every weight and bias is drawn from N(0, 1); a layer computes

    z = weight_std / sqrt(fan_in) * (W x) + bias_std * b,

with ``fan_in = in_features`` (linear) or ``in_channels * kernel_height * kernel_width`` (convolution). In this
parameterization the neural tangent kernel has a finite limit at infinite width (Jacot, Gabriel and Hongler, 2018,
arXiv 1806.07572; Sohl-Dickstein et al., 2020, arXiv 2001.07301).

An architecture is one plain :class:`torch.nn.Sequential`, whatever is done with it: the finite network runs it, the
linearized network differentiates it, :class:`ntk_lightning.kernels.InfiniteNTK` walks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.whole_number import check_whole

__all__ = ["Erf", "NTKConv2d", "NTKLinear", "Pointwise", "Residual"]


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
        check_whole("NTKLinear", in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), weight_std, bias_std)
        self.in_features, self.out_features = int(in_features), int(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        self._check_input(x, -1, "in_features")
        if not x.is_floating_point() or x.numel() > self.weight.numel():
            return F.linear(x, *self._scaled())
        # (s x) W^T instead of x (s W)^T: a wide weight is not read and written once more for a few samples
        bias = None if self.bias is None else self.bias_std * self.bias
        return F.linear(x * (self.weight_std / math.sqrt(self.fan_in)), self.weight, bias)

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
        check_whole("NTKConv2d", **sizes)
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
