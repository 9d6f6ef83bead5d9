r"""Plain infinite-width kernels, to read and to test against.

One class of formulas in the order in which a network computes: with K the covariance of the pre-activations (NNGP) and
Theta the NTK, both indexed by a pair of inputs and, for images, a pair of pixels,

    affine:      K <- weight_std^2 A(K) + bias_std^2,   Theta <- weight_std^2 A(Theta) + K (the new one),
    activation:  K <- E[phi(u) phi(v)],                 Theta <- Theta E[phi'(u) phi'(v)],   (u, v) ~ N(0, K),

where A is the identity (linear) or the average over the filter's shifts of both pixels (convolution). See Jacot et al.
(2018, arXiv 1806.07572), Arora et al. (2019, arXiv 1904.11955) and Novak et al. (2019, arXiv 1810.05148).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.kernels.infinite.activations import ROUNDING, Activation, Near, dual_activation
from ntk_lightning.kernels.infinite.alignment import after_activation, after_affine, input_alignment
from ntk_lightning.kernels.infinite.architecture import Conv, Flatten, GlobalAvgPool, Layer, Linear, Pool, Sum

__all__ = ["dual_activation", "gram"]


@dataclass(frozen=True)
class _Fields:
    """Covariances of a block of pairs, (n1, n2) for vectors and (n1, n2, H, W, H, W) for images.

    ``self1`` and ``self2`` are the covariances of every input with itself, (n1, ...) and (n2, ...). ``near`` are pairs
    of vectors whose correlation is known better than the covariances tell it.
    """

    nngp: Tensor
    ntk: Tensor
    self1: Tensor
    self2: Tensor
    near: Near | None = None

    def map(self, linear: Layer) -> _Fields:
        """Apply a layer that acts on every covariance alike."""
        nngp, ntk, self1, self2 = (_linear_map(linear, k) for k in (self.nngp, self.ntk, self.self1, self.self2))
        return _Fields(nngp, ntk, self1, self2)


def gram(layers: Sequence[Layer], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both infinite-width kernels of all pairs at once; memory grows with n1 * n2 * (H * W)^2.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.architecture.parse`, with shapes checked.
        x1: Inputs (n1, d) or (n1, C, H, W).
        x2: Inputs (n2, d) or (n2, C, H, W) of the same dtype; x1 itself for its symmetric Gram.

    Returns:
        NNGP and NTK, each (n1, n2).
    """
    nngp, near = _input_covariance(x1, x2)
    fields = _Fields(nngp, torch.zeros_like(nngp), _input_variance(x1), _input_variance(x2), near)
    if x1 is x2:
        nngp.diagonal().copy_(fields.self1.movedim(0, -1))  # equal to the last bit, so that correlations are one
    fields = _apply(layers, fields)
    return fields.nngp, fields.ntk


def _input_covariance(x1: Tensor, x2: Tensor) -> tuple[Tensor, Near | None]:
    """Mean over channels of all products of pixels, (n1, n2, H, W, H, W); of vectors, (n1, n2)."""
    if x1.dim() == 2:
        k = x1 @ x2.T / x1.shape[1]
        better, near = input_alignment(k.detach(), x1.detach(), x2.detach())
        return (k + (better - k.detach()), None) if k.requires_grad else (better, near)
    k = torch.einsum("achw,bcij->ahwbij", x1, x2) / x1.shape[1]
    if x1.shape[1] > ROUNDING:  # with fewer channels, sums round less than what counts as a correlation of 1
        rows1, rows2 = (x.detach().movedim(1, -1).reshape(-1, x.shape[1]) for x in (x1, x2))
        flat = k.detach().reshape(len(rows1), len(rows2))
        k = k + (input_alignment(flat, rows1, rows2)[0] - flat).reshape(k.shape)
    return k.movedim(3, 1), None


def _input_variance(x: Tensor) -> Tensor:
    """Covariance of every input with itself, (n, H, W, H, W); of vectors, (n,)."""
    return torch.einsum("nchw,ncij->nhwij", x, x) / x.shape[1] if x.dim() == 4 else (x * x).mean(1)


def _apply(layers: Sequence[Layer], k: _Fields) -> _Fields:
    for layer in layers:
        match layer:
            case Linear() | Conv():
                near = k.near
                if near is not None and isinstance(layer, Linear):
                    variances = k.self1[:, None], k.self2
                    near = after_affine(near, k.nngp, *variances, layer.weight_std, layer.bias_std)
                k = replace(k.map(layer), near=near)
                k = replace(k, ntk=k.ntk - layer.bias_std**2 + k.nngp)  # the bias counts once, inside the new NNGP
            case Activation():
                diagonal1, diagonal2 = _pixel_variance(k.self1), _pixel_variance(k.self2)
                if k.nngp.dim() > 2:
                    left, right = diagonal1[:, None, :, :, None, None], diagonal2[None, :, None, None]
                    self1 = dual_activation(layer, k.self1, diagonal1[:, :, :, None, None], diagonal1[:, None, None])[0]
                    self2 = dual_activation(layer, k.self2, diagonal2[:, :, :, None, None], diagonal2[:, None, None])[0]
                else:
                    left, right = diagonal1[:, None], diagonal2[None]
                    self1, self2 = (dual_activation(layer, s, s, s)[0] for s in (k.self1, k.self2))
                nngp, derivative = dual_activation(layer, k.nngp, left, right, k.near)
                near = None if k.near is None else after_activation(layer, k.near, k.nngp, left, right)
                k = _Fields(nngp, k.ntk * derivative, self1, self2, near)
            case Sum(body, shortcut):
                a, b = _apply(body, k), _apply(shortcut, k)
                k = _Fields(a.nngp + b.nngp, a.ntk + b.ntk, a.self1 + b.self1, a.self2 + b.self2)
            case Pool() | GlobalAvgPool() | Flatten():
                k = replace(k.map(layer), near=k.near)  # vectors, of which alone it is known, pass nn.Flatten only
    return k


def _pixel_variance(k: Tensor) -> Tensor:
    """Variances of the pixels, (n, H, W, H, W) -> (n, H, W); of vectors, (n,) -> (n,)."""
    return k if k.dim() == 1 else torch.einsum("nhwhw->nhw", k)


def _linear_map(layer: Layer, k: Tensor) -> Tensor:
    """Covariance after a linear layer: an average over shifts of both pixels, or a mean over pixels."""
    match layer:
        case Linear(weight_std, bias_std):
            return weight_std**2 * k + bias_std**2
        case Conv(size, pad, stride, weight_std, bias_std):
            padded = F.pad(k, (pad,) * 8)
            height, width = ((side - size) // stride + 1 for side in padded.shape[-2:])
            total = torch.zeros(())
            for i, j in itertools.product(range(size), repeat=2):
                rows, columns = (slice(d, d + stride * side, stride) for d, side in ((i, height), (j, width)))
                total = total + padded[..., rows, columns, rows, columns]
            return (weight_std / size) ** 2 * total + bias_std**2
        case Pool(size, stride):
            for _ in range(2):  # the second pixel of each pair, then the first
                k = F.avg_pool2d(k.flatten(0, -4), size, stride).unflatten(0, k.shape[:-3])
                k = k.movedim((-2, -1), (-4, -3))
            return k
        case GlobalAvgPool():
            return k.mean((-4, -3, -2, -1))[..., None, None, None, None]
        case Flatten():
            return k if k.dim() < 5 else torch.einsum("...hwhw->...", k) / (k.shape[-1] * k.shape[-2])
    raise NotImplementedError(f"{layer} is not linear.")
