"""The tiny tasks of the soak: how each is run, gone on with, looked at and damaged."""

from __future__ import annotations

import contextlib
import glob
import importlib
import itertools
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "cli_configs"
PACKAGE, NETWORK = "ntk_lightning", {"width": 4, "in_channels": 3}
NET = {"class_path": f"{PACKAGE}.networks.FiveLayerCNN", "init_args": NETWORK}
MODELS = "FiniteNetwork", "LinearizedNetwork", "InfiniteNTKReadout"
CALLBACKS: dict[str, dict[str, Any]] = {
    "EmpiricalNTKDynamics": {"every_n_batches": 7},
    "KernelDiagnostics": {"every_n_batches": 4, "probe_size": 12},
    "AfterKernel": {},
    "InfiniteNTKFit": {"store": "grams"},
}


@dataclass(frozen=True)
class Task:
    """What a child does in a folder, and does again to go on; and how to look at what it has done.

    Args:
        kind: "fit", "study" or "store".
        name: Which.
        prepare: Writes what the task reads.
        run: Does it.
        finished: What must neither change nor vanish any more: names and stamps.
        results: What must equal an undisturbed run's: names and contents.
    """

    kind: str
    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    finished: Callable[[Path], dict[str, Any]]
    results: Callable[[Path], dict[str, Any]]


def stamps(folder: Path, *patterns: str) -> dict[str, Any]:
    """Tell the files that are finished (temporary ones begin with a dot) and when each was written."""
    found = {}
    for name in itertools.chain.from_iterable(glob.glob(pattern, root_dir=folder) for pattern in patterns):
        with contextlib.suppress(FileNotFoundError):
            stat = (folder / name).stat()
            found[name] = (stat.st_ino, stat.st_mtime_ns)
    return found


def prepare_fit(model: str, folder: Path) -> None:
    callbacks = {"OptimalEarlyStopping": {}} | (CALLBACKS if model == "FiniteNetwork" else {})
    optimizer = {"lr": 0.2, "momentum": 0.9, "batch_size": 8}
    trainer = {"max_epochs": 5, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    config = {
        "trainer": trainer
        | {"callbacks": [{"class_path": f"{PACKAGE}.callbacks.{k}", "init_args": v} for k, v in callbacks.items()]},
        "model": {
            "class_path": f"{PACKAGE}.modules.{model}",
            "init_args": {"net": NET, "optimizer": optimizer},
        },
        "data": {
            "class_path": f"{PACKAGE}.datamodules.SyntheticTeacher",
            "init_args": {"shape": [3, 8, 8], "pool_size": 40, "n_train": 28, "n_test": 16},
        },
    }
    (folder / "fit.yaml").write_text(json.dumps(config))


def run_fit(folder: Path) -> None:
    main = importlib.import_module(f"{PACKAGE}.cli").main
    configs = [f"--config={file}" for file in (folder / "fit.yaml", CONFIGS / "overlays" / "resume.yaml")]
    os.chdir(folder)
    cli = main(["fit", *configs, "--trainer.callbacks.every_n_steps=3", f"--trainer.default_root_dir={folder}"])
    undisturbed()
    weights = {name: value.numpy().tobytes() for name, value in cli.model.state_dict().items()}
    (folder / "weights").write_text(repr(weights))


def saved_step(folder: Path) -> dict[str, Any]:
    """Tell the step from which a fit would go on."""
    import torch

    path = folder / "runs/resume/resume.ckpt"
    return {"step": torch.load(path, weights_only=True)["global_step"]} if path.exists() else {}


def fit_results(folder: Path) -> dict[str, Any]:
    files = [*folder.rglob("*.csv"), *folder.rglob("*.ckpt"), folder / "weights"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.exists()}


def prepare_study(name: str, folder: Path) -> None:
    importlib.import_module("studies").tiny(CONFIGS / "studies" / f"{name}.yaml", folder)


def run_study(name: str, folder: Path) -> None:
    files = (CONFIGS / "studies" / f"{name}.yaml", folder / f"tiny_{name}.yaml")
    configs = [f"--config={file}" for file in files]
    importlib.import_module(f"{PACKAGE}.cli").main(["study", *configs, f"--output={folder}/results", "--cpus=1"])


def study_cells(folder: Path) -> dict[str, Any]:
    return stamps(folder, "results/cells/*.parquet")


def study_results(name: str, folder: Path) -> dict[str, Any]:
    path = folder / "results" / f"{name}.parquet"
    table = repr(importlib.import_module("studies").table(path)) if path.exists() else None
    return dict.fromkeys(study_cells(folder)) | ({str(path.name): table} if table else {})


def run_store(folder: Path) -> None:
    import torch

    from ntk_lightning.kernels import InfiniteNTK, KernelStore
    from ntk_lightning.networks import MyrtleCNN

    x = torch.randn(104, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    KernelStore(folder / "grams", InfiniteNTK(MyrtleCNN(2)), x, block=16).compute(progress=False)


def store_blocks(folder: Path) -> dict[str, Any]:
    return stamps(folder, "grams/*/*.zarr.zip")


def store_results(folder: Path) -> dict[str, Any]:
    return {name: (folder / name).read_bytes() for name in stamps(folder, "grams/*/zarr.json", "grams/*/*.zarr.zip")}


def tasks() -> dict[str, list[Task]]:
    """Name all tasks by kind."""
    fits = [Task("fit", m, partial(prepare_fit, m), run_fit, saved_step, fit_results) for m in MODELS]
    studies = [
        Task("study", s, partial(prepare_study, s), partial(run_study, s), study_cells, partial(study_results, s))
        for s in ("figure_4a", "figure_1a", "figure_5b")
    ]
    return {
        "fit": fits,
        "study": studies,
        "store": [Task("store", "InfiniteNTK", lambda _: None, run_store, store_blocks, store_results)],
    }


def undisturbed() -> None:
    """End a full disk in this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def damage_finished(task: Task, folder: Path) -> None:
    """Lose something finished, as a package with a bug would."""
    fit = [name for name in ("runs/resume/resume.ckpt", "error_curve.csv") if (folder / name).exists()]
    (folder / (fit if task.kind == "fit" else sorted(task.finished(folder)))[0]).unlink()


def damage_result(task: Task, folder: Path) -> None:
    """Change a result, as a package with a bug would."""
    name = sorted(name for name, content in task.results(folder).items() if content)[0]
    if task.kind == "study":
        import pyarrow.parquet as pq

        table = folder / "results" / name
        pq.write_table(pq.read_table(table).slice(1), table)
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
