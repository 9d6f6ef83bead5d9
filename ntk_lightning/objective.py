"""The task of every arm: mean squared error on targets in {-1, +1} (or one-hot), and the error rate."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["check_labels", "count_errors", "encode_targets", "squared_error"]


def encode_targets(labels: Tensor, num_outputs: int, dtype: torch.dtype) -> Tensor:
    """Bring labels to the shape of a network's outputs.

    Args:
        labels: (n,) in {-1, +1} for one output; (n,) class numbers or (n, num_outputs) real targets for several.
        num_outputs: Outputs of the network.
        dtype: Floating-point type of the outputs.

    Returns:
        Targets (n, num_outputs).

    Raises:
        ValueError: The labels do not fit the number of outputs.
    """
    if num_outputs > 1 and labels.dim() == 1:
        return F.one_hot(labels.long(), num_outputs).to(dtype)
    if labels.numel() != len(labels) * num_outputs:
        raise ValueError(f"Labels of shape {tuple(labels.shape)} do not fit {num_outputs} outputs.")
    return labels.reshape(-1, num_outputs).to(dtype)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of every sample, averaged over outputs.

    Args:
        outputs: (..., n, num_outputs).
        targets: (..., n, num_outputs).

    Returns:
        (..., n), whose mean over a batch is the loss.
    """
    return (outputs - targets).square().mean(-1)


def count_errors(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tell which samples are misclassified: sign(f) != y, where f = 0 and NaN are errors; argmax for several outputs.

    Args:
        outputs: (..., n, num_outputs).
        targets: (..., n, num_outputs).

    Returns:
        Boolean (..., n), True for an error.

    Example:
        >>> count_errors(torch.tensor([[0.5], [0.0], [-2.0]]), torch.tensor([[1.0], [1.0], [-1.0]]))
        tensor([False,  True, False])
    """
    if targets.shape[-1] == 1:
        return ~(outputs * targets > 0)[..., 0]
    return (outputs.argmax(-1) != targets.argmax(-1)) | outputs.isnan().any(-1)


def check_labels(labels: Tensor) -> None:
    """Check binary labels.

    Args:
        labels: (n,).

    Raises:
        ValueError: A label is neither -1 nor +1.
    """
    wrong = labels[(labels != 1) & (labels != -1)]
    if len(wrong):
        raise ValueError(
            f"Labels must be -1 or +1, got {wrong.unique()[:5].tolist()}: map your two classes to them, "
            "or give the network several outputs."
        )
