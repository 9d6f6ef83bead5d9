"""The networks compute what their parameterization says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ntk_lightning.networks import MLP, Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear, Residual


def test_linear_is_scaled_by_fan_in_and_adds_the_scaled_bias() -> None:
    layer = NTKLinear(7, 3, weight_std=1.5, bias_std=0.3).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    assert layer.bias is not None
    expected = 1.5 / math.sqrt(7) * x @ layer.weight.T + 0.3 * layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_scaled_by_fan_in(padding: str, stride: int) -> None:
    layer = NTKConv2d(2, 5, 3, padding, 1.2, 0.4, stride).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    assert layer.bias is not None
    pad = 1 if padding == "same" else 0
    expected = F.conv2d(x, layer.weight, stride=stride, padding=pad) * 1.2 / math.sqrt(18)
    torch.testing.assert_close(layer(x), expected + 0.4 * layer.bias[:, None, None], rtol=1e-12, atol=1e-12)


def test_parameters_are_standard_normal() -> None:
    torch.manual_seed(0)
    weight = NTKConv2d(32, 64, 3).weight
    assert abs(weight.mean().item()) < 0.03
    assert abs(weight.std().item() - 1) < 0.03


@pytest.mark.parametrize(("depth", "blocks"), [(5, (2, 1, 1)), (7, (2, 2, 2)), (10, (3, 3, 3))])
def test_myrtle_has_its_layers_in_order(depth: int, blocks: tuple[int, ...]) -> None:
    kinds = [type(layer) for layer in MyrtleCNN(4, depth)]
    first, second, third = ([NTKConv2d, nn.ReLU] * count for count in blocks)
    ending = [nn.AdaptiveAvgPool2d, nn.Flatten, NTKLinear]
    assert kinds == [*first, nn.AvgPool2d, *second, nn.AvgPool2d, *third, *ending]
    assert sum(kind in (NTKConv2d, NTKLinear) for kind in kinds) == depth


def test_every_architecture_maps_images_to_outputs_at_unit_scale() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 16, 16)
    for net in (MyrtleCNN(256, num_outputs=3), FiveLayerCNN(256, num_outputs=3), MLP(256, 3, 768, num_outputs=3)):
        assert type(net) is nn.Sequential
        outputs = net(x)
        assert outputs.shape == (6, 3)
        assert 0.01 < outputs.std().item() < 3


def test_mlp_layers_and_activation() -> None:
    kinds = [type(layer) for layer in MLP(4, 2, 12, Erf)]
    assert kinds == [nn.Flatten, NTKLinear, Erf, NTKLinear, Erf, NTKLinear]
    assert [type(layer) for layer in MLP(4, 0, 12)] == [nn.Flatten, NTKLinear]


def test_residual_adds_its_branches() -> None:
    body, shortcut = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(Residual(body, shortcut)(x), body(x) + shortcut(x))
    torch.testing.assert_close(Residual(body)(x), body(x) + x)


def test_numpy_numbers_become_plain_ones() -> None:
    layer = NTKConv2d(np.int64(2), np.int64(4), np.int64(3), stride=np.int64(2), weight_std=np.float64(1.5))
    assert repr(layer) == repr(NTKConv2d(2, 4, 3, stride=2, weight_std=1.5))
    kinds = [type(value) for value in (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride)]
    assert kinds == [int] * 4
    assert type(layer.weight_std) is float
    assert layer(torch.ones(1, 2, 4, 4)).shape == (1, 4, 2, 2)
    assert type(NTKLinear(np.int64(2), np.int64(3)).in_features) is int


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NTKConv2d(3, 2, (3, 3.0)), r"kernel_size=\(3, 3.0\): give one int"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKConv2d(3, 2, True), "kernel_size=True"),
        (lambda: NTKConv2d(3, 2, 3, stride=1.5), "stride=1.5"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKConv2d("3", 2, 3), "in_channels='3'"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKLinear(2, 2.0), "out_features=2.0"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKLinear(2, 2, "1"), "weight_std='1'"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKLinear(2, 2, bias_std=None), "bias_std=None"),  # type: ignore[arg-type]  # on purpose
        (lambda: MLP(4, 2.5, 3), "MLP .*depth=2.5"),  # type: ignore[arg-type]  # on purpose
        (lambda: MyrtleCNN(depth=[5]), r"MyrtleCNN .*depth=\[5\]"),  # type: ignore[arg-type]  # on purpose
        (lambda: FiveLayerCNN(8.0), "FiveLayerCNN .*width=8.0"),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_arguments_of_a_wrong_type_are_named(make: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()  # type: ignore[operator]  # a table of lambdas


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MyrtleCNN(depth=6), r"depth \[5, 7, 10\]"),
        (lambda: MLP(4, -1, 3), "cannot be negative"),
        (lambda: NTKConv2d(1, 1, 2), "odd kernel_size"),
        (lambda: NTKConv2d(1, 1, 3, "full"), "padding must be"),  # type: ignore[arg-type]  # on purpose
        (lambda: NTKConv2d(1, 1, 3, stride=0), "stride must be"),
        (lambda: NTKLinear(0, 1), "positive sizes"),
        (lambda: NTKLinear(1, 1, weight_std=-1), "weight_std must be"),
        (lambda: NTKLinear(1, 1, bias_std=-1), "bias_std >= 0"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]  # a table of lambdas
