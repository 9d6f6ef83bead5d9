"""Every way to make the gradients of an affine layer gives those of plain autograd, and the cheap one is chosen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense, jacobian, relative, trace
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical import trial
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.networks import MLP, MyrtleCNN, NTKConv1d, NTKConv2d, NTKLinear

D = torch.float64


class Tokens(nn.Module):
    """A transformer's layer on tokens, with a readout of their mean."""

    def __init__(self, num_outputs: int = 3) -> None:
        super().__init__()
        self.query, self.key, self.norm = nn.Linear(5, 4), nn.Linear(5, 4, bias=False), nn.LayerNorm(5)
        self.value, self.readout = NTKLinear(5, 5, bias_std=0.3), nn.Linear(5, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.softmax(self.query(x) @ self.key(x).mT, -1) @ self.value(x)
        return self.readout(self.norm(x + mixed).mean(1))


class WideTokens(nn.Module):
    """So few and wide tokens that products of all pairs of them are fewer than those of gradients."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 30), NTKLinear(30, 24, bias_std=0.3)
        self.readout = nn.Linear(24, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


class Twice(nn.Module):
    """A convolution that is used twice, one whose weight something else reads, one of patches, and an ordinary one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1)
        self.patches, self.once, self.readout = nn.Conv2d(2, 2, 2), nn.Conv2d(2, 3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(x))) * self.read.weight.mean() + self.read(x)
        h = h + self.patches(h.reshape(-1, 2, 2, 2)).reshape(len(x), -1, 2, 1).mean(1)[..., None]
        return self.readout(torch.tanh_(self.once(h)).mean((2, 3)))


def convolution(conv: nn.Module, size: int, frozen: str = "") -> nn.Module:
    if frozen:
        getattr(conv, frozen).requires_grad_(False)
    return nn.Sequential(NTKConv2d(2, 2, 1), nn.Tanh(), conv, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3))


# a network, one sample's shape, and how often each way is chosen for it
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "myrtle": (lambda: MyrtleCNN(3, num_outputs=3, bias_std=0.3), (3, 8, 8), {"product": 4, "factors": 1}),
    "myrtle, one output": (lambda: MyrtleCNN(3), (3, 8, 8), {"product": 4, "factors": 1}),
    "mlp": (lambda: MLP(4, 2, 5, num_outputs=3, bias_std=0.3), (5,), {"factors": 3}),
    "tokens": (Tokens, (6, 5), {"product": 3, "factors": 1}),
    "tokens, one output": (lambda: Tokens(1), (6, 5), {"product": 3, "factors": 1}),
    "few wide tokens": (lambda: WideTokens(3), (2, 24), {"factors": 3}),
    "few wide tokens, one output": (lambda: WideTokens(1), (2, 24), {"factors": 3}),
    "few pixels": (lambda: convolution(nn.Conv2d(2, 30, 3), 60), (2, 3, 4), {"product": 1, "factors": 2}),
    "sequence": (
        lambda: nn.Sequential(
            NTKConv1d(2, 4, 3, padding="same", bias_std=0.3, padding_mode="circular"), nn.Tanh(),
            nn.Conv1d(4, 3, 2, dilation=2, padding=1), nn.Tanh(), nn.Conv1d(3, 3, 3, stride=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(12, 3),
        ), (2, 9), {"product": 3, "factors": 1},
    ),
    "strided": (
        lambda: convolution(NTKConv2d(2, 3, 3, "valid", stride=2), 12), (2, 5, 6), {"product": 2, "factors": 1},
    ),
    "dilated": (
        lambda: convolution(nn.Conv2d(2, 3, (2, 3), (1, 2), (1, 0), (2, 1)), 30), (2, 5, 6),
        {"product": 2, "factors": 1},
    ),
    "same": (lambda: convolution(nn.Conv2d(2, 2, (3, 1), padding="same"), 40), (2, 4, 5), {"product": 2, "factors": 1}),
    "same, even": (
        lambda: convolution(nn.Conv2d(2, 2, 2, padding="same"), 40), (2, 4, 5), {"product": 2, "factors": 1},
    ),
    "grouped": (lambda: convolution(nn.Conv2d(2, 4, 2, groups=2), 48), (2, 4, 5), {"product": 1, "factors": 1}),
    "circular": (
        lambda: convolution(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 40), (2, 4, 5),
        {"product": 2, "factors": 1},
    ),
    "reflected": (
        lambda: convolution(nn.Conv2d(2, 2, (3, 2), padding=(1, 0), padding_mode="reflect"), 32), (2, 4, 5),
        {"product": 2, "factors": 1},
    ),
    "no bias": (lambda: convolution(nn.Conv2d(2, 2, 2, bias=False), 24), (2, 4, 5), {"product": 2, "factors": 1}),
    "frozen weight": (lambda: convolution(nn.Conv2d(2, 2, 2), 24, "weight"), (2, 4, 5), {"product": 2, "factors": 1}),
    "frozen bias": (lambda: convolution(nn.Conv2d(2, 2, 2), 24, "bias"), (2, 4, 5), {"product": 2, "factors": 1}),
    "twice": (Twice, (2, 4, 4), {"product": 1, "factors": 1}),
}  # fmt: skip


def rows_of(net: nn.Module, x: Tensor, **options: Any) -> GradientRows:  # noqa: ANN401 - of the rows
    names = tuple(name for name, parameter in net.named_parameters() if parameter.requires_grad)
    function = NetworkFunction(net, names, None, False, x.dtype, x.device)
    return GradientRows(function, Inputs.of(x[:1]), **options)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, dict[str, int]]:
    torch.manual_seed(0)
    make, shape, ways = CASES[request.param]
    return make().to(D), torch.randn(7, *shape, dtype=D), torch.randn(4, *shape, dtype=D), ways


def test_the_cheap_way_is_chosen_and_every_mode_is_plain_autograd(
    case: tuple[nn.Module, Tensor, Tensor, dict[str, int]],
) -> None:
    net, x, y, ways = case
    rows = rows_of(net, x)
    assert Counter(rows.ways.values()) == ways
    expected, square = dense(net, y, x), dense(net, x, x)
    kernel, full = EmpiricalNTK(net), EmpiricalNTK(net, full=True)
    few = EmpiricalNTK(net, full=True, memory=rows.width * rows.num_outputs * 8 * 40 + 40_000)
    for actual, values in (
        (kernel(x), trace(square)),
        (kernel(y, x), trace(expected)),
        (kernel.diag(x), trace(square).diagonal()),
        *zip(kernel.gram_and_cross(x, y), (trace(square), trace(expected)), strict=True),
        (full(x), square),
        (full(y, x), expected),
        (full.diag(x), square.diagonal().movedim(-1, 0)),
        (few(x), square),
        (sum(full.per_layer(x).values()), square),
        (EmpiricalNTK(net, output=0)(y, x), expected[..., 0, 0]),
        (EmpiricalNTK(net, output=0, output2=expected.shape[-1] - 1)(y, x), expected[..., 0, -1]),
        (kernel.matvec(x, torch.ones(7, dtype=D)), trace(square).sum(1)),
    ):
        assert relative(actual, values) < 1e-12


def test_per_layer_is_plain_autograd(case: tuple[nn.Module, Tensor, Tensor, dict[str, int]]) -> None:
    net, x, _, _ = case
    for name, actual in EmpiricalNTK(net).per_layer(x).items():
        own = [p for p in net.get_submodule(name).parameters(recurse=False) if p.requires_grad]
        j = jacobian(net, x, parameters=own)
        assert relative(actual, torch.einsum("iap,jap->ij", j, j) / j.shape[1]) < 1e-12


def test_outputs_that_vmap_cannot_take_together_are_taken_one_after_another(
    case: tuple[nn.Module, Tensor, Tensor, dict[str, int]],
) -> None:
    net, x, _, _ = case
    made = []
    for batched in (True, False):
        rows = rows_of(net, x, batched=batched)
        made.append(torch.empty(len(x), rows.width, dtype=D))
        rows.fill(made[-1], Inputs.of(x))
    assert relative(*made) < 1e-12


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_outputs", [2, 5])
def test_all_outputs_go_back_in_one_pass_and_make_one_product_a_layer(num_outputs: int) -> None:
    net, x = MyrtleCNN(3, num_outputs=num_outputs), torch.randn(4, 3, 8, 8)
    rows, calls = rows_of(net, x, batched=True), Calls()
    with calls:
        rows.fill(torch.empty(4, rows.width), Inputs.of(x))
    # one forward pass of 4 convolutions, a backward pass through all but the first, and a gradient of each
    assert [calls.counts[name] for name in ("convolution", "convolution_backward", "baddbmm")] == [4, 3, 4]


def test_a_second_call_tries_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x, seen, fill = EmpiricalNTK(MyrtleCNN(3, num_outputs=2)), torch.randn(6, 3, 8, 8), [], GradientRows.fill
    first = kernel(x)
    monkeypatch.setattr(trial, "_try", None)
    monkeypatch.setattr(GradientRows, "fill", lambda self, out, x: (seen.append(len(x)), fill(self, out, x)))
    assert torch.equal(kernel(x), first)
    assert sum(seen) == 6


def test_a_network_of_several_outputs_that_is_tried_takes_them_together() -> None:
    net, x = Tokens().to(D), torch.randn(5, 6, 5, dtype=D)
    kernel = EmpiricalNTK(net)
    with kernel._computing(x) as (rows, _):
        assert isinstance(rows, GradientRows)
        assert rows.batched


@pytest.mark.parametrize("full", [False, True])
def test_rows_in_bfloat16_are_those_of_float32_to_its_precision(full: bool) -> None:
    torch.manual_seed(0)
    net, x = MyrtleCNN(8, num_outputs=3), torch.randn(12, 3, 8, 8)
    exact = EmpiricalNTK(net, full=full)(x)
    assert 1e-6 < relative(EmpiricalNTK(net, full=full, features="bfloat16")(x), exact) < 1e-2
