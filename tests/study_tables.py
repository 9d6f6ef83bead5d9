"""Made-up result tables of studies, one of every kind of figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SIZES = (500, 1000, 2000, 4000, 8000, 16000)
STEPS = (0, 1, 3, 10, 32, 100, 320, 1000)


def row(model: str, error: float, *, arm: str | None = None, seed: int = 0, **columns: Any) -> dict[str, Any]:  # noqa: ANN401
    """One fit, with a test loss twice its error."""
    return {
        "study": "made up",
        "arm": arm or model,
        "model": model,
        "cell": "0123abcd",
        **{"n": 1000, "m": None, "t": None, "width": None if model in ("infinite", "nngp") else 64, "seed": seed},
        **{"lr": 1.0, "momentum": 0.9, "batch_size": 50, "full_batch": False, "epochs": 100, "steps": 2000},
        **{"optimal_error": error, "optimal_step": 900, "last_error": 1.1 * error},
        **{"optimal_loss": 2 * error, "last_loss": 2.2 * error, "network_error": None, "network_loss": None},
        **{"initial_error": None, "initial_loss": None},
        **{"curve_steps": [0, 900, 2000], "curve_errors": [0.5, error, 1.1 * error], "curve_losses": [1.0, 0.4, 0.5]},
        **{"seconds": 1.5, "git_revision": "abc1234", "version": "0.1.0", "config": "{}"},
        **columns,
    }


def law(alpha: float, beta: float, n: int, seed: int = 0, noise: float = 0.03) -> float:
    """An error near alpha n^-beta."""
    return float(
        alpha
        * n**-beta
        * np.exp(noise * np.random.default_rng([n, seed, int(1000 * alpha), int(1000 * beta)]).standard_normal())
    )


def write(folder: Path, name: str, x: str, rows: list[dict[str, Any]], **figure: Any) -> Path:  # noqa: ANN401
    """Write a study's table."""
    config = {
        **{"name": name, "title": name.replace("_", " ").title(), "scale": "small", "figure": {"x": x, **figure}},
        **{"arms": [{"label": label} for label in dict.fromkeys(row["arm"] for row in rows)], "grid": {}},
        "data": {"class_path": "ntk_lightning.datamodules.CIFAR10Binary", "init_args": {"n_test": 2000}},
        "net": {"class_path": "ntk_lightning.networks.MyrtleCNN", "init_args": {"depth": 5, "in_channels": 3}},
    }
    table = pa.Table.from_pylist(rows).replace_schema_metadata({b"study": json.dumps(config).encode()})
    pq.write_table(table, folder / f"{name}.parquet")
    return folder / f"{name}.parquet"


def scaling(folder: Path, seeds: int = 3) -> Path:
    """Error against n of a network and two kernels: figure 1A."""
    laws = {"network": (1.9, 0.29), "empirical": (1.3, 0.19), "infinite": (1.4, 0.2)}
    arms = {"network": "network", "empirical": "empirical NTK", "infinite": "infinite NTK"}
    rows = [
        row(model, law(*laws[model], n, seed), arm=arms[model], n=n, seed=seed)
        for n in SIZES
        for model in laws
        for seed in range(seeds)
    ]
    published = {"network": 0.291, "empirical NTK": 0.178, "infinite NTK": 0.195}
    caption = "Five-layer CNN on animals against vehicles of CIFAR-10: the network's error falls faster."
    return write(folder, "figure_1a", "n", rows, published=published, caption=caption)


def after_kernels(folder: Path, seeds: int = 2) -> Path:
    """Error against n of after-kernels and kernels during training, many lines: figures 3 and 4."""
    rows = []
    for seed in range(seeds):
        for n in SIZES:
            one = {"n": n, "seed": seed}
            rows.append(row("network", law(1.9, 0.29, n, seed), **one))
            rows.append(row("after-kernel", law(2.5, 0.27, n, seed), m=n, arm="after-kernel", **one))
            rows.append(row("after-kernel", law(1.2, 0.2, n, seed), m=16000, arm="after-kernel of all", **one))
            rows.append(row("after-kernel, fresh", law(1.3, 0.2, n, seed), m=16000, arm="fresh", **one))
            rows.append(row("after-kernel, fresh", law(1.4, 0.2, n, seed), m=1000, arm="fresh", **one))
            for t in (10, n // 25):
                error = law(2.0 - t / 1000, 0.2, n, seed)
                rows.append(row("kernel during training", error, t=t, m=n, arm="K^t", **one))
    published = {"network": 0.291, "$K_n(n)$": 0.28}
    return write(folder, "figure_3a", "n", rows, published=published, caption="After-kernels.")


def fresh_samples(folder: Path) -> Path:
    """Error of K_m^F(n) against m: figure 1B."""
    rows = []
    for seed in range(3):
        for m in SIZES:
            rows.append(row("network", law(1.9, 0.29, m, seed), n=m, seed=seed))
            for n, alpha in ((1000, 1.2), (4000, 0.9)):
                rows.append(row("after-kernel, fresh", law(alpha, 0.15, m, seed), n=n, m=m, seed=seed, arm="fresh"))
    return write(folder, "figure_1b", "m", rows, caption="Kernels learned from more samples are better.")


def dynamics(folder: Path, seeds: int = 3) -> Path:
    """Error of K^t and the network against t: figure 1C. The network parts from K^0 after t = 100."""
    network = (0.5, 0.49, 0.46, 0.35, 0.28, 0.21, 0.15, 0.12)
    initial = (1.0, 0.48, 0.45, 0.34, 0.28, 0.22, 0.2, 0.2)
    kernel = (0.26, 0.255, 0.25, 0.24, 0.22, 0.2, 0.18, 0.17)
    rows = [row("infinite", law(0.27, 0.0, 1, seed), arm="infinite NTK", n=4000, seed=seed) for seed in range(seeds)]
    for seed in range(seeds):
        for t, *errors in zip(STEPS, network, initial, kernel, strict=True):
            a, b, c = (law(error, 0.0, 1, seed) for error in errors)
            beside = {"network_error": a, "network_loss": 2 * a, "initial_error": b, "initial_loss": 2 * b}
            rows.append(row("kernel during training", c, n=4000, t=t, seed=seed, arm="network", m=4000, **beside))
        rows.append(row("network", 0.12, n=4000, seed=seed))
    return write(folder, "figure_1c", "t", rows, caption="The kernel keeps improving.")


def widths(folder: Path) -> Path:
    """Error against width: figure 2b."""
    rows = [row("infinite", law(0.2, 0.0, 1, seed), arm="infinite NTK", seed=seed) for seed in range(3)]
    for width in (16, 32, 64, 128, 256):
        for seed in range(3):
            one = {"width": width, "seed": seed}
            rows.append(row("network", law(0.2, 0.03, width, seed), **one))
            rows.append(row("empirical", law(0.3, 0.06, width, seed), arm="empirical NTK", **one))
    return write(folder, "figure_2b", "width", rows, caption="Width.")


def orders(folder: Path) -> Path:
    """Error against n of Taylor expansions, one seed, arms with several widths, and a diverged fit."""
    rows = []
    for n in SIZES:
        rows += [row("network", law(1.9, 0.29, n, width), n=n, width=width) for width in (64, 128)]
        for order in (2, 3):
            broken = order == 3 and n == 2000
            loss = {"optimal_loss": float("nan"), "last_loss": float("inf")} if broken else {}
            rows.append(row(f"order {order}", law(2.0, 0.2 + 0.02 * order, n, order), n=n, **loss))
    return write(folder, "orders", "n", rows)


def all_kinds(folder: Path) -> Path:
    """One table of every kind."""
    for make in (scaling, after_kernels, fresh_samples, dynamics, widths, orders):
        make(folder)
    return folder
