"""The reference kernels against neural-tangents and against sampled wide networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.infinite import reference
from ntk_lightning.kernels.infinite.activations import Activation
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.kernels.infinite.shapes import check_shape
from ntk_lightning.networks import MLP, Erf, NTKConv2d, NTKLinear, Residual


@pytest.mark.parametrize("kind", [0, 1])
def test_equals_neural_tangents(
    reference_case: tuple[str, nn.Sequential], kind: int, neural_tangents: dict[str, Tensor]
) -> None:
    name, net = reference_case
    x1, x2 = neural_tangents[f"{name}/x1"], neural_tangents[f"{name}/x2"]
    if x1.shape[-1] > 16:
        x1, x2 = x1[:1], x2[:1]
    expected = neural_tangents[f"{name}/{('nngp', 'ntk')[kind]}"][: len(x1), : len(x2)]
    torch.testing.assert_close(reference.gram(parse(net), x1, x2)[kind], expected, rtol=1e-10, atol=0)


ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "relu": (Activation("relu"), F.relu),
    "leaky": (Activation("relu", 0.3), lambda u: F.leaky_relu(u, 0.3)),
    "identity": (Activation("relu", 1.0), lambda u: u),
    "erf": (Activation("erf"), torch.erf),
    "gelu": (Activation("gelu"), F.gelu),
}


def expectation(function: Callable[[Tensor, Tensor], Tensor], k11: float, k12: float, k22: float) -> Tensor:
    """E[function(u, v)] by a fine grid in polar coordinates, exact to about 1e-6 for functions with kinks too."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(120))
    radius, angle = 5 * (nodes + 1), torch.linspace(0, 2 * math.pi, 40001, dtype=torch.float64)[:-1]
    a, b = (radius[:, None] * f(angle) for f in (torch.cos, torch.sin))
    u = math.sqrt(k11) * a
    v = k12 / math.sqrt(k11) * a + math.sqrt(k22 - k12**2 / k11) * b
    return (5 * weights * radius * torch.exp(-(radius**2) / 2) * function(u, v).mean(1)).sum()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("k", [(1.0, 0.3, 2.0), (0.5, -0.6, 1.5), (3.0, 0.0, 0.2), (1.0, 0.999, 1.0)])
def test_dual_activation_equals_the_integral(name: str, k: tuple[float, float, float]) -> None:
    activation, function = ACTIVATIONS[name]
    k11, k12, k22 = (torch.tensor(value, dtype=torch.float64) for value in k)

    def derivative(u: Tensor) -> Tensor:
        u = u.detach().requires_grad_()
        return torch.autograd.grad(function(u).sum(), u)[0]

    nngp, slope = reference.dual_activation(activation, k12, k11, k22)
    torch.testing.assert_close(nngp, expectation(lambda u, v: function(u) * function(v), *k), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(slope, expectation(lambda u, v: derivative(u) * derivative(v), *k), rtol=2e-4, atol=2e-4)


def test_relu_of_equal_opposite_and_zero_inputs() -> None:
    k11, k12 = torch.tensor([2.0, 2.0, 0.0]), torch.tensor([2.0, -2.0, 0.0])
    nngp, slope = reference.dual_activation(Activation("relu"), k12, k11, k11)
    torch.testing.assert_close(nngp, torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(slope, torch.tensor([0.5, 0.0, 0.25]))


def test_relu_of_tiny_huge_and_slightly_negative_variances() -> None:
    scale = torch.tensor([1e-25, 1e25])
    nngp, slope = reference.dual_activation(Activation("relu"), 0.5 * scale, scale, scale)
    expected = reference.dual_activation(Activation("relu"), torch.tensor(0.5), torch.ones(()), torch.ones(()))
    torch.testing.assert_close(nngp / scale, expected[0].expand(2))
    torch.testing.assert_close(slope, expected[1].expand(2))
    nngp, slope = reference.dual_activation(Activation("relu"), torch.zeros(()), torch.tensor(-1e-9), torch.ones(()))
    assert nngp == 0
    assert slope == 0.25


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(
            *(NTKConv2d(1, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(1, 1), nn.ReLU(), NTKLinear(1, 1))
        ),
        nn.Sequential(nn.AvgPool2d(4), NTKConv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), NTKLinear(4, 1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_that_average_to_nothing_have_a_kernel_of_nothing(net: nn.Sequential, dtype: torch.dtype) -> None:
    x = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)
    patches -= patches.mean((-2, -1), keepdim=True)
    for kernel in reference.gram(parse(net), x, x):
        assert float(kernel.abs().max()) < 1e-5


class Largest(TorchDispatchMode):
    """Finds how many entries the largest tensor has that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        out = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_vectors_are_paired_without_their_products() -> None:
    x = torch.randn(60, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with Largest() as largest:  # type: ignore[no-untyped-call]  # torch's constructor
        nngp, _ = reference.gram(parse(NTKLinear(500, 1)), x[:40], x[40:])
    assert largest.entries <= 40 * 500
    torch.testing.assert_close(nngp, 2 * (x[:40, None] * x[40:]).mean(-1), rtol=1e-12, atol=1e-12)


PIXELWISE = NTKConv2d(5, 5, 1), nn.ReLU(), NTKConv2d(5, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()


@pytest.mark.parametrize(
    ("net", "shape"), [(MLP(5, 2, 300), (300,)), (nn.Sequential(*PIXELWISE, NTKLinear(5, 1)), (5, 4, 4))]
)
def test_the_diagonal_of_a_symmetric_gram_is_that_of_single_inputs(net: nn.Sequential, shape: tuple[int, ...]) -> None:
    x, layers = torch.randn(50, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), parse(net)
    single = torch.cat([reference.gram(layers, sample, sample)[1][0] for sample in x.split(1)])
    torch.testing.assert_close(reference.gram(layers, x, x)[1].diagonal(), single, rtol=1e-13, atol=0)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="tanh"):
        reference.dual_activation(Activation("tanh"), *torch.ones(3))


def strided(n: int) -> nn.Sequential:
    first, second = NTKConv2d(2, n, 3, stride=2, bias_std=0.3), NTKConv2d(n, n, 3, "valid")
    return nn.Sequential(first, nn.ReLU(), second, nn.LeakyReLU(0.2), nn.Flatten(), NTKLinear(n, 1))


def overlapping_pool(n: int) -> nn.Sequential:
    convolutions = NTKConv2d(2, n, 5), nn.GELU(), nn.AvgPool2d(3, 2), NTKConv2d(n, n, 2, "valid"), nn.ReLU()
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(n, 1, bias_std=0.5))


def residual(n: int) -> nn.Sequential:
    body = nn.Sequential(nn.ReLU(), NTKConv2d(n, n, 3, weight_std=1.0))
    down = Residual(nn.Sequential(nn.ReLU(), NTKConv2d(n, n, 3, stride=2)), NTKConv2d(n, n, 1, "valid", stride=2))
    return nn.Sequential(
        *(NTKConv2d(2, n, 3), Residual(body), down, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), NTKLinear(n, 1)
    )


def perceptron(n: int) -> nn.Sequential:
    return MLP(4 * n, 2, 50, Erf, weight_std=1.5, bias_std=0.4)


@pytest.mark.parametrize("make", [strided, overlapping_pool, residual, perceptron])
def test_wide_networks_approach_both_limits(make: Callable[[int], nn.Sequential]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 5, 5)
    x[1] = 0.8 * x[0] + 0.6 * x[1]
    layers = parse(make(1))
    check_shape(layers, (5, 5))
    nngp, ntk = reference.gram(layers, x, x)
    nets = [make(128) for _ in range(16)]
    sampled = torch.stack([EmpiricalNTK(net)(x) for net in nets]).mean(0)
    assert (sampled - ntk).norm() < 0.08 * ntk.norm()
    readouts = [net[-1] for net in nets]  # given its features, the readout's covariance is exact
    features = [net[:-1](x).detach() for net in nets]
    pairs = zip(features, readouts, strict=True)
    covariance = torch.stack(
        [readout.weight_std**2 * f @ f.T / f.shape[1] + readout.bias_std**2 for f, readout in pairs]
    ).mean(0)
    assert (covariance - nngp).norm() < 0.08 * nngp.norm()


def test_the_two_limits_differ_by_more_than_the_tolerance() -> None:
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for make in (strided, overlapping_pool, residual, perceptron):
        nngp, ntk = reference.gram(parse(make(1)), x, x)
        assert (nngp - ntk).norm() > 0.3 * ntk.norm()
