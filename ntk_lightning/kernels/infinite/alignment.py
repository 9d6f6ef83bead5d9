"""How far two vectors are from being multiples of each other, followed through a network to relative precision.

With r the correlation of two vectors, the dual derivative of ReLU depends on sqrt(1 - r), and at large inputs that of
erf on 1 - r^2 alone. Taken from covariances, 1 - r^2 is uncertain by the machine epsilon: that is 1e-8 of the NTK of
nearly equal vectors, and may be any part of that of erf. So for vectors that are nearly multiples of each other,
sine2 = 1 - r^2 is followed on its own, from the distance of the inputs on. Where it is not known (images, sums of
branches, inputs that require gradients) it is taken from the covariances, and correlations within rounding of 1 count
as 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, ROUNDING, Activation, Near, Pair

__all__ = ["after_activation", "after_affine", "input_alignment"]

_ENTRIES = 2**20  # of differences at once
_NEAR = 1e-4  # distance of a correlation from 1 from which on covariances tell it well enough


def input_alignment(k12: Tensor, x1: Tensor, x2: Tensor) -> tuple[Tensor, Near]:
    """Covariances of inputs whatever the order in which their sums were rounded, and 1 - r^2 where that is small.

    With unit vectors u and v, 1 -+ u.v = |u -+ v|^2 / 2.

    Args:
        k12: Means over entries of their products, (n1, n2).
        x1: Vectors (n1, d).
        x2: Vectors (n2, d).

    Returns:
        The covariances (n1, n2), and 1 - r^2 of pairs near 1 and -1, 0 for multiples up to rounding.
    """
    root1, root2 = ((x * x).mean(1).sqrt() for x in (x1, x2))
    mask = k12.abs() > (1 - _NEAR) * root1[:, None] * root2
    unit1, unit2 = (F.normalize(x, dim=1, eps=0) for x in (x1, x2))
    rounding = (ROUNDING * torch.finfo(k12.dtype).eps) ** 2
    k12, gaps = k12.clone(), []
    for rows in torch.arange(len(x1), device=x1.device).split(256):
        for i, j in (part.unbind(1) for part in mask[rows].nonzero().split(max(1, _ENTRIES // x1.shape[1]))):
            i = rows[i]
            sign = k12[i, j].sign()
            gap = (unit1[i] - sign[:, None] * unit2[j]).square().sum(1) / 2
            gaps.append(torch.where(2 * gap > rounding, gap, 0))
            k12[i, j] = sign * (1 - gaps[-1]) * root1[i] * root2[j]
    gap = torch.cat([k12.new_empty(0), *gaps])
    return k12, Near(mask, gap * (2 - gap))


def after_affine(near: Near, k12: Tensor, k11: Tensor, k22: Tensor, weight_std: float, bias_std: float) -> Near:
    """1 - r^2 after K <- weight_std^2 K + bias_std^2, as a sum of positive numbers.

    Args:
        near: Pairs before.
        k12: Covariances before, (n1, n2).
        k11: Variances before, (n1, 1).
        k22: Variances before, (n2,).
        weight_std: Of the layer.
        bias_std: Of the layer.

    Returns:
        Pairs after the layer: those before, and those that the bias brings near.
    """
    if bias_std == 0:
        return near
    after12, after1, after2 = (weight_std**2 * k + bias_std**2 for k in (k12, k11, k22))
    mask = near.mask | (after12 > (1 - _NEAR) * after1.sqrt() * after2.sqrt())
    pair = _select(Pair.of(k12, k11, k22, near), mask)
    after1, after2 = (after.expand_as(mask)[mask] for after in (after1, after2))
    # k11' k22' - k12'^2 = w^4 (k11 k22 - k12^2) + w^2 b^2 |u - v|^2, with |u - v|^2 = k11 + k22 - 2 k12
    distance2 = (pair.k11.sqrt() - pair.k22.sqrt()).square() + 2 * pair.scale * pair.versine()
    kept = (weight_std**2 * pair.k11 / after1) * (weight_std**2 * pair.k22 / after2) * pair.sine2
    small, large = torch.minimum(after1, after2), torch.maximum(after1, after2)
    return Near(mask, kept + (weight_std**2 * distance2 / large) * (bias_std**2 / small))


def after_activation(activation: Activation, near: Near, k12: Tensor, k11: Tensor, k22: Tensor) -> Near | None:
    """1 - r^2 after an activation.

    Args:
        activation: The nonlinearity.
        near: Pairs before.
        k12: Covariances before, (n1, n2).
        k11: Variances before, (n1, 1).
        k22: Variances before, (n2,).

    Returns:
        The same pairs after it, or None where the covariances tell their 1 - r^2 as well.
    """
    shortfall = ACTIVATIONS[activation.name].shortfall
    if shortfall is None or not len(near.sine2):
        return None if shortfall is None else near
    k12, k11, k22 = (k.expand_as(near.mask)[near.mask] for k in (k12, k11, k22))
    pair = Pair.of(k12, k11, k22)._replace(sine2=near.sine2, plain=False)
    # With E[phi(u) phi(v)] = (1 - g12) h sqrt(k11 k22), and so on, r' = (1 - g12) / sqrt((1 - g11) (1 - g22))
    g12 = shortfall(pair, activation)
    g11, g22 = (shortfall(Pair.of(k, k, k), activation) for k in (k11, k22))
    difference = 2 * g12 - g11 - g22 + g11 * g22 - g12**2
    rounding = ROUNDING * torch.finfo(k12.dtype).eps * torch.maximum(g11, g22)
    return Near(near.mask, torch.where(difference > rounding, difference, 0) / ((1 - g11) * (1 - g22)))


def _select(pair: Pair, mask: Tensor) -> Pair:
    k12, k11, k22, scale, r, sine2 = (k.expand_as(mask)[mask] for k in pair[:6])
    return Pair(k12, k11, k22, scale, r, sine2)
