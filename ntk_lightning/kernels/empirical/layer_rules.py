"""Layers whose gradients are made from their inputs and the cotangents of their outputs, and in which way.

A layer z_p = s W a_p + t b at positions p = 1..T (of one vector T = 1, of tokens, or of pixels: then a_p is the patch
of a convolution's input below the filter; in an embedding a_p is the one-hot vector of a token, and W is transposed)
has, with the cotangents g_cp = d f_c / d z_p of C outputs, the gradients

    grad_W f_c = s sum_p g_cp a_p^T,    grad_b f_c = t sum_p g_cp.

The ways to them, with d_in entries of a_p and d_out of z_p; G = C products of outputs for the trace, C^2 with ``full``:

| way     | what a row keeps of the layer | multiplications for a sample; for a pair         | numbers kept       |
|---------|-------------------------------|--------------------------------------------------|--------------------|
| factors | (s a, t) and g_c (T = 1)      | 0; d_in + G d_out                                | d_in + C d_out     |
|         | (s a_p, t) and g_cp, all p    | 0; T^2 (d_in + G d_out + ENTRY)                  | T (d_in + C d_out) |
|         | embedding: ids and g_cp       | 0; T^2 (G d_out + ENTRY)                         | T (1 + C d_out)    |
| product | the gradient                  | C T d_in d_out; G d_in d_out                     | C d_in d_out       |
| kept    | the layer's input and g_cp    | 0; G d_in d_out, and C T d_in d_out for a sample | inputs + C T d_out |
| vmap    | the gradient                  | as product, or more                              | C d_in d_out       |

``factors``: two rows multiply as sum_pp' <g_p, g'_p'> <(s a_p, t), (s a'_p', t)>, and never form the gradient; one-hot
a_p have the product 1 where the ids are equal. ENTRY is what two passes over a (T, T) matrix cost beside a
multiplication inside a matrix product. ``product``: the cotangents [g_1 .. g_C] of all outputs (C d_out, T) times the
patches (T, d_in), see ``layer_gradients``. ``kept`` is chosen for a whole network where its gradients do not fit in
memory, see ``memory_plan``, for each layer of which it keeps less than ``product``.

``AffineLayer.way`` chooses the way of the fewest multiplications for a pair, with those for a sample, and WRITTEN for
every entry of a gradient that is written and read, divided by the samples that it is multiplied with. Layers of one
vector are always kept in factors, whose columns are also the fewest. Layers without a rule take the general way, vmap,
as does an embedding of few tokens.

Normalized trace: where all outputs reach z only through the readout's rows r_c, and channel o of z only entry o of the
readout's input, then g_cpo = r_co h_po for some h, and sum_c <g_cp, g'_cp'> = <u h_p, u h'_p'> with
u_o^2 = sum_c r_co^2. One vector h, weighted by u, then stands for the cotangents of all outputs: C is 1 in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor, nn

from ntk_lightning.networks import NTKConv1d, NTKConv2d, NTKLinear

__all__ = ["AffineLayer", "Convolution", "Ruled", "Way"]

Way = Literal["factors", "product", "kept", "vmap"]
Convolution = nn.Conv1d | nn.Conv2d | NTKConv1d | NTKConv2d

_ENTRY = 32  # multiplications inside a matrix product that take as long as an entry of <g, g'> <a, a'> and its sum
_WRITTEN = 16  # multiplications that take as long as an entry of a gradient is written and read once more
_SHIFTED_POSITIONS = 64  # fewer make too thin products, and fewer inputs too narrow ones
_SHIFTED_INPUTS = 32


@dataclass(frozen=True)
class AffineLayer:
    """A layer with the scales s and t of its weight and bias, which are None where these are not trained.

    Args:
        module: The layer.
        weight: s.
        bias: t.
        input_shape: Of its input for one sample, (1, ...); empty before that is known.
        shape: Of its output for one sample, (1, ...).
        unit: r_co / u_o, (C, d_out), where h stands for the cotangents of all outputs.
    """

    module: nn.Linear | NTKLinear | nn.Embedding | Convolution
    weight: float | None
    bias: float | None
    input_shape: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    unit: Tensor | None = None

    @property
    def convolves(self) -> bool:
        """Whether its positions are the pixels of a convolution."""
        return isinstance(self.module, Convolution)

    @property
    def embeds(self) -> bool:
        """Whether its inputs are the ids of tokens."""
        return isinstance(self.module, nn.Embedding)

    @property
    def d_in(self) -> int:
        """Entries of a_p."""
        return len(self.module.weight) if self.embeds else prod(self.module.weight.shape[1:])

    @property
    def d_out(self) -> int:
        """Entries of z_p."""
        return self.module.weight.shape[1] if self.embeds else len(self.module.weight)

    @property
    def positions(self) -> int:
        """T."""
        return prod(self.shape) // self.d_out

    @property
    def digits(self) -> int:
        """Digits base 256 of an id, which rows of every precision hold exactly."""
        return max(1, -(-(self.d_in - 1).bit_length() // 8))

    @property
    def num_inputs(self) -> int:
        """Entries of (s a_p, t), or of an id."""
        if self.embeds:
            return self.digits
        return (self.weight is not None) * self.d_in + (self.bias is not None)

    @property
    def filter(self) -> tuple[int, int]:
        """Height and width of a convolution's filter."""
        *height, width = self.module.weight.shape[2:]
        return height[0] if height else 1, width

    @property
    def shifts(self) -> bool:
        """Whether patches are unfolded along rows only, and shifted along columns: see ``layer_gradients``."""
        if not self.convolves:
            return False
        stride = self.module.stride
        if any(step != 1 for step in (stride if isinstance(stride, tuple) else (stride,))):
            return False
        inputs = self.module.weight.shape[1] * self.filter[1]
        return self.filter == (1, 1) or (self.positions >= _SHIFTED_POSITIONS and inputs >= _SHIFTED_INPUTS)

    @property
    def blocks(self) -> int:
        """Into how many groups of d_in / blocks inputs its gradient falls, each one product."""
        return self.filter[0] if self.shifts else 1

    def count(self, num_cotangents: int) -> int:
        """Cotangents that a row holds of it, where the network has so many."""
        return num_cotangents if self.unit is None else 1

    def costs(self, num_cotangents: int, full: bool, partners: int = 128) -> dict[Way, float]:
        """Multiplications for a pair of samples by each way, as in the table of this file.

        Args:
            num_cotangents: C.
            full: All products of outputs, instead of the trace.
            partners: Samples that a sample is multiplied with, among which the making of its row is shared.

        Returns:
            Of each way that there is.
        """
        c, t, d_out = self.count(num_cotangents), self.positions, self.d_out
        pairs = c * c if full else c
        if self.embeds:
            dense = (pairs + c * _WRITTEN / partners) * self.d_in * d_out
            return {"factors": t * t * (pairs * d_out + _ENTRY), "vmap": dense}
        factors = self.num_inputs + pairs * d_out
        if t > 1:
            factors = t * t * (factors + _ENTRY)
        return {"factors": factors, "product": (pairs + c * (t + _WRITTEN) / partners) * self.num_inputs * d_out}

    def way(self, num_cotangents: int, full: bool, keep: bool = False, partners: int = 128) -> Way:
        """Choose by the table of this file how the gradients of C outputs are made.

        Args:
            num_cotangents: C.
            full: All products of outputs, instead of the trace.
            keep: Keep inputs and cotangents, where that is less than the gradients.
            partners: Samples that a sample is multiplied with.

        Returns:
            The way.
        """
        costs = self.costs(num_cotangents, full, partners)
        if self.positions == 1 and not self.embeds:
            return "factors"
        cheapest = min(costs, key=costs.__getitem__)
        if keep and cheapest == "product":
            gradient = self.count(num_cotangents) * self.num_inputs * self.d_out
            return "kept" if sum(self.kept(num_cotangents)) < gradient else "product"
        return cheapest

    def kept(self, num_cotangents: int) -> tuple[int, int]:
        """Columns of its input and of its cotangents."""
        return prod(self.input_shape), self.count(num_cotangents) * prod(self.shape)


@dataclass(frozen=True)
class Ruled:
    """The layers of a network to which rules apply.

    Args:
        shapes: Of the inputs and outputs of each, for one sample, by name.
        readout: The layer whose outputs are those of the network, or None.
        last: Layers that reach the outputs through the readout alone, channel by channel.
        num_outputs: Of the network.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    readout: str | None
    last: frozenset[str]
    num_outputs: int
