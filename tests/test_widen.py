"""A network made wider is the network that was written wider."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks import (
    MLP,
    ChannelNorm,
    NTKConv2d,
    NTKLinear,
    Residual,
    SelfAttention,
)
from ntk_lightning.networks.widen import redraw, widened


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Graph(nn.Module):
    """A forward with branches, a concatenation that has the input in it, and a normalization with a gain."""

    def __init__(self, width: int = 4, outputs: int = 2) -> None:
        super().__init__()
        self.first = NTKConv2d(3, width, 3, bias_std=0.1)
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), NTKConv2d(width, 2 * width, (1, 3))
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Conv2d(3 * width + 3, width, 1, bias=False)
        self.attention = SelfAttention(width, width)
        self.readout = NTKLinear(width, outputs, parameterization="standard")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        h = torch.cat([self.norm(h + self.one(h)), F.gelu(self.two(h)), x], 1)
        out: Tensor = self.readout(self.attention(self.mix(h)).mean((2, 3)))
        return out


def shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def residual(width: int) -> nn.Module:
    body = nn.Sequential(NTKLinear(width, 2 * width), nn.ReLU(inplace=True), NTKLinear(2 * width, width))
    return nn.Sequential(NTKLinear(4, width), Residual(body), nn.LayerNorm(width), NTKLinear(width, 2))


def two_readouts(width: int) -> nn.Module:
    branches = [nn.Sequential(NTKLinear(4, width), nn.PReLU(), NTKLinear(width, 2)) for _ in range(2)]
    return Residual(*branches)


WIDE: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda width: MLP(width, 2, 4), (4,)),
    "linear": (lambda width: NTKLinear(4, 3), (4,)),
    "graph": (lambda width: Graph(width), (3, 4, 3)),
    "residual": (residual, (4,)),
    "two readouts": (two_readouts, (4,)),
    "flatten": (
        lambda width: nn.Sequential(
            NTKConv2d(3, width, 3, "valid"), ChannelNorm(), nn.PReLU(width), nn.Flatten(), NTKLinear(6 * width, 5)
        ),
        (3, 5, 4),
    ),
    "norms": (
        lambda width: nn.Sequential(
            nn.Conv1d(2, width, 3), nn.LayerNorm((width, 3)), nn.BatchNorm1d(width).eval(), nn.Conv1d(width, 2, 3)
        ),
        (2, 5),
    ),
    "heads": (
        lambda width: nn.Sequential(
            SelfAttention(2, width, num_heads=3, head_channels=2 * width),
            SelfAttention(width, 4, mechanism="identity", scaling="sqrt", num_heads=width, head_channels=2),
        ),
        (2, 5),
    ),
    "frozen": (lambda width: nn.Sequential(NTKLinear(4, width).requires_grad_(False), NTKLinear(width, 1)), (4,)),
}


@pytest.mark.parametrize("name", WIDE)
def test_wider_networks_are_those_that_were_made_wider(name: str) -> None:
    make, shape = WIDE[name]
    net, wide = make(4).double(), make(12).double()
    found = widened(net, normal(1, *shape), 3)
    assert shapes(found) == shapes(wide)
    assert repr(found) == repr(wide)
    for one, other in zip(found.named_parameters(), wide.named_parameters(), strict=True):
        assert (one[0], one[1].dtype, one[1].requires_grad) == (other[0], other[1].dtype, other[1].requires_grad)
    found.load_state_dict(wide.state_dict())
    x = normal(2, *shape)
    torch.testing.assert_close(found(x), wide(x), rtol=0, atol=0)
    redraw(found, 0)
    redraw(wide, 0)
    torch.testing.assert_close(found(x), wide(x), rtol=0, atol=0)
