"""Products of the empirical NTK with many vectors at once, on chains of layers, by vmap and one sample at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_modules import SLOW, D, jacobian, relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical import products
from ntk_lightning.networks import (
    MLP,
    ChannelNorm,
    MyrtleCNN,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Residual,
    SelfAttention,
)


def shared() -> nn.Sequential:
    first, second = NTKLinear(6, 6, bias_std=0.2), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), first, nn.GELU(), second, nn.Softplus(), NTKLinear(6, 2))


def frozen() -> nn.Sequential:
    net = MLP(7, 3, 6, nn.Tanh, num_outputs=2, bias_std=0.3)
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i % 3 == 1)
    return net


def normalized() -> nn.Sequential:
    net = nn.Sequential(
        NTKConv2d(2, 4, 3, bias_std=0.2),
        nn.BatchNorm2d(4),
        Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)), nn.Conv2d(4, 4, 1)),
        nn.GroupNorm(2, 4),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 3),
    )
    net[1].running_mean = torch.randn(4)
    return net.eval()


def attention() -> nn.Sequential:
    return nn.Sequential(
        NTKConv2d(2, 4, (3, 2), (1, 0), stride=(1, 2), padding_mode="circular"),
        ChannelNorm(),
        SelfAttention(4, 4),
        nn.Flatten(),
        NTKLinear(24, 1),
    )


def sequences() -> nn.Sequential:
    return nn.Sequential(
        NTKConv1d(2, 3, 3, "valid", stride=2, bias_std=0.1), nn.ELU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(6, 1)
    )


class Functional(nn.Module):
    """No chain: vmap makes its products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(2, 3, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.conv(x)).flatten(1) ** 2)


class Branching(Functional):
    """Samples take different branches."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.out((h.tanh() if (x.sum() > 0).all() else F.softplus(h)).flatten(1))


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one output": (lambda: MLP(7, 2, 6, bias_std=0.3), (6,)),
    "no dimension of outputs": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), (6,)),
    "myrtle": (lambda: MyrtleCNN(3, in_channels=2, num_outputs=2), (2, 4, 4)),
    "shared": (shared, (6,)),
    "frozen": (frozen, (6,)),
    "normalized": (normalized, (2, 4, 4)),
    "sequences": (sequences, (2, 10)),
}
OTHERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "functional": (Functional, (2, 4, 4)),
    "branching": (Branching, (2, 4, 4)),
    **SLOW,
}


def check(net: nn.Module, shape: tuple[int, ...], **options: Any) -> None:  # noqa: ANN401 - passed on
    """Compare with the Jacobian by plain autograd: a vector, several, other rows, one output, all outputs."""
    x, x2 = torch.randn(5, *shape, dtype=D), torch.randn(3, *shape, dtype=D)
    j, j2 = jacobian(net, x), jacobian(net, x2)  # (n, C, P)
    v = torch.randn(5, 4, dtype=D)
    gram, cross = (torch.einsum("icp,jdp->ijcd", a, j) for a in (j, j2))

    def trace(kernel: Tensor) -> Tensor:
        return kernel.diagonal(dim1=2, dim2=3).mean(-1)

    kernel = EmpiricalNTK(net, **options)
    assert relative(kernel.matvec(x, v), trace(gram) @ v) < 1e-12
    assert relative(kernel.matvec(x, v[:, 0]), trace(gram) @ v[:, 0]) < 1e-12
    assert kernel.matvec(x, v[:, :1]).shape == (5, 1)
    assert relative(kernel.matvec(x, v, x2), trace(cross) @ v) < 1e-12
    if not isinstance(net, nn.Sequential) or net[-1].__class__ is not nn.Flatten:
        assert relative(EmpiricalNTK(net, output=0, **options).matvec(x, v, x2), cross[:, :, 0, 0] @ v) < 1e-12
    u = torch.randn(5, j.shape[1], dtype=D)
    full = EmpiricalNTK(net, full=True, **options)
    assert relative(full.matvec(x, u, x2), torch.einsum("ijab,jb->ia", cross, u)) < 1e-12
    assert relative(full.matvec(x, u), torch.einsum("ijab,jb->ia", gram, u)) < 1e-12


@pytest.mark.parametrize("name", CHAINS)
def test_products_of_chains_are_those_of_the_jacobian(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a chain's products are made by its layers")

    monkeypatch.setattr(products, "choose_products", never)
    torch.manual_seed(0)
    make, shape = CHAINS[name]
    check(make().double(), shape)


@pytest.mark.parametrize("name", [*OTHERS, "attention"])
def test_products_of_other_networks_are_those_of_the_jacobian(name: str) -> None:
    torch.manual_seed(0)
    make, shape = OTHERS.get(name, (attention, (2, 3, 4)))
    check(make().double() if name != "complex weights" else make(), shape)


@pytest.mark.parametrize("name", ["myrtle", "normalized", "functional"])
def test_little_memory_takes_fewer_vectors_and_keeps_nothing(name: str) -> None:
    torch.manual_seed(0)
    make, shape = (CHAINS | OTHERS)[name]
    net = make().double()
    x = torch.randn(5, *shape, dtype=D)
    with pytest.raises(ValueError, match="cannot hold the gradients needed at once") as error:
        EmpiricalNTK(net, memory=1000).matvec(x, torch.ones(5))
    least = float(str(error.value).split("takes ")[1].split("MB")[0])
    check(net, shape, memory=f"{1.2 * least + 0.05}MB")


def test_a_layer_at_two_places_stays_tied_to_a_third() -> None:
    torch.manual_seed(0)
    net, x = shared().double(), torch.randn(4, 6, dtype=D)
    gram = torch.einsum("icp,jcp->ij", jacobian(net, x), jacobian(net, x)) / 2
    kernel = EmpiricalNTK(net)
    for _ in range(3):
        assert relative(kernel(x), gram) < 1e-12
    assert kernel.net[0].weight is kernel.net[4].weight


class _Convolutions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        name = str(func)
        if name.startswith("aten.convolution_backward"):
            self.made["inputs"] += args[10][0]
            self.made["weights"] += args[10][1]
        elif name.startswith("aten.convolution"):
            self.made["forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vectors", [1, 8])
def test_a_chain_runs_once_for_both_factors_and_all_vectors(vectors: int) -> None:
    torch.manual_seed(0)
    kernel, x = EmpiricalNTK(MyrtleCNN(3)), torch.randn(4, 3, 8, 8)
    kernel.matvec(x, torch.ones(4))  # the memory is measured once
    with _Convolutions() as convolutions:
        kernel.matvec(x, torch.randn(4, vectors))
    # Four convolutions run, and once more with all directions in place of their weights; all but the first have
    # gradients in their inputs, and each has one in its weights for every vector.
    assert convolutions.made == {"forward": 8, "inputs": 3, "weights": 4 * vectors}


def test_a_slow_network_runs_once_a_sample_for_all_vectors() -> None:
    calls = []
    make, shape = SLOW["lstm"]
    net, x = make().double(), torch.randn(4, *shape, dtype=D)
    net.register_forward_hook(lambda *_: calls.append(1))
    kernel = EmpiricalNTK(net)
    kernel.matvec(x, torch.ones(4, dtype=D))
    counts = []
    for vectors in (1, 6):
        calls.clear()
        kernel.matvec(x, torch.randn(4, vectors, dtype=D))
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
