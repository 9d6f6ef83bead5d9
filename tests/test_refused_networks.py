"""Networks without a closed form, or malformed: one clear error each, that names the line; none gets a wrong kernel.

Longer than 300 lines because it is a list, one network after another.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lifted_networks import ResNet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import (
    ChannelNorm,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Pointwise,
    Residual,
    SelfAttention,
)

HERE = r"test_refused_networks\.py:\d+, `.*"


class Forward(nn.Module):
    """Layers a, b and last, and a forward of their own."""

    def __init__(self, forward: Callable[[Forward, Tensor], Any], image: bool = False) -> None:
        super().__init__()
        make = (lambda c, n: NTKConv2d(c, n, 3)) if image else NTKLinear
        self.first, self.a, self.b = make(3, 4), make(4, 4), make(4, 4)
        self.last, self.scale, self.body = NTKLinear(4, 1), nn.Parameter(torch.ones(4)), forward

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401 - whatever a network returns
        return self.body(self, x)


def max_pool(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.max_pool2d(F.relu(net.first(x)), 2).flatten(1))


def softmax(net: Forward, x: Tensor) -> Tensor:
    return net.last(torch.softmax(net.first(x), 1))


def batch_norm(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.relu(F.batch_norm(net.first(x), torch.zeros(4), torch.ones(4))))


def matrix_product(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last((x @ x.transpose(0, 1)) @ x)


def data_dependent(net: Forward, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = 2 * x
    return net.last(F.relu(net.first(x)))


def size_dependent(net: Forward, x: Tensor) -> Tensor:
    for _ in range(x.shape[1]):
        x = net.first(x)
    return net.last(x)


def in_place_part(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    x[:, 0] = 0
    return net.last(x)


def in_place_method(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    x.relu_()
    return net.last(x)


def in_place_and_used(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    out = F.relu(x, inplace=True)
    return net.last(x + net.a(out))


def in_place_sum_and_used(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    y = x
    y += net.a(F.relu(x))
    return net.last(x + net.b(y))


def used_twice(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.relu(net.a(F.relu(net.a(net.first(x))))))


def a_function_with_a_layer_s_weight(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.linear(net.first(x), net.a.weight))


def parameter(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x) * net.scale)


def added_constant(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x) + 1)


def mean_over_channels(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x - x.mean(1, keepdim=True))


def part(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x)[:, :2])


def activation_of_the_input(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(torch.relu(x)))


def activation_twice(net: Forward, x: Tensor) -> Tensor:
    return net.last(torch.tanh(F.relu(net.first(x))))


def activation_of_a_sum_with_an_activation(net: Forward, x: Tensor) -> Tensor:
    x = F.relu(net.first(x))
    return net.last(F.relu(x + net.a(x)))


def sum_of_activations(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(F.relu(net.a(x)) + F.relu(net.b(x)))


def sum_with_its_activation(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x + F.relu(x))


def sum_with_its_norm(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x + F.layer_norm(x, [4]))


def product_with_itself(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x * torch.sigmoid(x))


def product_with_a_sum_of_it(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last((x + net.a(x)) * torch.tanh(net.b(x) + x))


def difference_of_equals(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x - x)


def product_with_infinity(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x) * float("inf"))


def module_made_on_the_way(net: Forward, x: Tensor) -> Tensor:
    return net.last(nn.Linear(4, 4)(net.first(x)))


def asserted(net: Forward, x: Tensor) -> Tensor:
    assert x.shape[1] == 3
    return net.last(F.relu(net.first(x)))


def cube(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x) ** 3)


def division_by_a_value(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.a(x) / net.first(x))


def concatenation_of_samples(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(torch.cat([x, x]))


def view_as_something_else(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x).view(-1, 4))


def transposed(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x).transpose(1, 2).flatten(1))


def mean_over_rows(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x).mean(2).mean(2))


def upsampled(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.interpolate(net.first(x), scale_factor=2).mean((2, 3)))


def norm_with_gains(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.relu(F.layer_norm(net.first(x), [4], net.scale)))


def noise(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x + torch.randn_like(x))


def numpy(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(torch.from_numpy(x.numpy())))


def python_number(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x) * float(x.max()))


def without_gradients(net: Forward, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.first(x)
    return net.last(x)


def an_argument_too_many(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.first(x).mean((2, 3), dtype=torch.float16))


def written_by_position(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.last(x + net.a(F.relu(x, True)))


def written_through_another_name(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    y = x.contiguous()
    y += net.a(F.relu(x))
    return net.last(net.b(x) + y)


def written_and_not_returned(net: Forward, x: Tensor) -> Tensor:
    x = net.first(x)
    torch.relu_(x)
    return net.last(x)


def detached(net: Forward, x: Tensor) -> Tensor:
    return net.last(F.relu(net.first(x).detach()))


def two_outputs(net: Forward, x: Tensor) -> Any:  # noqa: ANN401
    x = net.first(x)
    return net.last(x), x


def broken(net: Forward, x: Tensor) -> Tensor:
    return net.last(net.missing(x))


IMAGES = {an_argument_too_many, max_pool, batch_norm, transposed, mean_over_rows, upsampled}
VALUE_ERRORS = {
    activation_of_the_input: "must be Gaussian",
    activation_twice: "must be Gaussian",
    activation_of_a_sum_with_an_activation: "must be Gaussian",
    sum_of_activations: "at most one of them",
    sum_with_its_activation: "from the same values",
    sum_with_its_norm: "from the same values",
    product_with_itself: "use an activation or Pointwise",
    product_with_a_sum_of_it: "factors of a product must be independent",
    difference_of_equals: "leaves nothing",
    product_with_infinity: "a product with inf",
}
NAMED = {
    max_pool: "max_pool2d",
    softmax: "softmax",
    batch_norm: "batch_norm",
    matrix_product: "transpose|matmul",
    data_dependent: "decisions that depend on its values",
    size_dependent: "decisions that depend on its values or sizes",
    in_place_part: "writes in place",
    in_place_method: "relu_",
    in_place_and_used: "used again",
    in_place_sum_and_used: "used again",
    used_twice: "net.a is used twice",
    a_function_with_a_layer_s_weight: "linear|a tensor outside of a layer",
    parameter: "scale, a tensor outside of a layer",
    added_constant: "give the layer before a bias",
    mean_over_channels: "over all pixels",
    part: "a part of a value",
    module_made_on_the_way: "make it in __init__",
    asserted: "decisions that depend on its values or sizes",
    cube: "Pointwise",
    division_by_a_value: "numbers",
    concatenation_of_samples: "dim=1",
    view_as_something_else: "may only flatten",
    transposed: "transpose",
    mean_over_rows: "over all pixels",
    upsampled: "interpolate",
    norm_with_gains: "scale, a tensor outside of a layer|nn.LayerNorm",
    noise: "randn_like",
    numpy: "numpy",
    without_gradients: "without gradients",
    an_argument_too_many: "dtype",
    written_by_position: "used again",
    written_through_another_name: "used again",
    written_and_not_returned: "relu_, which writes in place",
    detached: "detach",
    python_number: "decisions that depend on its values|float",
}


@pytest.mark.parametrize("forward", [*NAMED, *VALUE_ERRORS], ids=lambda forward: forward.__name__)
def test_a_forward_without_closed_form_names_its_line(forward: Callable[[Forward, Tensor], Any]) -> None:
    error = ValueError if forward in VALUE_ERRORS else TypeError
    with pytest.raises(error) as raised:
        InfiniteNTK(Forward(forward, forward in IMAGES))
    message = str(raised.value)
    assert re.search(HERE, message), message
    assert re.search({**NAMED, **VALUE_ERRORS}[forward], message), message
    assert len(message) < 1800


def test_what_is_returned_must_be_one_tensor() -> None:
    with pytest.raises(TypeError, match="must return one tensor, not tuple"):
        InfiniteNTK(Forward(two_outputs))
    with pytest.raises(TypeError, match=HERE + ".*missing"):
        InfiniteNTK(Forward(broken))


def test_a_resnet_with_activations_after_its_sums_is_refused_where_they_stand() -> None:
    """Torchvision's: the identity of its second block is an activation, so the sum is not Gaussian."""
    with pytest.raises(ValueError, match=r"net\.layer1\.0\.relu .*lifted_networks\.py:\d+, `return self\.relu\(out\)`"):
        InfiniteNTK(ResNet())


class ConvMixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.depthwise(x))
        return F.gelu(self.pointwise(x))


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = NTKLinear(9, 9), NTKLinear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(x)
        return x + self.channels(x.transpose(1, 2)).transpose(1, 2)


class SoftmaxAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (NTKConv1d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x).transpose(1, 2) @ self.key(x), -1)
        return self.value(x) @ weights.transpose(1, 2)


@pytest.mark.parametrize(
    ("block", "named"),
    [
        (ConvMixerBlock(), r"net\.1\.depthwise is Conv2d\(.*groups=4.*self\.depthwise\(x\)"),
        (MixerBlock(), r"transpose.*self\.channels"),
        (SoftmaxAttention(), r"self\.query\(x\)"),
        (nn.LSTM(4, 4), r"net\.1 is LSTM"),
        (nn.MultiheadAttention(4, 1), r"net\.1 is MultiheadAttention|missing"),
        (nn.TransformerEncoderLayer(4, 1), r"TransformerEncoderLayer"),
        (nn.ConvTranspose2d(4, 4, 3), r"net\.1 is ConvTranspose2d"),
        (nn.Conv2d(4, 4, 3, dilation=2), r"net\.1 is Conv2d\(.*dilation"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1), r"net\.1 is Conv2d\(.*reflect"),
        (nn.LazyConv2d(4, 3), r"net\.1 has no sizes yet: run the network"),
        (nn.GroupNorm(2, 4), r"net\.1 is GroupNorm\(2"),
        (nn.BatchNorm2d(4), r"net\.1 is BatchNorm2d"),
        (nn.InstanceNorm2d(4), r"net\.1 is InstanceNorm2d"),
        (nn.Dropout2d(), r"net\.1 is Dropout2d"),
        (nn.Softmax(1), r"net\.1 is Softmax"),
        (nn.PReLU(), r"net\.1 is PReLU"),
        (nn.MaxPool2d(2), r"net\.1 is MaxPool2d"),
        (nn.AvgPool2d(2, ceil_mode=True), r"net\.1 is AvgPool2d\(.*"),
        (nn.Upsample(scale_factor=2), r"net\.1 is Upsample"),
        (nn.Bilinear(4, 4, 4), r"Bilinear"),
        (SelfAttention(4, 4, scaling="sqrt", mechanism="softmax"), r"net\.1 is SelfAttention"),
        (weight_norm(NTKConv2d(4, 4, 3)), "parametrizations"),
        (spectral_norm(nn.Linear(4, 4)), "parametrizations"),
        (Pointwise(lambda x: x - x.mean()), "no function of one number"),
        (nn.ModuleList([nn.ReLU()]), "ModuleList"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_without_closed_form_is_named(block: nn.Module, named: str) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        InfiniteNTK(nn.Sequential(NTKConv2d(3, 4, 3), block, nn.Flatten(), NTKLinear(4, 1)))


def gains() -> nn.Module:
    norm = nn.LayerNorm(4)
    nn.init.constant_(norm.weight, 2.0)
    return nn.Sequential(NTKLinear(3, 4), norm, nn.ReLU(), NTKLinear(4, 1))


class Stacked(nn.Module):
    def __init__(self, a: nn.Module, b: nn.Module, merge: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.merge, self.last = a, b, merge, NTKLinear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.merge(self.a(x), self.b(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (gains, (3,), "gains other than 1"),
        (lambda: nn.Sequential(nn.LayerNorm(3), NTKLinear(3, 1)), (3,), "mean of its input must be 0"),
        (lambda: nn.Sequential(NTKLinear(3, 4), nn.ReLU(), ChannelNorm(), NTKLinear(4, 1)), (3,), "must be 0"),
        (
            lambda: nn.Sequential(NTKLinear(3, 4), nn.LayerNorm(5), nn.ReLU(), NTKLinear(4, 1)),
            (3,),
            "give it that size",
        ),
        (
            lambda: nn.Sequential(NTKConv2d(3, 4, 3), nn.LayerNorm(4), nn.ReLU(), nn.Flatten(), NTKLinear(16, 1)),
            *((3, 2, 2), "GroupNorm"),
        ),
        (lambda: nn.Sequential(NTKConv1d(3, 4, 3), nn.Flatten(), NTKLinear(16, 1)), (3, 2, 2), "sequences"),
        (lambda: nn.Sequential(NTKConv2d(3, 4, 3), nn.Flatten(), NTKLinear(16, 1)), (3, 4), "images"),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 1)), (3,), "in_features=5, but 4"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 1)), (3, 2, 2), "too small"),
        (
            lambda: nn.Sequential(
                NTKConv2d(3, 4, 3, padding=3, padding_mode="circular"), nn.Flatten(), NTKLinear(4, 1)
            ),
            *((3, 2, 2), "more than once"),
        ),
        (
            lambda: Stacked(NTKConv2d(3, 4, 3), NTKConv2d(3, 4, 3, stride=2), lambda a, b: a + b),
            *((3, 4, 4), "different shapes"),
        ),
        (
            lambda: Stacked(NTKConv2d(3, 2, 3), NTKConv2d(3, 2, 3, stride=2), lambda a, b: torch.cat([a, b], 1)),
            *((3, 4, 4), "different shapes"),
        ),
        (lambda: Stacked(NTKConv2d(3, 4, 3), NTKConv2d(3, 2, 3), lambda a, b: a * b), (3, 4, 4), "different channels"),
        (lambda: nn.Sequential(nn.Dropout(1.0), NTKLinear(3, 1)), (3,), "p < 1"),
        (lambda: nn.Sequential(NTKLinear(3, 4), nn.ReLU()), (3,), "readout"),
        (lambda: nn.Sequential(NTKLinear(3, 4), nn.LayerNorm(4)), (3,), "readout"),
        (lambda: nn.Sequential(NTKConv2d(3, 1, 3), nn.Flatten()), (3, 4, 4), "readout"),
        (lambda: nn.Sequential(NTKConv2d(3, 4, 3)), (3, 4, 4), "still has pixels"),
        (lambda: nn.Sequential(NTKConv2d(3, 4, 3), nn.AvgPool2d(2, stride=0), nn.Flatten()), (3, 4, 4), "one pixel"),
        (lambda: nn.Sequential(nn.Identity()), (3,), "readout"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], nn.Module], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        InfiniteNTK(make())(torch.randn(2, *shape))


def test_an_activation_that_overwrites_its_shortcut_is_refused() -> None:
    """The shortcut would see what the activation wrote: relu(x) instead of x."""
    body = nn.Sequential(nn.ReLU(inplace=True), NTKLinear(4, 4))
    with pytest.raises(TypeError, match="writes in place into a value that is used again"):
        InfiniteNTK(nn.Sequential(NTKLinear(3, 4), Residual(body), NTKLinear(4, 1)))


@pytest.mark.parametrize("net", [None, torch.relu, NTKLinear, "net"])
def test_only_modules_are_taken(net: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"nn\.Module"):
        InfiniteNTK(net)


class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.last = NTKLinear(3, 4), NTKLinear(4, 4), NTKLinear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.training and float(torch.rand(())) < 2:
            x = x + self.block(torch.relu(x))
        return self.last(x)


def test_a_path_that_is_drawn_is_refused() -> None:
    net, state = StochasticDepth(), torch.get_rng_state()
    with pytest.raises(TypeError, match="draws random numbers"):
        InfiniteNTK(net)
    assert torch.equal(state, torch.get_rng_state())
    assert InfiniteNTK(net.eval())(torch.eye(3)).shape == (3, 3)
