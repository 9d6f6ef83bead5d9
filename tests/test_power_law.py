"""Power-law fits: exact laws, the coverage of the intervals by simulation, and what draws a warning."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from ntk_lightning.scaling import compare_exponents, fit_power_law

SIZES = np.array([125, 250, 500, 1000, 2000, 4000])


def noisy(rng: np.random.Generator, seeds: int, beta: float = 0.25, points: int = 1000) -> NDArray[np.float64]:
    """Errors of a law on a test set of so many points, with a spread of the seeds that is common to all sizes."""
    spread = np.exp(rng.normal(0, 0.05, (seeds, 1)) + rng.normal(0, 0.05, (seeds, len(SIZES))))
    return rng.binomial(points, SIZES**-beta * spread) / points


def test_exact_law() -> None:
    errors = 1.5 * SIZES**-0.3
    for table in (errors, [errors] * 4):
        fit = fit_power_law(SIZES, table)
        assert fit.alpha == pytest.approx(1.5)
        assert fit.beta == pytest.approx(0.3)
        assert fit.beta_interval == pytest.approx((0.3, 0.3))
        assert fit.r_squared == pytest.approx(1)
        np.testing.assert_allclose(fit.predict([8000, 10]), 1.5 * np.array([8000.0, 10.0]) ** -0.3)
    assert fit_power_law(SIZES, 0.1 * SIZES**0.1, chance=None).beta == pytest.approx(-0.1)


def test_one_seed_equals_linear_regression() -> None:
    errors = noisy(np.random.default_rng(0), 1)[0]
    line = stats.linregress(np.log(SIZES), np.log(errors))
    fit = fit_power_law(SIZES, errors, confidence=0.9)
    assert fit.beta == pytest.approx(-line.slope)
    assert fit.alpha == pytest.approx(math.exp(line.intercept))
    assert fit.r_squared == pytest.approx(line.rvalue**2)
    width = stats.t.ppf(0.95, len(SIZES) - 2) * line.stderr
    assert fit.beta_interval == pytest.approx((-line.slope - width, -line.slope + width))


def test_several_seeds_fit_the_mean_error() -> None:
    table = noisy(np.random.default_rng(1), 5)
    line = stats.linregress(np.log(SIZES), np.log(table.mean(0)))
    fit = fit_power_law(SIZES, table)
    assert (fit.beta, fit.r_squared) == pytest.approx((-line.slope, line.rvalue**2))
    order = [3, 0, 5, 1, 4, 2]
    assert fit_power_law(SIZES[order], table[:, order]).beta_interval == pytest.approx(fit.beta_interval)
    assert fit_power_law(SIZES, table).beta_interval == fit.beta_interval
    wide, narrow = fit.beta_interval, fit_power_law(SIZES, table, confidence=0.5).beta_interval
    assert wide[0] < narrow[0] < fit.beta < narrow[1] < wide[1]


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 10])
def test_interval_covers_the_exponent_as_often_as_it_says(seeds: int) -> None:
    rng, trials, hits = np.random.default_rng(seeds), 1500, 0
    for trial in range(trials):
        low, high = fit_power_law(SIZES, noisy(rng, seeds), resamples=400, seed=trial).beta_interval
        hits += low <= 0.25 <= high
    assert 0.935 <= hits / trials <= 0.965


@pytest.mark.parametrize(("seeds_a", "seeds_b", "paired"), [(3, 3, False), (3, 6, False), (1, 4, False), (4, 4, True)])
def test_equal_exponents_are_rejected_as_often_as_the_level_says(seeds_a: int, seeds_b: int, paired: bool) -> None:
    rng, trials, rejected, missed = np.random.default_rng(7), 1500, 0, 0
    for trial in range(trials):
        first, second = noisy(rng, seeds_a), noisy(rng, seeds_b)
        if paired:
            shared = np.exp(rng.normal(0, 0.2, first.shape))
            first, second = first * shared, second * shared
        a, b = (fit_power_law(SIZES, table, chance=None, resamples=400, seed=trial) for table in (first, second))
        result = compare_exponents(a, b, paired=paired)
        rejected += result.p_value < 0.05
        missed += not result.interval[0] <= 0 <= result.interval[1]
    assert rejected == missed
    assert 0.025 <= rejected / trials <= 0.065


def test_different_exponents_are_found() -> None:
    rng = np.random.default_rng(3)
    a, b = (fit_power_law(SIZES, noisy(rng, 10, beta)) for beta in (0.30, 0.18))
    result = compare_exponents(a, b)
    assert result.difference == pytest.approx(a.beta - b.beta)
    assert result.p_value < 0.001
    assert result.interval[0] > 0
    reverse = compare_exponents(b, a)
    assert reverse.p_value == pytest.approx(result.p_value)
    assert reverse.interval == pytest.approx((-result.interval[1], -result.interval[0]))
    assert compare_exponents(a, a).p_value == 1


def test_pairing_finds_a_difference_under_shared_noise() -> None:
    rng = np.random.default_rng(4)
    shared = np.exp(rng.normal(0, 0.2, (5, len(SIZES))))
    tables = [SIZES**-beta * shared * np.exp(rng.normal(0, 0.01, shared.shape)) for beta in (0.30, 0.27)]
    a, b = (fit_power_law(SIZES, table) for table in tables)
    assert compare_exponents(a, b).p_value > 0.1
    assert compare_exponents(a, b, paired=True).p_value < 0.01


@pytest.mark.filterwarnings("ignore:A power law fitted to 2 sizes")
def test_certain_and_uninformative_fits() -> None:
    exact, other = (fit_power_law([100, 400], [[0.4, b], [0.4, b]], chance=None) for b in (0.2, 0.1))
    assert compare_exponents(exact, exact).p_value == 1
    assert compare_exponents(exact, other).p_value < 1e-12
    exact, other = (replace(fit, standard_error=0.0) for fit in (exact, other))
    assert compare_exponents(exact, exact).p_value == 1
    assert compare_exponents(exact, other).p_value == 0
    single = fit_power_law([100, 400], [0.4, 0.2])
    assert single.beta == pytest.approx(0.5)
    assert single.beta_interval == (-math.inf, math.inf)
    result = compare_exponents(single, exact)
    assert (result.p_value, result.interval) == (1, (-math.inf, math.inf))


def test_warns_about_weak_evidence() -> None:
    with pytest.warns(UserWarning, match="fitted to 3 sizes"):
        fit_power_law([1, 2, 4], [0.4, 0.3, 0.2])
    with pytest.warns(UserWarning, match=r"At n=\[100.0\] the error is at chance \(0.5\)"):
        fit_power_law([100, 200, 400, 800], [0.49, 0.4, 0.3, 0.2])
    with pytest.warns(UserWarning, match=r"Left out n=\[1600.0\].*error 0"):
        fit = fit_power_law([100, 200, 400, 800, 1600], [[0.4, 0.3, 0.2, 0.1, 0.0], [0.4, 0.3, 0.2, 0.1, 0.01]])
    assert fit.n.tolist() == [100, 200, 400, 800]


@pytest.mark.parametrize(
    ("n", "errors", "message"),
    [
        ([1, 2, 3], [[0.1, 0.2]], r"errors \(seeds, sizes\)"),
        ([1, 2], np.empty((0, 2)), r"errors \(seeds, sizes\)"),
        ([[1, 2]], [0.1, 0.2], r"n must be \(sizes,\)"),
        ([1, 1], [0.1, 0.2], "different positive"),
        ([0, 1], [0.1, 0.2], "different positive"),
        ([1, 2], [0.1, math.nan], "runs failed"),
        ([1, 2], [0.1, -0.2], "at least 0"),
        ([1, 2, 3], [0.1, 0.0, 0.0], "Only 1 of 3 sizes"),
        ([1], [0.1], "Only 1 of 1 sizes"),
    ],
)
def test_rejects_bad_input(n: object, errors: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_power_law(n, errors)


def test_rejects_bad_options() -> None:
    with pytest.raises(ValueError, match="confidence must be"):
        fit_power_law(SIZES, SIZES**-0.5, confidence=1.0)
    a, b = fit_power_law(SIZES, SIZES**-0.5), fit_power_law(SIZES, SIZES**-0.5, confidence=0.9)
    with pytest.raises(ValueError, match="same confidence"):
        compare_exponents(a, b)
    with pytest.raises(ValueError, match="two or more seeds"):
        compare_exponents(a, a, paired=True)
    pair = [fit_power_law(SIZES, [SIZES**-0.5] * 2, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="equal resamples"):
        compare_exponents(*pair, paired=True)
