"""Networks that torch.func cannot transform have the kernel of plain autograd; those without a kernel are refused.

Longer than 300 lines, since it is one table of networks and what is asked of each.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical import trial
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.slow_path import OneByOneRows, PlainNetwork
from ntk_lightning.modules import LinearizedNetwork
from tests.slow_modules import SLOW, D, Packed, Recurrent, jacobian, relative


def rows_of(kernel: EmpiricalNTK, *inputs: object) -> object:
    with kernel._computing(*inputs) as (rows, _):
        return rows


@pytest.mark.parametrize("name", SLOW)
def test_every_call_equals_plain_autograd(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    make, shape = SLOW[name]
    net = make().to(D) if name != "complex weights" else make()
    x, y = torch.randn(5, *shape, dtype=D), torch.randn(3, *shape, dtype=D)
    jx, jy = (jacobian(net, [(s[None],) for s in t]) for t in (x, y))
    cross = torch.einsum("iap,jbp->ijab", jx, jy)
    square = torch.einsum("iap,jbp->ijab", jx, jx)
    outputs = cross.shape[-1]

    def trace(k: Tensor) -> Tensor:
        return k.diagonal(dim1=-2, dim2=-1).mean(-1)

    kernel, full = EmpiricalNTK(net), EmpiricalNTK(net, full=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with caplog.at_level(logging.INFO):
        assert relative(kernel(x), trace(square)) < 1e-12
        assert relative(kernel(x, y), trace(cross)) < 1e-12
    said = [record for record in caplog.records if "one sample at a time" in record.message]
    slow = isinstance(rows_of(kernel, x), OneByOneRows)
    assert len(said) == slow == (name != "complex weights")
    assert relative(full(x, y), cross) < 1e-12
    assert relative(kernel.diag(x), trace(square).diagonal()) < 1e-12
    assert relative(EmpiricalNTK(net, output=0)(x, y), cross[..., 0, 0]) < 1e-12
    assert relative(kernel.gram_and_cross(x, y)[1], trace(cross).T) < 1e-12
    layers = kernel.per_layer(x, y)
    assert relative(sum(layers.values()), trace(cross)) < 1e-12
    assert list(layers) == [n for n, m in net.named_modules() if list(m.parameters(recurse=False))]
    v = torch.randn(5, 2, dtype=D)
    assert relative(kernel.matvec(x, v, y), trace(cross).T @ v) < 1e-12
    w = torch.randn(5, outputs, dtype=D)
    assert relative(full.matvec(x, w), torch.einsum("ijab,jb->ia", square, w)) < 1e-12
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in kernel.net.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_packed_lstm_takes_lengths_and_is_linearized_by_reverse_mode() -> None:
    torch.manual_seed(0)
    net, x, lengths = Packed().to(D), torch.randn(5, 6, 3, dtype=D), torch.tensor([6, 2, 4, 1, 5])
    j = jacobian(net, [(x[i : i + 1], lengths[i : i + 1]) for i in range(5)])[:, 0]
    kernel, v = EmpiricalNTK(net), torch.randn(5, dtype=D)
    assert relative(kernel((x, lengths)), j @ j.T) < 1e-12
    assert relative(kernel.matvec((x, lengths), v), j @ (j.T @ v)) < 1e-12
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    flat = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    assert relative(twin((x, lengths))[:, 0].detach(), j @ flat) < 1e-12
    twin((x, lengths)).sum().backward()
    gradient = torch.cat([d.grad.reshape(-1) for d in twin.displacement])
    assert relative(gradient, j.sum(0)) < 1e-12


@pytest.mark.parametrize("name", ["checkpoint", "reentrant checkpoint"])
def test_a_network_that_computes_activations_again_is_not_linearized(name: str) -> None:
    with pytest.raises(ValueError, match="turn checkpointing off"):
        LinearizedNetwork(SLOW[name][0]())(torch.randn(4, 3))


class Asking(nn.Module):
    """A branch on the sign of the first feature, and one on a mask, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if not mask.all():
            x = x * mask
        return self.a(x).tanh() if (x[:, 0] > 0).all() else self.b(x).sin()


def test_samples_that_branch_are_taken_together_by_branch() -> None:
    torch.manual_seed(0)
    net, x, mask = Asking().to(D), torch.randn(16, 3, dtype=D), torch.rand(16, 3) > 0.3
    mask[:5] = True
    x[0], x[-1] = x[0].abs(), -x[0].abs()  # of different branches
    j = jacobian(net, [(x[i : i + 1], mask[i : i + 1]) for i in range(16)])
    kernel, v = EmpiricalNTK(net, full=True), torch.randn(16, 2, dtype=D)
    expected = torch.einsum("iap,jbp->ijab", j, j)
    rows = rows_of(kernel, (x, mask))
    assert isinstance(rows, GradientRows)
    assert rows.by_branch
    assert relative(kernel((x, mask)), expected) < 1e-12
    assert relative(kernel.matvec((x, mask), v), torch.einsum("ijab,jb->ia", expected, v)) < 1e-12


class Summing(nn.Module):
    """A branch on a sum over whatever batch it is called with; ``mixing`` mixes the samples too."""

    def __init__(self, mixing: bool) -> None:
        super().__init__()
        self.a, self.b, self.mixing = nn.Linear(6, 4), nn.Linear(4, 2), mixing

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h - h.mean(0) * 0.5 if self.mixing else h
        return self.b(h.tanh() if x.sum() > 0 else h.sin())


def test_a_branch_on_the_whole_batch_has_the_kernel_of_samples_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6, dtype=D)
    x[0], x[-1] = x[0].abs(), -2 * x[0].abs()
    net = Summing(mixing=False).to(D)
    j = jacobian(net, [(s[None],) for s in x])
    assert relative(EmpiricalNTK(net, full=True)(x), torch.einsum("iap,jbp->ijab", j, j)) < 1e-12
    with pytest.raises(ValueError, match="depends on the other samples"):
        EmpiricalNTK(Summing(mixing=True).to(D))(x)


class Wrapped(nn.Linear):
    """A linear layer behind a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__(6, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.function(x).tanh())


OWN = torch.Generator().manual_seed(0)

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "nn.Dropout": lambda: nn.Sequential(nn.Dropout(), nn.Linear(6, 1)),
    "nn.AlphaDropout": lambda: nn.Sequential(nn.AlphaDropout(), nn.Linear(6, 1)),
    "nn.RReLU": lambda: nn.Sequential(nn.RReLU(), nn.Linear(6, 1)),
    "F.dropout": lambda: Wrapped(lambda x: F.dropout(x, 0.5, training=True)),
    "F.feature_alpha_dropout": lambda: Wrapped(lambda x: F.feature_alpha_dropout(x, 0.5, training=True)),
    "F.rrelu": lambda: Wrapped(lambda x: F.rrelu(x, training=True)),
    "F.gumbel_softmax": lambda: Wrapped(lambda x: F.gumbel_softmax(x)),
    "attention dropout": lambda: Wrapped(
        lambda x: F.scaled_dot_product_attention(*[x.reshape(-1, 1, 3, 2)] * 3, dropout_p=0.5).reshape(-1, 6)
    ),
    "torch.rand": lambda: Wrapped(lambda x: x + torch.rand(1)),
    "randn_like": lambda: Wrapped(lambda x: x + torch.randn_like(x)),
    "bernoulli_": lambda: Wrapped(lambda x: x * torch.empty_like(x).bernoulli_(0.5)),
    "random.random": lambda: Wrapped(lambda x: x * random.random()),
    "numpy.random": lambda: Wrapped(lambda x: x * float(np.random.rand())),
    "a generator of one's own": lambda: Wrapped(lambda x: x + torch.rand(x.shape, generator=OWN)),
    "an LSTM's dropout": lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.5),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_refused_in_every_spelling(name: str) -> None:
    torch.manual_seed(0)
    net = RANDOM[name]()
    x = torch.randn(4, 5, 3) if "LSTM" in name else torch.randn(4, 6)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for call in (lambda: EmpiricalNTK(net)(x), lambda: EmpiricalNTK(net).matvec(x, torch.ones(4))):
        with pytest.raises(ValueError, match=r"draws random numbers.*net\.eval\(\)"):
            call()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


MIXING: dict[str, Callable[[], nn.Module]] = {
    "nn.BatchNorm1d": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
    "without statistics": lambda: nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 1)).eval(),
    "F.batch_norm": lambda: Wrapped(
        lambda x: F.batch_norm(x.reshape(-1, 2, 3), None, None, training=True).reshape(-1, 6)
    ),
    "mean of the batch": lambda: Wrapped(lambda x: x - x.mean(0)),
    "norm of the batch": lambda: Wrapped(lambda x: x / x.norm()),
    "softmax over the batch": lambda: Wrapped(lambda x: x.softmax(0)),
    "attention over the batch": lambda: Wrapped(lambda x: (x @ x.T).softmax(-1) @ x),
}


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_samples_are_refused_in_every_spelling(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net, x = MIXING[name]().to(dtype), torch.randn(4, 6, dtype=dtype)
    with pytest.raises(ValueError, match=r"of (the|its) batch.*net\.eval\(\)"):
        EmpiricalNTK(net)(x)
    with pytest.raises(ValueError, match=r"of (the|its) batch.*net\.eval\(\)"):
        EmpiricalNTK(net)(x[:1], x)


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_scaled_by_the_tokens_of_a_batch_are_refused(layer: type[nn.Module]) -> None:
    net, x = nn.Sequential(layer(7, 2, scale_grad_by_freq=True), nn.Flatten()), torch.randint(7, (4, 3))
    for make in (EmpiricalNTK, LinearizedNetwork):
        with pytest.raises(ValueError, match=r"'0' divides gradients.*set scale_grad_by_freq=False"):
            make(net)(x)


def test_layers_that_only_look_random_or_mixing_are_taken() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.RReLU(), nn.BatchNorm1d(6), nn.Linear(6, 1)).eval()
    x = torch.randn(4, 6, dtype=D)
    exact = copy.deepcopy(net).to(D)
    j = jacobian(exact, [(s[None],) for s in x])[:, 0]
    assert relative(EmpiricalNTK(net)(x), j @ j.T) < 1e-12
    wide = nn.Sequential(nn.Dropout(0.0), nn.GroupNorm(2, 6), nn.Linear(6, 1)).to(D)
    j = jacobian(wide, [(s[None],) for s in x])[:, 0]
    assert relative(EmpiricalNTK(wide)(x), j @ j.T) < 1e-12


class Lying(torch.autograd.Function):
    """Its rule for vmap gives another result than its forward pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 2

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return x * 3, in_dims[0]


def test_a_wrong_rule_for_vmap_is_noticed() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 3), Wrapped(lambda x: x), nn.Linear(1, 2)).to(D)
    net[1] = nn.Linear(3, 4).to(D)
    net.insert(2, type("Lie", (nn.Module,), {"forward": lambda self, h: Lying.apply(h).sin()})())
    net[3] = nn.Linear(4, 2).to(D)
    x = torch.randn(4, 6, dtype=D)
    j = jacobian(net, [(s[None],) for s in x])
    assert relative(EmpiricalNTK(net, full=True)(x), torch.einsum("iap,jbp->ijab", j, j)) < 1e-12


def test_the_way_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], trial._try
    monkeypatch.setattr(trial, "_try", lambda *args: (calls.append(1), real(*args))[1])
    kernel, x = EmpiricalNTK(Recurrent(nn.GRU)), torch.randn(4, 5, 3)
    for _ in range(3):
        kernel(x)
        kernel(x, x)
    assert len(calls) == 1
    kernel.net.eval()
    kernel(x)
    assert len(calls) == 2


def test_the_networks_own_error_is_raised() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        EmpiricalNTK(nn.Linear(5, 1))(torch.ones(3, 4))


def test_the_slow_path_does_no_more_passes_than_a_loop() -> None:
    passes = {"forward": 0, "backward": 0}

    class Counted(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            passes["forward"] += 1
            out = super().forward(x)
            if out.requires_grad:
                out.register_hook(lambda grad: passes.update(backward=passes["backward"] + 1))
            return out

    function = NetworkFunction(
        Counted(nn.LSTM), ("rnn.weight_hh_l0", "out.weight"), None, False, D, torch.device("cpu")
    )
    x = Inputs.of(torch.randn(9, 5, 3, dtype=D))
    rows = OneByOneRows(PlainNetwork(function), 2, 0)
    passes.update(forward=0, backward=0)
    rows.fill(torch.empty(9, rows.width, dtype=D), x)
    assert passes == {"forward": 9, "backward": 18}
