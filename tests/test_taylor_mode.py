"""Taylor coefficients carried from layer to layer are those of nested Jacobian-vector products."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_lightning.kernels.empirical.network_state import functional_call
from ntk_lightning.kernels.empirical.standard_layers import is_standard
from ntk_lightning.modules import taylor_expansion as module_of_expansion
from ntk_lightning.modules.taylor_expansion import taylor_expansion
from ntk_lightning.modules.taylor_mode import nested_derivatives
from ntk_lightning.networks import (
    MLP,
    ChannelNorm,
    Erf,
    MyrtleCNN,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Residual,
    SelfAttention,
)


def shared() -> nn.Sequential:
    """One layer at two places, and one weight in two layers."""
    first, second = NTKLinear(6, 6, bias_std=0.2), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), first, nn.Softplus(), second, nn.Sigmoid(), NTKLinear(6, 1))


def convolutions() -> nn.Sequential:
    body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 3, padding="same", padding_mode="circular"), nn.LeakyReLU(0.3))
    shortcut = nn.Conv2d(4, 4, 1, bias=False)
    return nn.Sequential(
        NTKConv2d(2, 4, 3, bias_std=0.2),
        nn.BatchNorm2d(4),
        Residual(body, shortcut),
        nn.MaxPool2d(2),
        NTKConv2d(4, 4, 3, "valid", stride=2),
        Residual(nn.Sequential(nn.GELU(), nn.GroupNorm(2, 4))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.LayerNorm(4),
        nn.Linear(4, 1),
    )


def sequences() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.ELU(), nn.AvgPool1d(2), nn.Flatten(), nn.BatchNorm1d(9), Erf(), nn.Linear(9, 2)
    )


def attention() -> nn.Sequential:
    conv = NTKConv2d(2, 4, (3, 2), (1, 0), stride=(1, 2), padding_mode="circular", bias_std=0.1)
    return nn.Sequential(conv, ChannelNorm(), SelfAttention(4, 4), nn.Flatten(), NTKLinear(24, 2))


def strided() -> nn.Sequential:
    return nn.Sequential(NTKConv1d(2, 3, 3, "valid", stride=2, bias_std=0.1), nn.Tanh(), nn.Flatten(), NTKLinear(12, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: MLP(7, 3, 6, bias_std=0.3), (6,)),
    "gelu": (lambda: MLP(7, 2, 6, nn.GELU, num_outputs=3), (6,)),
    "myrtle": (lambda: MyrtleCNN(3, in_channels=2), (2, 8, 8)),
    "linear": (lambda: nn.Linear(6, 1), (6,)),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)), (1, 3, 3, 3)),
    "no dimension of outputs": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), (6,)),
    "shared": (shared, (6,)),
    "convolutions": (convolutions, (2, 10, 10)),
    "sequences": (sequences, (2, 9)),
    "attention": (attention, (2, 3, 4)),
    "strided": (strided, (2, 9)),
}


def case(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """A network in evaluation mode with statistics and weights that are not the initial ones."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean = torch.randn_like(module.running_mean)
            module.running_var = torch.rand_like(module.running_var) + 0.5
    w0 = {key: weight.detach() + 0.1 * torch.randn_like(weight) for key, weight in net.named_parameters()}
    direction = {key: 0.3 * torch.randn_like(weight) for key, weight in w0.items()}
    assert is_standard(net)
    return net, w0, direction, torch.randn(5, *shape, dtype=torch.float64)


def nested(net: nn.Module, w0: dict[str, Tensor], d: dict[str, Tensor], x: Tensor, order: int) -> list[Tensor]:
    """Taylor coefficients by jvp of jvp of the whole network."""
    moved = {name: w0[name] for name in d}
    values = nested_derivatives(lambda w: functional_call(net, {**w0, **w}, (x,)), moved, d, order)
    return [value / math.factorial(j) for j, value in enumerate(values)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NETS)
def test_values_and_gradients_are_those_of_nested_products(
    name: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the network is differentiated as a whole")

    monkeypatch.setattr(module_of_expansion, "nested_derivatives", never)
    net, w0, direction, x = case(name)
    leaves = {key: d.requires_grad_() for key, d in direction.items()}
    terms = nested(net, w0, leaves, x, order)
    for include_f0 in (False, True):
        expected = sum(terms[2:], terms[1] + terms[0] if include_f0 else terms[1])
        found = taylor_expansion(net, w0, leaves, x, order, include_f0)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(
                taylor_expansion(net, w0, leaves, x, order, include_f0), expected.detach(), rtol=1e-12, atol=1e-12
            )
    u = torch.randn_like(found)
    actual, reference = (torch.autograd.grad(value, list(leaves.values()), u) for value in (found, expected))
    torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("name", ["relu", "gelu", "convolutions"])
def test_a_part_of_the_weights_and_one_of_the_outputs(name: str, order: int) -> None:
    net, w0, direction, x = case(name)
    part = {key: direction[key].requires_grad_() for i, key in enumerate(direction) if i % 3 == 1}
    expected = sum(nested(net, w0, part, x, order)[2:], nested(net, w0, part, x, order)[1])[:, -1:]
    found = taylor_expansion(net, w0, part, x, order, output=expected.shape[1] - 1 if name != "gelu" else 2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(value.sum(), list(part.values())) for value in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="output must be one of the network's"):
        taylor_expansion(net, w0, part, x, order, output=3)


class _Counter(TorchDispatchMode):
    """Counts convolutions, and those that a backward pass makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        name = str(func)
        if name.startswith("aten.convolution_backward"):
            self.made["backward"] += sum(args[10][:2])  # the input's gradient, the weight's
        elif name.startswith("aten.convolution"):
            self.made["forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("order", "outputs", "most"), [(1, 1, 4), (1, 2, 5), (2, 1, 10), (3, 1, 15), (4, 1, 20)])
def test_a_training_step_costs_few_convolutions_a_layer(order: int, outputs: int, most: int) -> None:
    torch.manual_seed(0)
    net = MyrtleCNN(3, depth=10, num_outputs=outputs)  # 9 convolutions: a step of the network makes 26
    w0 = {key: weight.detach() for key, weight in net.named_parameters()}
    leaves = {key: torch.zeros_like(weight, requires_grad=True) for key, weight in w0.items()}
    x = torch.randn(2, 3, 8, 8)
    taylor_expansion(net, w0, leaves, x, order)  # which of two ways is cheaper is found once
    with _Counter() as counter:
        taylor_expansion(net, w0, leaves, x, order).sum().backward()
    assert 0 < counter.made.total() <= 9 * most, counter.made


def in_place() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 1)).double()


def own_forward() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1)).double()
    plain = net[1].forward
    net[1].forward = lambda x: plain(x) + x.square()
    return net


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), nn.Linear(50, 1)).double().train()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("make", [in_place, own_forward, dropping])
def test_other_networks_are_differentiated_as_a_whole(make: Callable[[], nn.Module], order: int) -> None:
    torch.manual_seed(0)
    net, x = make(), torch.randn(4, 6, dtype=torch.float64)
    w0 = {key: weight.detach() for key, weight in net.named_parameters()}
    d = {key: torch.randn_like(weight) for key, weight in w0.items()}
    torch.manual_seed(1)
    terms = nested(net, w0, d, x.clone(), order)
    torch.manual_seed(1)
    found = taylor_expansion(net, w0, d, x, order)
    torch.testing.assert_close(found, sum(terms[2:], terms[1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_inputs_and_weights_can_be_differentiated_in_too(name: str, order: int) -> None:
    net, w0, direction, x = case(name)

    def both(value: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> tuple[Tensor, ...]:
        leaf, weights = x.clone().requires_grad_(), {key: w.clone().requires_grad_() for key, w in w0.items()}
        return torch.autograd.grad(value(leaf, weights).square().sum(), [leaf, *weights.values()])

    found = both(lambda x, w: taylor_expansion(net, w, direction, x, order))
    expected = both(lambda x, w: sum(nested(net, w, direction, x, order)[2:], nested(net, w, direction, x, order)[1]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func_go_through() -> None:
    net, w0, direction, x = case("relu")

    def single(d: dict[str, Tensor], sample: Tensor) -> Tensor:
        return taylor_expansion(net, w0, d, sample[None]).sum()

    gradients = vmap(grad(single), (None, 0))(direction, x)
    for i, sample in enumerate(x):
        leaves = {key: d.clone().requires_grad_() for key, d in direction.items()}
        expected = torch.autograd.grad(nested(net, w0, leaves, sample[None], 1)[1].sum(), list(leaves.values()))
        torch.testing.assert_close([g[i] for g in gradients.values()], list(expected), rtol=1e-12, atol=1e-12)


def test_the_number_of_outputs_may_change() -> None:
    net, w0, direction, x = case("relu")
    taylor_expansion(net, w0, {key: d.requires_grad_() for key, d in direction.items()}, x)
    net = copy.deepcopy(net)
    net[-1] = NTKLinear(7, 2).double()
    w0 = {key: weight.detach() for key, weight in net.named_parameters()}
    direction = {key: torch.randn_like(weight).requires_grad_() for key, weight in w0.items()}
    torch.testing.assert_close(
        taylor_expansion(net, w0, direction, x), nested(net, w0, direction, x, 1)[1], rtol=1e-12, atol=1e-12
    )


def test_half_precision_carries_no_small_gradients() -> None:
    net, w0, direction, x = case("myrtle")
    exact = taylor_expansion(net, w0, direction, x)
    net = net.float()
    w0, direction = ({key: value.float() for key, value in weights.items()} for weights in (w0, direction))
    leaves = {key: d.requires_grad_() for key, d in direction.items()}
    with torch.autocast("cpu", torch.bfloat16):
        rounded = taylor_expansion(net, w0, leaves, x.float())
    assert rounded.requires_grad
    assert float((rounded - exact).detach().norm() / exact.norm()) < 0.05
