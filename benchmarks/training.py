"""What training costs beside a bare PyTorch loop, and what watching the empirical NTK costs beside the training.

Parts of empirical_ntk.py.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Trainer

from ntk_lightning.callbacks import EmpiricalNTKDynamics
from ntk_lightning.datamodules import FashionMNISTBinary
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MyrtleCNN
from ntk_lightning.optim import OptimizerConfig

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(width: int, n: int, epochs: int, folder: str, **kwargs: Any) -> Callable[[], None]:  # noqa: ANN401 - passed on
    """Prepare a run of FiniteNetwork under the Trainer."""
    data = FashionMNISTBinary(n_train=n, n_test=200)
    data.setup()

    def run() -> None:
        torch.manual_seed(0)
        trainer = Trainer(
            max_epochs=epochs,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            **kwargs,
        )
        trainer.fit(FiniteNetwork(MyrtleCNN(width, in_channels=1), OptimizerConfig(lr=0.1)), datamodule=data)

    return run


def bare_loop(width: int, n: int, epochs: int) -> Callable[[], None]:
    """Prepare the same steps without Lightning."""
    data = FashionMNISTBinary(n_train=n, n_test=200)
    data.setup()
    assert data.train_set is not None
    x, y, config = data.train_set.x, data.train_set.y, OptimizerConfig(lr=0.1)

    def run() -> None:
        torch.manual_seed(0)
        net = MyrtleCNN(width, in_channels=1)
        optimizer = config.configure(net.parameters())
        for epoch in range(epochs):
            for batch in config.batches(n, epoch):
                optimizer.zero_grad()
                (net(x[batch])[:, 0] - y[batch]).square().mean().backward()
                optimizer.step()

    return run


def ratio(first: Callable[[], None], second: Callable[[], None], rounds: int) -> tuple[float, dict[str, list[float]]]:
    """Median time of the first by that of the second, and all times; the order turns every round, after a warm-up."""
    runs: dict[str, Callable[[], None]] = {"first": first, "second": second}
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    first(), second()
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(round(time.perf_counter() - start, 4))
    return statistics.median(seconds["first"]) / statistics.median(seconds["second"]), seconds


def trainer_beside_loop(options: argparse.Namespace) -> dict[str, Any]:
    """Part 5: FiniteNetwork under Trainer, no callbacks, n=4000, width 16."""
    with tempfile.TemporaryDirectory() as folder:
        median, seconds = ratio(bare_loop(16, 4000, 2), fit(16, 4000, 2, folder), options.rounds)
    print(f"FiniteNetwork under Trainer, n=4000, width 16: {median:.3f} of a bare loop's samples/s (at least 0.95)")
    return {"samples_per_second_of_bare_loop": median, "seconds": seconds}


def watching_beside_training(options: argparse.Namespace) -> dict[str, Any]:
    """K^t at 30 log-spaced steps, n=256, width 64, beside the training that it watches."""
    epochs, n = 20, 512
    with tempfile.TemporaryDirectory() as folder:
        watched = fit(64, n, epochs, folder, callbacks=[EmpiricalNTKDynamics(log_spaced=30)])
        median, seconds = ratio(watched, fit(64, n, epochs, folder), min(3, options.rounds))
    steps = epochs * OptimizerConfig().steps_per_epoch(n)
    print(f"K^t at 30 log-spaced of {steps} steps, n={n}, width 64: {median:.2f} times the run without")
    return {"steps": steps, "watched_over_unwatched": median, "seconds": seconds}
