"""Kernel SGD beside the memory it reads: n=4000, batch 200, 100 epochs, 1000 test points each epoch (float32, CPU).

The yardstick is the time to read the training Gram from memory once an epoch: the sum of its entries, on as many
threads. Both are measured in turn, after a first round for compiling. Printed are the ratio of the medians and that of
the fastest rounds, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numba
import torch

from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import kernel_sgd, kernel_sgd_grid

N, TESTS, EPOCHS = 4000, 1000, 100
GRID_EPOCHS = 10
RESULTS = Path(__file__).parent / "results" / "kernel_sgd_cpu.json"


def machine() -> str:
    """Name the processor and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(N + TESTS, 64, generator=generator))
    gram = (1 + points @ points[:N].T).square()
    labels = torch.randn(N + TESTS, generator=generator).sign()
    kernel, test_kernel = gram[:N].clone(), gram[N:].clone()
    sets = {"test_kernel": test_kernel, "test_targets": labels[N:]}
    config = OptimizerConfig(lr=0.1 * critical_learning_rate(kernel), batch_size=200, epochs=EPOCHS)
    grid = [replace(config, lr=config.lr * factor / 16, epochs=GRID_EPOCHS) for factor in range(1, 17)]

    tasks: dict[str, Callable[[], object]] = {
        "read": lambda: [kernel.sum() for _ in range(EPOCHS)],
        "read_with_test_rows": lambda: [(kernel.sum(), test_kernel.sum()) for _ in range(EPOCHS)],
        "kernel_sgd": lambda: kernel_sgd(kernel, labels[:N], config, **sets),
        f"grid_of_16_rates_{GRID_EPOCHS}_epochs": lambda: kernel_sgd_grid(kernel, labels[:N], grid, **sets),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, work in tasks.items():
            elapsed = seconds(work)
            if number:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = {name: min(values) for name, values in times.items()}
    result = {
        "machine": machine(),
        "threads": {"torch": torch.get_num_threads(), "numba": numba.get_num_threads()},
        "torch": torch.__version__,
        "n": N,
        "epochs": EPOCHS,
        "rounds": rounds,
        "median_seconds": {name: round(value, 4) for name, value in medians.items()},
        "fastest_seconds": {name: round(value, 4) for name, value in fastest.items()},
        "read_gigabytes_per_second": round(kernel.nbytes * EPOCHS / fastest["read"] / 1e9, 1),
        "ratio_to_reading_once_an_epoch": {
            "medians": round(medians["kernel_sgd"] / medians["read"], 2),
            "fastest": round(fastest["kernel_sgd"] / fastest["read"], 2),
        },
        "ratio_per_run_of_16_rates": round(
            fastest[f"grid_of_16_rates_{GRID_EPOCHS}_epochs"] / 16 * EPOCHS / GRID_EPOCHS / fastest["read"], 2
        ),
        "at_most": 3,
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
