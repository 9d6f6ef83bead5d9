"""Kernels of layers and networks against neural-tangents, and against finite networks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import DATA
from reference_networks import build
from torch import nn

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.networks import MLP, Pointwise

ARRAYS: dict[str, np.ndarray] = {}
for file in ("activations_reference.npz", "layers_reference.npz"):
    with np.load(DATA / file, allow_pickle=False) as stored:
        ARRAYS |= {name: stored[name] for name in stored}
CASES = sorted({name.partition("/")[0] for name in ARRAYS})


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_those_of_neural_tangents(case: str, record_property: Callable[[str, object], None]) -> None:
    x1, x2 = (torch.from_numpy(ARRAYS[f"{case}/{x}"]) for x in ("x1", "x2"))
    if case == "conv_3x3_stride2_circular_even_shifted":  # its pads are [0, 1], ours [1, 1]
        x1, x2 = (x.roll((-1, -1), (2, 3)) for x in (x1, x2))
    net = build(json.loads(str(ARRAYS[f"{case}/net"])), x1[:1].float())
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
