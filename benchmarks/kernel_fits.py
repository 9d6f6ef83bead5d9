"""Kernel fits: SGD beside the memory it reads, and the critical learning rate. Parts of empirical_ntk.py.

The yardstick of SGD is the time to read the training Gram from memory once an epoch: the sum of its entries, on as many
threads. Both are measured in turn, after a first round for compiling. Printed are the ratio of the medians and that of
the fastest rounds, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import kernel_sgd, kernel_sgd_grid

N, TESTS, EPOCHS = 4000, 1000, 100
GRID_EPOCHS = 10


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def kernel_sgd_beside_memory(options: argparse.Namespace) -> dict[str, Any]:
    """Part 3: kernel SGD, n=4000, batch 200, 100 epochs, 1000 test points each epoch."""
    rounds = options.rounds
    generator = torch.Generator().manual_seed(0)
    points = torch.nn.functional.normalize(torch.randn(N + TESTS, 64, generator=generator))
    gram = (1 + points @ points[:N].T).square()
    labels = torch.randn(N + TESTS, generator=generator).sign()
    kernel, test_kernel = gram[:N].clone(), gram[N:].clone()
    sets = {"test": (test_kernel, labels[N:])}
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
    print(
        f"kernel_sgd, n={N}, batch 200, {EPOCHS} epochs: {result['ratio_to_reading_once_an_epoch']['medians']:.2f} "
        "times the time that reading K once an epoch takes (medians; at most 3)"
    )
    return result


def critical_rate(options: argparse.Namespace) -> dict[str, Any]:
    """Part 6: full-batch descent just below and just above the critical learning rate."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(100, 20, generator=generator, dtype=torch.float64)
    kernel, labels = points @ points.T, torch.randn(100, generator=generator).sign()
    outcome = {}
    for momentum in (0.0, 0.9):
        critical = critical_learning_rate(kernel, momentum=momentum)
        for factor in (0.95, 1.05):
            config = OptimizerConfig(lr=factor * critical, momentum=momentum, full_batch=True, steps=4000)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the rate is above critical is the point
                fit = kernel_sgd(kernel, labels, config, eval_every=4000, evaluate_train=True)
            loss = float(fit.curves["train"].losses[-1])
            outcome[f"momentum {momentum}, {factor} times critical"] = loss
            print(f"momentum {momentum}, lr {factor} times critical: training loss after 4000 steps {loss:.3g}")
    return outcome
