"""Infinite NTK of Myrtle-5/7/10 at 32x32 on a GPU: pairs/s, fraction of the fp32 peak, tilings, time for 10,000 images.

python benchmarks/infinite_ntk_cuda.py [--depths 5 7 10] [--columns 4 8 16] [--n N] [--tune-n N]

Compiling takes most of the time, and grows fast with the columns: a run of one depth updates the file of results.

Floating-point operations are counted by formula, a multiply-add as two, without the columns that chunks repeat: an
entry of a covariance costs 2 a channel for the images, 6 a convolution and tensor (4 additions, weight, bias), 32 an
activation and 2 a pooling. Without a GPU the script prints what the kernels need of one with compute capability 9.0.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ntk_lightning.kernels.infinite import reference
from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import plan
from ntk_lightning.kernels.infinite.fused_cuda import Tiling, compile_levels, gram
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import MyrtleCNN

SHAPE = (3, 32, 32)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1024, help="images of the measured Gram")
    parser.add_argument("--tune-n", type=int, default=160, help="images of the Grams that tilings are compared on")
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 7, 10])
    parser.add_argument("--columns", type=int, nargs="+", default=[4, 8, 16], help="pixels of a lane, to try")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here: nothing is timed, below is what the kernels need of one with compute capability 9.0.")
        print(
            json.dumps({f"myrtle{depth}": needs(parse(MyrtleCNN(depth=depth))) for depth in arguments.depths}, indent=2)
        )
        return
    name = torch.cuda.get_device_name()
    report: dict[str, Any] = {"gpu": name, "torch": torch.__version__, "triton": triton.__version__, "shape": SHAPE}
    report["fp32_peak_tflops"] = peak() / 1e12
    for depth in arguments.depths:
        report[f"myrtle{depth}"] = measure(
            parse(MyrtleCNN(depth=depth)), arguments.n, arguments.tune_n, arguments.columns
        )
        print(f"myrtle{depth}", json.dumps(report[f"myrtle{depth}"], indent=2), flush=True)
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"\W+", "_", name).lower()
    path = RESULTS / f"infinite_ntk_{slug}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(earlier | report, indent=2) + "\n")


def needs(layers: tuple[Layer, ...]) -> dict[str, Any]:
    start = time.perf_counter()
    levels = compile_levels(layers, "ntk", SHAPE)
    return {"levels": levels, "compile_seconds": round(time.perf_counter() - start, 1)}


def measure(layers: tuple[Layer, ...], n: int, tune_n: int, columns: list[int]) -> dict[str, Any]:
    table: list[tuple[float, Tiling, dict[str, Any]]] = []

    def best_of(tilings: Iterable[Tiling]) -> Tiling:
        for tiling in tilings:
            line = row(layers, tiling, tune_n)
            table.append((line["pairs_per_second"], tiling, line))
        return max(table, key=lambda entry: entry[0])[1]

    best = best_of(Tiling(count) for count in columns)
    best = best_of(replace(best, warps=warps) for warps in (2, 4))
    best = best_of(replace(best, workspace_bytes=2**power) for power in (24, 25, 26, 28, 29))
    seconds = time_gram(layers, images(n), best)
    rate = n * (n + 1) / 2 / seconds
    few = images(6)
    expected = reference.gram(layers, few.double(), few.double())[1]
    error = (gram(layers, "ntk", few, None, lambda _: None, best) - expected).abs() / expected
    return {
        "n": n,
        "tiling": vars(best),
        "levels": compile_levels(layers, "ntk", SHAPE, best, capability=capability()),
        "seconds": seconds,
        "pairs_per_second": rate,
        "fraction_of_fp32_peak": rate * flops(layers) / peak(),
        "gflop_per_pair": flops(layers) / 1e9,
        "extrapolated_seconds_for_10000_symmetric": 10_000 * 10_001 / 2 / rate,
        "extrapolated_seconds_for_10000_by_10000": 1e8 / rate,
        "max_relative_error_of_6_images": float(error.max()),
        "tilings": [line for _, _, line in table],
    }


def row(layers: tuple[Layer, ...], tiling: Tiling, n: int) -> dict[str, Any]:
    """One line of the table of tilings: median of three, after a first call that compiles."""
    x = images(n)
    start = time.perf_counter()
    gram(layers, "ntk", x[:2], None, lambda _: None, tiling)
    compiling = time.perf_counter() - start
    seconds = sorted(time_gram(layers, x, tiling) for _ in range(3))[1]
    line = {**vars(tiling), "pairs_per_second": n * (n + 1) / 2 / seconds, "compile_seconds": compiling}
    print(json.dumps(line), flush=True)
    return line


def images(n: int) -> Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)).cuda()


def time_gram(layers: tuple[Layer, ...], x: Tensor, tiling: Tiling) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    gram(layers, "ntk", x, None, lambda _: None, tiling)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def flops(layers: tuple[Layer, ...]) -> float:
    """Of one pair, by the formula above."""
    total, pixels = 0, SHAPE[1] * SHAPE[2]
    levels = plan(layers).levels
    for number, steps in enumerate(levels):
        entry = 2 * SHAPE[0] if number == 0 else 0
        for s, step in enumerate(steps):
            entry += 6 * (1 if number == s == 0 else 2) + 32 * (step.activation is not None)
        total += (entry + 2 * (number < len(levels) - 1)) * pixels**2
        pixels //= 4
    return total


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def peak() -> float:
    """Multiply-adds of all fp32 lanes at the highest clock, as flop/s."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    clock = 1e6 * float(subprocess.run(query, capture_output=True, check=True, text=True).stdout.split()[0])
    lanes = 64 if capability() in (70, 72, 75, 80) else 128
    return 2 * lanes * clock * torch.cuda.get_device_properties(0).multi_processor_count


if __name__ == "__main__":
    main()
