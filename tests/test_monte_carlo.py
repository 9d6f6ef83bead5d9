"""monte_carlo is a loop over networks; wide networks agree with the infinite-width kernel of every layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from oracle import close, dense, trace
from reference_networks import build
from test_widen import Graph, normal
from torch import Tensor, nn

from ntk_lightning.kernels import InfiniteNTK, monte_carlo
from ntk_lightning.networks import MLP, NTKConv1d, NTKLinear, Pointwise
from ntk_lightning.networks.widen import widened

with np.load(DATA / "layers_reference.npz", allow_pickle=False) as stored:
    ARRAYS = {name: stored[name] for name in stored}
CASES = sorted({name.partition("/")[0] for name in ARRAYS})
# one for each layer that is new to infinite width and quick; the marked test has all cases
QUICK = ["attention_linear_softmax", "conv1d_stride2_circular", "dropout_mlp", "graph_residual_mlp", "layernorm_mlp"]


class Loops(nn.Module):
    """What vmap refuses: a branch on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if float(x.detach().sum()) > 100 else 2 * out


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: MLP(6, 2, 4, nn.Tanh, num_outputs=3), (4,)),
    "graph": (Graph, (3, 4, 3)),
    "pointwise": (lambda: nn.Sequential(NTKConv1d(2, 3, 3), Pointwise(torch.sin), nn.Flatten()), (2, 5)),
    "batch norm, running": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5).eval(), nn.Linear(5, 1)), (4,)),
    "one output, squeezed": (lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), (4,)),
    "loops": (Loops, (4,)),
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_it_is_a_loop_over_drawn_networks(name: str, symmetric: bool) -> None:
    make, shape = NETS[name]
    net = make().double()
    x1, x2 = normal(3, *shape), None if symmetric else normal(2, *shape, seed=1)
    right = x1 if x2 is None else x2
    found: dict[str, list[Tensor]] = {"ntk": [], "nngp": []}
    for seed in (3, 0, 8):
        torch.manual_seed(seed)
        for module in reversed(list(net.modules())):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        found["ntk"].append(trace(dense(net, x1, right)))
        f1, f2 = (torch.cat([net(x[None]).detach().reshape(1, -1) for x in xs]) for xs in (x1, right))
        found["nngp"].append(f1 @ f2.T / f1.shape[1])
    for kind, kernels in found.items():
        stacked = torch.stack(kernels)
        for memory in ("1GB", "1MB" if name != "loops" else "2MB"):
            mean, error = monte_carlo(net, x1, x2, kind=kind, seeds=(3, 0, 8), memory=memory)  # type: ignore[arg-type]
            close(mean, stacked.mean(0))
            close(error, (stacked - stacked.mean(0)).square().sum(0).div(2 * 3).sqrt())


def test_a_budget_below_one_networks_gradients_gives_the_same() -> None:
    net, x = MLP(64, 1, 4, nn.Tanh).double(), normal(40, 4)
    expected = monte_carlo(net, x, seeds=3)
    for mean, other in zip(expected, monte_carlo(net, x, seeds=3, memory="200KB"), strict=True):
        close(other, mean)


def test_the_network_and_the_random_state_are_left_alone() -> None:
    net, x = Graph(), normal(2, 3, 4, 3).float()
    net.norm.requires_grad_(False)
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    mean, error = monte_carlo(net, x, seeds=3, width_factor=2)
    assert mean.dtype == error.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not mean.requires_grad
    assert monte_carlo(net, x.double(), seeds=3)[0].dtype == torch.float64
    again = monte_carlo(net, x, seeds=range(3), width_factor=2)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], error)
    with torch.inference_mode():
        torch.testing.assert_close(monte_carlo(net, x, seeds=3, width_factor=2)[0], mean)


def z_scores(case: str, seeds: int) -> float:
    """Largest z-score of networks of width 512 against the infinite-width kernel, for both kernels."""
    x1, x2 = (torch.from_numpy(ARRAYS[f"{case}/{x}"]) for x in ("x1", "x2"))
    if case == "conv_3x3_stride2_circular_even_shifted":
        x1, x2 = (x.roll((-1, -1), (2, 3)) for x in (x1, x2))
    options = json.loads(str(ARRAYS[f"{case}/net"]))
    net = build(options, x1[:1].float())
    factor = 64 if "branches" in str(options) else 512 // max(o.get("width", 1) for o in options)
    one_set = x1.shape == x2.shape and torch.equal(x1, x2)  # dropout draws a mask for every sample
    largest = 0.0
    for kind in ("ntk", "nngp") if f"{case}/ntk" in ARRAYS else ("nngp",):
        expected = torch.from_numpy(ARRAYS[f"{case}/{kind}"])
        if "standard" in case:  # its kernel is that of one width
            expected = InfiniteNTK(widened(net, x1[:1].float(), factor), kind)(x1, x2)  # type: ignore[arg-type]
        pair = (x1[:2].float(), None if one_set else x2[:1].float())
        mean, error = monte_carlo(net, *pair, kind=kind, seeds=seeds, width_factor=factor)  # type: ignore[arg-type]
        expected = expected[:2, : mean.shape[1]]
        largest = max(largest, float(((mean - expected) / error).abs().max()))
    return largest


@pytest.mark.parametrize("case", QUICK)
def test_networks_of_width_512_agree_with_the_infinite_one(case: str) -> None:
    assert z_scores(case, 12) < 4


@pytest.mark.ci
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK])
def test_networks_of_width_512_agree_with_the_infinite_one_of_every_layer(case: str) -> None:
    assert z_scores(case, 12) < 4


def test_plain_layers_agree_with_their_lifted_kernel() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    x = normal(3, 4)
    wide = InfiniteNTK(widened(net, x[:1].float(), 32))(x)
    mean, error = monte_carlo(net, x, seeds=24, width_factor=32)
    assert float(((mean - wide) / error).abs().max()) < 4


class Gain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 6), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.layer(x).reshape(len(x), 2, 3).mean(1))
        return out


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x + self.layer(x))
        return out


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(2, 1, 8, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (2, 2)), layer, nn.Flatten(), nn.Linear(4, 1))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
    net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: nn.Sequential(NTKLinear(4, 2), Gain(2)), {}, ValueError, "How gain of 1, a Gain, is initialized"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), {}, ValueError, "is initialized is not known"),
        (lambda: MLP(2, 1, 4), {"seeds": 1}, ValueError, "seeds must be at least 2"),
        (lambda: MLP(2, 1, 4), {"seeds": [1]}, ValueError, "at least two different ones"),
        (lambda: MLP(2, 1, 4), {"seeds": [1, 1]}, ValueError, "at least two different ones"),
        (lambda: MLP(2, 1, 4), {"seeds": [1, 2.0]}, TypeError, "whole numbers"),
        (lambda: MLP(2, 1, 4), {"seeds": "ab"}, TypeError, "seeds must be"),
        (lambda: MLP(2, 1, 4), {"seeds": [-1, 2]}, ValueError, "seeds must be at least 0"),
        (lambda: torch.sin, {}, TypeError, "net must be an nn.Module"),
        (encoder, {}, ValueError, r"cannot draw this network's masks: call net.eval\(\)"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.GRU(2, 3)), {}, ValueError, "1 samples gave tuple: wrap it"),
        (lambda: MLP(2, 1, 4), {"kind": "both"}, ValueError, "kind must be"),
        (lambda: MLP(2, 1, 4), {"width_factor": 0}, ValueError, "width_factor must be at least 1"),
        (lambda: MLP(2, 1, 4), {"width_factor": 1.5}, TypeError, "width_factor must be a whole number"),
        (lambda: MLP(2, 1, 4), {"memory": "much"}, ValueError, "memory must be"),
        (lambda: MLP(2, 1, 4).requires_grad_(False), {}, ValueError, "unfreeze some"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), {}, ValueError, "statistics of the batch"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), {}, ValueError, "not known yet: run the network once"),
        (lambda: nn.Linear(4, 2, dtype=torch.complex64), {}, TypeError, "complex parameters"),
        (lambda: nn.Unflatten(1, (2, 2)), {"kind": "nngp"}, ValueError, r"must map .* to \(n,\) or \(n, outputs\)"),
        (lambda: nn.Sequential(nn.GRU(4, 2), nn.Identity()), {"width_factor": 2}, ValueError, "0, a GRU, has sizes"),
        (lambda: nn.Sequential(nn.Linear(4, 2), Gain(2)), {"width_factor": 2}, ValueError, "1, a Gain, has sizes"),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 2, 1, groups=2)),
            {"width_factor": 2},
            ValueError,
            "groups",
        ),
        (tied, {"width_factor": 2}, ValueError, "1, a Linear, shares a parameter with 0"),
        (Counts, {"width_factor": 2}, ValueError, "does not run with 2 times as many hidden channels"),
        (Skip, {"width_factor": 3}, ValueError, "does not run with 3 times"),
        (nn.Identity, {"width_factor": 2, "kind": "nngp"}, ValueError, "do not follow from affine layers"),
    ],
)
def test_what_cannot_be_drawn_or_widened_is_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        monte_carlo(make(), torch.ones(2, 4), **options)


def test_values_that_overflow_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="kernel of seed 0 is NaN or infinite"):
        monte_carlo(NTKLinear(4, 1, weight_std=1e30), torch.ones(2, 4), seeds=2)


def test_parameters_in_a_list_are_drawn_by_the_module_that_holds_it() -> None:
    class Lists(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.empty(4)])
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.normal_(self.weights[0])

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weights[0]).sum(1)

    x = normal(2, 4)
    mean, _ = monte_carlo(Lists(), x, seeds=4)
    close(mean, x @ x.T)
    nngp, error = monte_carlo(Lists(), x, kind="nngp", seeds=400)
    assert float(((nngp - x @ x.T) / error).abs().max()) < 4
    assert float(error.max()) < 0.3 * math.sqrt(2) * float((x @ x.T).diagonal().max())
