"""Kinds of faults that users of other kernel libraries reported, looked for in solvers, spectrum and scaling laws.

Longer than 300 lines, since each kind comes with every relative that was looked for.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk_lightning.kernels import diagnostics
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.scaling import compare_exponents, fit_power_law
from ntk_lightning.scaling.log_log import curvature_p_value
from ntk_lightning.solvers import KernelFit, gradient_descent, gradient_flow, kernel_sgd, kernel_sgd_grid, ridge
from ntk_lightning.spectrum import critical_learning_rate, largest_eigenvalue

N, M = 24, 10
X = torch.linspace(-3, 3, N + M, dtype=torch.float64)[torch.randperm(N + M, generator=torch.Generator().manual_seed(0))]
ALL = torch.exp(-((X[:, None] - X[None]) ** 2)) + torch.eye(N + M, dtype=torch.float64)
GRAM, CROSS, VAL = ALL[:N, :N], ALL[N:, :N], ALL[:6, :N]
SINE, SIGNS = X.sin(), X.sin().sign()
CONFIG = OptimizerConfig(lr=0.5, momentum=0.5, batch_size=7, epochs=4)
FULL = OptimizerConfig(lr=0.5, momentum=0.5, full_batch=True, epochs=6)
SIZES = np.array([125, 250, 500, 1000, 2000, 4000])


# Kind: real-valued targets of one output


def loop(targets: Tensor, optimizer: OptimizerConfig) -> list[Tensor]:
    """Coefficients after every epoch of explicit SGD, one entry of the batch at a time."""
    a, v, out = torch.zeros_like(targets), torch.zeros_like(targets), []
    for epoch in range(optimizer.epochs):
        for batch in optimizer.batches(N, epoch):
            g = torch.zeros_like(targets)
            for i in batch.tolist():
                g[i] = 2 / len(batch) * (GRAM[i] @ a - targets[i])
            v = optimizer.momentum * v + g
            a = a - optimizer.lr * v
        out.append(a)
    return out


@pytest.mark.parametrize("columns", [False, True])
def test_real_targets_are_fitted_by_sgd_and_have_losses_only(columns: bool) -> None:
    y = SINE[:, None] if columns else SINE
    expected = loop(SINE[:N], CONFIG)
    losses = torch.stack([(CROSS @ a - SINE[N:]).square().mean() for a in expected])
    sets = {"test": (CROSS, y[N:]), "val": (VAL, y[:6])}
    fits = [
        kernel_sgd(GRAM, y[:N], CONFIG, **sets, evaluate_train=True),
        kernel_sgd_grid(GRAM, y[None, :N], [CONFIG], test=(CROSS, y[None, N:]), val=(VAL, y[None, :6]))[N, CONFIG, 0],
    ]
    for fit in fits:
        assert fit.coefficients.shape == y[:N].shape
        torch.testing.assert_close(fit.coefficients.flatten(), expected[-1], rtol=0, atol=1e-13)
        torch.testing.assert_close(fit.curves["test"].losses, losses, rtol=0, atol=1e-13)
        assert all(curve.errors is None for curve in fit.curves.values())
        check_summaries(fit, losses)


def check_summaries(fit: KernelFit, losses: Tensor) -> None:
    """A fit of real targets is summarized by its losses, and says so where it is asked for errors."""
    val = fit.curves["val"].losses
    assert fit.optimal_step == fit.steps[losses.argmin()]
    summary = [fit.optimal_loss, fit.last_loss, fit.validated_loss]
    expected = torch.stack([losses.min(), losses[-1], losses[val.argmin()]])
    torch.testing.assert_close(torch.tensor(summary, dtype=torch.float64), expected, rtol=0, atol=1e-13)
    for name in ("optimal_error", "last_error", "validated_error"):
        with pytest.raises(ValueError, match="Real targets have no error rate: ask for optimal_loss"):
            getattr(fit, name)


def test_real_targets_are_fitted_in_closed_form() -> None:
    sets = {"test": (CROSS, SINE[N:]), "val": (VAL, SINE[:6])}
    expected = loop(SINE[:N], FULL)
    fit = gradient_descent(GRAM, SINE[:N], FULL, range(1, 7), **sets)
    losses = torch.stack([(CROSS @ a - SINE[N:]).square().mean() for a in expected])
    torch.testing.assert_close(fit.curves["test"].losses, losses, rtol=0, atol=1e-12)
    check_summaries(fit, losses)
    flow = gradient_flow(GRAM, SINE[:N], [3.0], **sets)
    reached = SINE[:N] - torch.matrix_exp(-2 * 3.0 / N * GRAM) @ SINE[:N]
    torch.testing.assert_close(flow.coefficients, torch.linalg.solve(GRAM, reached), rtol=0, atol=1e-12)
    assert flow.curves["test"].errors is None
    assert flow.curves["train"].losses[0] == pytest.approx(float((reached - SINE[:N]).square().mean()), rel=1e-9)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("operator", [GRAM, lambda v: GRAM @ v])
def test_real_targets_are_fitted_by_ridge(operator: Tensor | Callable[[Tensor], Tensor], columns: bool) -> None:
    y = SINE[:, None] if columns else SINE
    fit = ridge(operator, y[:N], 1e-3, test=(CROSS, y[N:]), val=(VAL, y[:6]))
    expected = torch.linalg.solve(GRAM + N * 1e-3 * torch.eye(N, dtype=torch.float64), SINE[:N])
    assert fit.coefficients.shape == y[:N].shape
    torch.testing.assert_close(fit.coefficients.flatten(), expected, rtol=0, atol=1e-8)
    assert fit.test_error is None
    assert fit.test_loss == pytest.approx(float((CROSS @ expected - SINE[N:]).square().mean()), rel=1e-6)
    assert fit.curves["val"].losses.tolist() == pytest.approx([float((VAL @ expected - SINE[:6]).square().mean())])


SOLVE = {
    "kernel_sgd": lambda y, test: kernel_sgd(GRAM, y, CONFIG, test=test),
    "kernel_sgd_grid": lambda y, test: kernel_sgd_grid(GRAM, y[None], [CONFIG], test=(test[0], test[1][None])),
    "gradient_descent": lambda y, test: gradient_descent(GRAM, y, CONFIG, test=test),
    "gradient_flow": lambda y, test: gradient_flow(GRAM, y, [1.0], test=test),
    "ridge": lambda y, test: ridge(GRAM, y, 0.1, test=test),
}
CLASSES = torch.arange(N + M) % 2


@pytest.mark.parametrize("solve", SOLVE.values(), ids=SOLVE)
@pytest.mark.parametrize(
    "labels",
    [
        CLASSES,
        CLASSES.bool(),
        CLASSES.to(torch.uint8),
        CLASSES.float(),
        CLASSES.double()[:, None],
        torch.arange(N + M) % 10,
        (torch.arange(N + M) % 10).float(),
        (5 + 2 * CLASSES).float(),
        0 * SINE,
    ],
    ids=["0 1", "bool", "uint8", "0. 1.", "0. 1. in a column", "0 to 9", "0. to 9.", "5. 7.", "zeros"],
)
def test_class_numbers_are_never_taken_for_real_targets(solve: Callable[..., object], labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"targets must be -1 or \+1.*2 \* y - 1.*one_hot.*subtract their mean"):
        solve(labels[:N], (CROSS, labels[N:]))


@pytest.mark.parametrize("solve", SOLVE.values(), ids=SOLVE)
def test_complex_targets_do_not_lose_their_imaginary_part(solve: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match=r"targets must be real, got torch\.complex128"):
        solve(SINE[:N] + 1j, (CROSS, SINE[N:] + 1j))
    with pytest.raises(TypeError, match=r"The targets of test must be real"):
        solve(SINE[:N], (CROSS, SINE[N:] + 1j))


@pytest.mark.parametrize("solve", SOLVE.values(), ids=SOLVE)
def test_training_and_test_targets_are_of_one_kind(solve: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"the targets of test differ in kind, labels -1 and \+1 and real numbers"):
        solve(SIGNS[:N], (CROSS, SINE[N:]))
    with pytest.raises(ValueError, match="the targets of test differ in kind, real numbers and integers"):
        solve(SINE[:N], (CROSS, SIGNS[N:].long()))
    with pytest.raises(ValueError, match=r"The targets of test must be -1 or \+1, got \[0\.0, 1\.0\]"):
        solve(SIGNS[:N], (CROSS, CLASSES[N:].double()))
    solve(SINE[:N], (CROSS, SIGNS[N:]))  # a few real targets may be whole by chance: they have a loss
    solve(SIGNS[:N].long(), (CROSS, SIGNS[N:]))  # labels in any dtype


def test_real_and_class_label_vectors_of_one_grid_keep_their_kinds() -> None:
    both = torch.stack((SIGNS, SINE))
    fits = kernel_sgd_grid(GRAM, both[:, :N], [CONFIG], test=(CROSS, both[:, N:]))
    for i, vector in enumerate(both):
        single = kernel_sgd(GRAM, vector[:N], CONFIG, test=(CROSS, vector[N:]))
        ours, theirs = fits[N, CONFIG, i].curves["test"], single.curves["test"]
        assert (ours.errors is None) == (theirs.errors is None) == (i == 1)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=0, atol=1e-13)


# Kind: what a training run has set (autocast, default dtype, inference mode) changes a result


def everything(dtype: torch.dtype) -> list[Tensor]:
    """One value of every public function of solvers, spectrum and diagnostics."""
    gram, cross, y = GRAM.to(dtype), CROSS.to(dtype), SIGNS[:N]
    test = cross, SIGNS[N:]

    def multiply(v: Tensor) -> Tensor:
        return gram @ v.to(dtype)

    fits = [
        kernel_sgd(gram, y, CONFIG, test=test, evaluate_train=True),
        kernel_sgd_grid(gram, y, [CONFIG], test=test)[N, CONFIG, 0],
        gradient_descent(gram, y, CONFIG, test=test),
        gradient_flow(gram, y, [1.0, 2.0], test=test),
        ridge(gram, y, 0.1, test=test),
        ridge(gram, y, 0.1, test=test, method="cg", rank=5),
        ridge(multiply, y, 0.1, test=test, rank=5),
    ]
    values = [tensor for fit in fits for tensor in (fit.coefficients, fit.predict(cross), *fit.curves["test"])]
    numbers = [
        largest_eigenvalue(gram),
        largest_eigenvalue(multiply, N),
        critical_learning_rate(gram, momentum=0.9),
        critical_learning_rate(multiply, N),
        diagnostics.centered_kernel_alignment(gram, gram.square()),
        diagnostics.kernel_target_alignment(gram, y),
        diagnostics.kernel_distance(gram, gram + 1),
        diagnostics.kernel_velocity(gram, gram + 1, 2),
        diagnostics.effective_rank(gram),
        diagnostics.target_share(gram, y, 3),
    ]
    return [*values, torch.tensor(numbers, dtype=torch.float64), diagnostics.leading_eigenvalues(gram, 3)]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):  # noqa: ANN201 - a context
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "setting",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
    ],
    ids=["bfloat16 autocast", "float16 autocast", "float64 default", "bfloat16 default", "inference", "no_grad"],
)
def test_settings_of_a_training_run_change_nothing(
    dtype: torch.dtype, setting: Callable[[], contextlib.AbstractContextManager[object]]
) -> None:
    outside = everything(dtype)
    with setting():
        inside = everything(dtype)
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_results_of_inference_mode_are_of_use_outside() -> None:
    with torch.inference_mode():
        gram, y = GRAM.clone(), SIGNS[:N].clone()
        start = 0 * y
    expected = kernel_sgd(GRAM, SIGNS[:N], CONFIG).coefficients
    assert torch.equal(kernel_sgd(gram, y, CONFIG, initial_coefficients=start).coefficients, expected)
    assert torch.equal(ridge(gram, y, 0.1).coefficients, ridge(GRAM, SIGNS[:N], 0.1).coefficients)
    assert critical_learning_rate(gram) == critical_learning_rate(GRAM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_grams_of_few_digits_are_refused_or_measured_in_float64(dtype: torch.dtype) -> None:
    half = GRAM.to(dtype) if dtype.is_floating_point else (10 * GRAM).to(dtype)
    for solve in (lambda: kernel_sgd(half, SIGNS[:N], CONFIG), lambda: ridge(half, SIGNS[:N], 0.1)):
        with pytest.raises(TypeError, match=r"float32 or float64 tensor, got .*call \.float\(\) first"):
            solve()
    expected = N / float(torch.linalg.eigvalsh(half.double())[-1])
    assert critical_learning_rate(half) == pytest.approx(expected, rel=1e-6)
    assert diagnostics.effective_rank(half) == diagnostics.effective_rank(half.double())


# Kind: a power law fitted to a curve that is none


def seeds_of(
    law: NDArray[np.float64], seeds: int, rng: np.random.Generator, points: int = 10_000
) -> NDArray[np.float64]:
    """Errors on a test set of so many points, with spreads of 5% of each seed and of each of its sizes."""
    spread = np.exp(rng.normal(0, 0.05, (seeds, 1)) + rng.normal(0, 0.05, (seeds, len(SIZES))))
    return rng.binomial(points, law * spread) / points


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_a_floor_draws_a_warning_and_an_offset_finds_it(seeds: int) -> None:
    floor = np.tile(2 * SIZES**-0.5 + 0.05, (seeds, 1)) * (1 + 1e-4 * np.sin(np.arange(seeds)))[:, None]
    with pytest.warns(UserWarning, match=r"not a power law: .* goes from 0\.\d+ to 0\.\d+.*offset=True"):
        plain = fit_power_law(SIZES, floor, chance=None)
    assert plain.beta < 0.4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = fit_power_law(SIZES, floor, chance=None, offset=True)
    assert (fit.alpha, fit.beta, fit.offset) == pytest.approx((2, 0.5, 0.05), rel=1e-3)
    assert fit.offset_interval is not None
    np.testing.assert_allclose(fit.predict(SIZES), floor.mean(0), rtol=1e-4)
    np.testing.assert_allclose(fit.predict(10**12), 0.05, rtol=1e-3)
    expected = [-np.log(b / a) / np.log(2) for a, b in zip(floor.mean(0), floor.mean(0)[1:], strict=False)]
    np.testing.assert_allclose(fit.local_exponents, expected)
    assert fit.curvature_p_value < 0.01


def test_a_steepening_curve_draws_a_warning_without_the_advice_of_an_offset() -> None:
    with pytest.warns(UserWarning, match="not a power law") as caught:
        fit_power_law(SIZES, np.exp(-0.05 * np.log(SIZES) ** 2), chance=None)
    assert "offset" not in str(caught[0].message)
    falling = fit_power_law(SIZES, np.exp(-0.05 * np.log(SIZES) ** 2), chance=None, offset=True)
    line = np.polyfit(np.log(SIZES), -0.05 * np.log(SIZES) ** 2, 1)
    assert (falling.offset, falling.beta) == (0, pytest.approx(-line[0]))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 10])
def test_a_true_power_law_draws_the_warning_once_in_a_hundred_fits(seeds: int) -> None:
    rng, trials = np.random.default_rng(seeds), 3000
    values = np.array([curvature_p_value(SIZES, seeds_of(SIZES**-0.25, seeds, rng, 1000)) for _ in range(trials)])
    assert 0.005 <= (values < 0.01).mean() <= 0.017
    assert 0.035 <= (values < 0.05).mean() <= 0.065
    floor = np.array([curvature_p_value(SIZES, seeds_of(2 * SIZES**-0.5 + 0.05, seeds, rng)) for _ in range(500)])
    assert (floor < 0.01).mean() > {1: 0.02, 2: 0.01, 3: 0.05, 5: 0.2, 10: 0.8}[seeds]


@pytest.mark.parametrize(("alpha", "beta", "floor"), [(2, 0.5, 0.05), (2, 0.5, 0.0)])
@pytest.mark.parametrize("seeds", [1, 5])
def test_the_intervals_of_a_law_with_an_offset_cover_it(alpha: float, beta: float, floor: float, seeds: int) -> None:
    rng, trials, hits = np.random.default_rng(seeds), 150, np.zeros(2)
    for trial in range(trials):
        table = seeds_of(alpha * SIZES**-beta + floor, seeds, rng)
        fit = fit_power_law(SIZES, table, chance=None, offset=True, resamples=300, seed=trial)
        assert fit.offset_interval is not None
        assert fit.offset_interval[0] >= 0
        hits += (
            fit.beta_interval[0] <= beta <= fit.beta_interval[1],
            fit.offset_interval[0] <= floor <= fit.offset_interval[1],
        )
    assert (hits / trials >= 0.9).all()


def test_a_law_with_an_offset_needs_sizes_and_is_compared_with_its_like() -> None:
    with pytest.raises(ValueError, match=r"Only 2 of 2 sizes .* a law needs 3"):
        fit_power_law([100, 200], [0.4, 0.3], offset=True)
    with pytest.warns(UserWarning, match="fitted to 4 sizes is weak evidence: use at least 5"):
        fit_power_law(SIZES[:4], 2 * SIZES[:4] ** -0.5 + 0.05, offset=True, chance=None)
    plain, floor = (fit_power_law(SIZES, SIZES**-0.5, offset=offset) for offset in (False, True))
    with pytest.raises(ValueError, match="both with an offset or both without"):
        compare_exponents(plain, floor)
    assert compare_exponents(floor, floor).p_value == 1


def test_few_values_leave_nothing_to_test() -> None:
    for sizes, seeds in ((2, 3), (3, 1)):
        table = np.tile(SIZES[:sizes] ** -0.5, (seeds, 1))
        assert np.isnan(curvature_p_value(SIZES[:sizes].astype(float), table))
    exact = np.tile(SIZES**-0.5, (4, 1))
    assert curvature_p_value(SIZES.astype(float), exact) > 0.1  # rounding is no curvature
