"""Vectors of 16 lanes in compiled code against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit
from numpy.typing import NDArray

from ntk_lightning.kernels.infinite.fused_cpu_simd import (
    LANES,
    above,
    absolute,
    broadcast,
    copysign,
    exp,
    load,
    polynomial,
    sqrt,
    store,
    zeros,
)

cubic = polynomial([0.5, -1.0, 2.0, 0.25], [0.5, -1.0, 2.0, 0.25])


@njit
def _run(a: NDArray[np.float64], out: NDArray[np.float64]) -> None:
    x, y = load(a, 1), load(a, 17)
    results = (
        x + y,
        x - 2.0 * y,
        x / (y + 3),
        sqrt(absolute(x)),
        copysign(y, x),
        above(x, 0.0, y),
        broadcast(a, 5),
        zeros(a),
        exp(30.0 * x),
        cubic(x),
    )
    for i in range(len(results)):
        store(out, i * LANES, results[i])


@njit
def _mixed(a: NDArray[np.float64], b: NDArray[np.float64]) -> None:
    store(b, 0, load(b, 0) + load(a, 0) * 0.5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_operation_equals_numpy(dtype: type) -> None:
    a = np.random.default_rng(0).standard_normal(40).astype(dtype)
    out = np.full(10 * LANES, np.nan, dtype)
    _run(a, out)
    x, y = a[1:17], a[17:33]
    expected = [
        x + y,
        x - 2 * y,
        x / (y + 3),
        np.sqrt(abs(x)),
        np.copysign(y, x),
        np.where(x > 0, x, y),
        np.full(16, a[5]),
        np.zeros(16),
        np.exp(30 * x),
        0.5 - x + 2 * x**2 + 0.25 * x**3,
    ]
    rounding = 50 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(out.reshape(10, LANES), expected, rtol=rounding, atol=rounding)


def test_float32_meets_float64_in_float64() -> None:
    a, b = np.full(16, 1 / 3, np.float32), np.full(16, 1e-12)
    _mixed(a, b)
    np.testing.assert_array_equal(b, np.float64(np.float32(1 / 3)) / 2 + 1e-12)
