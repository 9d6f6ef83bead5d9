"""What empirical kernels, Taylor models, kernel fits and their training cost, beside what else computes them.

python benchmarks/empirical_ntk.py [--neural-tangents PYTHON] [--threads N] [--rounds N] [--only PART ...]
                                   [--row NAME ...] [--implementations NAME ...]

The part "table" is many networks and sizes; --row measures some of its rows, and leaves the others in the results.

neural-tangents runs in an environment of its own, whose interpreter the option or NEURAL_TANGENTS_PYTHON names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_fits import critical_rate, kernel_sgd_beside_memory
from machine import machine
from table import IMPLEMENTATIONS, ROWS, table
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from training import trainer_beside_loop, watching_beside_training
from turns import take_turns

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.modules.taylor_expansion import taylor_expansion
from ntk_lightning.networks import MyrtleCNN

RESULTS = Path(__file__).parent / "results"

NEURAL_TANGENTS = """
import json, sys, time
import numpy as np, jax, neural_tangents as nt
from neural_tangents import stax

path, rounds = sys.argv[1], int(sys.argv[2])
if "float64" in path:
    jax.config.update("jax_enable_x64", True)
arrays = np.load(path, allow_pickle=False)
weights = [arrays[f"w{i}"] for i in range(5)]
conv = lambda: stax.Conv(weights[0].shape[-1], (3, 3), padding="SAME", W_std=2**0.5, b_std=None)
pool = lambda: stax.AvgPool((2, 2), (2, 2))
layers = [conv(), stax.Relu(), conv(), stax.Relu(), pool(), conv(), stax.Relu(), pool(), conv(), stax.Relu(),
          stax.GlobalAvgPool(), stax.Dense(1, W_std=2**0.5, b_std=None)]
init, apply, _ = stax.serial(*layers)
x = arrays["x"]
_, params = init(jax.random.PRNGKey(0), (1, *x.shape[1:]))
leaves, tree = jax.tree_util.tree_flatten(params)
assert [leaf.shape for leaf in leaves] == [w.shape for w in weights]
params = jax.tree_util.tree_unflatten(tree, weights)
kernel = jax.jit(nt.empirical_ntk_fn(apply, vmap_axes=0, trace_axes=(-1,),
                                     implementation=nt.NtkImplementation.JACOBIAN_CONTRACTION))
seconds = []
for _ in range(rounds + 1):
    start = time.perf_counter()
    gram = np.asarray(kernel(x, None, params))
    seconds.append(time.perf_counter() - start)
np.save(path + ".gram.npy", gram)
print(json.dumps({"seconds": seconds[1:], "versions": {"neural-tangents": nt.__version__, "jax": jax.__version__}}))
"""

PEAK = """
import json, re, sys, time, torch
from pathlib import Path
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.networks import MyrtleCNN

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[3]))
n = int(sys.argv[2])
net, x, out = MyrtleCNN(64), torch.randn(n, 3, 32, 32), torch.ones(n, n)
EmpiricalNTK(net)(x[:4])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
start = time.perf_counter()
EmpiricalNTK(net, memory=sys.argv[1])(x)
print(json.dumps({"peak_bytes": status("VmHWM") - before - out.nbytes, "seconds": time.perf_counter() - start}))
"""


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest entry."""
    return float((actual - expected).abs().max() / expected.abs().max())


def jacrev_and_einsum(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Follow PyTorch's tutorial on the NTK: a Jacobian of each set of samples, an einsum for each parameter."""
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def single(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, weights, (sample.unsqueeze(0),)).squeeze(0)

    jacobians = [vmap(jacrev(single), (None, 0))(parameters, x) for x in (x1, x2)]
    pairs = zip(*([j.flatten(2) for j in jacobian.values()] for jacobian in jacobians), strict=True)
    return sum(torch.einsum("Naf,Mbf->NMab", a, b) for a, b in pairs)


def neural_tangents(python: str, net: nn.Sequential, x: Tensor, rounds: int) -> tuple[dict[str, Any], Tensor]:
    """Run neural-tangents on the same weights and images."""
    parameters = [p.detach().to(x.dtype) for p in net.parameters()]
    weights = [p.permute(2, 3, 1, 0) if p.dim() == 4 else p.T for p in parameters]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{x.dtype}.npz"
        np.savez(path, x=x.permute(0, 2, 3, 1).numpy(), **{f"w{i}": w.numpy() for i, w in enumerate(weights)})
        command = [python, "-c", NEURAL_TANGENTS, path, str(rounds)]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}, check=False)
        if run.returncode:
            raise RuntimeError(f"neural-tangents failed:\n{run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1]), torch.from_numpy(
            np.load(path + ".gram.npy", allow_pickle=False)
        )


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Part 1: Myrtle-5, width 64, 32x32, n=512."""
    torch.manual_seed(0)
    n, net = 512, MyrtleCNN(64)
    x, kernel = torch.randn(n, 3, 32, 32), EmpiricalNTK(net)
    features = torch.randn(n, sum(p.numel() for p in net.parameters()))

    def forward_backward(chunk: int) -> None:
        for part in x.split(chunk):
            net.zero_grad()
            net(part).sum().backward()

    tasks: dict[str, Callable[[], object]] = {
        "EmpiricalNTK": lambda: kernel(x),
        "forward+backward, batches of 16": lambda: forward_backward(16),
        "forward+backward, batches of 32": lambda: forward_backward(32),
        "matrix product (n, P) x (P, n)": lambda: features @ features.T,
        "jacrev and einsum": lambda: jacrev_and_einsum(net, x, x),
    }
    seconds = take_turns(tasks, options.rounds)
    oracle = kernel(x.double())
    ours, tutorial = kernel(x), jacrev_and_einsum(net, x, x)[:, :, 0, 0]
    errors = {"EmpiricalNTK": relative(ours, oracle), "jacrev and einsum": relative(tutorial, oracle)}
    results: dict[str, Any] = {"difference_to_jacrev": relative(ours, tutorial)}
    if options.neural_tangents:
        name, few = "neural-tangents, Jacobian contraction, jitted", x[:4].double()
        run, other = neural_tangents(options.neural_tangents, net, x, 3)
        seconds[name], errors[name] = run["seconds"], relative(other, oracle)
        double = relative(neural_tangents(options.neural_tangents, net, few, 0)[1], kernel(few))
        results |= {"neural_tangents_versions": run["versions"], "neural_tangents_float64_difference": double}
    else:
        print("neural-tangents is left out: name its interpreter with --neural-tangents or NEURAL_TANGENTS_PYTHON.")
    best = {name: min(times) for name, times in seconds.items()}
    parts = min(best["forward+backward, batches of 16"], best["forward+backward, batches of 32"])
    bound = parts + best["matrix product (n, P) x (P, n)"]
    print(
        f"\nMyrtle-5, width 64, 32x32, n={n}, float32, {options.threads} threads, {options.rounds} interleaved rounds"
    )
    print(f"{'':48}{'best s':>8}{'median s':>10}{'x ours':>8}{'error against float64':>24}")
    for name, times in seconds.items():
        error = f"{errors[name]:24.1e}" if name in errors else ""
        print(
            f"{name:48}{best[name]:8.3f}{statistics.median(times):10.3f}{best[name] / best['EmpiricalNTK']:8.2f}{error}"
        )
    print(f"ours over (faster forward+backward + matrix product), best times: {best['EmpiricalNTK'] / bound:.2f}")
    print(f"float32, ours against jacrev: {results['difference_to_jacrev']:.1e} of the largest entry")
    if options.neural_tangents:
        print(f"float64, 4 images, ours against neural-tangents: {results['neural_tangents_float64_difference']:.1e}")
    ratio = best["EmpiricalNTK"] / bound
    return {"n": n, "seconds": seconds, "errors": errors, "over_forward_backward_and_product": ratio, **results}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Part 2: peak memory against the budget."""
    n, width = 4000, sum(p.numel() for p in MyrtleCNN(64).parameters())
    print(f"\npeak memory, Myrtle-5, width 64, 32x32, n={n}, {options.threads} threads")
    print(f"the gradients of all samples take {n * width * 4 / 1e6:.0f} MB")
    print(f"{'budget':>8}{'peak above inputs, result and imports':>40}{'s':>8}")
    results = {}
    for budget in ("500MB", "1GB"):
        command = [sys.executable, "-c", PEAK, budget, str(n), str(options.threads)]
        run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"{budget:>8}{run['peak_bytes'] / 1e6:37.0f} MB{run['seconds']:8.1f}")
        results[budget] = run
    return results


def taylor(options: argparse.Namespace) -> dict[str, Any]:
    """Cost of a training step of the Taylor models beside the finite network's."""
    torch.manual_seed(0)
    net, x = MyrtleCNN(16), torch.randn(64, 3, 32, 32)
    w0 = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    displacement = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in w0.items()}

    def step(parameters: list[Tensor], predict: Callable[[], Tensor]) -> None:
        gradients = torch.autograd.grad((predict() - 1).square().mean(), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= 1e-3 * gradient

    def model(order: int) -> Callable[[], None]:
        return lambda: step(list(displacement.values()), lambda: taylor_expansion(net, w0, displacement, x, order))

    tasks = {"finite network": lambda: step(list(net.parameters()), lambda: net(x))}
    seconds = take_turns(
        tasks | {f"Taylor model of order {order}": model(order) for order in (1, 2, 3)}, options.rounds
    )
    print(f"\none SGD step, Myrtle-5, width 16, 32x32, batch of 64, {options.threads} threads")
    print(f"{'':48}{'best s':>8}{'median s':>10}{'x finite':>10}")
    for name, times in seconds.items():
        ratio = min(times) / min(seconds["finite network"])
        print(f"{name:48}{min(times):8.3f}{statistics.median(times):10.3f}{ratio:10.2f}")
    return {"seconds": seconds}


PARTS = {
    "speed": speed,
    "table": table,
    "memory": memory,
    "taylor": taylor,
    "kernel_sgd": kernel_sgd_beside_memory,
    "trainer": trainer_beside_loop,
    "dynamics": watching_beside_training,
    "critical": critical_rate,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neural-tangents", default=os.environ.get("NEURAL_TANGENTS_PYTHON"), metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--row", nargs="+", choices=ROWS, help="of the part table; all by default")
    parser.add_argument("--implementations", nargs="*", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--results", type=Path, default=RESULTS / "empirical_ntk_cpu.json")
    options = parser.parse_args()
    if options.row and "--only" not in sys.argv:
        options.only = ["table"]
    torch.set_num_threads(options.threads)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.before = json.loads(options.results.read_text()) if options.results.exists() else {}

    def save(result: dict[str, Any]) -> None:
        options.before |= {"machine": machine(), **result}
        options.results.write_text(json.dumps(options.before, indent=1) + "\n")

    options.save = save
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    for part in options.only:
        result = PARTS[part](options)
        save({part: result if part == "table" else {"threads": options.threads, **result}})


if __name__ == "__main__":
    main()
