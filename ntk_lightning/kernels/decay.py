"""How fast a kernel's spectrum and a task's coefficients in it fall: exponents of power laws, with intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

__all__ = ["Decay", "decay_exponents"]

_GROUPS = 10  # of samples that the jackknife leaves out
_FIRST = 2  # rank: the largest eigenvalue is that of the constant function
_LEAST = 40  # samples
_CONFIDENCE = 0.95


class Decay(NamedTuple):
    """A fitted power law i^(-exponent) in the rank i.

    Attributes:
        exponent: Positive for a falling law.
        interval: Its 95% confidence interval, over draws of the samples.
    """

    exponent: float
    interval: tuple[float, float]


def decay_exponents(kernel: Tensor, targets: Tensor) -> tuple[Decay, Decay] | None:
    """Fit power laws to the eigenvalues of a Gram and to what its leading eigenvectors leave of the targets.

    With eigenpairs (lambda_i, q_i), falling, the first law is lambda_i ~ i^(-a), and the second is that of the tail
    T(k) = sum_{i > k} ||q_i'y||^2 / ||y||^2 ~ k^(-b): the exponents that learning curves of kernel regression follow
    from (Bordelon et al., 2020, arXiv 2002.02561; Cui et al., 2021, arXiv 2105.15004). Both are least squares in
    log-log over the ranks 2 to n / 10, or to 8 where that is more, each decade with the same weight: beyond, a Gram's
    eigenvalues are not the kernel's. Intervals are those of a jackknife over ten groups of samples, with t of 9 degrees
    of freedom.

    Args:
        kernel: Gram on n points, (n, n).
        targets: Labels, (n,) or (n, C).

    Returns:
        The decay of the spectrum and that of the targets; None below 40 samples, or where an eigenvalue or a tail in
        that range is zero.

    Example:
        >>> x = torch.randn(200, 400, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 401) ** -1.0
        >>> spectrum, target = decay_exponents(x @ x.T, x[:, 0])
        >>> spectrum.interval[0] < 2 < spectrum.interval[1]
        True
    """
    count = len(kernel)
    if count < _LEAST:
        return None
    gram = kernel.detach().cpu().double()
    labels = targets.detach().cpu().double().reshape(count, -1)
    last = max(8, count // 10)
    ranks = np.unique(np.geomspace(_FIRST, last, min(20, last - _FIRST + 1)).round().astype(int))
    left_out = [torch.arange(count) % _GROUPS != group for group in range(_GROUPS)]
    whole, *parts = (
        _slopes(gram[kept][:, kept], labels[kept], ranks) for kept in (torch.ones(count, dtype=torch.bool), *left_out)
    )
    spread = np.std(parts, 0) * math.sqrt(_GROUPS - 1)
    if not np.isfinite([*whole, *spread]).all():
        return None
    width = spread * stats.t.ppf((1 + _CONFIDENCE) / 2, _GROUPS - 1)
    spectrum, target = (
        Decay(float(value), (float(value - half), float(value + half)))
        for value, half in zip(whole, width, strict=True)
    )
    return spectrum, target


def _slopes(gram: Tensor, labels: Tensor, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """-d log lambda_i / d log i and -d log T(k) / d log k, (2,); NaN where a logarithm does not exist."""
    values, vectors = torch.linalg.eigh(gram)
    powers = (vectors.T @ labels).square().sum(1).flip(0)  # (n,), the largest eigenvalue's first
    tails = powers.flip(0).cumsum(0).flip(0) / powers.sum()  # of rank i and beyond
    laws = torch.stack([values.flip(0)[ranks - 1], tails[ranks]]).numpy()
    if not (laws > 0).all():
        return np.full(2, np.nan)
    slopes: NDArray[np.float64] = -np.polyfit(np.log(ranks), np.log(laws).T, 1)[0]
    return slopes
