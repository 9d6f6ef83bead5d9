"""The table of activations: what is not in it, or not in a backend, is refused there."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.infinite import fused_cpu, fused_cpu_numba
from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, Activation, Pair, Row
from ntk_lightning.kernels.infinite.architecture import Conv, Flatten, Linear, parse
from ntk_lightning.kernels.infinite.fused import unsupported
from ntk_lightning.networks import MLP, NTKConv2d, NTKLinear

LAYERS = Conv(3, 1, 1, 1.0, 0.0), Activation("cube"), Flatten(), Linear(1.0, 0.0)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def dual(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """E[u^3 v^3] and E[9 u^2 v^2], by Isserlis."""
    k12, k11, k22 = pair.k12, pair.k11, pair.k22
    return 6 * k12**3 + 9 * k11 * k22 * k12, 9 * (k11 * k22 + 2 * k12**2)


@pytest.fixture
def cube(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more in the table."""
    monkeypatch.setitem(ACTIVATIONS, "cube", Row("Cube", (Cube,), lambda _: Activation("cube"), dual))


@pytest.mark.usefixtures("cube")
def test_a_row_makes_an_activation_known_to_the_reference() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    k = x @ x.T / 2
    nngp = 6 * k**3 + 9 * k.diagonal()[:, None] * k.diagonal() * k
    net = MLP(1, 1, 2, Cube, weight_std=1.0)
    torch.testing.assert_close(InfiniteNTK(net, "nngp")(x), nngp)
    derivative = 9 * (k.diagonal()[:, None] * k.diagonal() + 2 * k**2)
    torch.testing.assert_close(InfiniteNTK(net)(x), nngp + k * derivative)


@pytest.mark.usefixtures("cube")
def test_a_backend_that_its_row_does_not_name_never_runs_it() -> None:
    net = nn.Sequential(NTKConv2d(1, 1, 3), Cube(), nn.Flatten(), NTKLinear(16, 1))
    x = torch.ones(2, 1, 4, 4)
    assert InfiniteNTK(net).backend_for(x) == "reference"
    with pytest.raises(ValueError, match="the cpu kernel does not have the activation cube"):
        InfiniteNTK(net, backend="cpu")(x)
    for backend in ("cpu", "cuda"):
        assert unsupported(parse(net), (4, 4), backend) == f"the {backend} kernel does not have the activation cube"


@pytest.mark.usefixtures("cube")
def test_an_activation_after_the_mean_over_pixels_counts_too() -> None:
    net = nn.Sequential(NTKConv2d(1, 1, 3), nn.Flatten(), NTKLinear(16, 4), Cube(), NTKLinear(4, 1))
    assert "cube" in str(unsupported(parse(net), (4, 4), "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_name_without_a_row_is_refused(backend: str) -> None:
    assert unsupported(LAYERS, (4, 4), backend) == f"the {backend} kernel does not have the activation cube"


def test_the_table_names_the_cpu_kernel_where_it_has_the_activation() -> None:
    assert {name for name, row in ACTIVATIONS.items() if "cpu" in row.compiled} == set(fused_cpu._KINDS)


def test_no_branch_of_the_cpu_kernel_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(NotImplementedError, match="cube"):
        fused_cpu.gram(LAYERS, "ntk", x, None, lambda _: None)
    monkeypatch.setitem(fused_cpu._KINDS, "cube", 1 + max(fused_cpu_numba.LINEAR, *fused_cpu._KINDS.values()))
    assert fused_cpu.gram(LAYERS, "ntk", x, None, lambda _: None).isnan().all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")
def test_no_branch_of_the_cuda_tables_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntk_lightning.kernels.infinite import fused_cuda

    monkeypatch.setattr(fused_cuda.triton.knobs.runtime, "interpret", True)  # takes tensors in main memory
    x = torch.rand(2, 1, 4, 4)
    work = fused_cuda._Work(LAYERS, "ntk", x, fused_cuda.Tiling())
    monkeypatch.setattr(fused_cuda, "pixel_variances", lambda *_: [torch.ones(2, 4, 4)])
    with pytest.raises(NotImplementedError, match="CUDA kernel has no activation 'cube'"):
        work.tables(x)
