"""Measures of kernels too large for a Gram, from products K v alone: estimates, each with a standard error.

Every estimate splits the space as Hutch++ does (Meyer, Musco, Musco and Woodruff 2021, arXiv 2010.09649): exact in the
span Q of a sketch K S, where the leading eigenvectors are, and Hutchinson's mean over random signs g in its complement,

    tr A = tr(Q'A Q) + E[g'P A P g],  P = I - Q Q',

for A = K (trace), K^2 (norm), K K' (alignment) and K log K (entropy). Given Q the probes g are independent, so the
standard error is that of their mean. Longer than 300 lines because every measure documents its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ntk_lightning.kernels.lanczos import entropy_quadratures, lanczos
from ntk_lightning.whole_number import is_whole

__all__ = [
    "Estimate",
    "centered_kernel_alignment",
    "effective_rank",
    "frobenius_norm",
    "kernel_target_alignment",
    "trace",
]

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Estimate:
    """An estimate: ``value +- t * standard_error`` with t the quantile of a t distribution of ``probes - 1`` degrees.

    Args:
        value: The estimate.
        standard_error: Standard deviation over seeds, estimated from the probes; without the rounding of the products.
        probes: Number of random vectors that it was estimated from.
    """

    value: float
    standard_error: float
    probes: int


def trace(
    matvec: MatVec,
    n: int,
    products: int = 60,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate the trace of a kernel by Hutch++.

    tr K = tr(Q'K Q) + E[g'P K P g], Q an orthonormal basis of K S and P = I - Q Q': Meyer, Musco, Musco and Woodruff
    (2021, arXiv 2010.09649). Unbiased; exact where the rank of K is at most a third of ``products``.

    Args:
        matvec: Maps vectors (n, k) to K times them, (n, k), for a symmetric K.
        n: Number of points.
        products: Number of products with a vector, at least 6; a third each for sketch, Q and probes.
        seed: Of the random vectors, which are drawn on the CPU, by a generator of their own.
        dtype: Of the vectors that ``matvec`` is given; sums are in float64.
        device: Of these vectors.

    Returns:
        The estimate.

    Raises:
        ValueError: There are too few products, or ``matvec`` returns another shape or what is not finite.

    Example:
        >>> kernel = torch.diag(torch.tensor([5.0, 3.0, 0.0, 0.0]))
        >>> estimate = trace(lambda v: kernel @ v, n=4, products=9)
        >>> round(estimate.value, 5), estimate.standard_error < 1e-5
        (8.0, True)
    """
    draws = _Draws(n, seed, dtype, device)
    q, g = _split(draws, [matvec], _share(products, 3))
    return _mean((q * draws.apply(matvec, q)).sum(), (g * draws.apply(matvec, g)).sum(0))


def frobenius_norm(
    matvec: MatVec,
    n: int,
    products: int = 60,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate the Frobenius norm of a kernel.

    ||K||_F^2 = ||K Q||_F^2 + E||K P g||^2, which is Hutch++ of K^2 at one product a vector: Meyer, Musco, Musco and
    Woodruff (2021, arXiv 2010.09649). The root's standard error is that of the square over 2 ||K||_F.

    Args:
        matvec: Maps vectors (n, k) to K times them, (n, k), for a symmetric K.
        n: Number of points.
        products: Number of products with a vector, at least 6; a third each for sketch, Q and probes.
        seed: Of the random vectors, which are drawn on the CPU, by a generator of their own.
        dtype: Of the vectors that ``matvec`` is given; sums are in float64.
        device: Of these vectors.

    Returns:
        The estimate.

    Raises:
        ValueError: There are too few products, or ``matvec`` returns another shape or what is not finite.

    Example:
        >>> kernel = torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0]))
        >>> round(frobenius_norm(lambda v: kernel @ v, n=4, products=9).value, 5)
        5.0
    """
    square = _square_norm(_Draws(n, seed, dtype, device), matvec, products)
    norm = math.sqrt(square.value)
    return Estimate(norm, square.standard_error / (2 * norm) if norm else 0.0, square.probes)


def kernel_target_alignment(
    matvec: MatVec, targets: Tensor, products: int = 60, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Estimate:
    """Estimate the alignment of a kernel with the kernel of its labels.

    <K, y y'>_F / (||K||_F ||y y'||_F), which for one output is y'K y / (||K||_F ||y||^2): Cristianini et al. (2001,
    "On kernel-target alignment"). The numerator is exact; the norm is that of :func:`frobenius_norm`.

    Args:
        matvec: Maps vectors (n, k) to K times them, (n, k), for a symmetric K.
        targets: Labels, (n,) or (n, C); not centered here. Vectors lie on their device.
        products: Number of products for the norm, at least 6; the labels take C more.
        seed: Of the random vectors, which are drawn on the CPU, by a generator of their own.
        dtype: Of the vectors that ``matvec`` is given; sums are in float64.

    Returns:
        The estimate; NaN where the kernel or the labels are zero.

    Raises:
        ValueError: The labels are malformed, there are too few products, or ``matvec`` returns another shape or what is
            not finite.

    Example:
        >>> y = torch.tensor([1.0, -1.0, 1.0])
        >>> round(kernel_target_alignment(lambda v: torch.outer(y, y) @ v, y).value, 5)
        1.0
    """
    if targets.dim() not in (1, 2) or not len(targets) or not torch.isfinite(targets).all():
        raise ValueError(f"targets must be finite, (n,) or (n, C), got {tuple(targets.shape)}.")
    labels = targets.detach().double().reshape(len(targets), -1)
    draws = _Draws(len(labels), seed, dtype, targets.device)
    square = _square_norm(draws, matvec, products)
    aligned = float((labels * draws.apply(matvec, labels)).sum())  # tr(Y'K Y)
    scale = math.sqrt(square.value) * float((labels.T @ labels).norm())  # ||Y Y'||_F = ||Y'Y||_F
    if not scale:
        return Estimate(math.nan, math.nan, square.probes)
    value = aligned / scale
    return Estimate(value, abs(value) * square.standard_error / (2 * square.value), square.probes)


def centered_kernel_alignment(
    matvec1: MatVec,
    matvec2: MatVec,
    n: int,
    products: int = 80,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate the alignment of two kernels after centering, CKA.

    <A, B>_F / (||A||_F ||B||_F) with A = H K H, B = H K' H and H = I - 1 1' / n: Cortes, Mohri and Rostamizadeh (2012,
    "Algorithms for learning kernels based on centered alignment"); Kornblith et al. (2019, arXiv 1905.00414). All three
    products come from one sketch [A S, B S] and the same probes, <A, B>_F = <A Q, B Q>_F + E[(A P g)'(B P g)], so that
    their errors cancel in part; the standard error is that of the ratio, to first order.

    Args:
        matvec1: Maps vectors (n, k) to K times them, (n, k), for a symmetric K.
        matvec2: The same for another kernel on the same points.
        n: Number of points.
        products: Number of products with each kernel, at least 8; half of them for Q, a quarter for the sketch and for
            the probes.
        seed: Of the random vectors, which are drawn on the CPU, by a generator of their own.
        dtype: Of the vectors that the kernels are given; sums are in float64.
        device: Of these vectors.

    Returns:
        The estimate; NaN where a centered kernel is zero.

    Raises:
        ValueError: There are too few products, or a kernel returns another shape or what is not finite.

    Example:
        >>> y = torch.tensor([1.0, -1.0, 1.0])
        >>> kernel = torch.outer(y, y)
        >>> round(centered_kernel_alignment(lambda v: kernel @ v, lambda v: 2 * kernel @ v + v.sum(0), n=3).value, 5)
        1.0
    """
    draws = _Draws(n, seed, dtype, device)
    centered = [partial(_centered, matvec) for matvec in (matvec1, matvec2)]
    q, g = _split(draws, centered, _share(products, 4))
    (aq, bq), (ag, bg) = ([draws.apply(matvec, v) for matvec in centered] for v in (q, g))
    pairs = ((aq, bq, ag, bg), (aq, aq, ag, ag), (bq, bq, bg, bg))
    probes = [(left_g * right_g).sum(0) for _, _, left_g, right_g in pairs]
    inner, first, second = (
        float((left_q * right_q).sum() + probe.mean())
        for (left_q, right_q, _, _), probe in zip(pairs, probes, strict=True)
    )
    if first <= 0 or second <= 0:
        return Estimate(math.nan, math.nan, g.shape[1])
    scale = math.sqrt(first * second)
    value = inner / scale
    # d CKA = d<A, B> / (||A|| ||B||) - CKA/2 (d||A||^2 / ||A||^2 + d||B||^2 / ||B||^2), for every probe
    moved = probes[0] / scale - value / 2 * (probes[1] / first + probes[2] / second)
    return Estimate(value, _mean(0.0, moved).standard_error, g.shape[1])


def effective_rank(
    matvec: MatVec,
    n: int,
    products: int = 600,
    *,
    steps: int = 20,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate the effective rank of a kernel by stochastic Lanczos quadrature.

    exp(-sum_i p_i log p_i) with p_i = lambda_i / tr K: Roy and Vetterli (2007, "The effective rank: a measure of
    effective dimensionality"). The entropy is log T - S / T with T = tr K and S = tr(K log K), a sum of quadratic
    forms: Ubaru, Chen and Saad (2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"). The rules of
    Gauss, and of Gauss and Radau with a node at 0, lie on both sides of each form: it is taken in their middle, and
    half their distance is added to the standard error, as the root of the sum of squares.

    Args:
        matvec: Maps vectors (n, k) to K times them, (n, k), for a symmetric positive semidefinite K.
        n: Number of points.
        products: Number of products with a vector, at least ``2 * (2 * steps + 1)``.
        steps: Lanczos steps from every vector, at least 2: more where the spectrum falls over many magnitudes.
        seed: Of the random vectors, which are drawn on the CPU, by a generator of their own.
        dtype: Of the vectors that ``matvec`` is given; sums are in float64.
        device: Of these vectors.

    Returns:
        The estimate, between 1 and n to its error; NaN for the zero kernel.

    Raises:
        ValueError: There are too few products or steps, or ``matvec`` returns another shape or what is not finite.

    Example:
        >>> kernel = torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        >>> round(effective_rank(lambda v: kernel @ v, n=4).value, 4)
        3.0
    """
    if not is_whole(steps) or steps < 2:
        raise ValueError(f"steps must be a whole number of at least 2, got {steps}.")
    draws = _Draws(n, seed, dtype, device)
    q, g = _split(draws, [matvec], _share(products, 2 * steps + 1))
    product, eps = partial(draws.apply, matvec), torch.finfo(dtype).eps
    squares, tridiagonal = lanczos(product, torch.cat([q, g], 1), steps, eps)
    of_q, of_probes = slice(q.shape[1]), slice(q.shape[1], None)
    traces = squares * tridiagonal[:, 0, 0]  # v'K v for every column v of Q and every probe
    total = _mean(traces[of_q].sum(), traces[of_probes]).value  # T
    if not total > 0:
        return Estimate(math.nan, math.nan, g.shape[1])
    # With p = lambda / T instead of lambda, t = tr p = 1 and s = sum p log p: H = log t - s / t, dH = (1 + s) dt - ds.
    low, high = (squares * bound for bound in entropy_quadratures(tridiagonal / total))
    forms, half = (low + high) / 2, (high - low) / 2
    s = _mean(forms[of_q].sum(), forms[of_probes]).value
    probing = _mean(0.0, (1 + s) * traces[of_probes] / total - forms[of_probes]).standard_error
    truncating = _mean(half[of_q].sum(), half[of_probes]).value
    return Estimate(math.exp(-s), math.exp(-s) * math.hypot(probing, truncating), g.shape[1])


class _Draws:
    """Random signs of a generator of their own, and products in the precision and on the device of a kernel."""

    def __init__(self, n: int, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        if not is_whole(n) or n < 1:
            raise ValueError(f"n must be a whole number of at least 1, the number of points, got {n}.")
        self.n, self.dtype, self.device = n, dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def signs(self, k: int) -> Tensor:
        """Draw (n, k) entries of -1 and +1."""
        return (torch.randint(2, (self.n, k), generator=self.generator) * 2 - 1).double().to(self.device)

    def apply(self, matvec: MatVec, v: Tensor) -> Tensor:
        """Compute K v in float64 from a product in the kernel's precision."""
        product = matvec(v.to(self.dtype)).detach()
        if product.shape != v.shape:
            raise ValueError(f"matvec must return {tuple(v.shape)}, as it was given, got {tuple(product.shape)}.")
        if not torch.isfinite(product).all():
            raise ValueError("matvec returned a NaN or infinite entry: has the network diverged?")
        return product.to(v)


def _share(products: int, parts: int) -> int:
    """The products of each part, at least 2: a standard error needs two probes."""
    if not is_whole(products) or products < 2 * parts:
        raise ValueError(f"products must be a whole number of at least {2 * parts} here, got {products}.")
    return products // parts


def _split(draws: _Draws, matvecs: Sequence[MatVec], k: int) -> tuple[Tensor, Tensor]:
    """Q (n, up to k a kernel), an orthonormal basis of the sketches K S, and k probes P g = (I - Q Q') g, (n, k)."""
    signs = draws.signs(k)
    q = torch.linalg.qr(torch.cat([draws.apply(matvec, signs) for matvec in matvecs], 1)).Q
    g = draws.signs(k)
    for _ in range(2):  # the second time removes what rounding left of the first
        g = g - q @ (q.T @ g)
    return q, g


def _mean(exact: Tensor | float, probes: Tensor) -> Estimate:
    """The exact part plus the probes' mean, with its standard error."""
    k = len(probes)
    return Estimate(float(exact + probes.mean()), float(probes.std()) / math.sqrt(k), k)


def _square_norm(draws: _Draws, matvec: MatVec, products: int) -> Estimate:
    """||K||_F^2 = ||K Q||_F^2 + E||K P g||^2."""
    q, g = _split(draws, [matvec], _share(products, 3))
    return _mean(draws.apply(matvec, q).square().sum(), draws.apply(matvec, g).square().sum(0))


def _centered(matvec: MatVec, v: Tensor) -> Tensor:
    """H K H v with H = I - 1 1' / n."""
    product = matvec(v - v.mean(0))
    return product - product.mean(0)
