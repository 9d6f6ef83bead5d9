"""Translation of networks, and the errors that come before any work."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ntk_lightning.kernels.infinite.activations import Activation
from ntk_lightning.kernels.infinite.architecture import Conv, Flatten, GlobalAvgPool, Linear, Pool, Scale, Sum
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.kernels.infinite.shapes import check_shape
from ntk_lightning.networks import MLP, Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear, Residual


def test_every_supported_layer_is_translated() -> None:
    net = nn.Sequential(
        NTKConv2d(3, 4, 5, "valid", 1.5, 0.5, stride=2),
        nn.LeakyReLU(0.2),
        nn.Identity(),
        nn.AvgPool2d(2, stride=1),
        nn.Sequential(NTKConv2d(4, 4, 3), nn.GELU()),
        Residual(nn.Sequential(NTKConv2d(4, 4, 3), Erf(), NTKConv2d(4, 4, 1, weight_std=1.0))),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        NTKLinear(4, 1, 1.0, 0.1),
    )
    root = 2**0.5
    assert parse(net) == (
        Conv(5, 0, 2, 1.5, 0.5),
        Activation("relu", 0.2),
        Pool(2, 1),
        Conv(3, 1, 1, root, 0.0),
        Activation("gelu"),
        Sum((Conv(3, 1, 1, root, 0.0), Activation("erf"), Conv(1, 0, 1, 1.0, 0.0)), ()),
        GlobalAvgPool(),
        Flatten(),
        Linear(1.0, 0.1),
    )


def test_width_does_not_change_the_layers() -> None:
    assert parse(MyrtleCNN(8, 7)) == parse(MyrtleCNN(64, 7))


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.MaxPool2d(2), "MaxPool2d"),
        (nn.BatchNorm2d(3), "BatchNorm2d"),
        (nn.Conv2d(3, 3, 3, groups=3), "Conv2d"),
        (nn.PReLU(), "PReLU"),
        (nn.AvgPool2d(2, ceil_mode=True), "AvgPool2d"),
        (nn.AdaptiveAvgPool2d(2), "AdaptiveAvgPool2d"),
        (nn.Flatten(2), "Flatten"),
    ],
)
def test_a_layer_without_closed_form_is_named(layer: nn.Module, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        parse(nn.Sequential(NTKConv2d(3, 3, 3), layer, nn.Flatten(), NTKLinear(3, 1)))


def test_a_layer_without_parameters_counts_wherever_it_is_used() -> None:
    act = nn.ReLU()
    layers = Linear(2**0.5, 0.0), Activation("relu")
    block = Residual(nn.Sequential(act, NTKLinear(2, 2)))
    shared = nn.Sequential(NTKLinear(2, 2), act, NTKLinear(2, 2), block, act, NTKLinear(2, 1))
    assert parse(shared) == (*layers, layers[0], Sum(layers[::-1], ()), layers[1], layers[0])


def repeated_layer() -> nn.Module:
    layer = NTKLinear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), NTKLinear(2, 1))


def repeated_block() -> nn.Module:
    block = Residual(nn.Sequential(nn.ReLU(), NTKLinear(2, 2)))
    return nn.Sequential(NTKLinear(2, 2), block, block, NTKLinear(2, 1))


def one_bias() -> nn.Module:
    net = nn.Sequential(NTKLinear(2, 2, bias_std=0.1), nn.ReLU(), NTKLinear(2, 2, bias_std=0.1), NTKLinear(2, 1))
    net[2].bias = net[0].bias
    return net


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (repeated_layer, r"net\.0 is used twice"),
        (repeated_block, r"net\.1\.body\.1 is used twice"),
        (one_bias, r"net\.2 and net\.0 share a parameter"),
    ],
)
def test_tied_weights_are_refused(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(TypeError, match=named + ".*tied weights is not supported"):
        parse(make())


class Named(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(NTKLinear(2, 2), nn.ReLU(), NTKLinear(2, 1))


class Doubled(Named):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self[0](x)
        return out


class Centered(NTKLinear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * x


def replaced() -> nn.Module:
    net = Named()
    net[1].forward = torch.tanh
    return net


def test_a_subclass_that_computes_the_same_is_taken() -> None:
    assert parse(Named()) == parse(nn.Sequential(*Named()))


def test_a_forward_of_its_own_counts() -> None:
    with pytest.raises(ValueError, match="readout"):
        parse(nn.Sequential(Doubled(), nn.ReLU()))
    assert parse(Doubled()) == (Linear(2**0.5, 0.0), Scale(2.0))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Sequential(Centered(2, 1)), r"net\.0 is a Centered"),
        (lambda: nn.Sequential(NTKLinear(2, 2), Leaky(), NTKLinear(2, 1)), r"net\.1 is a Leaky"),
        (replaced, r"net\.1 is a ReLU with a forward of its own"),
        (lambda: nn.Sequential(weight_norm(NTKLinear(2, 1))), r"net\.0 has .*parametrizations"),
    ],
)
def test_a_layer_that_computes_something_else_is_refused(make: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(TypeError, match=named):
        parse(make())


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("place", ["", "0", "1"])
def test_hooks_are_refused_until_they_are_removed(place: str, hook: str) -> None:
    net = Named()
    handle = getattr(net.get_submodule(place), hook)(lambda *_: None)
    with pytest.raises(TypeError, match=r"forward hooks.*remove them"):
        parse(net)
    handle.remove()
    assert len(parse(net)) == 3


def flat_residual(shortcut: nn.Module | None = None, after: nn.Module | None = None) -> nn.Sequential:
    body = NTKLinear(2, 2) if shortcut is None and after is not None else nn.Sequential(nn.ReLU(), NTKLinear(2, 2))
    ends = [NTKLinear(2, 1)] if after is None else [after, NTKLinear(2, 1)]
    return nn.Sequential(NTKConv2d(1, 1, 3), nn.Flatten(), Residual(body, shortcut), *ends)


@pytest.mark.parametrize(
    ("net", "advice"),
    [
        (flat_residual(), "swap the two"),
        (flat_residual(NTKLinear(2, 2)), "swap the two"),
        (flat_residual(after=nn.ReLU()), "swap the two"),
        (nn.Sequential(nn.ReLU(), NTKLinear(2, 1)), "affine layer"),
        (nn.Sequential(NTKLinear(2, 2), nn.ReLU(), nn.ReLU(), NTKLinear(2, 1)), "affine layer"),
        (nn.Sequential(NTKConv2d(1, 1, 3), nn.Flatten(), nn.ReLU(), NTKLinear(2, 1)), "swap the two"),
        (nn.Sequential(NTKLinear(2, 2), nn.ReLU()), "readout"),
        (nn.Sequential(), "readout"),
        (nn.Sequential(Residual(nn.Sequential(NTKLinear(2, 2), nn.ReLU())), NTKLinear(2, 1)), "independent"),
        (nn.Sequential(Residual(NTKLinear(2, 2), nn.ReLU()), NTKLinear(2, 1)), "shortcut"),
    ],
)
def test_an_order_without_closed_form_is_refused(net: nn.Sequential, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        parse(net)


def test_shapes_are_followed() -> None:
    assert check_shape(parse(FiveLayerCNN(1)), (16, 24)) == ()
    assert check_shape((Conv(3, 1, 2, 1.0, 0.0),), (9, 8)) == (5, 4)
    assert check_shape((Conv(3, 0, 1, 1.0, 0.0), Pool(3, 2)), (9, 7)) == (3, 2)


@pytest.mark.parametrize(
    ("net", "shape", "advice"),
    [
        (MyrtleCNN(1), (3, 8), "too small"),
        (MyrtleCNN(1), (), r"\(n, C, H, W\)"),
        (nn.Sequential(NTKConv2d(1, 1, 5, "valid"), nn.Flatten(), NTKLinear(1, 1)), (4, 9), "too small"),
        (nn.Sequential(NTKConv2d(1, 1, 3), NTKLinear(1, 1)), (4, 4), "nn.Flatten"),
        (nn.Sequential(Residual(NTKConv2d(1, 1, 3, stride=2)), nn.Flatten(), NTKLinear(1, 1)), (4, 4), "branches"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(net: nn.Sequential, shape: tuple[int, ...], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        check_shape(parse(net), shape)


def test_a_multilayer_perceptron_takes_vectors_and_images() -> None:
    assert check_shape(parse(MLP(2, 1, 12)), ()) == check_shape(parse(MLP(2, 1, 12)), (2, 2)) == ()
