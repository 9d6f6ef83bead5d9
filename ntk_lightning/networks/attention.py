"""Self-attention in the neural tangent parameterization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks.affine import check_scales
from ntk_lightning.whole_number import check_size, check_whole

__all__ = ["SelfAttention"]

Mechanism = Literal["softmax", "identity", "relu", "abs"]
Scaling = Literal["linear", "sqrt"]

_MECHANISMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "identity": lambda scores: scores,
    "relu": torch.relu,
    "abs": torch.abs,
}


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, in NTK parameterization, without positional encoding.

    With x_p the C channels at position p = 1..L, each head h of H has weights Q_h, K_h, V_h (d, C) and O_h (C', d), and

        A_h[p, q] = f(query_std key_std <Q_h x_p, K_h x_q> / (C s(d))),
        z_p = out_std value_std / sqrt(H d C) sum_h O_h sum_q A_h[p, q] V_h x_q + bias_std b,

    all entries of the weights and of b of N(0, 1), and f the ``mechanism``, softmax over q (Hron et al., 2020,
    "Infinite attention", arXiv 2006.10540). Scaling ``"linear"`` is s(d) = d with Q = K, one matrix: independent ones
    would give scores of 0 at infinite width. As the number d of channels of a head grows, the scores then become the
    covariances of the input's positions, those of all heads the same. Scaling ``"sqrt"`` is the usual s(d) = sqrt(d)
    with independent Q and K: the scores stay random, and the limit is one of many heads; it has a closed form for
    ``"identity"`` only. In both the limits are those of neural-tangents' ``GlobalSelfAttention``.

    Args:
        in_channels: Channels C of the input (n, C, L) or (n, C, H, W); an image's positions are its pixels.
        out_channels: Channels of the output, which has the input's positions.
        mechanism: What is applied to the scores.
        scaling: Their scaling.
        query_std: Standard deviation of the query weights at unit fan-in.
        key_std: That of the key weights.
        value_std: That of the value weights.
        out_std: That of the output weights.
        bias_std: Standard deviation of the biases; with 0 the layer has none.
        num_heads: Number H of heads. By default, with w the larger of both numbers of channels: one for ``"linear"``,
            w for ``"identity"`` with ``"sqrt"``, whose limit needs many heads alone, and sqrt(w) for the others.
        head_channels: Channels d of every head's keys, queries and values; by default w / num_heads, rounded up.

    Raises:
        TypeError: A size is not a whole number, or a standard deviation not a number.
        ValueError: An unknown mechanism or scaling, a size that is not positive, or a standard deviation out of range.

    Example:
        >>> layer = SelfAttention(3, 8, scaling="sqrt", num_heads=2)
        >>> layer(torch.ones(5, 3, 7)).shape, layer(torch.ones(5, 3, 4, 4)).shape
        (torch.Size([5, 8, 7]), torch.Size([5, 8, 4, 4]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        mechanism: Mechanism = "softmax",
        scaling: Scaling = "linear",
        query_std: float = 1.0,
        key_std: float = 1.0,
        value_std: float = 1.0,
        out_std: float = 1.0,
        bias_std: float = 0.0,
        num_heads: int | None = None,
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_whole("SelfAttention", in_channels=in_channels, out_channels=out_channels)
        sizes = {"in_channels": in_channels, "out_channels": out_channels}
        for name, size in {**sizes, "num_heads": num_heads, "head_channels": head_channels}.items():
            check_size(name, size, 1)
        if mechanism not in _MECHANISMS:
            raise ValueError(f"mechanism must be one of {', '.join(map(repr, _MECHANISMS))}, got {mechanism!r}.")
        if scaling not in ("linear", "sqrt"):
            raise ValueError(f'scaling must be "linear" or "sqrt", got {scaling!r}.')
        scales = {"query_std": query_std, "key_std": key_std, "value_std": value_std, "out_std": out_std}
        check_scales("SelfAttention", bias_std, **scales)
        width = max(in_channels, out_channels)
        if num_heads is None:
            many = width if mechanism == "identity" else math.isqrt(width)
            num_heads = 1 if scaling == "linear" else many
        self.in_channels, self.out_channels = int(in_channels), int(out_channels)
        self.num_heads, self.head_channels = int(num_heads), int(head_channels or -(-width // num_heads))
        self.mechanism, self.scaling = mechanism, scaling
        self.query_std, self.key_std, self.value_std = float(query_std), float(key_std), float(value_std)
        self.out_std, self.bias_std = float(out_std), float(bias_std)
        inner = self.num_heads * self.head_channels
        self.query = nn.Parameter(torch.empty(inner, in_channels)) if scaling == "sqrt" else None
        self.key = nn.Parameter(torch.empty(inner, in_channels))
        self.value = nn.Parameter(torch.empty(inner, in_channels))
        self.out = nn.Parameter(torch.empty(out_channels, inner))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias_std > 0 else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter from N(0, 1)."""
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, ...) to (n, out_channels, ...)."""
        if x.dim() not in (3, 4) or x.shape[1] != self.in_channels:
            raise ValueError(
                f"SelfAttention has in_channels={self.in_channels}, but gets {tuple(x.shape)}: give it sequences "
                "(n, C, L) or images (n, C, H, W) with as many channels."
            )
        tokens = x.flatten(2).mT / math.sqrt(self.in_channels)  # (n, L, C)
        keys, values = self._heads(tokens, self.key), self._heads(tokens, self.value)  # (n, H, L, d)
        queries = keys if self.query is None else self._heads(tokens, self.query)
        size = self.head_channels if self.scaling == "linear" else math.sqrt(self.head_channels)
        scores = queries @ keys.mT * (self.query_std * self.key_std / size)  # (n, H, L, L)
        heads = _MECHANISMS[self.mechanism](scores) @ values
        joined = heads.transpose(1, 2).flatten(2)  # (n, L, H d)
        z = F.linear(joined, self.out) * (self.value_std * self.out_std / math.sqrt(joined.shape[-1]))
        if self.bias is not None:
            z = z + self.bias_std * self.bias
        out: Tensor = z.mT.reshape(len(x), self.out_channels, *x.shape[2:])
        return out

    def _heads(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Multiply every token with every head's weight: (n, L, C) to (n, H, L, d)."""
        n, length = tokens.shape[:2]
        return F.linear(tokens, weight).reshape(n, length, self.num_heads, self.head_channels).transpose(1, 2)

    def extra_repr(self) -> str:
        """Sizes and scales, for printing."""
        names = "query_std", "key_std", "value_std", "out_std", "bias_std"
        scales = ", ".join(f"{name}={getattr(self, name):.4g}" for name in names)
        return (
            f"{self.in_channels}, {self.out_channels}, mechanism={self.mechanism!r}, scaling={self.scaling!r}, "
            f"{scales}, num_heads={self.num_heads}, head_channels={self.head_channels}"
        )
