"""Estimates from products against exact measures of explicit Grams, and standard errors against many seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK, diagnostics, stochastic
from ntk_lightning.kernels.lanczos import entropy_quadratures, lanczos
from ntk_lightning.kernels.stochastic import Estimate

N, SEEDS = 120, 150
D = torch.float64


def gram(seed: int, power: float, n: int = N) -> Tensor:
    """A kernel with eigenvalues i^-power and random eigenvectors."""
    vectors = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=D)).Q
    return (vectors * torch.arange(1, n + 1, dtype=D) ** -power) @ vectors.T


def labels(n: int = N) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(9), dtype=D).sign()


def product(kernel: Tensor) -> Callable[[Tensor], Tensor]:
    return partial(torch.matmul, kernel)


def measures(kernel: Tensor, other: Tensor, y: Tensor) -> dict[str, tuple[Callable[..., Estimate], float]]:
    """For each measure its estimate, a function of a seed, and its exact value."""
    k, n, double = product(kernel), len(kernel), kernel.double()
    return {
        "trace": (partial(stochastic.trace, k, n), float(double.trace())),
        "norm": (partial(stochastic.frobenius_norm, k, n), float(double.norm())),
        "target alignment": (
            partial(stochastic.kernel_target_alignment, k, y),
            diagnostics.kernel_target_alignment(kernel, y),
        ),
        "centered alignment": (
            partial(stochastic.centered_kernel_alignment, k, product(other), n),
            diagnostics.centered_kernel_alignment(kernel, other),
        ),
        "effective rank": (partial(stochastic.effective_rank, k, n), diagnostics.effective_rank(kernel)),
    }


MEASURES = list(measures(torch.eye(2), torch.eye(2), torch.ones(2)))


@pytest.mark.parametrize("power", [0.5, 1.2])
@pytest.mark.parametrize("measure", MEASURES)
def test_estimates_scatter_around_the_truth_as_their_standard_errors_say(measure: str, power: float) -> None:
    kernel = gram(0, power)
    estimate, exact = measures(kernel, kernel + 0.3 * gram(1, power), labels())[measure]
    found = [estimate(seed=seed, dtype=D) for seed in range(SEEDS)]
    degrees = found[0].probes - 1
    z = torch.tensor([(e.value - exact) / e.standard_error for e in found], dtype=D)
    assert abs(float(z.mean())) < 4 / math.sqrt(SEEDS)
    assert 0.75 < float(z.std()) / math.sqrt(degrees / (degrees - 2)) < 1.25  # a t distribution's
    covered = float((z.abs() < stats.t.ppf(0.95, degrees)).double().mean())
    assert abs(covered - 0.9) < 4 * math.sqrt(0.9 * 0.1 / SEEDS)


@pytest.mark.parametrize("measure", MEASURES)
def test_more_products_lower_the_standard_error(measure: str) -> None:
    kernel = gram(0, 1.0)
    estimate, exact = measures(kernel, gram(1, 1.0) + kernel, labels())[measure]
    few = 246 if measure == "effective rank" else 24

    def spread(products: int) -> float:
        errors = [estimate(products=products, seed=seed, dtype=D).value - exact for seed in range(20)]
        return float(torch.tensor(errors).square().mean().sqrt())

    assert spread(4 * few) < 0.6 * spread(few)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("measure", MEASURES)
def test_low_ranks_are_exact_to_rounding(measure: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    features, others = (torch.randn(N, 4, generator=generator, dtype=D) for _ in range(2))
    kernel, other = ((f @ f.T).to(dtype) for f in (features, others))
    estimate, exact = measures(kernel, other, labels().to(dtype))[measure]
    rounding = 1e-4 if dtype == torch.float32 else 1e-10
    found = estimate(dtype=dtype)
    assert found.value == pytest.approx(exact, rel=rounding)
    assert found.standard_error < rounding * found.value


@pytest.mark.parametrize("measure", MEASURES)
def test_float32_products_change_an_estimate_by_rounding(measure: str) -> None:
    kernel, other, y = gram(0, 1.2), gram(1, 1.2), labels()
    double = measures(kernel, other, y)[measure][0](dtype=D)
    single = measures(kernel.float(), other.float(), y.float())[measure][0]()
    assert single.value == pytest.approx(double.value, rel=1e-4)
    assert single.standard_error == pytest.approx(double.standard_error, rel=1e-2)


def test_as_many_products_as_points_are_exact() -> None:
    kernel, other, y = gram(0, 0.5, 12), gram(1, 0.5, 12), labels(12)
    for name, (estimate, exact) in measures(kernel, other, y).items():
        found = estimate(dtype=D, products=492 if name == "effective rank" else 48)
        assert found.value == pytest.approx(exact, rel=1e-9)
        assert found.standard_error < 1e-9


def test_hutch_plus_plus_is_better_than_the_mean_of_as_many_random_signs() -> None:
    kernel, generator = gram(0, 2.0), torch.Generator().manual_seed(0)
    exact = float(kernel.trace())
    plain = []
    for _ in range(40):
        signs = torch.randint(2, (N, 30), generator=generator) * 2.0 - 1
        plain.append(float((signs * (kernel.float() @ signs)).sum(0).mean()) - exact)
    ours = [stochastic.trace(product(kernel), N, 30, seed=seed, dtype=D).value - exact for seed in range(40)]
    assert torch.tensor(ours).square().mean().sqrt() < 0.1 * torch.tensor(plain).square().mean().sqrt()


def test_alignment_with_itself_has_no_error_and_several_outputs_count() -> None:
    kernel = gram(0, 0.5)
    same = stochastic.centered_kernel_alignment(product(kernel), product(3 * kernel), N, dtype=D)
    assert same.value == pytest.approx(1, rel=1e-12)
    assert same.standard_error < 1e-12
    one_hot = nn.functional.one_hot(torch.arange(N) % 3).double()
    found = stochastic.kernel_target_alignment(product(kernel), one_hot, 240, dtype=D)
    exact = diagnostics.kernel_target_alignment(kernel, one_hot)
    assert abs(found.value - exact) < 4 * found.standard_error < 0.1 * exact


@pytest.mark.parametrize("power", [0.5, 2.0, 6.0])
def test_quadratures_are_on_both_sides_of_the_truth(power: float) -> None:
    kernel = gram(0, power)
    values, vectors = torch.linalg.eigh(kernel)
    start = torch.randn(N, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    exact = -((vectors.T @ start).square() * torch.special.entr(values.clamp_min(0))[:, None]).sum(0)
    widths = []
    for steps in (2, 4, 8, 16):
        squares, tridiagonal = lanczos(product(kernel), start, steps, eps=2e-16)
        low, high = (squares * bound for bound in entropy_quadratures(tridiagonal))
        assert (low <= exact + 1e-10).all()
        assert (high >= exact - 1e-10).all()
        widths.append(float((high - low).max()))
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 10


def test_few_steps_widen_the_standard_error_of_the_effective_rank() -> None:
    kernel = gram(0, 2.0)
    exact = diagnostics.effective_rank(kernel)
    found = [stochastic.effective_rank(product(kernel), N, 200, steps=2, seed=seed, dtype=D) for seed in range(20)]
    assert all(abs(estimate.value - exact) < 3 * estimate.standard_error for estimate in found)


def test_of_the_empirical_kernel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(40, 5), torch.randn(40).sign()
    kernel, later = EmpiricalNTK(net), EmpiricalNTK(nn.Sequential(net[0], nn.ReLU(), net[2]))
    k, later_k = partial(kernel.matvec, x), partial(later.matvec, x)
    gram, later_gram = kernel(x), later(x)
    checked = {
        "trace": (stochastic.trace(k, 40), float(gram.trace())),
        "norm": (stochastic.frobenius_norm(k, 40), float(gram.norm())),
        "rank": (stochastic.effective_rank(k, 40, 168, steps=10), diagnostics.effective_rank(gram)),
        "targets": (stochastic.kernel_target_alignment(k, y), diagnostics.kernel_target_alignment(gram, y)),
        "cka": (
            stochastic.centered_kernel_alignment(k, later_k, 40),
            diagnostics.centered_kernel_alignment(gram, later_gram),
        ),
    }
    for estimate, exact in checked.values():
        assert abs(estimate.value - exact) < 4 * estimate.standard_error + 1e-5 * abs(exact)


def test_a_seed_is_all_the_randomness() -> None:
    kernel = product(gram(0, 0.5))
    before = torch.get_rng_state()
    first, again, other = (stochastic.trace(kernel, N, seed=seed, dtype=D) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    assert first != other


def test_zero_kernels() -> None:
    zero = product(torch.zeros(10, 10))
    assert stochastic.trace(zero, 10) == Estimate(0, 0, 20)
    assert stochastic.frobenius_norm(zero, 10) == Estimate(0, 0, 20)
    assert math.isnan(stochastic.effective_rank(zero, 10).value)
    assert math.isnan(stochastic.kernel_target_alignment(zero, torch.ones(10)).value)
    assert math.isnan(stochastic.centered_kernel_alignment(zero, zero, 10).value)


def test_errors_say_what_to_do() -> None:
    kernel = product(torch.eye(4))
    with pytest.raises(ValueError, match="products must be a whole number of at least 6"):
        stochastic.trace(kernel, 4, 5)
    with pytest.raises(ValueError, match="at least 42"):
        stochastic.effective_rank(kernel, 4, 41, steps=10)
    with pytest.raises(ValueError, match="steps must be"):
        stochastic.effective_rank(kernel, 4, steps=1)
    with pytest.raises(ValueError, match="n must be"):
        stochastic.trace(kernel, 0)
    with pytest.raises(ValueError, match=r"must return \(4, 20\)"):
        stochastic.trace(lambda v: v[:2], 4)
    with pytest.raises(ValueError, match="diverged"):
        stochastic.frobenius_norm(lambda v: v / 0, 4)
    with pytest.raises(ValueError, match="targets must be finite"):
        stochastic.kernel_target_alignment(kernel, torch.full((4,), math.nan))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    kernel, y = gram(0, 1.2).cuda(), labels().cuda()
    on_gpu = stochastic.kernel_target_alignment(product(kernel), y, dtype=D)
    assert on_gpu.value == pytest.approx(
        stochastic.kernel_target_alignment(product(kernel.cpu()), y.cpu(), dtype=D).value
    )
    found = stochastic.trace(product(kernel), N, dtype=D, device="cuda")
    assert found.value == pytest.approx(stochastic.trace(product(kernel.cpu()), N, dtype=D).value)
