"""Imports run one way: studies, callbacks, modules, then solvers, kernels and data modules, then single files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ntk_lightning"
# From the top down: a folder imports from those in later rows only. "" are the single files of the top level.
LAYERS = (
    ("studies",),
    ("callbacks",),
    ("modules",),
    ("datamodules", "solvers", "kernels", "scaling", "testing"),
    ("networks",),
    ("",),
)
HEIGHT = {folder: -number for number, layer in enumerate(LAYERS) for folder in layer}
# Programs, which import from everywhere and are imported by nothing.
PROGRAMS = {"__main__", "cli", "commands"}


def files() -> Iterator[tuple[str, Path]]:
    """The folder and path of every file, through the links to callbacks and data modules."""
    nested = (path for folder in HEIGHT if folder for path in (PACKAGE / folder).rglob("*.py"))
    for path in (*PACKAGE.glob("*.py"), *nested):
        parts = path.relative_to(PACKAGE).parts
        yield (parts[0] if len(parts) > 1 else ""), path


def imported(path: Path) -> Iterator[str]:
    """Names of this package's modules that a file imports, also within functions; not those for types only."""
    tree = ast.parse(path.read_text())
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ntk_lightning":
            if node.module == "ntk_lightning":
                yield from (f"ntk_lightning.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ntk_lightning")


def folder_of(module: str) -> str:
    """The folder of a module, "" for a single file of the top level."""
    name = module.split(".")[1]
    return name if (PACKAGE / name).is_dir() else ""


def edges() -> Iterator[tuple[str, str, str]]:
    """Folder, imported folder, and file, of each import from another folder."""
    for folder, path in files():
        if folder == "" and path.stem in {*PROGRAMS, "__init__"}:
            continue
        for module in imported(path):
            if folder_of(module) != folder:
                yield folder, folder_of(module), f"{path.relative_to(PACKAGE)} imports {module}"


def test_every_folder_has_its_layer() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert found <= HEIGHT.keys()


def test_nothing_is_imported_from_above() -> None:
    upwards = [text for folder, other, text in edges() if HEIGHT[other] > HEIGHT[folder]]
    assert upwards == []


def test_no_cycle_between_folders() -> None:
    graph: dict[str, set[str]] = {}
    for folder, other, _ in edges():
        graph.setdefault(folder, set()).add(other)
    left = {*graph, *(other for others in graph.values() for other in others)}
    while free := {folder for folder in left if not graph.get(folder, set()) & left}:
        left -= free  # what imports nothing that is left is in no cycle
    assert left == set()


def test_programs_are_imported_by_programs_only() -> None:
    found = [
        f"{path.relative_to(PACKAGE)} imports {module}"
        for _, path in files()
        for module in imported(path)
        if module.split(".")[1] in PROGRAMS and path.stem not in PROGRAMS
    ]
    assert found == []


def test_an_import_from_above_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ntk_lightning.studies import study\n"
        "from ntk_lightning import callbacks\n\ndef f():\n    import ntk_lightning.modules.base\n"
    )
    assert list(imported(file)) == ["ntk_lightning.callbacks", "ntk_lightning.modules.base"]


@pytest.mark.parametrize("folder", ["kernels", "solvers", "scaling"])
def test_mathematics_loads_no_lightning(folder: str) -> None:
    names = [
        ".".join(("ntk_lightning", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for there, path in files()
        if there == folder and "triton" not in path.stem  # which needs a GPU's package
    ]
    program = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    program += "print(sorted(m for m in sys.modules if m.split('.')[0] in ('lightning', 'pytorch_lightning')))"
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert told.stdout.strip() == "[]"
