r"""Dual covariance and dual derivative of any pointwise function, by quadrature, with an estimate of their error.

Let h_n be the normalized Hermite polynomials, orthonormal under N(0, 1). With u = sigma_1 x, v = sigma_2 y and
correlation r, Mehler's formula separates the inputs (Daniely et al., 2016, arXiv 1602.05897):

    E[f(u) f(v)] = sum over n of c_n(sigma_1) c_n(sigma_2) r^n,    c_n(sigma) = E[f(sigma x) h_n(x)],

and the same for f'. The c_n belong to one input: one-dimensional integrals by Gauss-Legendre in panels, which end at
the kinks of f and get finer towards 0, as f(sigma x) at large sigma asks for. By Cauchy and Schwarz, what N terms leave
out is at most |r|^N sqrt(T_1 T_2), with the rests T = E[f(sigma x)^2] - sum over n < N of c_n^2.

Where that bound is too large (a kink, or a large variance, and r near 1 or -1) the pair is integrated on its own. With
x, a and b independent N(0, 1), and f(-v) for f(v) where r < 0,

    u = sigma_1 (sqrt(|r|) x + sqrt(1 - |r|) a),    v = sigma_2 (sqrt(|r|) x + sqrt(1 - |r|) b),

so that E[f(u) f(v)] is the mean over x of a product of two one-dimensional means, each with its kinks where they are.

The estimated error is relative to sqrt(E[f(u)^2] E[f(v)^2]), and the same for f': the largest of that bound, of the
change from a coarser rule, and of what is missing in Stein's lemma, sigma E[f'(u) h_n] = sqrt(n + 1) E[f(u) h_(n+1)],
which a jump of f breaks.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Duals", "expectations", "warn_of"]

Function = Callable[[Tensor], Tensor]

_TERMS, _STEP = 1024, 16  # of Mehler's sum, at most; and how many are added before the rest is looked at
_ENOUGH = 1e-13  # rest, or bound of a pair, relative to the whole
_FINE, _COARSE = 20, 14  # nodes in a panel
_REACH = 12.0  # of x, beyond which the density of N(0, 1) and half its exponent are nothing
_STEIN = 8  # coefficients that Stein's lemma is tried on
_ENTRIES = 2**22  # at once
_KEPT_BYTES = 2**28
_WARN, _REFUSE = 1e-8, 1e-2  # relative errors


class Duals(NamedTuple):
    """E[f(u) f(v)], E[f'(u) f'(v)] and the largest relative error that is estimated for either."""

    nngp: Tensor
    derivative: Tensor
    error: float


def expectations(
    function: Function, kinks: Sequence[float], root1: Tensor, root2: Tensor, r: Tensor, sine2: Tensor
) -> Duals:
    """Integrate f(u) f(v) and f'(u) f'(v) over a Gaussian pair, f' by automatic differentiation.

    Args:
        function: f, pointwise on tensors in float64.
        kinks: Where f or a low derivative of it jumps; 0 is always taken for one.
        root1: Standard deviations of u, broadcastable to r.
        root2: Standard deviations of v, broadcastable to r.
        r: Correlations, any shape.
        sine2: 1 - r^2, of the same shape.

    Returns:
        Both expectations, of the shape of r, and the estimated error.

    Example:
        >>> one, r = torch.ones((), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
        >>> duals = expectations(torch.square, (), one, one, r, 1 - r**2)  # 1 + 2 r^2 and 4 r
        >>> [round(float(value), 12) for value in duals[:2]], duals.error < 1e-12
        ([1.5, 2.0], True)
    """
    most = _TERMS if sine2.any() else _STEP  # at r = 1 and -1 a one-dimensional integral is cheaper
    roots = root1.flatten(), root2.flatten()
    tables = [_coefficients(function, kinks, root, most) for root in roots]
    if (count := max(table.terms.shape[1] for table in tables)) > min(table.terms.shape[1] for table in tables):
        tables = [_coefficients(function, kinks, root, most, count) for root in roots]
    error = max(table.error for table in tables)
    first, second = (table.terms[:, :count].flip(1) for table in tables)  # (2, N, S), highest degree first
    rests = [table.rests(count) for table in tables]
    duals, bound = [], torch.zeros_like(r)
    for i in range(2):
        dual = torch.zeros_like(r)
        for c1, c2 in zip(first[i], second[i], strict=True):  # Horner's scheme in r
            dual = torch.addcmul(c1.view(root1.shape) * c2.view(root2.shape), dual, r)
        rest = rests[0][i].view(root1.shape).sqrt() * rests[1][i].view(root2.shape).sqrt()
        bound = torch.maximum(bound, r.detach().abs() ** count * rest)
        duals.append(dual)
    near = bound > _ENOUGH
    if near.any():
        better, other = _near(function, kinks, *(k.expand_as(r)[near] for k in (root1, root2, r, sine2)))
        duals = [dual.masked_scatter(near, values) for dual, values in zip(duals, better, strict=True)]
        error, bound = max(error, other), bound.masked_fill(near, 0)
    return Duals(duals[0], duals[1], max([error, *bound.flatten().sort().values[-1:].tolist()]))


def warn_of(error: float, name: str) -> None:
    """Warn of an estimated error that is too large to be overlooked, and refuse what is no value.

    Args:
        error: Relative error, from :func:`expectations`.
        name: Of the function.

    Raises:
        ValueError: The error is above 1e-2, or not a number.
    """
    advice = "if it has kinks, name them in Pointwise(function, kinks=(...)); else scale its inputs down"
    if not error <= _REFUSE:
        raise ValueError(
            f"The expectations of {name} that its kernel needs do not converge: their estimated relative error is "
            f"{error:.1e}. A function that jumps has no finite NTK; {advice}."
        )
    if error > _WARN:
        warnings.warn(f"The kernel of {name} has an estimated relative error of {error:.1e}: {advice}.", stacklevel=2)


class _Table(NamedTuple):
    """c_n of f(sigma x) and of f'(sigma x), (2, N, S), E[f^2] and E[f'^2], (2, S), for S sigmas, and their error."""

    terms: Tensor
    squares: Tensor
    error: float

    def rests(self, count: int) -> Tensor:
        """What the first so many terms leave out of the squares, relative to them, (2, S)."""
        rest = self.squares - self.terms[:, :count].square().sum(1)
        return (rest.clamp_min(0) / self.squares).nan_to_num(0, posinf=0).detach()


_tables: OrderedDict[tuple[object, ...], _Table] = OrderedDict()  # of the inputs that were last seen, the latest last
_lock = threading.Lock()


def _coefficients(function: Function, kinks: Sequence[float], roots: Tensor, most: int, least: int = 0) -> _Table:
    """The table of sigmas: as many terms as leave no rest, at least and at most so many."""
    # Blocks of one Gram have their inputs in common, so tables are kept for as long as there is room
    if roots.requires_grad:
        return _table(function, kinks, roots, most, least)
    key = function, tuple(kinks), most, roots.device, roots.cpu().numpy().tobytes()
    with _lock:
        kept = _tables.pop(key, None)
    if kept is None or kept.terms.shape[1] < least:
        kept = _table(function, kinks, roots, most, least)
    with _lock:
        _tables[key] = kept
        while len(_tables) > 1 and sum(table.terms.nbytes for table in _tables.values()) > _KEPT_BYTES:
            _tables.popitem(last=False)
    return kept


def _table(function: Function, kinks: Sequence[float], roots: Tensor, most: int, least: int) -> _Table:
    edges = _edges(13, 0.5, _REACH).to(roots)
    breaks = _scaled(kinks, roots if any(kinks) else roots[:1])  # without them all sigmas share the nodes
    x, weight = _rule(_with(edges, breaks), _FINE)
    values = torch.stack(_with_slope(function, roots[:, None] * x))  # (2, S, Q)
    squares = (values.square() * weight).sum(-1)
    coarse_x, coarse_weight = _rule(_with(0.85 * edges, breaks), _COARSE)
    coarse = (torch.stack(_with_slope(function, roots[:, None] * coarse_x)).square() * coarse_weight).sum(-1)
    error = _relative(coarse - squares, squares)
    state = _Recursion(x, values * weight)
    c, rest = values.new_empty(2, 0, len(roots)), squares.detach()
    while (n := c.shape[1]) < max(least, _STEP) or (n < most and _relative(rest, squares) > _ENOUGH):
        more = state.terms(n, _STEP if n < 4 * _STEP else n)  # twice as many, once they are many
        c, rest = torch.cat([c, more], 1), rest - more.detach().square().sum(1)
    degree = torch.arange(1, _STEIN + 1).to(roots)[:, None].sqrt()
    missing = roots * c[1, :_STEIN] - degree * c[0, 1 : _STEIN + 1]  # by Stein's lemma nothing
    scale = (squares[0] + roots**2 * squares[1]).sqrt()
    return _Table(c, squares, max(error, _relative(missing.abs().amax(0), scale)))


class _Recursion:
    """Sums of weighted values (2, S, Q) times normalized Hermite polynomials at nodes (S, Q) or (1, Q)."""

    def __init__(self, x: Tensor, weighted: Tensor) -> None:
        self.x, self.weighted = x, weighted
        self.before, self.h = torch.zeros_like(x), torch.ones_like(x)

    def terms(self, first: int, count: int) -> Tensor:
        """The next so many, (2, N, S), from the number of the first on."""
        if len(self.x) > 1 and not self.weighted.requires_grad and self.x.device.type == "cpu":
            from ntk_lightning.kernels.infinite.quadrature_numba import hermite_terms

            out = self.x.new_empty(2, count, len(self.x))
            x, values, before, current = (k.numpy() for k in (self.x, self.weighted, self.before, self.h))
            hermite_terms(x, values, before, current, first, out.numpy())
            return out
        polynomials = []
        for n in range(first, first + count):
            polynomials.append(self.h)  # h_(n+1) = (x h_n - sqrt(n) h_(n-1)) / sqrt(n + 1)
            self.before, self.h = self.h, (self.x * self.h - math.sqrt(n) * self.before) / math.sqrt(n + 1)
        h = torch.stack(polynomials, 1)  # (S, N, Q), or (1, N, Q): then one matrix product
        if len(h) == 1:
            return h[0] @ self.weighted.mT
        return (h @ self.weighted.movedim(0, -1)).movedim(-1, 0).mT


def _near(
    function: Function, kinks: Sequence[float], root1: Tensor, root2: Tensor, r: Tensor, sine2: Tensor
) -> tuple[list[Tensor], float]:
    """Both duals of P pairs, each integrated on its own, and their error."""
    values, error = [], 0.0
    equal = sine2 == 0
    for mask, entries, counts in ((equal, 2**11, (_FINE, _COARSE)), (~equal, 2**19, (12, 9))):
        for rows in mask.nonzero().flatten().split(max(1, _ENTRIES // entries)):
            sides = root1[rows], root2[rows], r.sign()[rows], (sine2 / (1 + r.abs()))[rows]
            fine, coarse = (_product_of_means(function, kinks, sides, nodes) for nodes in counts)
            values.append((rows, fine[0]))
            error = max(error, _relative(coarse[0] - fine[0], fine[1]))
    order = torch.cat([rows for rows, _ in values]).argsort()
    return list(torch.cat([value for _, value in values], 1)[:, order]), error


def _product_of_means(
    function: Function, kinks: Sequence[float], sides: tuple[Tensor, Tensor, Tensor, Tensor], nodes: int
) -> tuple[Tensor, Tensor]:
    """E_x of E_a[f(u)] E_b[f(v)], and of f', (2, P), and their scales (2, P)."""
    root1, root2, sign, gap = sides  # sigma_1, sigma_2, sign of r and 1 - |r|, (P,); all gaps are 0, or none is
    common, own = (1 - gap).sqrt(), gap.sqrt()
    equal = bool((gap == 0).all())
    centers = torch.cat([_scaled(kinks, root1 * common), _scaled(kinks, sign * root2 * common)], 1)  # (P, J)
    if not equal:  # the means are smooth on the scale of a / sqrt(|r|)
        steps = own[:, None] * torch.tensor([-8, -4, -2, -1, 0, 1, 2, 4, 8]).to(own)
        centers = torch.cat([(centers[:, None] + steps[:, :, None]).flatten(1), steps], 1)
    grid = (_edges(13, 0.5, _REACH) if equal else _edges(7, 1, 10)).to(own)
    x, weight = _rule(_with(grid, centers), nodes)  # (P, Q)
    means, scales = [], []
    for root in (root1, sign * root2):
        if equal:
            mean = torch.stack(_with_slope(function, root[:, None] * x))
            scale = (mean.square() * weight).sum(-1)
        else:
            shift = common[:, None] * x
            kink = (_scaled(kinks, root)[:, None] - shift[:, :, None]) / own[:, None, None]  # (P, Q, K)
            zero = -shift[:, :, None] / own[:, None, None]
            steps = torch.tensor([-1.0, -0.25, -0.0625, 0, 0.0625, 0.25, 1]).to(own)
            a, inner = _rule(_with(torch.arange(-10, 11, 2).to(own), torch.cat([kink, zero + steps], -1)), nodes)
            f = torch.stack(_with_slope(function, root[:, None, None] * (shift[..., None] + own[:, None, None] * a)))
            mean, square = (f * inner).sum(-1), (f.square() * inner).sum(-1)
            scale = (square * weight).sum(-1)
        means.append(mean)
        scales.append(scale.detach())
    return (means[0] * means[1] * weight).sum(-1), (scales[0] * scales[1]).sqrt()


def _with_slope(function: Function, u: Tensor) -> tuple[Tensor, Tensor]:
    """f(u) and f'(u)."""
    value, pullback = torch.func.vjp(function, u)[:2]
    return value, pullback(torch.ones_like(value))[0]


def _rule(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of E[f(x)], x ~ N(0, 1), by Gauss-Legendre between sorted edges (..., E): (..., E nodes)."""
    points, weights = (k.to(edges) for k in _legendre(nodes))
    half, middle = edges.diff(dim=-1) / 2, (edges[..., 1:] + edges[..., :-1]) / 2
    x = (middle[..., None] + half[..., None] * points).flatten(-2)
    density = (-(x**2) / 2).exp() / math.sqrt(2 * math.pi)
    return x, (half[..., None] * weights).flatten(-2) * density


@lru_cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy(points), torch.from_numpy(weights)


def _edges(levels: int, width: float, reach: float) -> Tensor:
    """Edges of panels from -reach to reach, of one width but towards 0, where they halve at each level."""
    steps = torch.cat(
        [0.5 ** torch.arange(1, levels + 1, dtype=torch.float64), torch.arange(width, reach + width, width)]
    )
    return torch.cat([-steps, torch.zeros(1), steps]).sort().values


def _with(edges: Tensor, breaks: Tensor) -> Tensor:
    """Edges (E,) and breaks (..., K) within them, in order, (..., E + K)."""
    breaks = breaks.clamp(edges.min(), edges.max())
    return torch.cat([edges.expand(*breaks.shape[:-1], -1), breaks], -1).sort(-1).values


def _scaled(kinks: Sequence[float], roots: Tensor) -> Tensor:
    """Where sigma x is at a kink, (S, K), for roots (S,); far out for sigma = 0."""
    return torch.tensor([kink for kink in kinks if kink]).to(roots) / roots[:, None]


def _relative(difference: Tensor, scale: Tensor) -> float:
    """The largest |difference| / scale, 0 where both are 0."""
    share = torch.where(difference == 0, 0, difference.detach().abs() / scale.detach())
    return float(share.max()) if share.numel() else 0.0
