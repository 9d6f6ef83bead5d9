"""Training steps of networks of several seeds as one vmapped batch, beside as many single runs.

python benchmarks/stacked_seeds.py --json benchmarks/results/stacked_seeds.json

Processor time of one thread, alternating, the best of the rounds. The studies run their seeds one by one: stacked they
are slower for convolutional networks of the widths that count, whose steps are bound by arithmetic already.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from ntk_lightning.networks import MLP, MyrtleCNN

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Myrtle-5, width 64, 16x16": (lambda: MyrtleCNN(width=64, depth=5, in_channels=3), (3, 16, 16)),
    "Myrtle-5, width 16, 16x16": (lambda: MyrtleCNN(width=16, depth=5, in_channels=3), (3, 16, 16)),
    "Myrtle-5, width 8, 16x16": (lambda: MyrtleCNN(width=8, depth=5, in_channels=3), (3, 16, 16)),
    "MLP, width 64, 3 layers": (lambda: MLP(64, 3, 64), (64,)),
    "MLP, width 512, 3 layers": (lambda: MLP(512, 3, 768), (768,)),
}


def measure(
    make: Callable[[], nn.Module], shape: tuple[int, ...], seeds: int, batch: int, rounds: int
) -> dict[str, Any]:
    nets = [make() for _ in range(seeds)]
    start = [parameter.detach().clone() for net in nets for parameter in net.parameters()]
    x, y = torch.randn(seeds, batch, *shape), torch.randn(seeds, batch)
    weights, _ = stack_module_state(nets)
    weights = {name: weight.detach() for name, weight in weights.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs: Tensor = functional_call(nets[0], (parameters,), (x,))
        return (outputs.squeeze(-1) - y).square().mean()

    gradients = vmap(grad(loss))
    velocities = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in nets]

    def stacked() -> None:
        for name, gradient in gradients(weights, x, y).items():
            velocities[name].mul_(0.9).add_(gradient)
            weights[name].sub_(0.01 * velocities[name])

    def single() -> None:
        for net, optimizer, inputs, targets in zip(nets, optimizers, x, y, strict=True):
            optimizer.zero_grad()
            (net(inputs).squeeze(-1) - targets).square().mean().backward()
            optimizer.step()

    seconds: dict[str, list[float]] = {"stacked": [], "single": []}
    for _ in range(rounds):
        for name, step in (("stacked", stacked), ("single", single)):
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    trained = [parameter.detach() for net in nets for parameter in net.parameters()]
    ours = [weights[name][seed] for seed in range(seeds) for name, _ in nets[0].named_parameters()]
    moved = max(float((a - b).abs().max()) for a, b in zip(trained, start, strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(trained, ours, strict=True))
    return {
        "seconds": {name: min(times) for name, times in seconds.items()},
        "single_over_stacked": min(seconds["single"]) / min(seconds["stacked"]),
        "difference_over_movement": apart / moved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for name, (make, shape) in NETWORKS.items():
        rows[name] = measure(make, shape, given.seeds, given.batch, given.rounds)
        print(f"{name}: {given.seeds} single runs take {rows[name]['single_over_stacked']:.2f} times one stacked")
    if given.json:
        content = {"seeds": given.seeds, "batch": given.batch, "networks": rows, "machine": machine()}
        given.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
