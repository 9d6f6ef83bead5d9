"""The empirical NTK beside nngeometry (Gram) and curvlinops (products), for networks in PyTorch's own parameterization.

python benchmarks/other_libraries.py [--n N] [--threads N] [--rounds N]

Needs ``pip install nngeometry curvlinops-for-pytorch``. They take turns, and the best processor time of each is
compared, which other programs on the machine disturb little; how far their results differ is printed beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from curvlinops import JacobianLinearOperator, TransposedJacobianLinearOperator
from machine import machine
from nngeometry import GramMatrix
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.kernels import EmpiricalNTK

RESULTS = Path(__file__).parent / "results" / "other_libraries_cpu.json"


def myrtle5(width: int) -> nn.Sequential:
    """The layers of Myrtle-5 in PyTorch's parameterization, which nngeometry knows."""
    conv = [nn.Conv2d(3 if i == 0 else width, width, 3, padding=1, bias=False) for i in range(4)]
    first = [conv[0], nn.ReLU(), conv[1], nn.ReLU(), nn.AvgPool2d(2), conv[2], nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(
        *first, conv[3], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1, bias=False)
    )


def take_turns(tasks: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Processor seconds of every round after a first one, and what each task gave."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    values = {name: task() for name, task in tasks.items()}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name].append(time.process_time() - start)
    return seconds, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    n, net, width = options.n, myrtle5(64), 64
    x, v = torch.randn(n, 3, 32, 32), torch.randn(n)
    data = TensorDataset(x, torch.zeros(n, 1))
    batches = [(x[i : i + 32], torch.zeros(min(32, n - i), 1)) for i in range(0, n, 32)]
    parameters = list(net.parameters())
    kernel = EmpiricalNTK(net)
    jacobian = JacobianLinearOperator(net, parameters, batches, check_deterministic=False)
    transposed = TransposedJacobianLinearOperator(net, parameters, batches, check_deterministic=False)

    def nngeometry() -> Tensor:
        gram: Tensor = GramMatrix(model=net, loader=DataLoader(data, batch_size=32), function=lambda x, _: net(x)).data
        return gram.reshape(n, n).detach()

    def curvlinops() -> Tensor:
        product: Tensor = jacobian @ (transposed @ v)
        return product.reshape(n).detach()

    results: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("nngeometry", "curvlinops-for-pytorch")},
        "n": n,
        "width": width,
        "threads": options.threads,
    }
    for part, tasks in {
        "gram": {"EmpiricalNTK": lambda: kernel(x), "nngeometry": nngeometry},
        "product": {"EmpiricalNTK.matvec": lambda: kernel.matvec(x, v), "curvlinops": curvlinops},
    }.items():
        seconds, values = take_turns(tasks, options.rounds)
        ours, theirs = values.values()
        best = [min(times) for times in seconds.values()]
        difference = float((ours - theirs).abs().max() / ours.abs().max())
        results[part] = {"seconds": seconds, "ratio": best[1] / best[0], "difference": difference}
        print(
            f"{part}: {best[0]:.3f} s, {list(tasks)[1]} {best[1]:.3f} s, {best[1] / best[0]:.2f} times ours", end="; "
        )
        print(f"difference {difference:.1e} of the largest entry")
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
