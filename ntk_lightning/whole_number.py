"""The one rule for what a whole number is, for every argument that counts something."""

from __future__ import annotations

from numbers import Integral
from typing import TypeGuard

__all__ = ["check_size", "check_whole", "is_whole"]


def is_whole(value: object) -> TypeGuard[int]:
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


def check_size(name: str, value: object, least: int) -> None:
    """Check an argument that counts something; None stands for a default.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest size allowed.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is too small.
    """
    if value is None:
        return
    if not is_whole(value):
        raise TypeError(f"{name} must be a whole number, got {value!r}: give one int.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
