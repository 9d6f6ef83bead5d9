"""Convolutions in the neural tangent parameterization, or in the standard one."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.networks.affine import NTKLayer, Parameterization
from ntk_lightning.whole_number import check_whole, is_whole

__all__ = ["NTKConv1d", "NTKConv2d"]

Padding = int | tuple[int, ...] | Literal["same", "valid"]
PaddingMode = Literal["zeros", "circular"]


def _sizes(owner: str, name: str, value: Any, axes: int, least: int) -> tuple[int, ...]:  # noqa: ANN401  # is checked
    """One whole number for every axis, from one for all or from a tuple."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{owner} needs {name} as one int or {axes}, one for each axis, got {value!r}.")
    if not all(is_whole(one) for one in values):
        given = "one int" if axes == 1 else f"one int, or a tuple of {axes}"
        raise TypeError(f"{owner} needs sizes that are whole numbers, got {name}={value!r}: give {given}.")
    if min(values) < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value!r}.")
    return tuple(int(one) for one in values)


def _one(values: tuple[int, ...]) -> int | tuple[int, ...]:
    """One number where all are equal."""
    return values[0] if len(set(values)) == 1 else values


def _spread(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for every axis."""
    return value if isinstance(value, tuple) else (value,) * axes


class _NTKConv(NTKLayer):
    """What convolutions share; ``_AXES`` is the number of an input's spatial axes."""

    _AXES: ClassVar[int]
    _FORM: ClassVar[str]
    padding_mode: PaddingMode = "zeros"  # set only where it is another, as parameterization above

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        padding: Padding = "same",
        weight_std: float = 2**0.5,
        bias_std: float = 0.0,
        stride: int | tuple[int, ...] = 1,
        *,
        padding_mode: PaddingMode = "zeros",
        parameterization: Parameterization = "ntk",
        bias: bool = True,
    ) -> None:
        owner = type(self).__name__
        check_whole(owner, in_channels=in_channels, out_channels=out_channels)
        filters = _sizes(owner, "kernel_size", kernel_size, self._AXES, 1)
        strides = _sizes(owner, "stride", stride, self._AXES, 1)
        if isinstance(padding, str) and padding not in ("same", "valid"):
            raise ValueError(f'padding must be "same", "valid", one int or {self._AXES}, got {padding!r}.')
        if padding == "same" and any(size % 2 == 0 for size in filters):
            raise ValueError(
                f'padding="same" needs an odd kernel_size, got {kernel_size}; use "valid", an odd one or a number.'
            )
        if padding_mode not in ("zeros", "circular"):
            raise ValueError(f'padding_mode must be "zeros" or "circular", got {padding_mode!r}.')
        shape = (out_channels, in_channels, *filters)
        super().__init__(shape, weight_std, bias_std, parameterization, bias)
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.kernel_size, self.stride = _one(filters), _one(strides)
        self.padding = padding if isinstance(padding, str) else _one(_sizes(owner, "padding", padding, self._AXES, 0))
        if padding_mode != "zeros":
            self.padding_mode = padding_mode

    @property
    def pads(self) -> tuple[int, ...]:
        """Pixels added on each of the two sides of each axis."""
        if self.padding == "same":
            return tuple((size - 1) // 2 for size in self.weight.shape[2:])
        return (0,) * self._AXES if self.padding == "valid" else _spread(self.padding, self._AXES)

    @property
    def pad(self) -> int | tuple[int, ...]:
        """Pixels added on each side; one number where it is the same for all axes."""
        return _one(self.pads)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, ...) to (n, out_channels, ...)."""
        self.check_input(x, -1 - self._AXES, "in_channels", self._FORM)
        convolve = F.conv1d if self._AXES == 1 else F.conv2d
        pads = self.pads
        if self.padding_mode == "circular" and any(pads):
            x = F.pad(x, [pad for pad in reversed(pads) for _ in range(2)], mode="circular")
            pads = (0,) * self._AXES
        return convolve(x, *self.scaled(), stride=_spread(self.stride, self._AXES), padding=pads)

    def extra_repr(self) -> str:
        """Sizes and scales, for printing."""
        mode = "" if self.padding_mode == "zeros" else f"padding_mode={self.padding_mode!r}, "
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, padding={self.padding!r}, "
            f"{mode}stride={self.stride}, {self.scales()}"
        )


class NTKConv1d(_NTKConv):
    r"""One-dimensional convolution in NTK parameterization, or in the standard one.

    Sizes mean what they do in ``nn.Conv1d``; the order of positional arguments is this package's, so name ``stride``
    and ``padding``. The fan-in counts padded zeros as inputs, as neural-tangents does.

    Args:
        in_channels: Channels of the input (n, in_channels, L).
        out_channels: Channels of the output.
        kernel_size: Length of the filter.
        padding: Pixels added on each side. ``"same"`` adds
            (kernel_size - 1) / 2 (odd filters only; the size stays with stride 1), ``"valid"`` adds none.
        weight_std: Standard deviation of the weights at unit fan-in.
        bias_std: Standard deviation of the biases; with 0 the layer has none in the NTK parameterization, and one that
            starts at 0 in the standard one.
        stride: Step of the filter in pixels.
        padding_mode: Added pixels are ``"zeros"``, or those of the opposite side, ``"circular"``.
        parameterization: ``"ntk"``: all weights and biases of N(0, 1), times weight_std / sqrt(fan_in) and bias_std in
            the forward pass. ``"standard"``: drawn with those scales.
        bias: ``False`` for no bias.

    Raises:
        TypeError: A size is not a whole number, a standard deviation not a number, or ``bias`` not a truth value.
        ValueError: A size is out of range, an unknown padding, mode or
            parameterization, an even filter with ``"same"``, ``bias=False`` with a ``bias_std``, or a standard
            deviation out of range.

    Example:
        >>> import torch
        >>> NTKConv1d(3, 16, 5, stride=2)(torch.ones(2, 3, 9)).shape
        torch.Size([2, 16, 5])
    """

    _AXES = 1
    _FORM = "sequences (n, C, L)"


class NTKConv2d(_NTKConv):
    r"""Two-dimensional convolution in NTK parameterization, or in the standard one.

    Sizes mean what they do in ``nn.Conv2d``; the order of positional arguments is this package's, so name ``stride``
    and ``padding``. The fan-in counts padded zeros as inputs, as neural-tangents does.

    Args:
        in_channels: Channels of the input (n, in_channels, H, W).
        out_channels: Channels of the output.
        kernel_size: Height and width of the filter in pixels, or one number for both.
        padding: Pixels added on each side, for height and width or one number for both. ``"same"`` adds
            (kernel_size - 1) / 2 (odd filters only; the size stays with stride 1), ``"valid"`` adds none.
        weight_std: Standard deviation of the weights at unit fan-in.
        bias_std: Standard deviation of the biases; with 0 the layer has none in the NTK parameterization, and one that
            starts at 0 in the standard one.
        stride: Step of the filter in pixels, for height and width or one number for both.
        padding_mode: Added pixels are ``"zeros"``, or those of the opposite side, ``"circular"``.
        parameterization: ``"ntk"``: all weights and biases of N(0, 1), times weight_std / sqrt(fan_in) and bias_std in
            the forward pass. ``"standard"``: drawn with those scales.
        bias: ``False`` for no bias.

    Raises:
        TypeError: A size is not a whole number, a standard deviation not a number, or ``bias`` not a truth value.
        ValueError: A size is out of range or not one for each axis, an unknown padding, mode or
            parameterization, an even filter with ``"same"``, ``bias=False`` with a ``bias_std``, or a standard
            deviation out of range.

    Example:
        >>> import torch
        >>> NTKConv2d(3, 16, (3, 5), padding=(1, 2), padding_mode="circular")(torch.ones(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    _AXES = 2
    _FORM = "images (n, C, H, W)"
