"""The infinite NTK on CPUs: speed beside neural-tangents, and of Myrtle networks scaling, accuracy, memory, first call.

neural-tangents 0.6.5 needs an environment of its own; name its Python by --neural-tangents or by the environment
variable NEURAL_TANGENTS_PYTHON. It runs under jax.jit in float32 on all cores, compiled before the clock starts, in the
batch that --batch sets; both libraries take turns, and medians are compared. "Per core" counts processor time, which
other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from infinite_networks import networks
from machine import machine
from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MyrtleCNN

RESULTS = Path(__file__).parent / "results" / "infinite_ntk_cpu.json"

MEMORY = """
import re, torch
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MyrtleCNN

def kibibytes(name):
    with open("/proc/self/status") as status:
        return int(re.search(name + r":\\s+(\\d+)", status.read())[1])

kernel = InfiniteNTK(MyrtleCNN(1))
kernel(torch.randn(2, 3, 8, 8))
x = torch.randn(2000, 3, 16, 16)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak starts again from here
before = kibibytes("VmRSS")
gram = kernel(x)
print((kibibytes("VmHWM") - before) / 1024 - gram.nbytes / 2**20)
"""

FIRST_CALL = """
import time, torch
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MyrtleCNN
start = time.perf_counter()
InfiniteNTK(MyrtleCNN(1))(torch.ones(1, 3, 32, 32))
print(time.perf_counter() - start)
"""


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


@contextmanager
def neural_tangents(python: str | None, batch: int) -> Iterator[Callable[[str], tuple[int, float, float]] | None]:
    """A function that times one batch of a network in the other environment and tells its images a side, or None."""
    if not python:
        print("neural-tangents is skipped: set NEURAL_TANGENTS_PYTHON to the Python of its environment.")
        yield None
        return
    command = [python, str(Path(__file__).with_name("infinite_networks_stax.py")), str(batch)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        assert process.stdin
        assert process.stdout
        if process.stdout.readline().strip() != "ready":
            sys.exit(
                f"neural-tangents does not run in {Path(python).name}; install neural-tangents==0.6.5 jax==0.4.30."
            )

        def run(name: str) -> tuple[int, float, float]:
            assert process.stdin
            assert process.stdout
            print(name, file=process.stdin, flush=True)
            images, wall, cpu = process.stdout.readline().split()
            return int(images), float(wall), float(cpu)

        yield run
        process.stdin.close()


def speed(python: str | None, batch: int, rounds: int, only: str) -> list[dict[str, Any]]:
    print(f"\nFloat32 NTK, medians of {rounds} rounds in turn")
    title = f"{'':46}{'backend':>10}{'pairs/s':>12}{'per core':>12}"
    print(f"{title}{'neural-tangents':>18}{'per core':>12}{'ratio':>8}{'per core':>10}")
    generator, rows = torch.Generator().manual_seed(0), []
    with neural_tangents(python, batch) as other:
        for name, (net, shape, images) in networks().items():
            if only not in name:
                continue
            x1, x2 = torch.randn(2, images, *shape, generator=generator)
            kernel = InfiniteNTK(net)
            kernel(x1[:2], x2[:2])
            ours, theirs, side = [], [], 1
            for _ in range(rounds):
                ours.append(seconds(lambda kernel=kernel, x1=x1, x2=x2: kernel(x1, x2)))
                if other:
                    side, *times = other(name)
                    theirs.append(times)
            row: dict[str, Any] = {"network": name, "shape": list(shape), "backend": kernel.backend_for(x1)}
            pairs = (images**2 / statistics.median(t) for t in zip(*ours, strict=True))
            row["pairs_per_s"], row["pairs_per_core_s"] = pairs
            label = f"{name} ({'x'.join(map(str, shape))})"
            line = f"{label:46}{row['backend']:>10}{row['pairs_per_s']:12.0f}{row['pairs_per_core_s']:12.0f}"
            if other:
                names = "neural_tangents_pairs_per_s", "neural_tangents_pairs_per_core_s"
                row |= zip(names, (side**2 / statistics.median(t) for t in zip(*theirs, strict=True)), strict=True)
                row["neural_tangents_batch"] = side
                row["ratio"] = row["pairs_per_s"] / row[names[0]]
                row["ratio_per_core"] = row["pairs_per_core_s"] / row[names[1]]
                line += f"{row[names[0]]:18.4g}{row[names[1]]:12.4g}{row['ratio']:8.3g}{row['ratio_per_core']:10.3g}"
            print(line, flush=True)
            rows.append(row)
    return rows


def scaling(rounds: int) -> dict[str, list[dict[str, float]]]:
    kernel = InfiniteNTK(MyrtleCNN(1), backend="cpu")
    tasks = {("n", n): (n, 16) for n in (128, 256, 512)} | {("side", s): (2**14 // s**2, s) for s in (8, 16, 32)}
    images = {key: torch.randn(n, 3, side, side) for key, (n, side) in tasks.items()}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in tasks}
    for _ in range(rounds):
        for key, x in images.items():
            times[key].append(seconds(lambda x=x: kernel(x))[1])
    tables: dict[str, list[dict[str, float]]] = {"n": [], "side": []}
    for (name, value), cpu in times.items():
        n = len(images[name, value])
        cost = statistics.median(cpu) * (1 if name == "n" else 1e6 / (n * (n + 1) / 2))
        table = tables[name]
        power = math.log(cost / table[-1]["cost"], value / table[-1][name]) if table else math.nan
        table.append({name: value, "cost": cost, "power": power})
    for name, title in (
        ("n", "Core-seconds of a symmetric Gram, Myrtle-5 at 16x16, against n (quadratic: power 2)"),
        ("side", "Core-microseconds of a pair, Myrtle-5, against the side (fourth power)"),
    ):
        print(f"\n{title}\n{name:>8}{'cost':>14}{'power':>8}")
        for row in tables[name]:
            print(f"{row[name]:8.0f}{row['cost']:14.4g}" + ("" if math.isnan(row["power"]) else f"{row['power']:8.2f}"))
            if math.isnan(row["power"]):
                del row["power"]
    return tables


def accuracy() -> list[dict[str, Any]]:
    """Relative distance of float32 from float64, at its largest, on sets of images of which some are hard."""
    generator = torch.Generator().manual_seed(0)

    def near(x: Tensor) -> Tensor:
        noise = torch.tensor([1e-4, 3e-4, 1e-3, 3e-3])[:, None, None, None]
        return torch.cat([x[:4], x[:4] + noise * torch.randn(4, 3, 32, 32, generator=generator), x[:1]])

    smooth = F.interpolate(torch.randn(8, 3, 6, 6, generator=generator), size=(32, 32), mode="bicubic")
    sets = {
        "standard normal": torch.randn(8, 3, 32, 32, generator=generator),
        "smooth, saturated": smooth.clamp(-1.0, 0.8),
        "near-duplicates": near(smooth),
    }
    print(f"\nLargest relative error of float32 against float64\n{'':12}" + "".join(f"{name:>20}" for name in sets))
    rows = []
    for depth in (5, 7, 10):
        row: dict[str, Any] = {"network": f"Myrtle-{depth}"}
        for name, x in sets.items():
            kernel = InfiniteNTK(MyrtleCNN(1, depth), backend="cpu")
            row[name] = float((kernel(x).double() / kernel(x.double()) - 1).abs().max())
        print(f"{row['network']:12}" + "".join(f"{row[name]:20.1e}" for name in sets), flush=True)
        rows.append(row)
    x = sets["smooth, saturated"][:2].double()
    exact = InfiniteNTK(MyrtleCNN(1), backend="reference")(x[:1], x[1:])
    error = float((InfiniteNTK(MyrtleCNN(1), backend="cpu")(x[:1], x[1:]) / exact - 1).abs().max())
    print(f"float64 against the plain reference, Myrtle-5: {error:.1e}")
    return [*rows, {"network": "Myrtle-5", "float64 against the reference": error}]


def child(code: str) -> float:
    """The number that a fresh process prints."""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neural-tangents", metavar="PYTHON", default=os.environ.get("NEURAL_TANGENTS_PYTHON"))
    parser.add_argument("--batch", type=int, default=8, help="images a side of neural-tangents' batch, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="of the networks beside neural-tangents, those whose names have it")
    options = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("numba", "llvmlite")}
    result: dict[str, Any] = {"machine": machine() | versions}
    result |= {"threads": torch.get_num_threads(), "neural_tangents_batch": options.batch, "rounds": options.rounds}
    print(json.dumps(result))
    child(FIRST_CALL)  # compiles where that has not been done yet
    result["first_call_of_a_second_process_s"] = statistics.median(child(FIRST_CALL) for _ in range(3))
    print(f"First call of a second process, after the imports: {result['first_call_of_a_second_process_s']:.2f} s")
    result["speed"] = speed(options.neural_tangents, options.batch, options.rounds, options.only)
    result["scaling"] = scaling(options.rounds)
    result["accuracy"] = accuracy()
    result["peak_mib_n2000_16x16"] = child(MEMORY)
    print(
        f"\nPeak memory of n=2000 at 16x16 above imports, images and result: {result['peak_mib_n2000_16x16']:.0f} MiB"
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(_rounded(result), indent=2) + "\n")


def _rounded(value: Any) -> Any:  # noqa: ANN401 - JSON
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {name: _rounded(entry) for name, entry in value.items()}
        case list():
            return [_rounded(entry) for entry in value]
    return value


if __name__ == "__main__":
    main()
