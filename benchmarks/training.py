"""What training and its linearized twins cost beside a bare loop, watching the kernel beside training, and products.

python benchmarks/training.py [--threads N] [--rounds N] [--only PART ...] [--results FILE]

All ratios are of tasks that take turns in one process. Products need ``pip install curvlinops-for-pytorch``. To compare
with an older version, set PYTHONPATH to its checkout and give another file of results.

glibc gives memory that a step has freed back to the system, which fills it with zeros at the next step: up to a third
of a step's time, by chance more for one of two equal loops. The benchmark starts itself again with an allocator that
keeps it; --allocator default leaves it as it is.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from machine import machine
from torch import Tensor, nn
from turns import take_turns

from ntk_lightning.callbacks import EmpiricalNTKDynamics
from ntk_lightning.datamodules import FashionMNISTBinary
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.modules.taylor_expansion import taylor_expansion
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
    """FiniteNetwork under Trainer, no callbacks, n=4000, width 16."""
    epochs = 4
    with tempfile.TemporaryDirectory() as folder:
        _, seconds = ratio(bare_loop(16, 4000, epochs), fit(16, 4000, epochs, folder), options.rounds)
    best = min(seconds["first"]) / min(seconds["second"])
    print(f"FiniteNetwork under Trainer, n=4000, width 16, {epochs} epochs: {best:.3f} of a bare loop's samples/s")
    return {"samples_per_second_of_bare_loop": best, "seconds": seconds}


def watching_beside_training(options: argparse.Namespace) -> dict[str, Any]:
    """K^t at 30 log-spaced steps, n=256, width 64, beside the training that it watches."""
    epochs, n = 20, 512
    with tempfile.TemporaryDirectory() as folder:
        watched = fit(64, n, epochs, folder, callbacks=[EmpiricalNTKDynamics(log_spaced=30)])
        median, seconds = ratio(watched, fit(64, n, epochs, folder), min(3, options.rounds))
    steps = epochs * OptimizerConfig().steps_per_epoch(n)
    print(f"K^t at 30 log-spaced of {steps} steps, n={n}, width 64: {median:.2f} times the run without")
    return {"steps": steps, "watched_over_unwatched": median, "seconds": seconds}


def taylor_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Cost of a training step of the Taylor models beside the finite network's."""
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    for outputs in (1, 10):
        net, x = MyrtleCNN(16, num_outputs=outputs), torch.randn(64, 3, 32, 32)
        w0 = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        displacement = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in w0.items()}
        tasks = {"finite network": _step(list(net.parameters()), lambda net=net, x=x: net(x))}
        for order in (1, 2, 3):
            predict = lambda order=order, arguments=(net, w0, displacement, x): taylor_expansion(*arguments, order)  # noqa: E731
            tasks[f"order {order}"] = _step(list(displacement.values()), predict)
        seconds = take_turns(tasks, options.rounds)
        finite = min(seconds["finite network"])
        ratios = {name: min(times) / finite for name, times in seconds.items() if name != "finite network"}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        print(f"a step of the Taylor models by the finite network's, Myrtle-5, width 16, {outputs} outputs: {shown}")
        results[f"{outputs} outputs"] = {"over_finite": ratios, "seconds": seconds}
    return results


def _step(parameters: list[Tensor], predict: Callable[[], Tensor]) -> Callable[[], None]:
    """Prepare an SGD step."""

    def step() -> None:
        gradients = torch.autograd.grad((predict() - 1).square().mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 1e-3 * gradient

    return step


def products_beside_curvlinops(options: argparse.Namespace) -> dict[str, Any]:
    """Products of the kernel of 128 images with one and with eight vectors, Myrtle-5 of width 64."""
    from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator

    torch.manual_seed(0)
    n, width = 128, 64
    convs = [nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False) for i in range(4)]
    net = nn.Sequential(
        *(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.AvgPool2d(2), convs[2], nn.ReLU(), nn.AvgPool2d(2)),
        *(convs[3], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1, bias=False)),
    )
    x, vectors = torch.randn(n, 3, 32, 32), torch.randn(n, 8)
    batches = [(part, torch.zeros(len(part), 1)) for part in x.split(32)]
    arguments = net, list(net.parameters()), batches
    jacobian = JacobianLinearOperator(*arguments, check_deterministic=False)
    transposed = TransposedJacobianLinearOperator(*arguments, check_deterministic=False)
    kernel, one = EmpiricalNTK(net), vectors[:, 0].contiguous()
    tasks: dict[str, Callable[[], object]] = {
        "ours, 1": lambda: kernel.matvec(x, one),
        "curvlinops, 1": lambda: jacobian @ (transposed @ one),
        "ours, 8": lambda: kernel.matvec(x, vectors),
        "curvlinops, 8": lambda: jacobian @ (transposed @ vectors),
    }
    seconds = take_turns(tasks, options.rounds)
    best = {name: min(times) for name, times in seconds.items()}
    ratios = {
        "1 vector": best["curvlinops, 1"] / best["ours, 1"],
        "8 vectors, theirs together": best["curvlinops, 8"] / best["ours, 8"],
        "8 vectors, theirs one at a time": 8 * best["curvlinops, 1"] / best["ours, 8"],
    }
    shown = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
    print(f"products of the kernel, curvlinops' time by ours: {shown}")
    return {"curvlinops_over_ours": ratios, "seconds": seconds}


PARTS = {
    "taylor": taylor_steps,
    "trainer": trainer_beside_loop,
    "dynamics": watching_beside_training,
    "products": products_beside_curvlinops,
}
KEEPING = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": "4000000000"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--allocator", choices=("keeping", "default"), default="keeping")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "training_cpu.json")
    options = parser.parse_args()
    if options.allocator == "keeping" and not KEEPING.items() <= os.environ.items():
        sys.exit(subprocess.run([sys.executable, *sys.argv], check=False, env={**os.environ, **KEEPING}).returncode)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for part in options.only:
        common = {"threads": options.threads, "allocator": options.allocator, "load": os.getloadavg()[0]}
        result = {**common, **PARTS[part](options)}
        options.results.parent.mkdir(exist_ok=True)
        results = json.loads(options.results.read_text()) if options.results.exists() else {}
        options.results.write_text(json.dumps({**results, "machine": machine(), part: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
