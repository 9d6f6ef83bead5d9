"""Configurations that come with the package, for those who have no checkout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["find_config", "find_configs"]

SHIPPED = Path(__file__).parent / "cli_configs"


def find_config(path: str) -> str:
    """Find a configuration where it was named, or else among those that come with the package.

    Args:
        path: Of a file; where there is none, a path below ``cli_configs``, with or without that folder's name, such as
            ``cli_configs/myrtle64.yaml`` or ``studies/figure_1a.yaml``.

    Returns:
        The path of the file that there is; ``path`` itself where there is none.

    Example:
        >>> find_config("overlays/linearized.yaml") == str(SHIPPED / "overlays" / "linearized.yaml")
        True
        >>> find_config("nowhere.yaml")
        'nowhere.yaml'
    """
    parts = Path(path).parts
    shipped = SHIPPED.joinpath(*parts[parts[:1] == (SHIPPED.name,) :])
    return str(shipped) if os.path.isfile(shipped) and not os.path.exists(path) else path


def find_configs(arguments: Sequence[str]) -> list[str]:
    """Apply :func:`find_config` to every ``--config`` (or ``-c``) of a command line.

    Args:
        arguments: Of the command line.

    Returns:
        The arguments, with the paths that were found.

    Example:
        >>> find_configs(["fit", "--config", "nowhere.yaml", "--config=nowhere.yaml"])
        ['fit', '--config', 'nowhere.yaml', '--config=nowhere.yaml']
    """
    found: list[str] = []
    for argument in arguments:
        option, equals, path = argument.partition("=")
        if found and found[-1] in ("--config", "-c"):
            argument = find_config(argument)
        elif option == "--config" and equals:
            argument = f"{option}={find_config(path)}"
        found.append(argument)
    return found
