"""Shared fixtures: the neural-tangents Grams and the architectures they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ntk_lightning.networks import MLP, Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear

DATA = Path(__file__).parent / "data"


def flat_cnn(width: int = 2) -> nn.Sequential:
    convolutions = NTKConv2d(3, width, 3), nn.ReLU(), NTKConv2d(width, width, 3), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), NTKLinear(36 * width, 1))


REFERENCE_NETS = {
    "mlp3_relu": lambda: MLP(4, 3, 12),
    "mlp2_erf_bias": lambda: MLP(4, 2, 7, Erf, weight_std=1.5, bias_std=0.3),
    "flatcnn_relu": flat_cnn,
    "myrtle5_8x8": lambda: MyrtleCNN(2),
    "myrtle5_32x32": lambda: MyrtleCNN(2),
    "myrtle5_bias_8x8": lambda: MyrtleCNN(2, weight_std=1.3, bias_std=0.2),
    "cnn5_16x16": lambda: FiveLayerCNN(2),
}


@pytest.fixture(scope="session")
def neural_tangents() -> dict[str, torch.Tensor]:
    """Arrays of tests/data/ntk_reference.npz, keyed "case/x1", "case/x2", "case/nngp", "case/ntk"."""
    with np.load(DATA / "ntk_reference.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.fixture(params=REFERENCE_NETS)
def reference_case(request: pytest.FixtureRequest) -> tuple[str, nn.Sequential]:
    """Name of a neural-tangents case and its network."""
    return request.param, REFERENCE_NETS[request.param]()
