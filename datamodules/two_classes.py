"""Two classes of a data set with more of them, or two groups of classes, as labels -1 and +1."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np
import torch

from ntk_lightning.whole_number import is_whole

__all__ = ["TwoClasses", "binary_labels", "check_classes", "check_present", "class_groups", "signed_classes"]

TwoClasses: TypeAlias = Sequence[int | Sequence[int]]  # two class numbers, or two groups of them


def class_groups(classes: TwoClasses) -> tuple[tuple[int, ...], ...]:
    """Write single classes as groups of one.

    Args:
        classes: For each label, -1 and +1, a class number or several.

    Returns:
        The class numbers of each label.

    Example:
        >>> class_groups((5, 7)), class_groups([[2, 3], [0, 1]])
        (((5,), (7,)), ((2, 3), (0, 1)))
    """
    return tuple((group,) if is_whole(group) else tuple(group) for group in classes)  # type: ignore[arg-type]  # is_whole


def check_classes(classes: TwoClasses, count: int = 10) -> None:
    """Check the choice of two classes, or of two groups of classes.

    Args:
        classes: Class numbers for the labels -1 and +1.
        count: How many classes there are.

    Raises:
        ValueError: They are not two different class numbers, nor two groups of class numbers without a common one.
    """
    groups = class_groups(classes) if all(is_whole(c) or isinstance(c, (list, tuple)) for c in classes) else ()
    every = [number for group in groups for number in group]
    numbers = all(is_whole(c) and 0 <= c < count for c in every)
    if len(groups) != 2 or not all(groups) or not numbers or len(set(every)) < len(every):
        raise ValueError(
            f"classes must be two different class numbers from 0 to {count - 1}, or two groups of such numbers "
            f"in which none comes twice, got {classes}."
        )


def check_present(labels: np.ndarray, classes: TwoClasses, source: str) -> None:
    """Check that data have every class of groups of classes; two single classes are left to the data module.

    Args:
        labels: (n,) class numbers.
        classes: As for :func:`check_classes`.
        source: Where the labels are from, for the error.

    Raises:
        ValueError: A class of a group has no sample.
    """
    every = {number for group in class_groups(classes) for number in group}
    missing = sorted(every - set(np.unique(labels).tolist()))
    if missing and len(every) > 2:
        raise ValueError(
            f"{source} has no sample of the classes {missing}: give data that have them, or take them out of classes."
        )


def binary_labels(labels: np.ndarray, classes: TwoClasses) -> torch.Tensor:
    """Map the first class, or group of classes, to -1 and the second to +1.

    Args:
        labels: (n,) class numbers, each one of these.
        classes: As for :func:`check_classes`.

    Returns:
        float32 labels (n,).
    """
    return torch.from_numpy(np.where(np.isin(labels, class_groups(classes)[1]), 1.0, -1.0).astype(np.float32))


def signed_classes(labels: np.ndarray, classes: Collection[Collection[int]]) -> np.ndarray:
    """Write label and class as one number: s (1 + c), s the label -1 or +1 and c the class; s alone of single classes.

    Args:
        labels: (n,) class numbers, each one of those in ``classes``.
        classes: The two groups.

    Returns:
        (n,) int8.
    """
    first, second = classes
    signs = np.where(np.isin(labels, list(second)), 1, -1)
    return (signs if len(first) == len(second) == 1 else signs * (1 + labels)).astype(np.int8)
