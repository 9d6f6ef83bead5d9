"""Covariances of the inputs of a network, equal to rounding where pixels are multiples of each other."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lightning.kernels.infinite.activations import ROUNDING, Near
from ntk_lightning.kernels.infinite.alignment import input_alignment

__all__ = ["covariance", "own_covariance"]


def covariance(x1: Tensor, x2: Tensor, full: bool) -> tuple[Tensor, Near | None]:
    """Compute the mean over channels of products of pixels, of all pairs of inputs.

    Args:
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...).
        full: Whether of all pairs of pixels, not of equal ones alone.

    Returns:
        Covariances (n1, n2, H, W, H, W) or (n1, n2, H, W), of vectors (n1, n2), and pairs of vectors that are nearly
        multiples of each other.
    """
    channels = x1.shape[1]
    if x1.dim() == 2:
        k = x1 @ x2.T / channels
        better, near = input_alignment(k.detach(), x1.detach(), x2.detach())
        return (k + (better - k.detach()), None) if k.requires_grad else (better, near)
    rows1, rows2 = (x.movedim(1, -1).flatten(1, -2) for x in (x1, x2))  # (n, P, C)
    if full:  # (n1, P, n2, P)
        k = _aligned(rows1.flatten(0, 1), rows2.flatten(0, 1)).view(len(x1), -1, len(x2), rows2.shape[1])
        k = k.movedim(2, 1)
    else:
        k = _aligned(rows1.movedim(1, 0), rows2.movedim(1, 0)).movedim(0, -1).contiguous()
    return k.reshape(len(x1), len(x2), *x1.shape[2:], *(x2.shape[2:] if full else ())), None


def _aligned(rows1: Tensor, rows2: Tensor) -> Tensor:
    """Covariances of pixels (..., m1, C) and (..., m2, C), those of multiples of each other to rounding."""
    k = rows1 @ rows2.mT / rows1.shape[-1]
    if rows1.shape[-1] <= ROUNDING:  # sums round less than what counts as a correlation of 1
        return k
    known = k.detach().reshape(-1, *k.shape[-2:])
    pixels = zip(known, *(rows.detach().reshape(-1, *rows.shape[-2:]) for rows in (rows1, rows2)), strict=True)
    return k + (torch.stack([input_alignment(*pixel)[0] for pixel in pixels]).view_as(k) - k.detach())


def own_covariance(x: Tensor, full: bool) -> Tensor:
    """Compute the covariance of every input with itself.

    Args:
        x: Inputs (n, ...).
        full: Whether of all pairs of pixels, not of equal ones alone.

    Returns:
        (n, H, W, H, W) or (n, H, W); of vectors, (n,).
    """
    if not full:
        return (x * x).mean(1)
    rows = x.flatten(2)
    return (rows.mT @ rows / x.shape[1]).view(len(x), *x.shape[2:], *x.shape[2:])
