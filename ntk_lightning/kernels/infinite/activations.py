r"""The activations: one table, one row each; those without a closed form share the row of the quadrature.

The limit of a network needs two expectations of its nonlinearity phi, with (u, v) ~ N(0, [[k11, k12], [k12, k22]]):

    dual covariance  E[phi(u) phi(v)],        dual derivative  E[phi'(u) phi'(v)].

:func:`~ntk_lightning.kernels.infinite.lift.parse` looks a module up in :data:`ACTIVATIONS`, the reference takes
the formulas from there, and a compiled backend runs only activations whose rows name it. A new activation is a new row:
its modules, its function of a :class:`Pair`, and, once they know it, the compiled backends. Of any other pointwise
function the duals are integrated numerically (:mod:`~ntk_lightning.kernels.infinite.quadrature`).

Precision. A correlation r that is computed in p bits is uncertain by some rounding errors eps, and the duals of ReLU
depend on sqrt(1 - r): one eps at r = 1 would be 1e-8 of the kernel in float64. So r within :data:`ROUNDING` eps of 1 or
-1 counts as 1 or -1, which is right for equal vectors and for multiples of each other. Everything else is written
without differences of nearly equal numbers and without products of variances, which overflow: inputs of any size that
the dtype holds have kernels to a few eps.

Longer than 300 lines because a table is read in one piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels.infinite.functions import MODULES, Function, read_function
from ntk_lightning.kernels.infinite.quadrature import expectations, warn_of
from ntk_lightning.networks import Erf, Pointwise

__all__ = [
    "ACTIVATIONS",
    "ROUNDING",
    "Activation",
    "Near",
    "Numerical",
    "Pair",
    "Row",
    "dual_activation",
    "less_its_sine",
    "read_activation",
]

ROUNDING = 16  # machine epsilons by which correlations of equal vectors, and of multiples, may miss 1


@dataclass(frozen=True)
class Activation:
    """Pointwise nonlinearity, by its name in :data:`ACTIVATIONS`; "relu" has the slope of its negative half."""

    name: str
    negative_slope: float = 0.0


@dataclass(frozen=True)
class Numerical(Activation):
    """Pointwise nonlinearity whose duals are integrated numerically."""

    function: Function = field(kw_only=True)


class Near(NamedTuple):
    """The pairs whose 1 - r^2 is known better than covariances tell it: which, and what it is there."""

    mask: Tensor  # (n1, n2)
    sine2: Tensor  # of the pairs in the mask, in their order


class Pair(NamedTuple):
    """Covariances of u and v as the duals need them; all of one shape, or broadcastable to it.

    ``r`` is the correlation, 0 where a variance is 0 and NaN where one is infinite; ``sine2`` is 1 - r^2, exactly 0
    where it is so up to rounding, and there ``k12`` is ``scale`` or its negative. ``plain`` says that r tells sine2.
    """

    k12: Tensor
    k11: Tensor
    k22: Tensor
    scale: Tensor  # sqrt(k11 k22)
    r: Tensor
    sine2: Tensor
    plain: bool = False

    @classmethod
    def of(cls, k12: Tensor, k11: Tensor, k22: Tensor, near: Near | None = None) -> Pair:
        """Prepare covariances; their gradients are finite, and at r = 1 and -1 those of r held fixed."""
        root1, root2 = _sqrt(k11), _sqrt(k22)
        r = k12 * _inverse(root1) * _inverse(root2)  # never a product of variances, which over- or underflows
        scale = root1 * root2
        size = r.abs()
        versine = 1 - size
        sine2 = torch.addcmul(versine, versine, size)  # (1 - |r|) (1 + |r|)
        bound = ROUNDING * torch.finfo(r.dtype).eps
        known = near is not None and near.sine2.numel() > 0
        if not known and versine.numel() and float(versine.detach().min()) > bound:
            return cls(k12, k11, k22, scale, r, sine2, plain=True)
        aligned = versine <= bound
        k12 = torch.where(aligned, r.detach().sign() * scale, k12)
        sine2 = sine2.masked_fill(aligned, 0)
        return cls(k12, k11, k22, scale, r, sine2 if near is None else sine2.masked_scatter(near.mask, near.sine2))

    def versine(self) -> Tensor:
        """1 - r to relative precision."""
        return torch.where(self.r > 0, self.sine2 / (1 + self.r.clamp_min(0)), 1 - self.r)


@dataclass(frozen=True)
class Row:
    """What is known of one activation.

    Args:
        words: Its modules, as a list of supported layers names them.
        modules: Classes of its modules.
        read: Makes the layer of a module; None where options of the module have no closed form.
        dual: E[phi(u) phi(v)] and E[phi'(u) phi'(v)] of a pair, given the layer.
        compiled: Compiled backends that have it, of "cpu" (``fused_cpu_numba``) and "cuda" (``fused_cuda_triton``).
        variance: A bound on E[phi(u)^2], given a bound on that of u, and the layer.
        float32_variance: Variance of u above which float32 does not hold E[phi'(u) phi'(v)].
        shortfall: 1 - E[phi(u) phi(v)] / (h sqrt(k11 k22)) to relative precision where it is small, h E[phi(u)^2] / k11
            in the limit of large k11; None where no precision is lost to correlations near 1.
    """

    words: str
    modules: tuple[type[nn.Module], ...]
    read: Callable[[nn.Module], Activation | None]
    dual: Callable[[Pair, Activation], tuple[Tensor, Tensor]]
    compiled: frozenset[str] = frozenset()
    variance: Callable[[float, Activation], float] = lambda variance, _: variance
    float32_variance: float = math.inf
    shortfall: Callable[[Pair, Activation], Tensor] | None = None


def _relu(pair: Pair, activation: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = max(u, 0) + s min(u, 0). Cho and Saul (2009), of the angle a = pi - arccos(r), for every slope s."""
    k12, _, _, scale, r, sine2, plain = pair
    sine, opposite = sine2.sqrt() if plain else _sqrt(sine2), -r
    angle = opposite.acos() if plain else torch.atan2(sine, opposite)
    s, gain = activation.negative_slope, (1 - activation.negative_slope) ** 2 / (2 * math.pi)
    nngp = torch.addcmul(scale * sine2 * sine, k12, less_its_sine(angle, sine, opposite)) * gain
    return (nngp + s * k12, gain * angle + s) if s else (nngp, gain * angle)


def _relu_shortfall(pair: Pair, activation: Activation) -> Tensor:
    """1 - r - (1 - s)^2 / (pi (1 + s^2)) (sin a - a cos a), with a = arccos(r)."""
    sine = pair.sine2.sqrt()
    angle = torch.atan2(sine, pair.r)
    share = (1 - activation.negative_slope) ** 2 / (math.pi * (1 + activation.negative_slope**2))
    return pair.versine() - share * (sine**3 - pair.r * less_its_sine(angle, sine, pair.r))


def _gelu_shortfall(pair: Pair, _: Activation) -> Tensor:
    """1 - r + (r (c - sin c cos c) - r cos(c) (a b)^2 / sin(c) - cos(c) sin(c) (1 - r^2) / r) / pi, as in ``_gelu``."""
    a2, b2 = 1 / (1 + pair.k11), 1 / (1 + pair.k22)
    ab, sine = a2.sqrt() * b2.sqrt(), _sine(a2, b2, pair.sine2)
    cosine = pair.k12 * ab
    bow = less_its_sine(torch.atan2(sine, cosine), sine, cosine)
    lost = pair.r * (bow - cosine * ab * (ab / sine)) - pair.scale * ab * pair.sine2 * sine
    return pair.versine() + lost / math.pi


def _erf(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = erf(u). Williams (1997), with cosine = 2 k12 a b, a^2 = 1 / (1 + 2 k11), b^2 = 1 / (1 + 2 k22)."""
    a2, b2 = 1 / (1 + 2 * pair.k11), 1 / (1 + 2 * pair.k22)
    ab, sine = a2.sqrt() * b2.sqrt(), _sine(a2, b2, pair.sine2)
    return torch.atan2(2 * pair.k12 * ab, sine) * (2 / math.pi), (4 / math.pi) * ab / sine


def _gelu(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = u P(N(0, 1) < u). Tsuchida et al. (2020, arXiv 2002.08517), here by Stein's lemma."""
    # With a^2 = 1 / (1 + k11), b^2 = 1 / (1 + k22), cosine = k12 a b, sine^2 = 1 - cosine^2 and m = k11 a k22 b
    # (1 - r^2): written so that no large terms cancel where k12 is large, of either sign.
    a2, b2 = 1 / (1 + pair.k11), 1 / (1 + pair.k22)
    a, b, sine = a2.sqrt(), b2.sqrt(), _sine(a2, b2, pair.sine2)
    ab = a * b
    cosine, density = pair.k12 * ab, ab / sine  # 2 pi times the density of (u - z, v - z') at 0, z and z' ~ N(0, 1)
    opposite = -cosine
    bow = less_its_sine(torch.atan2(sine, opposite), sine, opposite)  # of 2 pi P(u > z, v > z')
    m, weight = (pair.k11 * a) * (pair.k22 * b) * pair.sine2, cosine * density
    nngp = torch.addcmul(torch.addcmul(m * sine, pair.k12, bow), cosine, weight)
    derivative = torch.addcmul(bow, weight, ab + density / sine - m)
    return nngp * (0.5 / math.pi), derivative * (0.5 / math.pi)


def _sin(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = sin(u): exp(-m) sinh(k12) and exp(-m) cosh(k12), with m = (k11 + k22) / 2."""
    m = (pair.k11 + pair.k22) / 2
    sum_, difference = (-m - pair.k12).exp(), (pair.k12 - m).exp()
    small = pair.k12.abs() < 1  # where the difference of both exponentials would lose digits
    sinh = (-m).exp() * torch.where(small, pair.k12, 0).sinh()
    return torch.where(small, sinh, (difference - sum_) / 2), (difference + sum_) / 2


def _cos(pair: Pair, activation: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = cos(u): the duals of the sine, in the other order."""
    sine, cosine = _sin(pair, activation)
    return cosine, sine


def _exp(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = exp(u), its own derivative: the mean of a log-normal variable, exp(Var(u + v) / 2)."""
    mean = ((pair.k11 + pair.k22) / 2 + pair.k12).exp()
    return mean, mean


def _sign(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) = sign(u): 2/pi arcsin(r). Its derivative counts as 0: no gradient passes it."""
    nngp = torch.atan2(pair.r, _sqrt(pair.sine2)) * (2 / math.pi)
    return nngp, torch.zeros_like(nngp)


def _quadrature(pair: Pair, activation: Activation) -> tuple[Tensor, Tensor]:
    """phi(u) any function; an estimated error that is too large is told."""
    if not isinstance(activation, Numerical):
        raise NotImplementedError(f"{activation} has no function to integrate.")
    function = activation.function
    duals = expectations(function, function.kinks, _sqrt(pair.k11), _sqrt(pair.k22), pair.r, pair.sine2)
    warn_of(duals.error, function.name.partition(":")[0])
    return duals.nngp, duals.derivative


def _sine(a2: Tensor, b2: Tensor, sine2: Tensor) -> Tensor:
    """sqrt(1 - cosine^2) with cosine^2 = (1 - a2) (1 - b2) (1 - sine2), as a sum of positive numbers."""
    return torch.addcmul(a2, 1 - a2, torch.addcmul(b2, 1 - b2, sine2)).sqrt()


def _sqrt(k: Tensor) -> Tensor:
    """Square root, 0 below 0, where rounding can leave a variance; its gradient is 0 there, not infinite."""
    if not k.requires_grad:
        return k.clamp_min(0).sqrt()
    return torch.where(k > 0, torch.where(k > 0, k, 1).sqrt(), 0)


def _inverse(root: Tensor) -> Tensor:
    """1 / root, 0 of 0; NaN of infinity, since an overflow must not look like a correlation of 0."""
    positive = torch.where(root > 0, root, 1) if root.requires_grad else root  # whose gradient is not infinite at 0
    return torch.where(root > 0, 1 / positive, 0) + (root - root)


def _read_relu(module: nn.Module) -> Activation:
    return Activation("relu", module.negative_slope if isinstance(module, nn.LeakyReLU) else 0.0)


def _read_gelu(module: nn.Module) -> Activation:
    return Activation("gelu") if isinstance(module, nn.GELU) and module.approximate == "none" else _numerical(module)


def _read_pointwise(module: nn.Module) -> Activation:
    return _FUNCTIONS.get(getattr(module, "function", None)) or _numerical(module)


def _numerical(module: nn.Module) -> Numerical:
    return Numerical("quadrature", function=read_function(module))


def _named_only(name: str) -> tuple[tuple[type[nn.Module], ...], Callable[[nn.Module], Activation]]:
    """Neither modules nor reader: Pointwise leads to the row."""
    return (), lambda _: Activation(name)


_BOTH = frozenset({"cpu", "cuda"})
ACTIVATIONS: dict[str, Row] = {
    "relu": Row(
        *("nn.ReLU, nn.LeakyReLU", (nn.ReLU, nn.LeakyReLU), _read_relu, _relu, _BOTH),
        variance=lambda variance, activation: variance * max(1.0, activation.negative_slope**2),
        shortfall=_relu_shortfall,
    ),
    "gelu": Row("nn.GELU", (nn.GELU,), _read_gelu, _gelu, _BOTH, shortfall=_gelu_shortfall),
    "erf": Row(
        *("Erf", (Erf,), lambda _: Activation("erf"), _erf, _BOTH),
        variance=lambda *_: 1.0,
        float32_variance=100.0,  # then it is nearly a step, whose derivative is that of ReLU's second
    ),
    "sin": Row("Pointwise(torch.sin)", *_named_only("sin"), _sin),
    "cos": Row("Pointwise(torch.cos)", *_named_only("cos"), _cos),
    "exp": Row("Pointwise(torch.exp)", *_named_only("exp"), _exp),
    "sign": Row("Pointwise(torch.sign)", *_named_only("sign"), _sign),
    "quadrature": Row(
        ", ".join([*(f"nn.{kind.__name__}" for kind in MODULES), "Pointwise(any function)"]),
        *((*MODULES, Pointwise), _read_pointwise, _quadrature),
    ),
}

_FUNCTIONS: dict[object, Activation] = {  # of Pointwise, that have closed forms
    **dict.fromkeys((torch.relu, F.relu), Activation("relu")),
    **dict.fromkeys((torch.abs, torch.absolute), Activation("relu", -1.0)),  # max(u, 0) - min(u, 0)
    **dict.fromkeys((torch.erf, torch.special.erf), Activation("erf")),
    **dict.fromkeys((torch.sign, torch.sgn), Activation("sign")),
    **{function: Activation(function.__name__) for function in (torch.sin, torch.cos, torch.exp)},
    F.leaky_relu: Activation("relu", 0.01),
    F.gelu: Activation("gelu"),
}


def read_activation(module: nn.Module) -> Activation | None:
    """Find the layer of a module.

    Args:
        module: Any module.

    Returns:
        Its layer, or None where the table has no closed form of it.

    Example:
        >>> read_activation(nn.LeakyReLU(0.1))
        Activation(name='relu', negative_slope=0.1)
    """
    rows = (row for row in ACTIVATIONS.values() if isinstance(module, row.modules))
    return next((row.read(module) for row in rows), None)


def dual_activation(
    activation: Activation, k12: Tensor, k11: Tensor, k22: Tensor, near: Near | None = None
) -> tuple[Tensor, Tensor]:
    """Expectations E[phi(u) phi(v)] and E[phi'(u) phi'(v)] for (u, v) ~ N(0, [[k11, k12], [k12, k22]]).

    Args:
        activation: The nonlinearity.
        k12: Covariances, any shape.
        k11: Variances of u, broadcastable to k12.
        k22: Variances of v, broadcastable to k12.
        near: Pairs, of k12 (n1, n2), whose correlations are known better than the covariances tell them.

    Returns:
        Both expectations, each of the shape of k12. Where u and v are multiples of each other, the derivative of ReLU's
        second with respect to the inputs has a kink; its gradient there is the mean of both sides.

    Raises:
        NotImplementedError: The activation's name is unknown.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> dual_activation(Activation("relu"), one, one, one)
        (tensor(0.5000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    row = ACTIVATIONS.get(activation.name)
    if row is None:
        raise NotImplementedError(f"No dual activation of {activation.name!r}.")
    return row.dual(Pair.of(k12, k11, k22, near), activation)


def less_its_sine(angle: Tensor, sine: Tensor, cosine: Tensor) -> Tensor:
    """Compute angle - sine cosine = (2 angle - sin(2 angle)) / 2, to relative precision for small angles too.

    Args:
        angle: In radians, from 0 to pi.
        sine: Its sine, of the same shape.
        cosine: Its cosine, of the same shape.

    Returns:
        The difference, of the same shape.

    Example:
        >>> angle = torch.tensor([1e-5, 3.0], dtype=torch.float64)
        >>> less_its_sine(angle, angle.sin(), angle.cos())
        tensor([6.6667e-16, 3.1397e+00], dtype=torch.float64)
    """
    difference = torch.addcmul(angle, sine, cosine, value=-1)
    if angle.numel() and float(angle.detach().min()) >= 0.3:
        return difference
    small = angle < 0.3
    x = angle[small]
    series, y = torch.ones_like(x), 4 * x**2
    for n in (18, 16, 14, 12, 10, 8, 6, 4):
        series = 1 - y / (n * (n + 1)) * series
    return difference.index_put((small,), x**3 * (2 / 3) * series)
