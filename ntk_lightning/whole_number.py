"""The one rule for what a whole number is, for every argument that counts something."""

from __future__ import annotations

from numbers import Integral

__all__ = ["check_whole", "is_whole"]


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number: an int or NumPy integer, but not a truth value and not 3.0.

    Args:
        value: Anything.

    Returns:
        Whether it is.

    Example:
        >>> is_whole(3), is_whole(3.0), is_whole(True)
        (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole(owner: str, **sizes: object) -> None:
    """Check that sizes are whole numbers.

    Args:
        owner: What needs them, for the message.
        **sizes: The values, by name.

    Raises:
        TypeError: One is not.
    """
    for name, size in sizes.items():
        if not is_whole(size):
            raise TypeError(f"{owner} needs sizes that are whole numbers, got {name}={size!r}: give one int.")
