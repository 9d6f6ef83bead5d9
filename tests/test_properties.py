"""What every kernel and every fit must satisfy, on architectures and data drawn at random.

Longer than 300 lines, for the strategies that draw networks and data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.kernels.infinite.infinite_ntk import Kind
from ntk_lightning.networks import Erf, NTKConv2d, NTKLinear, Residual
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import gradient_descent, kernel_sgd, ridge
from ntk_lightning.solvers.sgd_steps import _advance_torch, product

CHANNELS, SIDE, SAMPLES = 2, 4, 5
HALF_THE_DIGITS = 1e-7  # of float64: what the arcsine of a correlation that rounding moves from 1 keeps
FLOAT32 = 2e-6  # of the largest entry: a few roundings
Kernel = Callable[..., Tensor]

settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

scales = st.sampled_from([1.0, 2**0.5])
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float32, torch.float64])
infinite_kinds: st.SearchStrategy[Kind] = st.sampled_from(("ntk", "nngp"))


def activations(homogeneous: bool) -> st.SearchStrategy[Callable[[], nn.Module]]:
    """Activations; ``homogeneous`` ones have phi(c x) = c phi(x)."""
    smooth = [] if homogeneous else [nn.GELU, Erf]
    return st.sampled_from([nn.ReLU, lambda: nn.LeakyReLU(0.2), *smooth])


def biases(homogeneous: bool) -> st.SearchStrategy[float]:
    return st.just(0.0) if homogeneous else st.sampled_from([0.0, 0.3])


@st.composite
def networks(draw: st.DrawFn, homogeneous: bool = False, compiled: bool = False, outputs: int = 1) -> nn.Sequential:
    """Networks of every supported layer, with an activation, on images of 2 channels and 4x4 pixels.

    Args:
        draw: Of hypothesis.
        homogeneous: Only ReLU and leaky ReLU and no biases, so that f(c x) = c f(x).
        compiled: Only layers that the compiled backends run.
        outputs: Units of the readout.

    Returns:
        The network.
    """
    width = draw(st.sampled_from([2, 3]))
    bias, activation = biases(homogeneous), activations(homogeneous)

    def conv(channels: int, size: int = 3, padding: str = "same") -> NTKConv2d:
        return NTKConv2d(channels, width, size, padding, draw(scales), draw(bias))  # type: ignore[arg-type]  # a literal

    layers: list[nn.Module] = [conv(CHANNELS)]
    side, active = SIDE, False
    kinds = ["act", "conv", "pool"] + ([] if compiled else ["residual", "valid", "big"])
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
        gaussian = isinstance(layers[-1], NTKConv2d | Residual)
        if kind == "act" and isinstance(layers[-1], NTKConv2d):
            layers.append(draw(activation)())
            active = True
        elif kind == "conv":
            layers.append(conv(width))
        elif kind == "pool" and side % 2 == 0:
            layers.append(nn.AvgPool2d(2))
            side //= 2
        elif kind == "residual" and gaussian:
            layers.append(Residual(nn.Sequential(draw(activation)(), conv(width))))
            active = True
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
    if not active or draw(st.booleans()):
        layers += [NTKLinear(features, width, draw(scales), draw(bias)), draw(activation)()]
        features = width
    return nn.Sequential(*layers, NTKLinear(features, outputs, draw(scales), draw(bias)))


@st.composite
def perceptrons(draw: st.DrawFn, homogeneous: bool = False, outputs: int = 1) -> nn.Sequential:
    """Fully connected networks, with an activation, on the same images as vectors (arguments as above)."""
    width = draw(st.sampled_from([2, 5]))
    bias, activation = biases(homogeneous), activations(homogeneous)

    def linear(features: int, units: int = width) -> NTKLinear:
        return NTKLinear(features, units, draw(scales), draw(bias))

    layers: list[nn.Module] = [nn.Flatten(), linear(CHANNELS * SIDE**2)]
    for kind in draw(st.lists(st.sampled_from(["layer", "residual", "shortcut"]), max_size=3)):
        if kind == "layer":
            layers += [draw(activation)(), linear(width)]
        else:
            body = nn.Sequential(draw(activation)(), linear(width))
            layers.append(Residual(body, linear(width) if kind == "shortcut" else None))
    return nn.Sequential(*layers, draw(activation)(), linear(width, outputs))


@st.composite
def kernels(draw: st.DrawFn, homogeneous: bool = False) -> Kernel:
    """A kernel of any kind of any network that it takes."""
    name = draw(st.sampled_from(["cpu", "reference", "empirical"]))
    if name == "cpu":
        net = draw(networks(homogeneous, compiled=True))
    else:
        outputs = draw(st.sampled_from([1, 3]))
        net = draw(st.one_of(networks(homogeneous, outputs=outputs), perceptrons(homogeneous, outputs=outputs)))
    if name == "empirical":
        return EmpiricalNTK(net)
    return InfiniteNTK(net, draw(infinite_kinds), "cpu" if name == "cpu" else "reference")


def images(seed: int, n: int = SAMPLES) -> Tensor:
    return torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_special(seed: int) -> Tensor:
    """Five images: two of noise, one of zeros, the first again, and its opposite."""
    first, second = images(seed, 2)
    return torch.stack([first, second, torch.zeros_like(first), first, -first])


inputs = st.builds(lambda make, seed: make(seed), st.sampled_from([images, with_special]), seeds)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = HALF_THE_DIGITS) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale + 1e-300, check_dtype=False)


@given(kernels(), inputs, dtypes)
def test_a_gram_is_symmetric_and_positive_semidefinite(kernel: Kernel, x: Tensor, dtype: torch.dtype) -> None:
    gram = kernel(x.to(dtype))
    assert gram.dtype == dtype
    assert torch.equal(gram, gram.T)
    values = torch.linalg.eigvalsh(gram.double())
    assert float(values[0]) >= -(FLOAT32 if dtype == torch.float32 else HALF_THE_DIGITS) * float(values[-1])


@pytest.mark.ci
@given(st.one_of(networks(outputs=3), perceptrons(outputs=2)), inputs)
def test_all_outputs_make_one_positive_semidefinite_kernel(net: nn.Sequential, x: Tensor) -> None:
    full = EmpiricalNTK(net, full=True)(x)
    assert_close(full.diagonal(dim1=2, dim2=3).mean(2), EmpiricalNTK(net)(x), 1e-12)
    assert_close(full[..., 1, 1], EmpiricalNTK(net, output=1)(x), 1e-12)
    matrix = full.transpose(1, 2).flatten(2).flatten(0, 1)
    assert_close(matrix, matrix.T, 1e-12)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values[0]) >= -1e-12 * float(values[-1])


@given(kernels(), inputs, st.permutations(range(SAMPLES)))
def test_the_order_of_the_samples_does_not_matter(kernel: Kernel, x: Tensor, order: list[int]) -> None:
    assert_close(kernel(x[order]), kernel(x)[order][:, order])


@given(kernels(), inputs, st.integers(1, SAMPLES - 1), dtypes)
def test_parts_of_a_gram_are_the_kernels_of_the_parts(kernel: Kernel, x: Tensor, cut: int, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    gram, tolerance = kernel(x), FLOAT32 if dtype == torch.float32 else HALF_THE_DIGITS
    assert_close(kernel(x[:cut], x[cut:]), gram[:cut, cut:], tolerance)
    assert_close(kernel(x[cut:], x[:cut]), gram[cut:, :cut], tolerance)
    assert_close(kernel(x[:cut]), gram[:cut, :cut], tolerance)
    assert_close(kernel.diag(x), gram.diagonal(), tolerance)  # type: ignore[attr-defined]  # every kernel has it


@given(kernels(homogeneous=True), inputs, st.sampled_from([1e-10, 1e-3, 3.0, 1e8]), dtypes)
def test_without_biases_relu_kernels_scale_with_the_square_of_the_images(
    kernel: Kernel, x: Tensor, c: float, dtype: torch.dtype
) -> None:
    x, tolerance = x.to(dtype), FLOAT32 if dtype == torch.float32 else HALF_THE_DIGITS
    assert_close(kernel(c * x), c**2 * kernel(x), tolerance)
    assert_close(kernel(c * x, x), c * kernel(x), tolerance)


@given(networks(compiled=True), infinite_kinds, inputs)
def test_the_compiled_backend_agrees_with_the_reference(net: nn.Sequential, kind: Kind, x: Tensor) -> None:
    compiled, reference = (InfiniteNTK(net, kind, backend) for backend in ("cpu", "reference"))
    assert_close(compiled(x), reference(x))
    assert_close(compiled(x[:2], x[2:]), reference(x[:2], x[2:]))


@given(networks(compiled=True), infinite_kinds, seeds, st.sampled_from([1e-1, 1e-3, 1e-5]))
def test_float32_kernels_of_almost_equal_images_are_exact_to_rounding(
    net: nn.Sequential, kind: Kind, seed: int, distance: float
) -> None:
    x = torch.cat([images(seed, 2), images(seed, 2) + distance * images(seed + 1, 2)]).float()
    kernel = InfiniteNTK(net, kind, "cpu")
    exact = InfiniteNTK(net, kind, "reference")(x.double())
    own = exact.diagonal().sqrt()
    error = (kernel(x).double() - exact).abs() / (own[:, None] * own)
    assert float(error.max()) < 1e-6


@given(kernels(), seeds)
def test_autocast_changes_no_kernel_and_no_fit(kernel: Kernel, seed: int) -> None:
    x = images(seed).float()
    gram, targets = kernel(x), images(seed)[:, 0, 0, 0][None]
    batches, rates = [torch.tensor([0, 3]), torch.tensor([1])], torch.tensor([[0.1, 0.9]], dtype=torch.float64)

    def fit() -> Tensor:
        coefficients, velocity = torch.zeros_like(targets), torch.zeros_like(targets)
        _advance_torch(gram, targets, 2 * batches, coefficients, velocity, rates, 1)
        return torch.cat([coefficients, product(gram, coefficients)])

    expected = kernel(x, x[:2]), kernel.diag(x), fit()  # type: ignore[attr-defined]  # every kernel has it
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kernel(x, x[:2]), kernel.diag(x), fit()  # type: ignore[attr-defined]
    assert all(map(torch.equal, found, expected))


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
