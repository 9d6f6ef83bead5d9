"""The way that is chosen for a layer's kernel, beside the best of all ways, for many sizes of layers.

python benchmarks/layer_ways.py [--threads N] [--rounds N]

Prints the time of every way over that of the fastest one, and of the one that ``AffineLayer.way`` chooses. A time is
that of making the rows of n samples and of multiplying all pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from ntk_lightning.kernels.empirical import layer_rules
from ntk_lightning.kernels.empirical.inner_products import by_factors, multiply
from ntk_lightning.kernels.empirical.layer_gradients import cotangents_of, factors_of, write_gradients
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer

# kind, d_in, d_out, T, C, n
SIZES = [
    *(("conv", 3, 64, 1024, c, 32) for c in (1, 2, 10)),
    *(("conv", 64, 64, side**2, c, 32) for side in (32, 16, 8) for c in (1, 2, 10)),
    *(("conv", 256, 256, side**2, c, 8) for side in (16, 8, 4) for c in (1, 2, 10)),
    *(("conv", 512, 512, 16, c, 8) for c in (1, 2)),
    *(("linear", d, d, t, c, 32) for d in (256, 1024) for t in (4, 8, 16, 32) for c in (1, 2)),
]


def ways(layer: AffineLayer, a: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The kernel of one layer by each way."""
    n, c = g.shape[:2]
    weight = layer.module.weight.detach()

    def product(shifted: bool) -> Tensor:
        least = 1 if shifted else 10**9
        with (
            mock.patch.object(layer_rules, "_SHIFTED_POSITIONS", least),
            mock.patch.object(layer_rules, "_SHIFTED_INPUTS", least),
        ):
            rows = torch.empty(layer.blocks, n, c * layer.d_out, layer.d_in // layer.blocks)
            write_gradients(layer, a, cotangents_of(layer, g).flatten(1, 2), list(rows), None)
            return sum(multiply(block.flatten(1)[:, None], block.flatten(1)[:, None]) for block in rows)

    def factors() -> Tensor:
        x, y = (t.flatten(1) for t in factors_of(layer, a, cotangents_of(layer, g), full=False))
        return by_factors(layer, (x, y), (x, y), (1, 1), 2**25)

    def by_vmap() -> Tensor:
        def single(x: Tensor, u: Tensor) -> Tensor:
            def output(w: Tensor) -> Tensor:
                return torch.func.functional_call(layer.module, {"weight": w}, (x[None],))

            pull = vjp(output, weight)[1]
            return vmap(lambda v: pull(v)[0])(u)

        rows = vmap(single)(a, g).flatten(1)[:, None]
        return multiply(rows, rows)

    unfolded = {"unfolded": lambda: product(False)} if layer.convolves else {"product": lambda: product(False)}
    shifted = {"shifted": lambda: product(True)} if layer.convolves else {}
    return {**unfolded, **shifted, "factors": factors, "vmap": by_vmap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    worst = 0.0
    for kind, d_in, d_out, t, c, n in SIZES:
        torch.manual_seed(0)
        side = round(t**0.5)
        conv = kind == "conv"
        module = nn.Conv2d(d_in, d_out, 3, padding=1, bias=False) if conv else nn.Linear(d_in, d_out, bias=False)
        shapes = ((1, d_in, side, side), (1, d_out, side, side)) if conv else ((1, t, d_in), (1, t, d_out))
        layer = AffineLayer(module, 1.0, None, *shapes)
        a, g = torch.randn(n, *shapes[0][1:]), torch.randn(n, c, *shapes[1])
        tasks = ways(layer, a, g)
        if t * n * t * n * 4 > 2e9:  # matrices of all pairs of positions are no way
            del tasks["factors"]
        best = dict.fromkeys(tasks, float("inf"))
        for _ in range(options.rounds + 1):
            for name, task in tasks.items():
                start = time.process_time()
                task()
                best[name] = min(best[name], time.process_time() - start)
        way = str(layer.way(c, full=False, partners=n // 2))
        chosen = ("shifted" if layer.shifts else "unfolded") if conv and way == "product" else way
        fastest = min(best.values())
        worst = max(worst, best[chosen] / fastest)
        others = ", ".join(f"{name} {value / fastest:.2f}" for name, value in best.items())
        print(f"{kind} {d_in}x{d_out} T={t} C={c} n={n}: {chosen} {best[chosen] / fastest:.2f} of the best; {others}")
    print(f"the chosen way takes at most {worst:.2f} times the best")


if __name__ == "__main__":
    main()
