"""P-values of several claims at once."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["holm"]


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p-values for the number of claims tested, by Holm's step-down method.

    Of m tests the i-th smallest p-value becomes max_(j <= i) min(1, (m - j + 1) p_(j)). Rejecting what is then at most
    alpha, a true hypothesis is rejected with a probability of at most alpha, however the tests depend on each other:
    Holm (1979, "A simple sequentially rejective multiple test procedure").

    Args:
        p_values: One a claim; None where no test was made, which does not count.

    Returns:
        The corrected ones, in the same order.

    Example:
        >>> holm([0.04, None, 0.01])
        [0.04, None, 0.02]
    """
    tested = sorted((value, index) for index, value in enumerate(p_values) if value is not None)
    corrected: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (value, index) in enumerate(tested):
        least = max(least, min(1.0, (len(tested) - rank) * value))
        corrected[index] = least
    return corrected
