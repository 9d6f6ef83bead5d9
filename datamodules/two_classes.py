"""Two classes of a data set with more of them, as labels -1 and +1."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from ntk_lightning.whole_number import is_whole

__all__ = ["binary_labels", "check_classes"]


def check_classes(classes: Collection[int], count: int = 10) -> None:
    """Check the choice of two classes.

    Args:
        classes: Class numbers for the labels -1 and +1.
        count: How many classes there are.

    Raises:
        ValueError: They are not two different class numbers.
    """
    if len(classes) != 2 or len(set(classes)) != 2 or not all(is_whole(c) and 0 <= c < count for c in classes):
        raise ValueError(f"classes must be two different class numbers from 0 to {count - 1}, got {classes}.")


def binary_labels(labels: np.ndarray, classes: tuple[int, int]) -> torch.Tensor:
    """Map the first class to -1 and the second to +1.

    Args:
        labels: (n,) class numbers, each one of the two.
        classes: The two class numbers.

    Returns:
        float32 labels (n,).
    """
    return torch.from_numpy(np.where(labels == classes[1], 1.0, -1.0).astype(np.float32))
