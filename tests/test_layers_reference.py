"""Activations against neural-tangents, and against finite networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.networks import MLP, Erf, NTKConv2d, NTKLinear, Pointwise

with np.load(DATA / "activations_reference.npz", allow_pickle=False) as stored:
    ARRAYS = {name: stored[name] for name in stored}
CASES = sorted({name.partition("/")[0] for name in ARRAYS})


def sigmoid_like(x: Tensor) -> Tensor:
    return torch.erf(x / 2.4020563531719796) / 2 + 0.5


def numerical(options: dict[str, Any]) -> nn.Module:
    """An activation that has no spelling but a function."""
    a, b = options.get("a", 1.0), options.get("b", 1.0)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "abrelu": lambda x: a * x.clamp_max(0) + b * x.clamp_min(0),
        "gaussian": lambda x: a * torch.exp(b * x**2),
        "rbf": lambda x: math.sqrt(2) * torch.sin(math.sqrt(2 * options["gamma"]) * x + math.pi / 4),
        "monomial": lambda x: x ** options["degree"],
        "polynomial": lambda x: torch.stack([c * x**i for i, c in enumerate(options["coef"])]).sum(0),
        "sigmoid_like": sigmoid_like,
    }
    return Pointwise(functions[options["type"]])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "abs": lambda: Pointwise(torch.abs),
    "sin": lambda: Pointwise(torch.sin),
    "cos": lambda: Pointwise(torch.cos),
    "exp": lambda: Pointwise(torch.exp),
    "sign": lambda: Pointwise(torch.sign),
    "erf": Erf,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


def network(case: str) -> nn.Sequential:
    """Build what a case's JSON describes."""
    layers: list[nn.Module] = []
    channels = ARRAYS[f"{case}/x1"].shape[1]
    for options in json.loads(str(ARRAYS[f"{case}/net"])):
        match options["type"]:
            case "dense" | "conv" as kind:
                scales = options["weight_std"], options["bias_std"] or 0.0
                if kind == "dense":
                    layers.append(NTKLinear(channels, options["width"], *scales))
                else:
                    layers.append(NTKConv2d(channels, options["width"], 3, options["padding"], *scales))
                channels = options["width"]
            case "global_avg_pool":
                layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            case "leaky_relu":
                layers.append(nn.LeakyReLU(options["alpha"]))
            case name if name in MODULES:
                assert (options.get("a", 1), options.get("b", 1), options.get("c", 0)) == (1, 1, 0)
                layers.append(MODULES[name]())
            case _:
                layers.append(numerical(options))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("case", CASES)
def test_activations_equal_those_of_neural_tangents(case: str, record_property: Callable[[str, object], None]) -> None:
    x1, x2 = (torch.from_numpy(ARRAYS[f"{case}/{x}"]) for x in ("x1", "x2"))
    net = network(case)
    for kind in ("nngp", "ntk") if f"{case}/ntk" in ARRAYS else ("nngp",):
        expected = torch.from_numpy(ARRAYS[f"{case}/{kind}"])
        kernel = InfiniteNTK(net, kind)(x1, x2)  # type: ignore[arg-type]  # one of both
        error = float((kernel - expected).abs().max() / expected.abs().max())
        record_property(kind, error)
        assert error < 1e-10


@pytest.mark.parametrize(
    ("activation", "scale"),
    [
        (nn.Hardtanh, 1.5),
        (lambda: Pointwise(torch.sin), 1.5),
        (lambda: nn.ELU(0.7), 1.2),
        (lambda: Pointwise(torch.exp), 0.5),
        (nn.Softplus, 1.0),
        (lambda: Pointwise(torch.abs), 1.0),
    ],
)
def test_finite_networks_of_width_512_agree(activation: Callable[[], nn.Module], scale: float) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.manual_seed(0)
    nets = [MLP(512, 2, 5, activation, weight_std=scale, bias_std=0.2).double() for _ in range(24)]
    kernels = torch.stack([EmpiricalNTK(net)(x) for net in nets])
    error = kernels.std(0) / len(nets) ** 0.5
    assert float(((kernels.mean(0) - InfiniteNTK(nets[0])(x)) / error).abs().max()) < 4


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_no_gradient_passes_a_sign(kind: str) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net = MLP(2, 2, 5, lambda: Pointwise(torch.sign), weight_std=1.2, bias_std=0.3)
    k = 1.44 * x @ x.T / 5 + 0.09
    for _ in range(2):  # the NTK is that of the readout alone, which is its NNGP
        k = 1.44 * 2 / math.pi * (k / (k.diagonal()[:, None] * k.diagonal()).sqrt()).clamp(-1, 1).asin() + 0.09
    torch.testing.assert_close(InfiniteNTK(net, kind)(x), k, rtol=1e-7, atol=1e-12)  # type: ignore[arg-type]
