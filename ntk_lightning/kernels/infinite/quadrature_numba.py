"""Hermite coefficients of many functions, each with nodes of its own, in compiled code."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numba import njit
from numpy.typing import NDArray

__all__ = ["hermite_terms"]

Array = NDArray[np.float64]


def _hermite_terms(x: Array, values: Array, before: Array, current: Array, first: int, out: Array) -> None:
    """Add the next terms, c_n = sum over nodes of weighted values times h_n, for every row.

    With h_(n+1) = (x h_n - sqrt(n) h_(n-1)) / sqrt(n + 1).

    Args:
        x: Nodes (S, Q).
        values: Of f and of f' at the nodes, times their weights (2, S, Q).
        before: h_(first-1) at the nodes (S, Q); overwritten by h_(last).
        current: h_first (S, Q); overwritten by h_(last+1).
        first: Number of the first term.
        out: Terms (2, N, S), filled in.
    """
    for s in range(x.shape[0]):
        nodes, old, new = x[s], before[s], current[s]
        left, right = values[0, s], values[1, s]
        for i in range(out.shape[1]):
            n = first + i
            root, share = math.sqrt(n), 1 / math.sqrt(n + 1)
            one = two = 0.0
            for q in range(nodes.shape[0]):
                h = new[q]
                one += left[q] * h
                two += right[q] * h
                new[q] = (nodes[q] * h - root * old[q]) * share
                old[q] = h
            out[0, i, s] = one
            out[1, i, s] = two


_relaxed = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"}, cache=True)
hermite_terms: Callable[[Array, Array, Array, Array, int, Array], None] = _relaxed(_hermite_terms)
