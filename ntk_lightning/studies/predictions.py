"""The learning curve that theory predicts of a cell's kernel, beside what its fits measure."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ntk_lightning.scaling.learning_curve import LearningCurve, predict_learning_curve

__all__ = ["PREDICT_MAX", "predicted_columns"]

PREDICT_MAX = 8192  # samples: a minute of two cores and 2 GB for the eigenvectors
_LEAST = 16  # samples, below which the theory is weak
_RIDGES = 25


def predicted_columns(gram: Tensor, targets: Tensor) -> dict[str, Any]:
    """Predict error and loss of ridge regression on N, N / 2, N / 4, ... of N samples, each at its best ridge.

    The fits of a study stop at their best step; a best ridge is what comes nearest to that in the theory, and as much
    of an oracle (see :func:`~ntk_lightning.scaling.predict_learning_curve`). At n = N the prediction is a
    leave-one-out estimate on the N samples themselves.

    Args:
        gram: Of a kernel on N training samples, (N, N).
        targets: Their labels, (N,) in {-1, +1}.

    Returns:
        The columns "predicted_sizes", "predicted_errors" and "predicted_losses" of a row; none where N is above 8192
        or below 32, or, with a warning, where the Gram is that of no kernel.
    """
    count = len(gram)
    if not 2 * _LEAST <= count <= PREDICT_MAX:
        return {}
    sizes = [count >> k for k in range(int(math.log2(count / _LEAST)) + 1)][::-1]
    try:
        curves = _curves(gram.detach().double(), targets, sizes)
    except ValueError as error:
        warnings.warn(f"There is no predicted learning curve. {error}", stacklevel=2)
        return {}
    return {
        "predicted_sizes": sizes,
        "predicted_errors": np.min(
            [curve.test_errors for curve in curves if curve.test_errors is not None], 0
        ).tolist(),
        "predicted_losses": np.min([curve.test_losses for curve in curves], 0).tolist(),
    }


def _curves(kernel: Tensor, targets: Tensor, sizes: list[int]) -> list[LearningCurve]:
    """The curves at ridges from ten times the largest eigenvalue per sample down to rounding."""
    values, vectors = torch.linalg.eigh(kernel)
    # What rounding of a float32 Gram makes negative tells how much of the small eigenvalues is rounding, too
    floor, largest = max(-float(values[0]), 0.0), float(values[-1])
    if largest <= floor:
        raise ValueError("kernel has no positive eigenvalue above its rounding.")
    eigensystem = torch.where(values > floor, values, 0.0), vectors
    ridges = np.logspace(1, math.log10(max(floor / largest, 1e-10)), _RIDGES) * largest / len(kernel)
    return [predict_learning_curve(kernel, targets, sizes, float(r), eigensystem=eigensystem) for r in ridges]
