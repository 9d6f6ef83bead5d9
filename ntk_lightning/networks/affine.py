r"""Affine layers in the neural tangent parameterization, or in the standard one.

Neural tangent parameterization: every weight and bias is drawn from N(0, 1), and a layer computes

    z = weight_std / sqrt(fan_in) * (W x) + bias_std * b,

with ``fan_in = in_features`` (linear) or ``in_channels`` times the pixels of the filter (convolution). In this
parameterization the neural tangent kernel has a finite limit at infinite width (Jacot, Gabriel and Hongler, 2018,
arXiv 1806.07572).

Standard parameterization, that of plain PyTorch layers: ``z = W x + b`` with W of N(0, weight_std^2 / fan_in) and b of
N(0, bias_std^2). The outputs have the same distribution; the gradient by W has ``fan_in / weight_std^2`` times the
squared norm, so that the kernel grows with the width (Sohl-Dickstein et al., 2020, arXiv 2001.07301).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.whole_number import check_whole

__all__ = ["NTKLayer", "NTKLinear", "Parameterization", "check_scales"]

Parameterization = Literal["ntk", "standard"]


def check_scales(owner: str, bias_std: object, **scales: object) -> None:
    """Check standard deviations: that of a bias may be 0, all others are positive.

    Args:
        owner: What needs them, for the message.
        bias_std: That of the bias.
        **scales: The others, by name.

    Raises:
        TypeError: One is not a number.
        ValueError: One is out of range.
    """
    given = " and ".join(f"{name}={value!r}" for name, value in {**scales, "bias_std": bias_std}.items())
    values = [*scales.values(), bias_std]
    if not all(isinstance(value, Real) and not isinstance(value, bool) for value in values):
        raise TypeError(f"{owner} needs standard deviations that are numbers, got {given}.")
    *others, of_bias = (float(cast(Real, value)) for value in values)
    if not (all(0 < value < math.inf for value in others) and 0 <= of_bias < math.inf):
        raise ValueError(f"{owner}: {', '.join(scales)} must be > 0 and bias_std >= 0, got {given}.")


class NTKLayer(nn.Module):
    """What the affine layers share: parameters, their distribution, and the scales that stand outside them."""

    # Not an attribute of every layer: the attributes of a network name its stored kernels.
    parameterization: Parameterization = "ntk"

    def __init__(
        self, shape: tuple[int, ...], weight_std: float, bias_std: float, parameterization: Parameterization, bias: bool
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_scales(name, bias_std, weight_std=weight_std)
        if parameterization not in ("ntk", "standard"):
            raise ValueError(f'parameterization must be "ntk" or "standard", got {parameterization!r}.')
        if not isinstance(bias, bool):
            raise TypeError(f"bias must be True or False, got {bias!r}; its scale is bias_std.")
        if not bias and bias_std > 0:
            raise ValueError(f"bias=False contradicts {bias_std=}: leave one of the two out.")
        if min(shape) < 1:
            raise ValueError(f"{name} needs positive sizes, got a weight of shape {shape}.")
        if parameterization == "standard":
            self.parameterization = parameterization
        self.weight_std, self.bias_std = float(weight_std), float(bias_std)
        self.fan_in = math.prod(shape[1:])
        self.weight = nn.Parameter(torch.empty(shape))
        # A bias of scale 0 adds nothing in the NTK parameterization; in the standard one it starts at 0 and trains.
        has_bias = bias_std > 0 or (bias and parameterization == "standard")
        self.bias = nn.Parameter(torch.empty(shape[0])) if has_bias else None
        self.reset_parameters()

    @property
    def weight_scale(self) -> float:
        """What the weight is multiplied with in the forward pass."""
        return self.weight_std / math.sqrt(self.fan_in) if self.parameterization == "ntk" else 1.0

    @property
    def bias_scale(self) -> float:
        """What the bias is multiplied with in the forward pass."""
        return self.bias_std if self.parameterization == "ntk" else 1.0

    def reset_parameters(self) -> None:
        """Draw every parameter from N(0, 1), or, in the standard parameterization, with the layer's scales."""
        standard = self.parameterization == "standard"
        nn.init.normal_(self.weight, std=self.weight_std / math.sqrt(self.fan_in) if standard else 1.0)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=self.bias_std if standard else 1.0)

    def check_input(self, x: Tensor, dim: int, name: str, form: str) -> None:
        """Refuse inputs of another size, and say which size fits."""
        size = getattr(self, name)
        if x.dim() < -dim or x.shape[dim] != size:
            advice = f"set {name}={x.shape[dim]}" if x.dim() >= -dim else f"give it {form}"
            raise ValueError(f"{type(self).__name__} has {name}={size}, but gets {tuple(x.shape)}: {advice}.")

    def scaled(self) -> tuple[Tensor, Tensor | None]:
        """W and b as they act: with the scales that stand outside the parameters."""
        if self.parameterization == "standard":
            return self.weight, self.bias
        bias = None if self.bias is None else self.bias_scale * self.bias
        return self.weight * self.weight_scale, bias

    def scales(self) -> str:
        """Scales, and what is not the default, for printing."""
        text = f"weight_std={self.weight_std:.4g}, bias_std={self.bias_std:.4g}"
        if self.parameterization == "standard":
            text += f", parameterization='standard', bias={self.bias is not None}"
        return text


class NTKLinear(NTKLayer):
    """Fully connected layer in NTK parameterization, or in the standard one.

    Args:
        in_features: Size of the last dimension of the input, the fan-in.
        out_features: Size of the last dimension of the output.
        weight_std: Standard deviation of the weights at unit fan-in; sqrt(2) keeps ReLU networks' scale.
        bias_std: Standard deviation of the biases; with 0 the layer has none in the NTK parameterization, and one that
            starts at 0 in the standard one.
        parameterization: ``"ntk"``: z = weight_std / sqrt(in_features) W x + bias_std b, all entries of W and b of
            N(0, 1). ``"standard"``: z = W x + b, of N(0, weight_std^2 / in_features) and N(0, bias_std^2).
        bias: ``False`` for no bias.

    Raises:
        TypeError: A size is not a whole number, a standard deviation not a number, or ``bias`` not a truth value.
        ValueError: A size is not positive, a standard deviation is out of range, ``bias=False`` with a ``bias_std``, or
            an unknown parameterization.

    Example:
        >>> NTKLinear(8, 3)(torch.ones(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight_std: float = 2**0.5,
        bias_std: float = 0.0,
        *,
        parameterization: Parameterization = "ntk",
        bias: bool = True,
    ) -> None:
        check_whole("NTKLinear", in_features=in_features, out_features=out_features)
        super().__init__((out_features, in_features), weight_std, bias_std, parameterization, bias)
        self.in_features, self.out_features = int(in_features), int(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        self.check_input(x, -1, "in_features", "vectors (n, in_features)")
        if self.parameterization == "standard" or not x.is_floating_point() or x.numel() > self.weight.numel():
            return F.linear(x, *self.scaled())
        # (s x) W^T instead of x (s W)^T: a wide weight is not read and written once more for a few samples
        bias = None if self.bias is None else self.bias_scale * self.bias
        return F.linear(x * self.weight_scale, self.weight, bias)

    def extra_repr(self) -> str:
        """Sizes and scales, for printing."""
        return f"{self.in_features}, {self.out_features}, {self.scales()}"
