"""Gaussian predictions against neural-tangents, closed forms in weight space, and an ensemble of trained networks.

Longer than 300 lines, since the three share their problems and tolerances.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.func import functional_call, stack_module_state, vmap

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MLP, Erf
from ntk_lightning.solvers import (
    GaussianPrediction,
    KernelBlocks,
    log_marginal_likelihood,
    nngp_posterior,
    ntk_ensemble,
    ridge,
)

PROBLEMS = ("mlp_relu_1", "mlp_erf_3", "conv_relu_3")


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    path = Path(__file__).parent / "data" / "predictions_reference.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays if arrays[name].dtype.kind in "fb"}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_equals_neural_tangents(name: str, reference: dict[str, Tensor]) -> None:
    problem = {key.split("/")[1]: value for key, value in reference.items() if key.startswith(f"{name}/")}
    targets, largest = problem["targets"], 0.0
    blocks = {
        kind: KernelBlocks(*(problem[f"{kind}_{part}"] for part in ("train", "test_train", "test")))
        for kind in ("nngp", "ntk")
    }
    for index, time in enumerate(problem["times"].tolist()):
        elapsed = float(problem["learning_rate"]) * time / targets.numel()
        for kind in blocks:
            amount = float(problem["diag_reg"])
            if not problem["diag_reg_absolute_scale"]:
                amount *= float(blocks[kind].train.diagonal().mean())

            def predict(
                labels: Tensor, kind: str = kind, amount: float = amount, elapsed: float = elapsed
            ) -> GaussianPrediction:
                if kind == "nngp":
                    return nngp_posterior(blocks[kind], labels, amount, time=elapsed)
                reg = amount / len(targets)
                return ntk_ensemble(blocks["nngp"], blocks[kind], labels, elapsed, regularization=reg)

            found, from_f0 = predict(targets), predict(targets - problem["f0_train"])
            for value, key in (
                (found.mean, f"{kind}_mean"),
                (found.covariance, f"{kind}_covariance"),
                (found.mean, f"gd_{kind}_mean"),
                (problem["f0_test"] + from_f0.mean, f"gd_{kind}_mean_from_f0"),
            ):
                largest = max(largest, relative(value, problem[key][index]))
    print(f"{name}: largest relative difference from neural-tangents {largest:.1e}")
    assert largest < 1e-10


def features(*counts: int, size: int = 12, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, size, generator=generator, dtype=torch.float64) / size**0.5 for count in counts]


def blocks_of(x: Tensor, x_test: Tensor) -> KernelBlocks:
    return KernelBlocks(x @ x.T, x_test @ x.T, x_test @ x_test.T)


def rbf(x: Tensor, x_test: Tensor, scale: float = 1.0) -> KernelBlocks:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(a, b).square() / (2 * scale**2))

    return KernelBlocks(kernel(x, x), kernel(x_test, x), kernel(x_test, x_test))


@pytest.mark.parametrize("time", [0.0, 0.3, 20.0, 1e3])
@pytest.mark.parametrize("amount", [0.0, 0.2])
def test_is_the_flow_of_the_weights(time: float, amount: float) -> None:
    """f = phi w + psi u, w and u from N(0, 1): flow on w alone (NNGP: u has no features) and on all of them."""
    (phi, phi_test), (psi, psi_test) = features(6, 4), features(6, 4, seed=1)
    y = torch.randn(6, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    generator = torch.cat([-phi.T @ phi - amount * torch.eye(12, dtype=torch.float64), phi.T], 1)
    generator = torch.cat([generator, torch.zeros(6, 18, dtype=torch.float64)])  # d/dt (w - w_0, c) = G (w - w_0, c)
    reached = torch.linalg.matrix_exp(time * generator)[:12, 12:]  # w_t - w_0 of a residual c = y - f_0 at the start
    weights = phi_test @ reached  # predictions move by weights @ (y + label noise - f_0)

    start, start_test = torch.cat([phi, psi], 1), torch.cat([phi_test, psi_test], 1)
    spread = start_test - weights @ start
    prior = blocks_of(start, start_test)
    found = ntk_ensemble(prior, blocks_of(phi, phi_test), y, time, regularization=amount / 6)
    torch.testing.assert_close(found.mean, weights @ y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.covariance, spread @ spread.T, rtol=1e-9, atol=1e-11)

    readout = nngp_posterior(blocks_of(phi, phi_test), y, amount, time=time)
    moved = phi_test - weights @ phi
    torch.testing.assert_close(readout.mean, weights @ y, rtol=1e-9, atol=1e-11)
    expected = moved @ moved.T + amount * weights @ weights.T
    torch.testing.assert_close(readout.covariance, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_posterior_is_the_conditional_distribution(noise: float) -> None:
    x, x_test = features(7, 4, size=3)
    blocks, y = rbf(x, x_test), x[:, 0].sin()
    precision = torch.linalg.inv(
        torch.cat(
            [
                torch.cat([blocks.train + noise * torch.eye(7, dtype=torch.float64), blocks.test_train.T], 1),
                torch.cat([blocks.test_train, blocks.test], 1),
            ]
        )
    )
    covariance = torch.linalg.inv(precision[7:, 7:])
    posterior = nngp_posterior(blocks, y, noise)
    torch.testing.assert_close(posterior.covariance, covariance, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(posterior.mean, -covariance @ precision[7:, :7] @ y, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(posterior.standard_deviation, covariance.diagonal().sqrt(), rtol=1e-6, atol=1e-8)


def test_mean_at_the_end_is_ridge_regression() -> None:
    x, x_test = features(7, 4)
    blocks, y = rbf(x, x_test), torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0])
    expected = ridge(blocks.train, y, 0.01).predict(blocks.test_train)
    torch.testing.assert_close(ntk_ensemble(blocks, blocks, y, regularization=0.01).mean, expected)


def test_at_time_zero_it_is_the_prior() -> None:
    x, x_test = features(5, 3)
    nngp, ntk, y = rbf(x, x_test), blocks_of(x, x_test), torch.ones(5)
    for prediction in (nngp_posterior(nngp, y, 0.1, time=0), ntk_ensemble(nngp, ntk, y, 0)):
        assert torch.equal(prediction.mean, torch.zeros(3, dtype=torch.float64))
        assert torch.equal(prediction.covariance, nngp.test)


def test_repeated_samples_and_linear_kernels_have_their_limit() -> None:
    x, x_test = features(9, 4, size=3)  # 9 samples in 3 dimensions
    blocks, y = blocks_of(x, x_test), torch.randn(9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    least_squares = x_test @ torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    for time in (math.inf, 1e30, 1e6):
        for prediction in (nngp_posterior(blocks, y, time=time), ntk_ensemble(blocks, blocks, y, time)):
            torch.testing.assert_close(prediction.mean, least_squares, rtol=0, atol=1e-12)
            assert prediction.covariance.abs().max() < 1e-12

    x, x_test = features(6, 4)
    twice, y = torch.cat([x, x]), torch.randn(12, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    once = nngp_posterior(rbf(x, x_test), (y[:6] + y[6:]) / 2)
    again = nngp_posterior(rbf(twice, x_test), y)
    torch.testing.assert_close(again.mean, once.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(again.covariance, once.covariance, rtol=0, atol=1e-10)


def test_what_rounding_hides_is_refused_and_noise_brings_it_back() -> None:
    x, x_test = torch.linspace(0, 1, 30, dtype=torch.float64)[:, None], torch.tensor([[1.5]], dtype=torch.float64)
    blocks, y = rbf(x, x_test), x[:, 0].sin()
    for predict in (nngp_posterior, lambda *arguments: ntk_ensemble(blocks, *arguments)):
        with pytest.raises(ValueError, match=r"condition number is \d\.\de\+1\d or more"):
            predict(blocks, y)
    assert float(nngp_posterior(blocks, y, 1e-8).mean) == pytest.approx(math.sin(1.5), abs=5e-3)
    early = ntk_ensemble(blocks, blocks, y, 100.0)  # the hidden eigenvalues do not matter yet
    generator = torch.zeros(60, 60, dtype=torch.float64)
    generator[:30, :30], generator[:30, 30:] = -blocks.train, torch.eye(30, dtype=torch.float64)
    integral = torch.linalg.matrix_exp(100 * generator)[:30, 30:]  # of exp(-s K) over s from 0 to 100
    torch.testing.assert_close(early.mean, blocks.test_train @ integral @ y, rtol=1e-9, atol=0)


def test_covariances_are_symmetric_and_positive_semidefinite() -> None:
    x, x_test = features(20, 15, size=4)
    nngp, ntk, y = rbf(x, x_test), rbf(x, x_test, 2.0), torch.ones(20)
    for time in (0.5, 50.0, math.inf):
        for prediction in (nngp_posterior(nngp, y, time=time), ntk_ensemble(nngp, ntk, y, time)):
            assert torch.equal(prediction.covariance, prediction.covariance.T)
            assert torch.linalg.eigvalsh(prediction.covariance)[0] > -1e-9


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_kernels_are_computed_in_float64(autocast: bool) -> None:
    x, x_test = features(10, 4)
    exact = [rbf(x, x_test), rbf(x, x_test, 2.0)]
    single = [KernelBlocks(*(block.float() for block in vars(blocks).values())) for blocks in exact]
    same = [KernelBlocks(*(block.double() for block in vars(blocks).values())) for blocks in single]
    y = torch.ones(10, dtype=torch.int64)
    with torch.autocast("cpu", enabled=autocast):
        found = [nngp_posterior(single[0], y, 0.01), ntk_ensemble(*single, y, 3.0)]
        likelihood = log_marginal_likelihood(single[0].train, y, 0.01)
    expected = [nngp_posterior(same[0], y, 0.01), ntk_ensemble(*same, y, 3.0)]
    assert likelihood == log_marginal_likelihood(same[0].train, y, 0.01)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.mean, other.mean.float())
        assert torch.equal(one.covariance, other.covariance.float())


def test_outputs_are_independent() -> None:
    x, x_test = features(6, 4)
    nngp, ntk, y = rbf(x, x_test), rbf(x, x_test, 2.0), torch.eye(6, 3)
    for predict in (
        lambda labels: nngp_posterior(nngp, labels, 0.1),
        lambda labels: ntk_ensemble(nngp, ntk, labels, 2.0),
    ):
        together = predict(y)
        assert together.mean.shape == (4, 3)
        assert predict(y[:, :1]).mean.shape == (4, 1)
        for output in range(3):
            alone = predict(y[:, output])
            torch.testing.assert_close(alone.mean, together.mean[:, output])
            assert torch.equal(alone.covariance, together.covariance)


def test_log_marginal_likelihood_is_the_density() -> None:
    x, _ = features(7, 1)
    gram, y = rbf(x, x).train, torch.randn(7, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for noise in (0.0, 0.3):
        density = MultivariateNormal(
            torch.zeros(7, dtype=torch.float64), gram + noise * torch.eye(7, dtype=torch.float64)
        )
        assert log_marginal_likelihood(gram, y, noise) == pytest.approx(float(density.log_prob(y.T).sum()), rel=1e-9)
        assert log_marginal_likelihood(gram, y[:, 0], noise) == pytest.approx(float(density.log_prob(y[:, 0])))
    with pytest.raises(ValueError, match="singular to rounding"):
        log_marginal_likelihood(torch.ones(3, 3), torch.ones(3))


def departures(functions: Tensor, prediction: GaussianPrediction) -> dict[str, float]:
    """How far samples (s, m) are from a Gaussian: each entry is a distance in its own standard errors, at most."""
    count, size = functions.shape
    covariance, deviation = prediction.covariance, prediction.standard_deviation
    offset = functions.mean(0) - prediction.mean
    distance = float(count * offset @ torch.linalg.solve(covariance, offset))  # chi^2 with `size` degrees of freedom
    variances = covariance.diagonal()[:, None] * covariance.diagonal() + covariance.square()
    found = {
        "mean": float(stats.norm.isf(stats.chi2.sf(distance, size) / 2)),
        "covariance": float(((functions.T.cov() - covariance) / (variances / (count - 1)).sqrt()).abs().max()),
    }
    for level in (0.5, 0.8, 0.95):  # per test point: binomial
        inside = (functions - prediction.mean).abs() <= stats.norm.isf((1 - level) / 2) * deviation
        errors = (inside.double().mean(0) - level) / (level * (1 - level) / count) ** 0.5
        found[f"coverage {level}"] = float(errors.abs().max())
    return found


@pytest.mark.parametrize(
    ("depth", "width"),
    [pytest.param(1, 1024, marks=pytest.mark.slow), pytest.param(2, 256, marks=[pytest.mark.slow, pytest.mark.ci])],
)
def test_ensemble_of_trained_networks_has_the_predicted_mean_covariance_and_bands(depth: int, width: int) -> None:
    torch.manual_seed(100)
    x, x_test = torch.randn(6, 3).double(), torch.randn(5, 3).double()
    y = 0.7 * x[:, 0].sign()
    nets = [MLP(width, depth, 3, Erf, weight_std=1.5, bias_std=0.3).double() for _ in range(200)]
    blocks = {}
    for kind in ("nngp", "ntk"):
        kernel = InfiniteNTK(nets[0], kind)  # type: ignore[arg-type]  # one of its two
        blocks[kind] = KernelBlocks(kernel(x), kernel(x_test, x), kernel(x_test))
    weights, _ = stack_module_state(nets)  # type: ignore[arg-type]  # a list of one class
    outputs = vmap(lambda one, inputs: functional_call(nets[0], one, (inputs,))[:, 0], (0, None))
    lr = 0.5 / float(torch.linalg.eigvalsh(blocks["ntk"].train)[-1])
    sgd = torch.optim.SGD(weights.values(), lr)
    predictions = {step: ntk_ensemble(blocks["nngp"], blocks["ntk"], y, lr * step) for step in (0, 10, 100)}
    for step in range(101):
        if step in predictions:
            functions = outputs(weights, x_test).detach()
            found = departures(functions, predictions[step])
            print(f"depth {depth}, width {width}, step {step}, in standard errors: {found}")
            assert max(found.values()) < 4
            for other in predictions.keys() - {step}:  # so many networks can tell one time from another
                assert max(departures(functions, predictions[other]).values()) > 5
        sgd.zero_grad()
        (outputs(weights, x) - y).square().sum().div(2).backward()
        sgd.step()


GRAM, ROWS, TEST, Y = torch.eye(3), torch.ones(2, 3), torch.eye(2), torch.ones(3)
GOOD = KernelBlocks(GRAM, ROWS, TEST)
NAN = torch.tensor([1.0, math.nan, 0.0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: KernelBlocks(GRAM.numpy(), ROWS, TEST), TypeError, "train must be a tensor"),  # type: ignore[arg-type]
        (lambda: KernelBlocks(GRAM.half(), ROWS, TEST), TypeError, "float16: call"),
        (lambda: KernelBlocks(ROWS, ROWS, TEST), ValueError, "train must be a square matrix"),
        (lambda: KernelBlocks(GRAM, ROWS.T, TEST), ValueError, "transpose it"),
        (lambda: KernelBlocks(GRAM, ROWS, GRAM), ValueError, r"must be \(m, n\) = \(3, 3\)"),
        (lambda: KernelBlocks(GRAM, ROWS[:0], TEST[:0, :0]), ValueError, "with entries"),
        (lambda: KernelBlocks(GRAM.double(), ROWS, TEST), ValueError, "differ in dtype"),
        (lambda: KernelBlocks(GRAM, ROWS * math.inf, TEST), ValueError, "test_train has a NaN or infinite"),
        (lambda: KernelBlocks(GRAM + torch.ones(3, 3).triu(), ROWS, TEST), ValueError, "train is not symmetric"),
        (lambda: nngp_posterior(KernelBlocks(-GRAM, ROWS, TEST), Y), ValueError, "not positive semidefinite"),
        (lambda: nngp_posterior(GOOD, [1.0] * 3), TypeError, "targets must be a tensor"),  # type: ignore[arg-type]
        (lambda: nngp_posterior(GOOD, Y[:2]), ValueError, r"targets must be real, \(3,\)"),
        (lambda: nngp_posterior(GOOD, torch.ones(3, 0)), ValueError, r"shape \(3, 0\)"),
        (lambda: nngp_posterior(GOOD, NAN), ValueError, "without a label"),
        (lambda: nngp_posterior(GOOD, Y, -1), ValueError, "noise must be at least 0 and finite, got -1"),
        (lambda: nngp_posterior(GOOD, Y, math.inf), ValueError, "noise must be at least 0 and finite"),
        (lambda: nngp_posterior(GOOD, Y, "1"), TypeError, "noise must be a number"),  # type: ignore[arg-type]
        (lambda: ntk_ensemble(GOOD, GOOD, Y, -1), ValueError, "time must be at least 0, got -1"),
        (lambda: ntk_ensemble(GOOD, GOOD, Y, math.nan), ValueError, "time must be at least 0, got nan"),
        (lambda: ntk_ensemble(GOOD, GOOD, Y, regularization=-1), ValueError, "regularization must be at least 0"),
        (
            lambda: ntk_ensemble(GOOD, KernelBlocks(TEST, TEST, TEST), Y),
            ValueError,
            "same samples, but differ in shape",
        ),
        (lambda: log_marginal_likelihood(ROWS, Y), ValueError, "nngp must be a square matrix"),
    ],
)
def test_bad_arguments_say_what_to_do(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
