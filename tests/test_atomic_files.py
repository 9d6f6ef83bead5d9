"""Files are there whole or not at all, and one place in the package renames and flushes them."""

from __future__ import annotations

import ast
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import file_size_limit

from ntk_lightning.atomic_files import atomic_write, remove_stale

ROOT = Path(__file__).parent.parent
SOURCES = [file for folder in ("ntk_lightning", "callbacks", "datamodules") for file in (ROOT / folder).rglob("*.py")]
CALLS = {"os.replace", "os.rename", "os.renames", "os.link", "os.fsync", "os.fdatasync", "shutil.move"}


def finishing_calls(file: Path) -> list[str]:
    """Calls that rename, link or flush a file, also by methods of a Path."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and f"{ast.unparse(node.value)}.{node.attr}" in CALLS:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            to_path = len(node.args) == 1 and not node.keywords  # str.replace takes two
            if node.func.attr in ("rename", "hardlink_to") or (node.func.attr == "replace" and to_path):
                found.append(ast.unparse(node))
    return found


def test_one_file_of_the_package_renames_and_flushes() -> None:
    found = {file.name: finishing_calls(file) for file in SOURCES if finishing_calls(file)}
    assert found.keys() == {"atomic_files.py"}
    assert {"os.replace", "os.link", "os.fsync"} <= set(found["atomic_files.py"])


def test_a_body_that_raises_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError), atomic_write(path, "Advice") as temporary:
        temporary.write_text("half \udcff", encoding="utf-8")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("table", "before")]


def test_a_full_disk_is_told_with_path_and_advice(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with (
        file_size_limit(10),
        pytest.raises(OSError, match=rf"Cannot write {path}: .*\. Make room") as raised,
        atomic_write(path, "Make room") as temporary,
    ):
        temporary.write_text("more than ten bytes")
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def no_links(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("link", [os.link, no_links])
@pytest.mark.parametrize(("there", "expected"), [(None, "mine"), ("whole", "whole"), ("damaged", "mine")])
def test_the_first_whole_file_stays(
    there: str | None, expected: str, link: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "block"
    with atomic_write(path, "Advice", keep=lambda path: path.read_text() == "whole") as temporary:
        temporary.write_text("mine")
        if there is not None:  # another process is faster
            path.write_text(there)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("block", expected)]


def test_the_last_writer_wins_where_none_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "table"
    for text in ("first", "second"):
        with atomic_write(path, "Advice") as temporary:
            temporary.write_text(text)
    assert path.read_text() == "second"


def test_file_and_folder_are_flushed_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fsync(descriptor: int) -> None:
        calls.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)

    def replace(source: Path, target: Path) -> None:
        calls.append(f"to {target.name}")
        source.rename(target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "table", "Advice") as temporary:
        temporary.write_text("x")
    assert calls == [temporary.name, "to table", tmp_path.name]


def test_only_old_temporary_files_are_stale(tmp_path: Path) -> None:
    for name in (".new.partial", ".old.partial", "file.bin.partial", "old"):
        (tmp_path / name).touch()
        if "new" not in name:
            os.utime(tmp_path / name, (0, 0))
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new.partial", "file.bin.partial", "old"]
