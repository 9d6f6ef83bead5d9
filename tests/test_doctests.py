"""The example of every docstring gives what it says."""

from __future__ import annotations

import doctest
import pkgutil
from importlib import import_module
from pathlib import Path

import pytest

import ntk_lightning

MODULES = ["ntk_lightning", *(found.name for found in pkgutil.walk_packages(ntk_lightning.__path__, "ntk_lightning."))]


def test_the_linked_folders_are_among_the_modules() -> None:
    assert {"ntk_lightning.callbacks.from_trainer", "ntk_lightning.datamodules.base", "ntk_lightning.optim"} <= {
        *MODULES
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    assert module.__file__ is not None
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    assert attempted > 0 or ">>>" not in Path(module.__file__).read_text()
