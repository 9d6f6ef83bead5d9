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

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import Erf, NTKConv2d, NTKLinear, Pointwise

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
