"""The layers compute what they say, against plain PyTorch and against loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from oracle import close, dense, trace
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning import networks
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, kernel_key
from ntk_lightning.networks import (
    ChannelNorm,
    Erf,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Pointwise,
    Residual,
    SelfAttention,
    layers,
)
from ntk_lightning.networks.attention import Mechanism, Scaling


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (3, 1), "padding": "same"},
        {"kernel_size": (1, 5), "padding": "valid", "stride": (1, 2)},
        {"kernel_size": (2, 4), "padding": (1, 2), "stride": 3},
        {"kernel_size": 3, "padding": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": (2, 1)},
        {"kernel_size": (5, 3), "padding": (2, 1), "padding_mode": "circular"},
        {"kernel_size": 2, "padding": (1, 0), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_two_dimensional_convolutions_mean_what_those_of_torch_do(
    options: dict[str, Any], parameterization: Literal["ntk", "standard"]
) -> None:
    layer = NTKConv2d(2, 4, **options, weight_std=1.3, bias_std=0.4, parameterization=parameterization).double()
    if options["padding"] == "same":
        options = {**options, "padding": tuple((size - 1) // 2 for size in options["kernel_size"])}
    if options["padding"] == "valid":
        options = {**options, "padding": 0}
    check_convolution(layer, nn.Conv2d(2, 4, **options).double(), normal(3, 2, 7, 8))


@pytest.mark.parametrize("parameterization", ["ntk", "standard"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "padding": 3, "stride": 2},
        {"kernel_size": 5, "padding": 2, "padding_mode": "circular", "stride": 2},
    ],
    ids=str,
)
def test_one_dimensional_convolutions_mean_what_those_of_torch_do(
    options: dict[str, Any], parameterization: Literal["ntk", "standard"]
) -> None:
    layer = NTKConv1d(2, 4, **options, weight_std=1.3, bias_std=0.4, parameterization=parameterization).double()
    check_convolution(layer, nn.Conv1d(2, 4, **options).double(), normal(3, 2, 9))
    assert NTKConv1d(2, 4, 3)(torch.ones(1, 2, 9)).shape == (1, 4, 9)


def check_convolution(layer: NTKConv1d | NTKConv2d, plain: nn.Conv1d | nn.Conv2d, x: Tensor) -> None:
    ntk = layer.parameterization == "ntk"
    assert layer.bias is not None
    assert plain.bias is not None
    assert layer.fan_in == math.prod(plain.weight.shape[1:])
    with torch.no_grad():
        plain.weight.copy_(layer.weight * (1.3 / math.sqrt(layer.fan_in) if ntk else 1))
        plain.bias.copy_(layer.bias * (0.4 if ntk else 1))
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[0]), plain(x[0]), rtol=1e-12, atol=1e-12)


def test_standard_layers_are_plain_and_draw_their_scales() -> None:
    torch.manual_seed(0)
    layer = NTKLinear(400, 300, 1.5, 0.3, parameterization="standard")
    assert layer.bias is not None
    x = torch.randn(5, 400)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=0, atol=0)
    assert layer.weight.std().item() == pytest.approx(1.5 / 20, rel=0.02)
    assert layer.bias.std().item() == pytest.approx(0.3, rel=0.15)
    conv = NTKConv2d(20, 30, (2, 5), "valid", 1.5, parameterization="standard")
    assert conv.weight.std().item() == pytest.approx(1.5 / math.sqrt(200), rel=0.05)
    assert conv.bias is not None  # starts at 0 and trains
    assert not conv.bias.any()
    assert NTKLinear(3, 4, parameterization="standard", bias=False).bias is None
    assert NTKLinear(3, 4, bias=False).bias is None
    assert NTKLinear(3, 4).bias is None


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 5, 3, 2)])
def test_channel_norm_is_layer_norm_over_channels(shape: tuple[int, ...]) -> None:
    x = normal(*shape)
    plain = nn.LayerNorm(5, 1e-3, elementwise_affine=False)
    torch.testing.assert_close(ChannelNorm(1e-3)(x), plain(x.movedim(1, -1)).movedim(-1, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
@pytest.mark.parametrize("mechanism", ["softmax", "identity", "relu", "abs"])
def test_attention_is_its_formula(mechanism: Mechanism, scaling: Scaling) -> None:
    stds = {"query_std": 1.2, "key_std": 0.9, "value_std": 1.1, "out_std": 1.3, "bias_std": 0.2}
    layer = SelfAttention(3, 4, mechanism=mechanism, scaling=scaling, num_heads=2, head_channels=5, **stds).double()
    x = normal(2, 3, 2, 3)
    function: Callable[[Tensor], Tensor] = {
        "softmax": lambda g: g.exp() / g.exp().sum(),
        "identity": lambda g: g,
        "relu": lambda g: g.clamp_min(0),
        "abs": torch.abs,
    }[mechanism]
    assert layer.bias is not None
    assert (layer.query is None) == (scaling == "linear")
    key, value, out = (w.detach() for w in (layer.key, layer.value, layer.out))
    query = key if layer.query is None else layer.query.detach()
    size = 5 if scaling == "linear" else math.sqrt(5)
    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for n in range(2):
        tokens = x[n].flatten(1).T  # (6, 3)
        for p in range(6):
            for head in range(2):
                rows = slice(5 * head, 5 * head + 5)
                scores = [1.2 * query[rows] @ tokens[p] @ (0.9 * key[rows] @ token) / (3 * size) for token in tokens]
                weights = function(torch.stack(scores))
                mixed = value[rows] @ (weights @ tokens)
                expected[n, :, p] += 1.1 * 1.3 * out[:, rows] @ mixed / math.sqrt(3 * 10)
        expected[n] += 0.2 * layer.bias.detach()[:, None]
    torch.testing.assert_close(layer(x).detach(), expected.unflatten(-1, (2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x.flatten(2)).detach(), expected, rtol=1e-12, atol=1e-12)


def test_attention_has_as_many_heads_as_its_limit_needs() -> None:
    heads = {
        (mechanism, scaling): (layer.num_heads, layer.head_channels)
        for mechanism in ("softmax", "identity")
        for scaling in ("linear", "sqrt")
        if (layer := SelfAttention(3, 10, mechanism=mechanism, scaling=scaling))  # type: ignore[arg-type]  # a table
    }
    assert heads == {
        ("softmax", "linear"): (1, 10),
        ("identity", "linear"): (1, 10),
        ("softmax", "sqrt"): (3, 4),
        ("identity", "sqrt"): (10, 1),
    }


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear_standard": (lambda: NTKLinear(4, 3, 1.2, 0.3, parameterization="standard"), (4,)),
    "conv1d": (lambda: NTKConv1d(2, 3, 3, 2, 1.2, 0.3, 2), (2, 7)),
    "conv1d_circular": (lambda: NTKConv1d(2, 3, 3, padding_mode="circular"), (2, 7)),
    "conv2d": (lambda: NTKConv2d(2, 3, (3, 2), (1, 0), 1.2, 0.3, (1, 2)), (2, 5, 6)),
    "conv2d_circular": (lambda: NTKConv2d(2, 3, 3, padding_mode="circular"), (2, 5, 6)),
    "conv2d_standard": (lambda: NTKConv2d(2, 3, 3, bias_std=0.3, parameterization="standard"), (2, 5, 6)),
    "norm": (lambda: nn.Sequential(NTKConv2d(2, 3, 3), ChannelNorm()), (2, 4, 3)),
    "attention": (lambda: SelfAttention(2, 3, bias_std=0.3), (2, 5)),
    "attention_sqrt": (lambda: SelfAttention(2, 3, mechanism="relu", scaling="sqrt"), (2, 2, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_empirical_kernels_of_every_layer(name: str) -> None:
    make, shape = NETS[name]
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Flatten()).double()
    x = normal(3, *shape)
    kernel, expected = EmpiricalNTK(net), dense(net, x, x)
    close(EmpiricalNTK(net, full=True)(x), expected)
    close(sum(kernel.per_layer(x).values(), torch.zeros(())), trace(expected))
    close(kernel.matvec(x, x[:, :1].flatten(1)[:, 0]), trace(expected) @ x[:, :1].flatten(1)[:, 0])
    assert torch.autograd.gradcheck(net, (x.requires_grad_(),))


def test_state_dicts_and_stored_kernels_keep_their_names() -> None:
    body = nn.Sequential(nn.ReLU(), NTKConv2d(3, 3, 3))
    readout = nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(3, 1, 1.5, 0.2)
    convolutions = NTKConv2d(2, 3, 3, stride=2, bias_std=0.1), Erf(), NTKConv2d(3, 3, 2, "valid"), Residual(body)
    net = nn.Sequential(*convolutions, Pointwise(torch.sin), *readout)
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7 + i)
    assert list(net.state_dict()) == ["0.weight", "0.bias", "2.weight", "3.body.1.weight", "7.weight", "7.bias"]
    # what the version printed that had square filters in NTK parameterization only
    assert kernel_key(EmpiricalNTK(net)) == "1a7ec9cbf42466836c38a339e904416c"
    assert kernel_key(InfiniteNTK(net)) == "8389134e6d1530277cd8dff8a4105155"


def test_networks_that_were_saved_whole_find_their_classes() -> None:
    old = "Erf", "NTKConv2d", "NTKLinear", "Pointwise", "Residual"  # by the module that pickle wrote
    assert all(getattr(layers, name) is getattr(networks, name) for name in old)


def test_equal_layers_have_equal_names_however_they_are_spelled() -> None:
    pairs = [
        (NTKConv2d(2, 3, 3, stride=2), NTKConv2d(2, 3, (3, 3), stride=(2, 2), padding_mode="zeros", bias=True)),
        (NTKConv1d(2, 3, 3, padding=1), NTKConv1d(2, 3, (3,), padding=(1,), parameterization="ntk")),
    ]
    for one, other in pairs:
        other.load_state_dict(one.state_dict())
        assert kernel_key(EmpiricalNTK(one)) == kernel_key(EmpiricalNTK(other))
        assert repr(one) == repr(other)
    circular = NTKConv2d(2, 3, 3, padding_mode="circular")
    circular.load_state_dict(NTKConv2d(2, 3, 3).state_dict())
    assert kernel_key(EmpiricalNTK(circular)) != kernel_key(EmpiricalNTK(NTKConv2d(2, 3, 3)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: NTKConv2d(3, 2, (3, 3, 3)), ValueError, r"kernel_size as one int or 2, .*\(3, 3, 3\)"),
        (lambda: NTKConv1d(3, 2, (3, 3)), ValueError, "kernel_size as one int or 1"),
        (lambda: NTKConv1d(3, 2, 3.0), TypeError, "NTKConv1d .*kernel_size=3.0: give one int"),
        (lambda: NTKConv1d(3, 2, 2), ValueError, 'padding="same" needs an odd kernel_size'),
        (lambda: NTKConv2d(3, 2, (3, 2)), ValueError, r"odd kernel_size, got \(3, 2\)"),
        (lambda: NTKConv2d(3, 2, 3, -1), ValueError, "padding must be at least 0, got -1"),
        (lambda: NTKConv2d(3, 2, 3, 1.0), TypeError, "padding=1.0"),
        (lambda: NTKConv2d(3, 2, 3, None), TypeError, "padding=None"),
        (lambda: NTKConv2d(3, 2, 3, "full"), ValueError, "'full'"),
        (lambda: NTKConv2d(3, 2, 3, stride=(1, 0)), ValueError, r"stride must be at least 1, got \(1, 0\)"),
        (lambda: NTKConv2d(3, 2, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: NTKConv2d(0, 2, 3), ValueError, "positive sizes"),
        (lambda: NTKConv2d(3, 2, 3, padding_mode="reflect"), ValueError, "padding_mode must be .*'reflect'"),
        (lambda: NTKConv2d(3, 2, 3, parameterization="mup"), ValueError, "parameterization must be .*'mup'"),
        (lambda: NTKLinear(3, 2, parameterization=None), ValueError, "parameterization must be"),
        (lambda: NTKLinear(3, 2, bias=0.1), TypeError, "bias must be True or False, got 0.1"),
        (lambda: NTKLinear(3, 2, True), TypeError, "weight_std=True"),
        (lambda: NTKLinear(3, 2, bias_std=0.1, bias=False), ValueError, "bias=False contradicts bias_std=0.1"),
        (lambda: NTKLinear(3, 2, float("nan")), ValueError, "weight_std=nan"),
        (lambda: ChannelNorm("x"), TypeError, "number eps, got 'x'"),
        (lambda: ChannelNorm(-1), ValueError, "eps must be >= 0"),
        (lambda: ChannelNorm()(torch.ones(3)), ValueError, r"ChannelNorm needs inputs .*\(3,\)"),
        (lambda: SelfAttention(3, 2, mechanism="tanh"), ValueError, "mechanism must be one of 'softmax', .*'tanh'"),
        (lambda: SelfAttention(3, 2, scaling="none"), ValueError, "scaling must be .*'none'"),
        (lambda: SelfAttention(3, 2.0), TypeError, "out_channels=2.0"),
        (lambda: SelfAttention(3, 0), ValueError, "out_channels must be at least 1"),
        (lambda: SelfAttention(3, 2, num_heads=0), ValueError, "num_heads must be at least 1"),
        (lambda: SelfAttention(3, 2, head_channels=0.5), TypeError, "head_channels must be a whole number"),
        (lambda: SelfAttention(3, 2, key_std=0.0), ValueError, "key_std.* must be > 0 .*key_std=0.0"),
        (lambda: SelfAttention(3, 2, bias_std=-1), ValueError, "bias_std=-1"),
        (lambda: SelfAttention(3, 2)(torch.ones(2, 3)), ValueError, r"gets \(2, 3\): give it sequences"),
        (lambda: SelfAttention(3, 2)(torch.ones(2, 4, 5)), ValueError, "has in_channels=3"),
        (lambda: NTKConv1d(3, 2, 3)(torch.ones(2, 4, 5)), ValueError, "set in_channels=4"),
        (lambda: NTKConv1d(3, 2, 3)(torch.ones(3)), ValueError, r"sequences \(n, C, L\)"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
