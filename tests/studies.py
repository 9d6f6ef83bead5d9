"""Studies of seconds, for tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

CONFIGS = Path(__file__).parents[1] / "cli_configs" / "studies"
SHIPPED = sorted(file for file in CONFIGS.glob("*.yaml") if file.stem != "common")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SWITCHES = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--dump-dom"),
    "--window-size=500,1500",
)
VARYING = ("seconds", "git_revision", "version")
_SIZES = {"figure_2b": [12], "figure_2c": [12], "figure_5a": [12], "figure_4c": [6, 12]}
_WIDTHS = {"figure_2b": [2, 3], "figure_2c": [2, 3]}
_ARMS: dict[str, Any] = {
    "figure_2a": [{"label": f"width {width}", "grid": {"width": [width]}} for width in (2, 3)],
    "figure_4b": [{"label": "network", "after_fresh": [6], "show": ["after-kernel, fresh"]}],
    "figure_4c": [
        {"label": "network"},
        {"label": "$K_0$", "model": "empirical"},
        {"label": "K_12", "grid": {"n": [12]}, "after": [6, 12], "show": ["after-kernel"]},
    ],
    "figure_5a": [{"label": "network", "kernels_at": 3}],
    "figure_5b": [{"label": "network", "kernels_at": [1, 2]}],
}


def tiny(file: Path, folder: Path) -> Path:
    """Write an overlay that makes a study of a shipped configuration tiny."""
    grid = {"n": _SIZES.get(file.stem, [6, 9, 12]), "width": _WIDTHS.get(file.stem, [2]), "seed": [0, 1], "epochs": [2]}
    changes: dict[str, Any] = {
        "data": {
            "class_path": "ntk_lightning.datamodules.SyntheticTeacher",
            "init_args": {"shape": [3, 8, 8], "pool_size": 40, "n_test": 16},
        },
        "net": {"init_args": {"in_channels": 3}},
        "grid": {**grid, "batch_size": [6]},
    }
    if file.stem in _ARMS:
        changes["arms"] = _ARMS[file.stem]
    if file.stem in ("figure_4b", "figure_5b"):
        changes["figure"] = {"fitted_on": 6} if file.stem == "figure_4b" else {"at": [1, 2]}
    path = folder / f"tiny_{file.stem}.yaml"
    path.write_text(yaml.safe_dump(changes))
    return path


def table(path: Path) -> list[dict[str, Any]]:
    """Read a result table without what differs from run to run."""
    rows = pq.read_table(path).to_pylist()
    return [{name: value for name, value in row.items() if name not in VARYING} for row in rows]


def browse(page: Path, profile: Path) -> str:
    """Open a page in Chromium, which must have nothing to complain of: its document as it was shown."""
    command = [str(CHROMIUM), *SWITCHES, f"--user-data-dir={profile}", page.resolve().as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr
    return shown.stdout
