from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntk_lightning.modules.taylor_expansion import taylor_expansion
from ntk_lightning.networks import MLP, Erf, MyrtleCNN, NTKConv2d, NTKLinear


def tied() -> nn.Sequential:
    first, second = NTKLinear(5, 5), NTKLinear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, Erf(), second, nn.GELU(), NTKLinear(5, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "erf": (lambda: MLP(7, 2, 5, Erf, num_outputs=2, bias_std=0.3), (5,)),
    "relu": (lambda: MLP(7, 3, 5), (5,)),
    "silu": (lambda: MLP(7, 2, 5, nn.SiLU), (5,)),  # torch has no nested forward mode of it
    "myrtle": (lambda: MyrtleCNN(3), (3, 8, 8)),
    "conv_gelu": (
        lambda: nn.Sequential(NTKConv2d(2, 3, 3, bias_std=0.2), nn.GELU(), nn.Flatten(), NTKLinear(48, 1)),
        (2, 4, 4),
    ),
    "tied": (tied, (5,)),
}


def case(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    net = make().double()
    w0 = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    displacement = {key: 0.2 * torch.randn_like(weight) for key, weight in w0.items()}
    net.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    return net, w0, displacement, torch.randn(4, *shape, dtype=torch.float64)


def along(net: nn.Module, w0: dict[str, Tensor], displacement: dict[str, Tensor], x: Tensor, t: float) -> Tensor:
    return functional_call(net, {key: w0[key] + t * displacement[key] for key in w0}, (x,)).detach()


def dense_terms(net: nn.Module, w0: dict[str, Tensor], displacement: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """(1/j!) d^j/dt^j f(w0 + t d) at t = 0 for j = 0..3, output by output, by repeated reverse mode in the scalar t."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    outputs = functional_call(net, {key: w0[key] + t * displacement[key] for key in w0}, (x,))
    terms = [outputs.detach()]
    derivatives = list(outputs.flatten())
    for j in (1, 2, 3):
        derivatives = [torch.autograd.grad(value, t, create_graph=True)[0] for value in derivatives]
        terms.append(torch.stack(derivatives).detach().reshape(outputs.shape) / math.factorial(j))
    return terms


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_dense_taylor_expansion(name: str, order: int) -> None:
    net, w0, displacement, x = case(name)
    terms = dense_terms(net, w0, displacement, x)
    without, with_f0 = (taylor_expansion(net, w0, displacement, x, order, include) for include in (False, True))
    torch.testing.assert_close(without, sum(terms[2 : order + 1], terms[1]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(with_f0, sum(terms[1 : order + 1], terms[0]), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_error_falls_with_the_next_power_of_the_displacement(order: int) -> None:
    net, w0, displacement, x = case("erf")

    def error(t: float) -> float:
        scaled = {key: t * direction for key, direction in displacement.items()}
        expansion = taylor_expansion(net, w0, scaled, x, order, include_f0=True)
        return float((along(net, w0, displacement, x, t) - expansion).norm())

    assert error(0.1) / error(0.05) == pytest.approx(2 ** (order + 1), rel=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_linear_network_of_k_layers_is_exact_at_order_k(order: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[NTKLinear(4, 4) for _ in range(order)]).double()
    w0 = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    displacement = {key: torch.randn_like(weight) for key, weight in w0.items()}
    x = torch.randn(3, 4, dtype=torch.float64)
    expansion = taylor_expansion(net, w0, displacement, x, order, include_f0=True)
    torch.testing.assert_close(expansion, along(net, w0, displacement, x, 1.0))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["erf", "myrtle"])
def test_backward_gives_the_gradient_in_the_displacement(name: str, order: int) -> None:
    net, w0, displacement, x = case(name)
    leaves = {key: direction.requires_grad_() for key, direction in displacement.items()}
    taylor_expansion(net, w0, leaves, x, order).square().mean().backward()
    step = 1e-5
    for key, direction in leaves.items():
        probe = torch.randn_like(direction)
        ends = []
        for sign in (1, -1):
            moved = {**leaves, key: direction.detach() + sign * step * probe}
            ends.append(taylor_expansion(net, w0, moved, x, order).square().mean().detach())
        assert direction.grad is not None
        torch.testing.assert_close(
            (direction.grad * probe).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8
        )


def test_missing_names_are_held_at_w0() -> None:
    net, w0, displacement, x = case("erf")
    name = next(iter(w0))
    full = {key: direction if key == name else torch.zeros_like(direction) for key, direction in displacement.items()}
    part = {name: displacement[name]}
    torch.testing.assert_close(taylor_expansion(net, w0, part, x, 2), taylor_expansion(net, w0, full, x, 2))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", [1, 3])
def test_works_where_a_trainer_validates(context: Callable[[], torch.no_grad], order: int) -> None:
    net, w0, displacement, x = case("myrtle")
    expected = taylor_expansion(net, w0, displacement, x, order)
    leaves = {key: direction.requires_grad_() for key, direction in displacement.items()}
    with context():
        inside = taylor_expansion(net, {k: w + 0 for k, w in w0.items()}, leaves, x + 0, order)
    assert not inside.requires_grad
    torch.testing.assert_close(inside.clone(), expected)


def test_leaves_the_network_alone() -> None:
    net, w0, displacement, x = case("erf")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    taylor_expansion(net, w0, displacement, x, 2)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_malformed_arguments_are_errors() -> None:
    net, w0, displacement, x = case("erf")
    name = next(iter(w0))
    with pytest.raises(ValueError, match="order must be at least 1"):
        taylor_expansion(net, w0, displacement, x, 0)
    with pytest.raises(ValueError, match="a name out of"):
        taylor_expansion(net, w0, {"elsewhere": displacement[name]}, x)
    with pytest.raises(ValueError, match="does not fit w0: use shape"):
        taylor_expansion(net, w0, {name: displacement[name][:1]}, x)
