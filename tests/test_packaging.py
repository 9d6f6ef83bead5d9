"""The wheel built from the source distribution holds the whole package."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_from_sdist_holds_the_linked_packages_and_their_data(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    subprocess.run([*build, tmp_path / "sdist", "--sdist", ROOT], check=True, capture_output=True)
    (archive,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    subprocess.run([*build, tmp_path / "wheel", "--wheel", source], check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for folder in ("ntk_lightning", "ntk_lightning/callbacks", "ntk_lightning/datamodules")
        for pattern in ("**/*.py", "**/*.parquet")
        for path in (ROOT / folder).glob(pattern)
    }
    assert here <= packed
    assert {"ntk_lightning/callbacks/__init__.py", "ntk_lightning/py.typed"} <= packed
    assert "ntk_lightning/datamodules/data/fashion_mnist_pullover_coat_train.parquet" in packed
    assert not any(name.startswith(("callbacks/", "datamodules/")) for name in packed)
