"""The table of empirical kernels: networks and sizes, beside other implementations and beside their floor.

The floor is one forward pass and C backward passes of the same samples, batched as is best, and the matrix products of
the ways that were chosen. All take turns: a round of each, one after another. Part of empirical_ntk.py.

Longer than 300 lines because the rows, their peers and their floors are one table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table_networks import GPT, Encoder, plain_twin, resnet18
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.memory_plan import choose_plan
from ntk_lightning.networks import MLP, MyrtleCNN

IMPLEMENTATIONS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES")
WORKER = Path(__file__).with_name("table_neural_tangents.py")
MOST_BYTES = 2e9  # of Jacobians that others form at once


@dataclass(frozen=True)
class Row:
    """One row: the network, its name for neural-tangents, the shape of its inputs, and how the kernel is asked for."""

    title: str
    make: Callable[[], nn.Module]
    network: str
    shape: tuple[int, ...]
    full: bool = False
    memory: str = "4GB"
    vocabulary: int = 0

    def inputs(self) -> Tensor:
        """Random images, vectors or tokens."""
        return torch.randint(self.vocabulary, self.shape) if self.vocabulary else torch.randn(self.shape)


IMAGES = (3, 32, 32)
ROWS = {
    "myrtle64": Row("Myrtle-5 W=64, n=256, C=1", lambda: MyrtleCNN(64), "myrtle", (256, *IMAGES)),
    "myrtle64x10": Row(
        "Myrtle-5 W=64, n=64, C=10, trace", lambda: MyrtleCNN(64, num_outputs=10), "myrtle", (64, *IMAGES)
    ),
    "myrtle256": Row("Myrtle-5 W=256, n=64, C=1", lambda: MyrtleCNN(256), "myrtle", (64, *IMAGES)),
    "myrtle256x10": Row(
        "Myrtle-5 W=256, n=16, C=10, trace", lambda: MyrtleCNN(256, num_outputs=10), "myrtle", (16, *IMAGES)
    ),
    "mlp2048": Row("MLP 784-2048x3-8, n=16, trace", lambda: MLP(2048, 3, 784, num_outputs=8), "mlp", (16, 784)),
    "mlp2048full": Row(
        "MLP 784-2048x3-8, n=16, full", lambda: MLP(2048, 3, 784, num_outputs=8), "mlp", (16, 784), True
    ),
    "mlp1024": Row("MLP 784-1024x3-10, n=256, trace", lambda: MLP(1024, 3, 784, num_outputs=10), "mlp", (256, 784)),
    "mlp1024full": Row(
        "MLP 784-1024x3-10, n=256, full", lambda: MLP(1024, 3, 784, num_outputs=10), "mlp", (256, 784), True
    ),
    "resnet18": Row("ResNet-18 32x32, n=64, C=1", lambda: resnet18(1), "resnet", (64, *IMAGES)),
    "resnet18x10": Row("ResNet-18 32x32, n=16, C=10, trace", lambda: resnet18(10), "resnet", (16, *IMAGES)),
    "encoder": Row(
        "transformer encoder d=256, 4 layers, 32 tokens, n=64, C=2, trace", Encoder, "encoder", (64, 32, 256)
    ),
    "gpt": Row(
        "GPT-like, 10k tokens, d=256, 4 layers, 32 tokens, n=32, C=2, trace", GPT, "gpt", (32, 32), vocabulary=10_000
    ),
    "myrtle1024": Row(
        "Myrtle-5 W=1024, n=32, C=1, memory=1GB", lambda: MyrtleCNN(1024), "myrtle", (32, *IMAGES), memory="1GB"
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------- what is timed beside ours


class NeuralTangents:
    """A process that computes a kernel for every line it gets."""

    def __init__(self, python: str, row: Row, net: nn.Module, x: Tensor, name: str, threads: int, folder: str) -> None:
        self.gram_path, path = f"{folder}/{name}.npy", f"{folder}/{name}.npz"
        plain = row.network in ("myrtle", "mlp")
        buffers = {key: t for key, t in net.named_buffers() if t.is_floating_point()}
        tensors = {**dict(net.named_parameters()), **buffers}
        arrays = {}
        for i, (key, t) in enumerate(tensors.items()):
            embeds = isinstance(net, GPT) and key in ("token.weight", "position.weight")
            moved = t.permute(2, 3, 1, 0) if t.dim() == 4 else t.T if t.dim() == 2 and not embeds else t
            arrays[f"w{i:02}" if plain else key] = moved.detach().numpy()
        samples = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
        np.savez(path, x=samples.numpy(), **arrays)
        full = "full" if row.full else "trace"
        command = [python, str(WORKER), path, row.network, full, name, str(threads)]
        self.log_path = Path(folder, f"{name}.log")
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": ""},
            )  # fmt: skip

    def seconds(self, keep: bool = False) -> float:
        """Compute the kernel once more."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write((self.gram_path if keep else "") + "\n")
            stdin.flush()
            for line in stdout:
                if line.startswith("seconds"):
                    return float(line.split()[1])
        except BrokenPipeError:
            pass
        raise RuntimeError(f"neural-tangents failed:\n{self.log_path.read_text()[-2000:]}")

    def gram(self) -> Tensor:
        """The kernel that was kept."""
        return torch.from_numpy(np.load(self.gram_path, allow_pickle=False))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()


def tutorial(net: nn.Module, x: Tensor, full: bool) -> Tensor:
    """PyTorch's tutorial on the NTK: a Jacobian of each set of samples, an einsum for each parameter."""
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def single(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, weights, (sample.unsqueeze(0),)).squeeze(0)

    jacobians = [vmap(jacrev(single), (None, 0))(parameters, x).values() for _ in range(2)]
    einsum = "Naf,Mbf->NMab" if full else "Naf,Maf->NM"
    return sum(torch.einsum(einsum, a.flatten(2), b.flatten(2)) for a, b in zip(*jacobians, strict=True))


def nngeometry(net: nn.Module, x: Tensor) -> Tensor:
    """The Gram of all outputs, (C, n, C, n)."""
    from nngeometry import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(x, torch.zeros(len(x), 1)), batch_size=32)
    gram = GramMatrix(model=net, loader=loader, function=lambda x, _: net(x))
    return gram.data.detach()


def passes(net: nn.Module, x: Tensor, num_outputs: int, chunk: int, way: str) -> None:
    """One forward pass and C backward passes, in batches."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for part in x.split(chunk):
        outputs = net(part).sum(0)
        if way == "batched":
            torch.autograd.grad(outputs, parameters, torch.eye(num_outputs), is_grads_batched=True)
        else:
            for c in range(num_outputs):
                torch.autograd.grad(outputs[c], parameters, retain_graph=c + 1 < num_outputs)


def products(kernel: EmpiricalNTK, x: Tensor) -> Callable[[], object]:
    """The matrix products of rows as wide as the kernel's, block by block; or of gradients a slice at a time."""
    with kernel._computing(x) as (rows, inputs):
        rows, plan = choose_plan(kernel.memory, rows, inputs[0], 0, False, gram=True)
    n = len(x)
    rows.scratch = plan.scratch
    if not rows.keeps:
        made = torch.randn(n, rows.width)
        for part in rows.parts:
            for name, (columns, _) in part.factors.items():
                if rows.layers[name].embeds:
                    made[:, columns] = torch.randint(256, made[:, columns].shape).float()

        def multiplied() -> None:
            for i in range(0, n, plan.block):
                rows.contract(made[i : i + plan.block], made[i:])

        return multiplied
    gradients = sum(p.numel() for p in kernel.net.parameters()) * len(rows.cotangents)
    few = torch.randn(n, 2**20)

    def sliced() -> None:
        for _ in range(-(-gradients // few.shape[1])):
            torch.mm(few, few.T)

    return sliced


# ------------------------------------------------------------------------------- one row


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Time all of one row in turn."""
    torch.manual_seed(0)
    net, x = row.make(), row.inputs()
    outputs = net(x[:1]).shape[1]
    kernel = EmpiricalNTK(net, full=row.full, memory=row.memory)
    gram = kernel(x)
    tasks: dict[str, Callable[[], object]] = {"EmpiricalNTK": lambda: kernel(x), "products": products(kernel, x)}
    for chunk in (16, 64):
        ways = ("loop", "batched") if outputs > 1 else ("loop",)
        for way in ways:
            tasks[f"passes, {way}, {chunk}"] = lambda chunk=chunk, way=way: passes(net, x, outputs, chunk, way)
    left_out: dict[str, str] = {}
    grams: dict[str, Callable[[], Tensor]] = {}
    nbytes = 4 * outputs * len(x) * sum(p.numel() for p in net.parameters())
    if 2 * nbytes > MOST_BYTES:
        left_out["jacrev and einsum"] = f"its Jacobians take {2 * nbytes / 1e9:.0f} GB"
    else:
        scale = 1 if row.full else outputs
        tasks["jacrev and einsum"] = lambda: tutorial(net, x, row.full)
        grams["jacrev and einsum"] = lambda: tutorial(net, x, row.full) / scale
    twin = plain_twin(net)
    if twin is None or nbytes > MOST_BYTES:
        left_out["nngeometry"] = "it does not know the network" if twin is None else f"{nbytes / 1e9:.0f} GB"
    else:
        tasks["nngeometry"] = lambda: nngeometry(twin, x)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers: dict[str, NeuralTangents] = {}
        for name in options.implementations if options.neural_tangents else ():
            worker = NeuralTangents(options.neural_tangents, row, net, x, name, options.threads, folder)
            stack.callback(worker.close)
            try:
                worker.seconds(keep=True)  # compiles
            except RuntimeError as error:
                left_out[name] = str(error).strip().splitlines()[-1]
            else:
                workers[name] = worker
                tasks[name], grams[name] = worker.seconds, worker.gram
        differences = {name: float((g() - gram).abs().max() / gram.abs().max()) for name, g in grams.items()}
        seconds: dict[str, list[float]] = {name: [] for name in tasks}
        skipped: set[str] = set()
        for counted in [False] + [True] * options.rounds:
            for name, task in tasks.items():
                if name in skipped:
                    continue
                start = time.perf_counter()
                try:
                    task()
                except (RuntimeError, KeyError, NotImplementedError, AttributeError) as error:
                    if name != "nngeometry" and not name.startswith("passes"):
                        raise
                    skipped.add(name)  # it does not know a layer, or vmap has no rule for the graph
                    left_out[name] = str(error).splitlines()[0]
                    continue
                if counted:
                    seconds[name].append(time.perf_counter() - start)
    seconds = {name: times for name, times in seconds.items() if times}
    return summarized(row, seconds, differences, left_out)


def summarized(
    row: Row, seconds: dict[str, list[float]], differences: dict[str, float], left_out: dict[str, str]
) -> dict[str, Any]:
    """Print a row and give it as data."""
    best = {name: min(times) for name, times in seconds.items()}
    ours = best["EmpiricalNTK"]
    passed = min(value for name, value in best.items() if name.startswith("passes"))
    floor = passed + best["products"]
    peers = {
        name: value for name, value in best.items() if name in (*IMPLEMENTATIONS, "jacrev and einsum", "nngeometry")
    }
    print(f"\n{row.title}, float32, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'':32}{'best s':>9}{'median s':>10}{'x ours':>8}{'difference':>12}")
    for name, times in seconds.items():
        difference = f"{differences[name]:12.1e}" if name in differences else ""
        print(f"{name:32}{best[name]:9.4f}{statistics.median(times):10.4f}{best[name] / ours:8.2f}{difference}")
    for name, why in left_out.items():
        print(f"{name:32} left out: {why}")
    print(f"{'floor':32}{floor:9.4f}, ours {ours / floor:.2f} times that", flush=True)
    if peers:
        first = min(peers, key=peers.__getitem__)
        print(
            f"{'best of the others':32}{peers[first]:9.4f}, {peers[first] / ours:.2f} times ours: {first}", flush=True
        )
    return {
        "title": row.title,
        "seconds": seconds,
        "differences": differences,
        "left_out": left_out,
        "floor": floor,
        "over_floor": ours / floor,
        "load": os.getloadavg()[0],
    }


PEAK = """
import json, re, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from table import ROWS
from ntk_lightning.kernels import EmpiricalNTK

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

row = ROWS[sys.argv[1]]
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
net, x = row.make(), row.inputs()
kernel = EmpiricalNTK(net, full=row.full, memory=row.memory)
EmpiricalNTK(net, full=row.full)(x[:1])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
result = kernel(x)
print(json.dumps({"peak_bytes": status("VmHWM") - before - result.nbytes, "budget": kernel.memory}))
"""


def peak(name: str, threads: int) -> dict[str, int]:
    """Peak memory of a row's kernel above inputs and result, in a process of its own."""
    command = [sys.executable, "-c", PEAK, name, str(threads), str(Path(__file__).parent)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def table(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the rows that are asked for, and keep those that were measured before."""
    results: dict[str, Any] = dict(options.before.get("table", {}))
    mine: dict[str, Any] = dict(results.get(f"{options.threads} threads", {}))
    for name in options.row or ROWS:
        mine[name] = measure(ROWS[name], options)
        if Path("/proc/self/clear_refs").exists():
            mine[name]["memory"] = peak(name, options.threads)
            used, budget = mine[name]["memory"].values()
            print(f"{'peak memory':32}{used / 1e6:9.0f} MB of {budget / 1e6:.0f} MB", flush=True)
        results[f"{options.threads} threads"] = mine
        options.save({"table": results})
    return results
