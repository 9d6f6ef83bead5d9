"""Public names that are imported when they are first used (PEP 562), so that importing a package stays cheap."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

__all__ = ["lazy_names"]


def lazy_names(package: str, homes: Sequence[str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__``.

    Args:
        package: Full name of the package, whose ``__all__`` lists its public names.
        homes: Its modules that define them, each with an ``__all__``; they are imported in this order until one has
            the name, so those that import least come first.

    Returns:
        The two functions.
    """

    def getattribute(name: str) -> object:
        module = sys.modules[package]
        if name in module.__all__:
            for home in homes:
                if name in (found := import_module(f"{package}.{home}")).__all__:
                    value = getattr(found, name)
                    setattr(module, name, value)
                    return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def directory() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return getattribute, directory
