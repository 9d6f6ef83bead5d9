"""Kernels of networks with several outputs, beside all three implementations of neural-tangents."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.networks import MLP, MyrtleCNN

IMPLEMENTATIONS = ("JACOBIAN_CONTRACTION", "NTK_VECTOR_PRODUCTS", "STRUCTURED_DERIVATIVES")

NEURAL_TANGENTS = """
import json, sys, time
import numpy as np, jax, neural_tangents as nt
from neural_tangents import stax

path, rounds, full, name = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "full", sys.argv[4]
arrays = np.load(path, allow_pickle=False)
weights = [arrays[f"w{i}"] for i in range(len(arrays.files) - 1)]
dense = lambda w: stax.Dense(w.shape[-1], W_std=2**0.5, b_std=None)
conv = lambda w: stax.Conv(w.shape[-1], (3, 3), padding="SAME", W_std=2**0.5, b_std=None)
pool = lambda: stax.AvgPool((2, 2), (2, 2))
if weights[0].ndim == 4:
    a, b, c, d, readout = weights
    layers = [conv(a), stax.Relu(), conv(b), stax.Relu(), pool(), conv(c), stax.Relu(), pool(), conv(d), stax.Relu(),
              stax.GlobalAvgPool(), dense(readout)]
else:
    layers = [layer for w in weights[:-1] for layer in (dense(w), stax.Relu())] + [dense(weights[-1])]
init, apply, _ = stax.serial(*layers)
x = arrays["x"]
leaves, tree = jax.tree_util.tree_flatten(init(jax.random.PRNGKey(0), (1, *x.shape[1:]))[1])
assert [leaf.shape for leaf in leaves] == [w.shape for w in weights]
params = jax.tree_util.tree_unflatten(tree, weights)
kernel = jax.jit(nt.empirical_ntk_fn(apply, vmap_axes=0, trace_axes=() if full else (-1,),
                                     implementation=getattr(nt.NtkImplementation, name)))
seconds = []
for _ in range(rounds + 1):  # the first call compiles
    start = time.perf_counter()
    gram = np.asarray(kernel(x, None, params))
    seconds.append(time.perf_counter() - start)
np.save(path + ".gram.npy", gram)
print(json.dumps({"seconds": seconds[1:]}))
"""

# name: the network, inputs, whether outputs are kept apart
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "Myrtle-5 W=64, n=64, C=10, trace": (lambda: MyrtleCNN(64, num_outputs=10), (64, 3, 32, 32), False),
    "Myrtle-5 W=256, n=16, C=10, trace": (lambda: MyrtleCNN(256, num_outputs=10), (16, 3, 32, 32), False),
    "MLP 784-2048-2048-2048-8, n=16, trace": (lambda: MLP(2048, 3, 784, num_outputs=8), (16, 784), False),
    "MLP 784-2048-2048-2048-8, n=16, full": (lambda: MLP(2048, 3, 784, num_outputs=8), (16, 784), True),
}


def _neural_tangents(
    python: str, net: nn.Module, x: Tensor, rounds: int, full: bool, name: str
) -> tuple[list[float], Tensor]:
    """Run one implementation of neural-tangents on the same weights and inputs."""
    weights = [p.detach() for p in net.parameters()]
    arrays = {f"w{i}": (w.permute(2, 3, 1, 0) if w.dim() == 4 else w.T).numpy() for i, w in enumerate(weights)}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/arrays.npz"
        np.savez(path, x=(x.permute(0, 2, 3, 1) if x.dim() == 4 else x).numpy(), **arrays)
        command = [python, "-c", NEURAL_TANGENTS, path, str(rounds), "full" if full else "trace", name]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False)
        if run.returncode:
            raise RuntimeError(f"neural-tangents failed:\n{run.stderr[-2000:]}")
        gram = torch.from_numpy(np.load(path + ".gram.npy", allow_pickle=False))
        return json.loads(run.stdout.splitlines()[-1])["seconds"], gram


def several_outputs(options: argparse.Namespace) -> dict[str, Any]:
    """Time every case, ours before and after each implementation, and compare the kernels."""
    results: dict[str, Any] = {"load": [os.getloadavg()[0]]}
    for case, (make, shape, full) in CASES.items():
        torch.manual_seed(0)
        net, x = make(), torch.randn(*shape)
        kernel = EmpiricalNTK(net, full=full)
        ours, gram = [], kernel(x)
        seconds: dict[str, list[float]] = {"EmpiricalNTK": ours}
        differences = {}

        def measure(kernel: EmpiricalNTK = kernel, x: Tensor = x, ours: list[float] = ours) -> None:
            for _ in range(options.rounds):
                start = time.perf_counter()
                kernel(x)
                ours.append(time.perf_counter() - start)

        measure()
        for name in IMPLEMENTATIONS if options.neural_tangents else ():
            seconds[name], other = _neural_tangents(options.neural_tangents, net, x, options.rounds, full, name)
            differences[name] = float((other - gram).abs().max() / gram.abs().max())
            measure()
        print(f"\n{case}, float32, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
        print(f"{'':32}{'best s':>8}{'median s':>10}{'x ours':>8}{'difference':>12}")
        for name, times in seconds.items():
            difference = f"{differences[name]:12.1e}" if name in differences else ""
            print(
                f"{name:32}{min(times):8.3f}{statistics.median(times):10.3f}{min(times) / min(ours):8.2f}{difference}"
            )
        results[case] = {"seconds": seconds, "differences": differences}
    results["load"].append(os.getloadavg()[0])
    return results
