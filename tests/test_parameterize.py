"""Plain networks become the package's: same function in distribution, everything else kept, the rest refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, monte_carlo
from ntk_lightning.modules import LinearizedNetwork
from ntk_lightning.networks import NTKConv1d, NTKConv2d, NTKLinear, SelfAttention, ntk_parameterize
from ntk_lightning.networks.widen import widened


class Block(nn.Module):
    """As users write: a forward of its own, a list beside the modules, a buffer, a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, (3, 1), stride=2, padding=(1, 0))
        self.same = nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular", bias=False)
        self.plain = [self.conv, self.same]  # no nn.ModuleList
        self.norm = nn.GroupNorm(1, 8)
        self.gain = nn.Parameter(torch.full((1,), 0.5))
        self.register_buffer("shift", torch.tensor(0.25))
        self.head = nn.ModuleDict({"out": nn.Linear(8, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.plain:
            x = F.relu(layer(x))
        x = self.norm(x).mean((2, 3)) * self.gain + self.shift
        out: Tensor = self.head["out"](x)
        return out


def test_layers_are_replaced_and_all_else_is_kept() -> None:
    net = Block().double().eval()
    net.conv.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    made = ntk_parameterize(net)
    assert isinstance(made, Block)
    assert list(made.state_dict()) == list(before)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
        assert made.state_dict()[name].shape == value.shape
        assert made.state_dict()[name].dtype == torch.float64
    conv, same, out = made.plain[0], made.plain[1], made.head["out"]
    assert made.conv is conv
    assert made.same is same
    assert isinstance(conv, NTKConv2d)
    assert (conv.kernel_size, conv.stride, conv.pads, conv.padding_mode) == ((3, 1), 2, (1, 0), "zeros")
    assert conv.bias_std == pytest.approx(1 / math.sqrt(3 * 9))
    assert isinstance(same, NTKConv2d)
    assert (same.pads, same.padding_mode, same.bias) == ((1, 1), "circular", None)
    assert isinstance(out, NTKLinear)
    assert (out.weight_std, out.bias_std) == pytest.approx((1 / math.sqrt(3), 1 / math.sqrt(24)))
    assert not any(module.training for module in made.modules())
    assert not conv.weight.requires_grad
    assert made.norm is not net.norm
    assert made(torch.randn(2, 3, 8, 6).double()).shape == (2, 2)


def test_a_single_layer_and_shared_activations() -> None:
    assert isinstance(ntk_parameterize(nn.Conv1d(2, 3, 4, stride=2, padding=1).half()), NTKConv1d)
    assert ntk_parameterize(nn.Linear(2, 3).to(torch.bfloat16)).weight.dtype == torch.bfloat16
    assert ntk_parameterize(nn.Linear(2, 3, device="meta")).weight.is_meta
    relu = nn.ReLU()
    net = ntk_parameterize(nn.Sequential(nn.Linear(2, 3), relu, nn.Linear(3, 3), relu, SelfAttention(3, 3)), 1.5, 0.0)
    assert isinstance(net, nn.Sequential)
    assert [type(layer) for layer in net] == [NTKLinear, nn.ReLU, NTKLinear, nn.ReLU, SelfAttention]
    assert net[1] is net[3]
    assert isinstance(net[0], NTKLinear)
    assert (net[0].weight_std, net[0].bias) == (1.5, None)


def test_outputs_have_the_distribution_of_the_plain_network() -> None:
    def plain() -> nn.Module:
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(nn.Conv2d(2, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), *pool, nn.Linear(64, 64))

    torch.manual_seed(0)
    x = torch.randn(3, 2, 5, 4)
    covariances = []
    for make in (plain, lambda: ntk_parameterize(plain())):
        outputs = torch.cat([make()(x).detach() for _ in range(64)], 1)  # (3, 4096)
        covariances.append(outputs @ outputs.T / outputs.shape[1])
    one, other = covariances
    torch.testing.assert_close(one, other, rtol=0.1, atol=0.1 * float(one.diagonal().mean()))


def test_all_three_models_take_the_result() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 256, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1)
    nets = [ntk_parameterize(nn.Sequential(*layers)).double() for _ in range(12)]
    x = torch.randn(3, 2, 4, 4).double()
    kernels = torch.stack([EmpiricalNTK(net)(x) for net in nets])
    error = kernels.std(0) / len(nets) ** 0.5
    assert float(((kernels.mean(0) - InfiniteNTK(nets[0])(x)) / error).abs().max()) < 4
    assert LinearizedNetwork(nets[0])(x).shape == (3, 1)


class Branches(nn.Module):
    """A forward of its own, with plain layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 1, bias=False)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out: Tensor = self.out((h + self.second(F.gelu(h))).mean(2))
        return out


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_converted_graphs_have_the_infinite_kernel_of_their_copy(kind: Literal["ntk", "nngp"]) -> None:
    net, x = Branches(16), torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    converted = ntk_parameterize(net)
    expected = InfiniteNTK(widened(converted, x[:1].float(), 32), kind)(x)  # its biases' scales are those of a width
    mean, error = monte_carlo(converted, x, kind=kind, seeds=16, width_factor=32)
    assert float(((mean - expected) / error).abs().max()) < 4
    if kind == "nngp":  # the same function at initialization
        plain = InfiniteNTK(net, kind)(x)
        torch.testing.assert_close(InfiniteNTK(converted, kind)(x), plain, rtol=1e-12, atol=0)


def hooked() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return layer


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).abs()


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.abs(), bias)


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.again = self.layer.weight


def twice() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "takes an nn.Module, got 3"),
        (nn.ReLU, ValueError, "ReLU has no nn.Linear"),
        (lambda: nn.Sequential(NTKLinear(2, 2)), ValueError, "to convert"),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), ValueError, "net has groups=2"),
        (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2)), ValueError, r"net.0 has .*dilation=\(2,\)"),
        (lambda: nn.Conv2d(4, 4, 2, padding="same"), ValueError, 'even filter .* by "same"'),
        (lambda: nn.Conv2d(4, 4, 3, padding_mode="reflect"), ValueError, "pads by 'reflect'"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ConvTranspose2d(2, 2, 3)), TypeError, "net.1 is a ConvTranspose2d"),
        (lambda: nn.Conv3d(2, 2, 3), TypeError, "Conv3d, which has no counterpart"),
        (lambda: nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), TypeError, "net.0 is a Embedding"),
        (lambda: nn.GRU(2, 2), TypeError, "GRU"),
        (lambda: nn.TransformerEncoderLayer(4, 2), TypeError, "net.self_attn is a MultiheadAttention"),
        (lambda: nn.Bilinear(2, 2, 2), TypeError, "Bilinear"),
        (lambda: nn.LazyLinear(3), ValueError, "sizes are not known yet: run the network once"),
        (twice, ValueError, "net.2 and net.0 share"),
        (tied, ValueError, "net.1 and net.0 share"),
        (Reads, ValueError, "net.layer and net share"),
        (hooked, TypeError, "hooks or parametrizations"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), TypeError, "net "),
        (lambda: nn.Sequential(Own(2, 2)), TypeError, "net.0 is a Own with a forward of its own"),
        (lambda: OwnConv(2, 2, 3), TypeError, "net is a OwnConv with a forward of its own"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), TypeError, "weights of torch.complex64"),
        (lambda: torch.compile(nn.Linear(2, 2), backend="eager"), TypeError, "convert the original"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), TypeError, "convert the original"),
    ],
)
def test_networks_without_a_counterpart_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ntk_parameterize(make())


@pytest.mark.parametrize("scales", [(0, None), (-1.0, None), (None, -1.0), (float("inf"), 0.1)])
def test_scales_out_of_range_are_refused(scales: tuple[float | None, float | None]) -> None:
    with pytest.raises(ValueError, match=r"ntk_parameterize: weight_std must be"):
        ntk_parameterize(nn.Linear(2, 2), *scales)
    with pytest.raises(TypeError, match="standard deviations that are numbers"):
        ntk_parameterize(nn.Linear(2, 2), "1")  # type: ignore[arg-type]  # on purpose
