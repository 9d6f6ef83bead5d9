"""Modules with a forward of their own: what they are lifted to, and that their kernels are those of wide networks.

Longer than 300 lines because every kind of operation has a test here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lifted_networks import LIFTED, PreActivationResNet
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels import InfiniteNTK, monte_carlo
from ntk_lightning.kernels.infinite.architecture import (
    Activation,
    Add,
    Concat,
    Flatten,
    GlobalAvgPool,
    Graph,
    Linear,
    Node,
    Scale,
    Sum,
)
from ntk_lightning.kernels.infinite.graphs import to_graph, to_layers
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import ChannelNorm, Erf, NTKConv1d, NTKConv2d, NTKLinear, Pointwise, Residual, SelfAttention

ROOT = 2**0.5
RELU = Activation("relu")


class Lambda(nn.Module):
    """A forward on some layers."""

    def __init__(self, forward: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def inputs(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def equal(net: nn.Module, plain: nn.Module, *shape: int, factor: float = 1.0) -> None:
    """Compare both kernels of two networks."""
    x = inputs(*shape)
    for kind in ("nngp", "ntk"):
        expected = factor * InfiniteNTK(plain, kind)(x)  # type: ignore[arg-type]  # one of both
        torch.testing.assert_close(InfiniteNTK(net, kind)(x), expected, rtol=1e-12, atol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LIFTED)
@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_kernels_of_modules_are_those_of_wide_networks(name: str, kind: Any) -> None:  # noqa: ANN401 - one of two
    make, shape = LIFTED[name]
    torch.manual_seed(0)
    net, x = make(64).double(), inputs(*shape)  # type: ignore[call-arg]  # the width
    mean, error = monte_carlo(net, x, kind=kind, seeds=16)
    kernel = InfiniteNTK(net, kind)(x)
    assert float((mean - kernel).norm()) < 4 * float(error.norm()) + 0.03 * float(kernel.norm())
    if kind == "ntk":  # the bound tells this kernel from another
        other = InfiniteNTK(net, "nngp")(x)
        assert float((mean - other).norm()) > 4 * float(error.norm()) + 0.03 * float(kernel.norm())


LAYERS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda n: nn.Sequential(NTKConv1d(2, n, 3, stride=2, bias_std=0.2), nn.GELU()), (2, 5)),
    "circular": (lambda n: nn.Sequential(NTKConv2d(2, n, (3, 1), padding_mode="circular"), nn.GELU()), (2, 3, 3)),
    "padded pool": (
        lambda n: nn.Sequential(NTKConv2d(2, n, 1), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.GELU()),
        (2, 3, 3),
    ),
    "pool of a length": (lambda n: nn.Sequential(NTKConv1d(2, n, 3), nn.AvgPool1d(3, 1, 1), Erf()), (2, 4)),
    "channel norm": (lambda n: nn.Sequential(NTKConv2d(2, n, 3), ChannelNorm(), nn.GELU()), (2, 3, 3)),
    "group norm": (lambda n: nn.Sequential(NTKConv2d(2, n, 3), nn.GroupNorm(1, n, affine=False), nn.GELU()), (2, 3, 3)),
    "attention": (
        lambda n: nn.Sequential(NTKConv1d(2, n, 1), SelfAttention(n, n, mechanism="softmax", bias_std=0.3), nn.GELU()),
        (2, 4),
    ),
    "standard": (
        lambda n: nn.Sequential(NTKConv2d(2, n, 3, parameterization="standard", bias_std=0.2), nn.GELU()),
        (2, 3, 3),
    ),
    "plain": (lambda n: nn.Sequential(nn.Conv2d(2, n, 3, padding=1), nn.GELU()), (2, 3, 3)),
    "dropout": (lambda n: nn.Sequential(NTKConv2d(2, n, 3), nn.GELU(), nn.Dropout(0.3)), (2, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_at_width_512_are_within_four_standard_errors(name: str) -> None:
    make, shape = LAYERS[name]
    axes = tuple(range(2, 1 + len(shape)))
    head = NTKLinear(512, 1)
    net = Lambda(lambda x, body, head: head(body(x).mean(axes)), make(512), head).double()
    mean, error = monte_carlo(net, inputs(*shape), seeds=12)
    assert float(((mean - InfiniteNTK(net)(inputs(*shape))) / error).abs().max()) < 4


def test_a_residual_forward_is_the_module_residual() -> None:
    body = nn.Sequential(nn.ReLU(), NTKLinear(4, 4))
    plain = nn.Sequential(NTKLinear(5, 4), Residual(body), nn.ReLU(), NTKLinear(4, 1))

    def forward(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        x = x + second(torch.relu(x))
        return last(x.relu())

    net = Lambda(forward, NTKLinear(5, 4), NTKLinear(4, 4), NTKLinear(4, 1))
    assert (
        parse(net) == parse(plain) == (Linear(ROOT, 0.0), Sum((RELU, Linear(ROOT, 0.0)), ()), RELU, Linear(ROOT, 0.0))
    )
    assert repr(parse(net)) == repr(parse(plain))


def test_functions_and_methods_are_the_modules() -> None:
    def forward(x: Tensor, conv: nn.Module, last: nn.Module) -> Tensor:
        x = F.avg_pool2d(F.leaky_relu(conv(x), 0.2), kernel_size=2)
        return last(F.dropout(x.mean((2, 3)), 0.5, training=False))

    conv, last = NTKConv2d(2, 4, 3), NTKLinear(4, 1)
    pools = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    assert parse(Lambda(forward, conv, last)) == parse(nn.Sequential(conv, nn.LeakyReLU(0.2), *pools, last))


ACTIVATIONS: list[tuple[Callable[[Tensor], Tensor], nn.Module]] = [
    (torch.abs, Pointwise(torch.abs)),
    (lambda x: abs(x), Pointwise(torch.abs)),
    (lambda x: x.sin(), Pointwise(torch.sin)),
    (torch.cos, Pointwise(torch.cos)),
    (torch.exp, Pointwise(torch.exp)),
    (torch.erf, Erf()),
    (lambda x: nn.LeakyReLU(0.1)(x), nn.LeakyReLU(0.1)),
    (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh")),
    (lambda x: F.elu(x, 0.5), nn.ELU(0.5)),
    (lambda x: F.softplus(x, beta=2), nn.Softplus(2)),
    (lambda x: F.hardtanh(x, -2.0, 0.5), nn.Hardtanh(-2.0, 0.5)),
    (lambda x: x.tanh(), nn.Tanh()),
    (torch.sigmoid, nn.Sigmoid()),
    (F.silu, nn.SiLU()),
    (lambda x: x**2, Pointwise(torch.square)),
]


@pytest.mark.parametrize("number", range(len(ACTIVATIONS)))
def test_activations_as_functions_are_those_of_the_table(number: int) -> None:
    function, module = ACTIVATIONS[number]
    ends = NTKLinear(5, 4), NTKLinear(4, 1)
    net = Lambda(lambda x, first, last: last(function(first(x))), *ends)
    assert parse(net) == parse(nn.Sequential(ends[0], module, ends[1]))


def test_equal_terms_of_a_sum_add_up() -> None:
    ends = NTKLinear(5, 4), NTKLinear(4, 1)
    plain = nn.Sequential(*ends)
    equal(Lambda(lambda x, first, last: last(first(x) * 3), *ends), plain, 5, factor=9.0)

    def twice(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        return last(x + x)

    def thrice(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        return last((2 * x - x / 2) + x + 0.5 * x)

    equal(Lambda(twice, *ends), plain, 5, factor=4.0)
    equal(Lambda(thrice, *ends), plain, 5, factor=9.0)


def test_a_value_that_is_added_again_counts_with_its_covariance() -> None:
    first, second, last = NTKLinear(5, 4), NTKLinear(4, 4), NTKLinear(4, 1)

    def forward(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        return last((x + second(torch.relu(x))) + x)  # 2 x + f(x)

    def expected(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        return last(2 * x + second(torch.relu(x)))

    equal(Lambda(forward, first, second, last), Lambda(expected, first, second, last), 5)


def test_what_is_computed_twice_is_one_value() -> None:
    def forward(x: Tensor, first: nn.Module, last: nn.Module) -> Tensor:
        x = first(x)
        return last(torch.relu(x) + torch.relu(x))

    ends = NTKLinear(5, 4), NTKLinear(4, 1)
    equal(Lambda(forward, *ends), nn.Sequential(ends[0], nn.ReLU(), ends[1]), 5, factor=4.0)


def test_an_activation_of_a_concatenation_is_that_of_its_parts() -> None:
    def after(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
        return last(F.gelu(torch.cat([a(x), b(x)], 1)))

    def before(x: Tensor, a: nn.Module, b: nn.Module, last: nn.Module) -> Tensor:
        return last(torch.cat([F.gelu(a(x)), F.gelu(b(x))], -1))

    layers = NTKLinear(5, 6, 2.0), NTKLinear(5, 3, 0.5), NTKLinear(9, 1)
    x = inputs(5)
    wide, narrow = (
        InfiniteNTK(nn.Sequential(layer, nn.GELU(), NTKLinear(layer.out_features, 1)))(x) for layer in layers[:2]
    )
    expected = (6 * wide + 3 * narrow) / 9
    for forward in (after, before):
        torch.testing.assert_close(InfiniteNTK(Lambda(forward, *layers))(x), expected, rtol=1e-12, atol=0)


def test_nested_concatenations_are_one() -> None:
    def forward(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, last: nn.Module) -> Tensor:
        return last(torch.cat([torch.cat([a(x), b(x)], 1), c(x)], 1))

    net = Lambda(forward, NTKLinear(5, 6), NTKLinear(5, 3), NTKLinear(5, 2), NTKLinear(11, 1))
    (graph,) = parse(net)
    assert isinstance(graph, Graph)
    assert [node for node in graph.nodes if isinstance(node.operation, Concat)] == [Node(Concat((6, 3, 2)), (1, 2, 3))]


def test_writing_in_place_into_what_is_not_used_again_is_followed() -> None:
    def forward(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        out = first(x)
        out += second(x)
        out *= 0.5
        return last(F.relu(out, inplace=True))

    def expected(x: Tensor, first: nn.Module, second: nn.Module, last: nn.Module) -> Tensor:
        return last(F.relu(0.5 * (first(x) + second(x))))

    layers = NTKLinear(5, 4), NTKLinear(5, 4), NTKLinear(4, 1)
    equal(Lambda(forward, *layers), Lambda(expected, *layers), 5)


def test_a_single_output_may_lose_its_dimension() -> None:
    last = NTKLinear(5, 1)
    assert parse(Lambda(lambda x, last: last(x).squeeze(-1), last)) == parse(last)


def test_what_the_output_does_not_need_is_not_asked_of() -> None:
    def forward(x: Tensor, last: nn.Module) -> Tensor:
        x.argmax(1)
        return last(x)

    assert parse(Lambda(forward, NTKLinear(5, 1))) == (Linear(ROOT, 0.0),)


def test_a_graph_folds_into_layers_and_back() -> None:
    layers = Linear(1.0, 0.0), Sum((RELU, Linear(1.0, 0.0)), ()), RELU, GlobalAvgPool(), Flatten(), Scale(2.0)
    assert to_layers(to_graph(layers)) == layers
    shared = Graph((Node(RELU, (0,)), Node(Linear(1.0, 0.0), (1,)), Node(Add(), (2, 1)), Node(Add(), (3, 2))))
    assert to_layers(shared) == (shared,)  # a value that two sums use
    assert to_graph((Scale(2.0), shared)).nodes[1:] == tuple(
        Node(node.operation, tuple(i + 1 for i in node.inputs)) for node in shared.nodes
    )


def test_variances_are_of_equal_pixels_alone_where_nothing_mixes_them() -> None:
    """Flattened networks of 48 x 48 pixels: all pairs of pixels would be 42 MB a pair of images."""
    net = nn.Sequential(NTKConv2d(1, 4, 3), nn.ReLU(), NTKConv2d(4, 4, 3), nn.Flatten(), NTKLinear(4 * 48**2, 1))
    pooled = nn.Sequential(*net[:3], nn.AvgPool2d(1), *net[3:])  # the same, but it mixes pixels by name
    x = inputs(1, 6, 6)
    small = nn.Sequential(*net[:3], nn.Flatten(), NTKLinear(4 * 36, 1))
    equal(small, nn.Sequential(*pooled[:4], nn.Flatten(), NTKLinear(4 * 36, 1)), *x.shape[1:])
    with torch.no_grad():
        assert InfiniteNTK(net)(inputs(1, 48, 48)).shape == (3, 3)


def test_the_standard_parameterization_counts_in_keys_and_widths_do_not() -> None:
    def standard(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), NTKLinear(width, 1))

    def ntk(width: int) -> nn.Module:
        return nn.Sequential(NTKLinear(3, width), nn.ReLU(), NTKLinear(width, 1))

    assert repr(parse(ntk(4))) == repr(parse(ntk(8)))
    assert repr(parse(standard(4))) == repr(parse(standard(8)))  # the fan-in of its first layer is that of the inputs
    wide = (repr(parse(nn.Sequential(NTKLinear(3, n), nn.ReLU(), nn.Linear(n, 1)))) for n in (4, 8))
    assert len(set(wide)) == 2


def test_trained_gains_are_told_and_frozen_ones_are_constants(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(NTKLinear(5, 256), nn.LayerNorm(256), nn.ReLU(), NTKLinear(256, 1)).double()
    with caplog.at_level(logging.WARNING):
        InfiniteNTK(net)
    assert "requires_grad_(False)" in caplog.text
    caplog.clear()
    net[1].requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        kernel = InfiniteNTK(net)(inputs(5))
    assert not caplog.text
    mean, error = monte_carlo(net, inputs(5), seeds=16)
    assert float((mean - kernel).norm()) < 4 * float(error.norm())


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_is_of_the_mode_of_its_module(mode: bool) -> None:
    net = nn.Sequential(NTKLinear(5, 4), nn.GELU(), nn.Dropout(0.4), NTKLinear(4, 1)).train(mode)
    plain = nn.Sequential(net[0], net[1], net[3])
    x, kernel, expected = inputs(5), InfiniteNTK(net, "nngp"), InfiniteNTK(plain, "nngp")(inputs(5))
    if mode:
        expected = expected + expected.diag().diag() * (1 / 0.6 - 1)
    for actual in (kernel(x), kernel(x, x.clone())):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(kernel.diag(x), expected.diag())
    torch.testing.assert_close(kernel(x[:2], x[1:]), InfiniteNTK(plain, "nngp")(x[:2], x[1:]))  # independent masks


@pytest.mark.parametrize("kind", ["ntk", "nngp"])
def test_gradients_by_inputs_equal_finite_differences(kind: Any) -> None:  # noqa: ANN401
    net = PreActivationResNet(4)
    x, y = inputs(3, 3, 3), torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kernel = InfiniteNTK(net, kind)
    torch.autograd.gradcheck(lambda x: kernel(x[:1].requires_grad_(), y), x[:1].clone().requires_grad_(), atol=1e-6)
    probe = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(kernel(probe).sum(), probe)  # equal inputs on the diagonal
    assert bool(slope.isfinite().all())


def test_the_diagonal_is_that_of_the_gram() -> None:
    net, x = PreActivationResNet(4), inputs(3, 4, 4)
    torch.testing.assert_close(InfiniteNTK(net).diag(x), InfiniteNTK(net)(x).diag(), rtol=1e-12, atol=0)


def test_a_compiled_part_is_followed() -> None:
    ends = NTKLinear(5, 4), NTKLinear(4, 1)
    part = torch.compile(nn.Sequential(nn.ReLU(), NTKLinear(4, 4)), backend="eager")
    plain = nn.Sequential(ends[0], nn.ReLU(), NTKLinear(4, 4), ends[1])
    assert parse(nn.Sequential(ends[0], part, ends[1])) == parse(plain)  # type: ignore[arg-type]  # a module
