"""What every kernel and every fit must satisfy, on architectures and data drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.networks import Erf, NTKConv2d, NTKLinear, Residual
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import gradient_descent, kernel_sgd, ridge

CHANNELS, SIDE, SAMPLES = 2, 4, 5
HALF_THE_DIGITS = 1e-7  # of float64: what the arcsine of a correlation that rounding moves from 1 keeps
Kernel = Callable[..., Tensor]

settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=12, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")


@st.composite
def networks(draw: st.DrawFn, homogeneous: bool = False, compiled: bool = False) -> nn.Sequential:
    """Networks of every supported layer on images of 2 channels and 4x4 pixels.

    Args:
        draw: Of hypothesis.
        homogeneous: Only ReLU and leaky ReLU and no biases, so that f(c x) = c f(x).
        compiled: Only layers that the compiled backends run.

    Returns:
        The network.
    """
    width = draw(st.sampled_from([2, 3]))
    bias = st.just(0.0) if homogeneous else st.sampled_from([0.0, 0.3])
    scale = st.sampled_from([1.0, 2**0.5])
    smooth = [] if homogeneous else [nn.GELU, Erf]
    activation = st.sampled_from([nn.ReLU, lambda: nn.LeakyReLU(0.2), *smooth])

    def conv(channels: int, size: int = 3, padding: str = "same") -> NTKConv2d:
        return NTKConv2d(channels, width, size, padding, draw(scale), draw(bias))  # type: ignore[arg-type]  # a literal

    layers: list[nn.Module] = [conv(CHANNELS)]
    side = SIDE
    kinds = ["act", "conv", "pool"] + ([] if compiled else ["residual", "valid", "big"])
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
        gaussian = isinstance(layers[-1], NTKConv2d | Residual)
        if kind == "act" and isinstance(layers[-1], NTKConv2d):
            layers.append(draw(activation)())
        elif kind == "conv":
            layers.append(conv(width))
        elif kind == "pool" and side % 2 == 0:
            layers.append(nn.AvgPool2d(2))
            side //= 2
        elif kind == "residual" and gaussian:
            layers.append(Residual(nn.Sequential(draw(activation)(), conv(width))))
        elif kind == "valid" and side > 2:
            layers.append(conv(width, 2, "valid"))
            side -= 1
        elif kind == "big":
            layers.append(conv(width, 5))
    if draw(st.booleans()):
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        features = width
    else:
        layers.append(nn.Flatten())
        features = width * side**2
    if draw(st.booleans()):
        layers += [NTKLinear(features, width, draw(scale), draw(bias)), draw(activation)()]
        features = width
    return nn.Sequential(*layers, NTKLinear(features, 1, draw(scale), draw(bias)))


seeds = st.integers(0, 2**16)
kinds = st.sampled_from(["ntk", "nngp"])
makers = st.sampled_from(["infinite ntk", "infinite nngp", "reference", "empirical"])


def images(seed: int, n: int = SAMPLES) -> Tensor:
    return torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, net: nn.Sequential) -> Kernel:
    """A kernel of this network by its name."""
    if name == "empirical":
        return EmpiricalNTK(net.double())
    backend = "reference" if name == "reference" else "auto"
    return InfiniteNTK(net, "nngp" if name.endswith("nngp") else "ntk", backend)  # type: ignore[arg-type]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = HALF_THE_DIGITS) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale + 1e-300, check_dtype=False)


@given(makers, networks(), seeds)
def test_a_gram_is_symmetric_and_positive_semidefinite(name: str, net: nn.Sequential, seed: int) -> None:
    gram = make(name, net)(images(seed))
    assert torch.equal(gram, gram.T)
    values = torch.linalg.eigvalsh(gram)
    assert float(values[0]) >= -HALF_THE_DIGITS * float(values[-1])


@given(makers, networks(), seeds, st.permutations(range(SAMPLES)))
def test_the_order_of_the_samples_does_not_matter(name: str, net: nn.Sequential, seed: int, order: list[int]) -> None:
    kernel, x = make(name, net), images(seed)
    assert_close(kernel(x[order]), kernel(x)[order][:, order])


@given(makers, networks(), seeds, st.integers(1, SAMPLES - 1))
def test_parts_of_a_gram_are_the_kernels_of_the_parts(name: str, net: nn.Sequential, seed: int, cut: int) -> None:
    kernel, x = make(name, net), images(seed)
    gram = kernel(x)
    assert_close(kernel(x[:cut], x[cut:]), gram[:cut, cut:], 1e-10)
    assert_close(kernel(x[cut:], x[:cut]), gram[cut:, :cut], 1e-10)
    assert_close(kernel(x[:cut]), gram[:cut, :cut])
    assert_close(kernel.diag(x), gram.diagonal())  # type: ignore[attr-defined]  # every kernel has it


@given(makers, networks(homogeneous=True), seeds, st.sampled_from([1e-3, 0.5, 3.0, 1e4]))
def test_without_biases_relu_kernels_scale_with_the_square_of_the_images(
    name: str, net: nn.Sequential, seed: int, c: float
) -> None:
    kernel, x = make(name, net), images(seed)
    assert_close(kernel(c * x), c**2 * kernel(x))
    assert_close(kernel(c * x, x), c * kernel(x))


@given(networks(compiled=True), kinds, seeds)
def test_the_compiled_backend_agrees_with_the_reference(net: nn.Sequential, kind: str, seed: int) -> None:
    x = images(seed)
    compiled, reference = (InfiniteNTK(net, kind, backend) for backend in ("auto", "reference"))  # type: ignore[arg-type]
    assert_close(compiled(x), reference(x))
    assert_close(compiled(x[:2], x[2:]), reference(x[:2], x[2:]), 1e-10)


@given(networks(compiled=True), kinds, seeds, st.sampled_from([1e-1, 1e-3, 1e-5]))
def test_float32_kernels_of_almost_equal_images_are_exact_to_rounding(
    net: nn.Sequential, kind: str, seed: int, distance: float
) -> None:
    x = torch.cat([images(seed, 2), images(seed, 2) + distance * images(seed + 1, 2)]).float()
    kernel = InfiniteNTK(net, kind)  # type: ignore[arg-type]
    exact = InfiniteNTK(net, kind, "reference")(x.double())  # type: ignore[arg-type]
    own = exact.diagonal().sqrt()
    error = (kernel(x).double() - exact).abs() / (own[:, None] * own)
    assert float(error.max()) < 1e-6


def problem(seed: int, n: int = 7) -> tuple[Tensor, Tensor]:
    """A well conditioned Gram and labels."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0).double()
    return features @ features.T / n, labels


configs = st.builds(
    OptimizerConfig,
    lr=st.sampled_from([0.01, 0.1]),
    momentum=st.sampled_from([0.0, 0.9]),
    batch_size=st.sampled_from([1, 3, 7, 100]),
    epochs=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)


@given(seeds, configs)
def test_opposite_labels_give_the_opposite_fit(seed: int, config: OptimizerConfig) -> None:
    gram, y = problem(seed)
    for solve in (kernel_sgd, gradient_descent):
        first, second = (solve(gram, sign * y, config).coefficients for sign in (1, -1))
        assert torch.equal(first, -second)
    assert torch.equal(ridge(gram, y, 0.1).coefficients, -ridge(gram, -y, 0.1).coefficients)


@given(seeds, configs, st.permutations(range(7)))
def test_full_batch_fits_do_not_depend_on_the_order_of_the_samples(
    seed: int, config: OptimizerConfig, order: list[int]
) -> None:
    gram, y = problem(seed)
    config = replace(config, full_batch=True)
    moved = kernel_sgd(gram[order][:, order], y[order], config).coefficients
    assert_close(moved, kernel_sgd(gram, y, config).coefficients[order], 1e-12)


@given(seeds, configs)
def test_steps_by_the_eigenbasis_are_full_batch_sgd(seed: int, config: OptimizerConfig) -> None:
    gram, y = problem(seed)
    steps = kernel_sgd(gram, y, replace(config, full_batch=True)).coefficients
    assert_close(gradient_descent(gram, y, config).coefficients, steps, 1e-10)


@given(seeds, st.sampled_from([1e-6, 0.5, 1e6]), st.sampled_from([0.0, 0.5, 0.9]))
def test_the_critical_rate_falls_with_the_scale_of_the_kernel(seed: int, c: float, momentum: float) -> None:
    gram, _ = problem(seed)
    one = critical_learning_rate(gram)
    assert critical_learning_rate(c * gram, momentum=momentum) == pytest.approx((1 + momentum) * one / c, rel=1e-5)
    largest = float(torch.linalg.eigvalsh(gram)[-1])
    assert one == pytest.approx(len(gram) / largest, rel=1e-5)


@given(seeds, st.sampled_from(["cholesky", "cg"]), st.sampled_from([1e-3, 1.0]))
def test_ridge_reaches_the_residual_that_it_reports(seed: int, method: str, regularization: float) -> None:
    gram, y = problem(seed)
    fit = ridge(gram, y, regularization, method=method)  # type: ignore[arg-type]
    system = gram + len(gram) * regularization * torch.eye(len(gram), dtype=torch.float64)
    residual = float((system @ fit.coefficients - y).norm() / y.norm())
    assert residual <= 2e-10
    assert fit.residual == pytest.approx(residual, abs=1e-12)


@given(seeds, st.sampled_from([torch.float32, torch.float64]))
def test_a_solve_that_misses_its_residual_says_so(seed: int, dtype: torch.dtype) -> None:
    features = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(features).Q
    gram = (vectors * torch.logspace(0, -7, 40, dtype=torch.float64)) @ vectors.T
    gram = ((gram + gram.T) / 2).to(dtype)
    y = torch.ones(40, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"not 1\.0e-12, after 5 iterations.*raise regularization"):
        fit = ridge(gram, y, 1e-8, method="cg", tolerance=1e-12, max_iterations=5, rank=0)
    assert fit.residual > 1e-12
