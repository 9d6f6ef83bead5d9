"""The task of every model: mean squared error on targets in {-1, +1} (or one-hot), and the error rate."""

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
        Targets (n, num_outputs). Whether the labels are of classes that there are is for :func:`check_labels` to say,
        once: it has to wait for the device.

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


def check_labels(labels: Tensor, num_outputs: int = 1, *, name: str = "Labels", hint: str = "") -> None:
    """Check labels.

    Args:
        labels: (n,): -1 or +1 for one output, class numbers for several; (n, num_outputs) targets may be any.
        num_outputs: Outputs of the network.
        name: What to call them in the message.
        hint: A sentence to end the message with.

    Raises:
        ValueError: A label is neither -1 nor +1, or is no class number.
    """
    if num_outputs > 1:
        classes = labels if labels.dim() == 1 else labels[:0, 0]
        wrong = classes[(classes < 0) | (classes >= num_outputs) | (classes != classes.floor())]
        if len(wrong):
            raise ValueError(
                f"{name} of a network with {num_outputs} outputs must be class numbers 0 to {num_outputs - 1}, got "
                f"{wrong.unique()[:5].tolist()}: map them, or give the network one output for labels -1 and +1.{hint}"
            )
        return
    if ((labels != 1) & (labels != -1)).any():
        raise ValueError(
            f"{name} must be -1 or +1, got {labels.unique()[:5].tolist()}: map your two classes to them (0 and 1 by "
            f"2 * y - 1); several classes need several outputs of the network, or one_hot(y) for a solver.{hint}"
        )
