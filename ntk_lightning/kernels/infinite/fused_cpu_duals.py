"""The duals of every activation on vectors of 16 pairs, for the compiled CPU kernel.

The formulas are those of :mod:`~ntk_lightning.kernels.infinite.activations`, rearranged so that what belongs to one
pixel is computed once an image (:func:`pixel_numbers`, two numbers an activation), and so that one square root and a
few polynomials serve a pair (:func:`duals`).
"""

# ruff: noqa: ANN401 - vectors exist in compiled code only, where they have no Python type
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.polynomial import Chebyshev, Polynomial

from ntk_lightning.kernels.infinite.activations import less_its_sine
from ntk_lightning.kernels.infinite.fused_cpu_program import ERF, EXP, GELU, NORM, RELU, SIGN, SIN
from ntk_lightning.kernels.infinite.fused_cpu_simd import (
    above,
    absolute,
    copysign,
    exp,
    polynomial,
    positive,
    root,
    sqrt,
)

__all__ = ["duals", "pixel_numbers"]

Vector = Any
_compiled = njit(nogil=True, error_model="numpy")
_inlined = njit(nogil=True, error_model="numpy", forceinline=True)


def _fit(function: Callable[[Any], Any], degrees: tuple[int, int] = (6, 19)) -> Any:
    """Polynomials on [0, 1] that are right to the precision of each type."""
    fits = [Chebyshev.interpolate(function, degree, domain=[0, 1]) for degree in degrees]
    single, double = (fit.convert(kind=Polynomial, domain=[-1, 1], window=[-1, 1]).coef.tolist() for fit in fits)
    return polynomial(single, double)


def _arccos(t: Any) -> Any:
    return (2 / np.pi) * np.arccos(t) / np.sqrt(1 - t)


def _arcsin_slope(t: Any) -> Any:
    root = np.sqrt(1 - t)
    return (1 / (1 + root) - (2 / np.pi) * np.arcsin(t) / t) / root


def _bow(t: Any) -> Any:
    angle = 2 * np.arcsin(np.sqrt((1 - t) / 2))  # arccos(t)
    difference = less_its_sine(*(torch.from_numpy(np.asarray(a)) for a in (angle, np.sin(angle), t)))
    return difference.numpy() / (1 - t) ** 1.5


# With t = |r| and one square root, root = sqrt(1 - t):
#     arcsin(t) = pi/2 (1 - root arc(t)),    sqrt(1 - r^2) + r arcsin(r) = pi/2 (t + root arc_integral(t)),
# without the cancellation at small t, arcsin(t) = pi/2 t (1 / (1 + root) - root arc_slope(t)),
# and without that at t near 1, arccos(t) - t sqrt(1 - t^2) = root^3 bow(t).
_arc = _fit(_arccos)
_arc_integral = _fit(lambda t: (2 / np.pi) * np.sqrt(1 + t) - t * _arccos(t))
_arc_slope = _fit(_arcsin_slope)
_arc_bow = _fit(_bow)
# sinh(x) = x (1 + x^2 / 3! + x^4 / 5! + ...) for |x| <= 1
_sinh_share = polynomial(*([1 / math.factorial(2 * n + 1) for n in range(terms)] for terms in (6, 10)))


@_compiled
def pixel_numbers(kind: int, even: float, variance: float) -> tuple[float, float]:
    """What an activation needs of a pixel; an overflow must not look like a correlation of 0.

    Args:
        kind: Number of the activation.
        even: Of ReLU as in :func:`duals`; of NORM what is added to the variance.
        variance: Of the pixel.

    Returns:
        Two numbers.
    """
    variance = max(variance, 0.0)  # where pooling cancels, rounding may leave less
    deviation = math.sqrt(variance)
    inverse = 1 / deviation if deviation > 0 else 0.0
    if variance == math.inf:
        return math.nan, math.nan
    if kind == RELU:
        return inverse, math.sqrt(even) * deviation
    if kind == ERF:
        return 1 / math.sqrt(1 + 2 * variance), inverse
    if kind == GELU:
        return 1 / math.sqrt(1 + variance), deviation
    if kind == NORM:
        return 1 / math.sqrt(variance + even) if variance + even > 0 else 0.0, 0.0
    return variance / 2, inverse


@_inlined
def duals(
    kind: int,
    odd: float,
    even: float,
    tiny: float,
    k: Vector,
    numbers1: tuple[Vector, Vector],
    numbers2: tuple[Vector, Vector],
) -> tuple[Vector, Vector]:
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)].

    Args:
        kind: Number of the activation; NORM, a normalization, counts as one, phi(u) = u / sqrt(variance + eps).
        odd: Of ReLU: phi(u) = sqrt(odd) u + sqrt(even) |u|.
        even: The same.
        tiny: Correlations within it of 1 count as 1, as those of equal pixels round.
        k: Covariances.
        numbers1: Of the pixels of the first images, from :func:`pixel_numbers`.
        numbers2: Of those of the second ones.

    Returns:
        Both, NaN for an unknown activation.
    """
    (first1, second1), (first2, second2) = numbers1, numbers2
    if kind == RELU:  # first: 1 / deviation; second: sqrt(even) deviation
        r = k * first2 * first1
        t = absolute(r)
        share = root(1.0 - t, tiny)
        mean = second1 * second2 * ((odd / even) * r + (t + share * _arc_integral(t)))
        return mean, odd + even * copysign(1.0 - share * _arc(t), r)
    if kind == NORM:  # first: 1 / sqrt(variance + eps)
        return k * first1 * first2, first1 * first2
    if SIN <= kind <= EXP:  # the sine, the cosine or exp; first: variance / 2
        m = first1 + first2
        if kind == EXP:
            mean = exp(k + m)
            return mean, mean
        # exp(-m) sinh(k) and exp(-m) cosh(k), with m >= |k|
        larger, smaller = exp(absolute(k) - m), exp(-1.0 * absolute(k) - m)
        near = k * exp(-1.0 * m) * _sinh_share(k * k)
        sinh = above(absolute(k) - 1.0, 0.0, -1.0)
        sinh = positive(sinh, copysign(0.5 * (larger - smaller), k), near)
        cosh = 0.5 * (larger + smaller)
        return (sinh, cosh) if kind == SIN else (cosh, sinh)
    if kind == SIGN:  # second: 1 / deviation
        r = k * second2 * second1
        t = absolute(r)
        share = root(1.0 - t, tiny)
        return r * (1.0 / (1.0 + share) - share * _arc_slope(t)), 0.0 * r
    ab = first1 * first2  # of erf and GELU, first: a and b
    a2, b2 = first1 * first1, first2 * first2
    if kind == ERF:  # second: 1 / deviation
        t = absolute(k * second2 * second1)
        sine2 = a2 + (1.0 - a2) * (b2 + (1.0 - b2) * (above(1.0 - t, tiny, 0.0) * (1.0 + t)))
        cosine = 2.0 * (k * ab)
        t = absolute(cosine)
        share = sqrt(sine2 / (1.0 + t))  # of 1 - t, and arcsin to relative precision, for dark images
        arcsin = cosine * (1.0 / (1.0 + share) - share * _arc_slope(t))
        return arcsin, (4 / math.pi) * ab / sqrt(sine2)
    if kind == GELU:  # second: deviation
        scale = second1 * second2
        t = absolute(k) / above(scale, 0.0, 1.0)
        q = above(1.0 - t, tiny, 0.0) * (1.0 + t)
        p = scale * ab
        m = p * p * q
        sine2 = above(a2 + (1.0 - a2) * b2 + m, 0.0, 1.0)  # 0 in the lanes without an image only
        inverse = 1.0 / sqrt(sine2)
        cosine = k * ab
        t = absolute(cosine)
        u = sine2 / (1.0 + t)
        small = u * sqrt(u) * _arc_bow(t)
        bow = positive(cosine, math.pi - small, small)
        density = ab * inverse
        mean = p * scale * q * (sine2 * inverse) + k * bow + cosine * cosine * density
        slope = bow + cosine * (density * (ab + density * inverse) - m * inverse)
        return (0.5 / math.pi) * mean, (0.5 / math.pi) * slope
    nothing = k * math.nan
    return nothing, nothing
