"""Gram, products and the linearized network are one derivative, that of reverse mode.

Longer than 300 lines, since it is one table of networks on which forward mode gives another derivative, or none.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.derivatives import differentiable_attention
from ntk_lightning.modules import LinearizedNetwork
from ntk_lightning.modules.taylor_expansion import taylor_expansion
from ntk_lightning.optim import OptimizerConfig
from tests.slow_modules import D, Recurrent, jacobian, relative
from tests.tiny import QUIET


class Net(nn.Module):
    """Features that a function of them divides, and a readout."""

    def __init__(self, divide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.divide = nn.Linear(6, 8), nn.Linear(8, 2), divide

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.divide(self.a(x).tanh()))


def no_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.norm(dim=1, keepdim=True)
    return h / scale


@torch.no_grad()
def decorated(h: Tensor) -> Tensor:
    return h.norm(dim=1, keepdim=True)


def set_grad_enabled(h: Tensor) -> Tensor:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    scale = h.norm(dim=1, keepdim=True)
    torch.set_grad_enabled(before)
    return h / scale


def inference(h: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = h.norm(dim=1, keepdim=True)
    return h / scale.clone()


def within(h: Tensor) -> Tensor:
    with torch.no_grad():
        scale = h.norm(dim=1, keepdim=True)
        with torch.enable_grad():
            h = h.sin()
    return h / scale


def partly(h: Tensor) -> Tensor:
    with torch.no_grad():
        mask = torch.where(h > 0, h, torch.zeros_like(h))
    return h * torch.cat([mask[:, :4], h[:, 4:]], 1)


def written(h: Tensor) -> Tensor:
    h = h * 1
    with torch.no_grad():
        h.mul_(2.0)
    return h


class WrongJvp(torch.autograd.Function):
    """Forward mode has another derivative than reverse mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401 - torch's
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return grad * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return tangent * 2


class NoJvp(torch.autograd.Function):
    """There is no forward mode."""

    generate_vmap_rule = True
    forward, setup_context, backward = WrongJvp.forward, WrongJvp.setup_context, WrongJvp.backward


class Reversed(torch.autograd.Function):
    """Gradient reversal: its backward is not the derivative of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ANN401 - torch's
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return -0.5 * grad


class Old(torch.autograd.Function):
    """The old form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return grad * ctx.saved_tensors[0].cos()


class Hooked(Net):
    """A hook on a tensor scales the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        if h.requires_grad:
            h.register_hook(lambda grad: 3 * grad)
        return self.b(h)


def full_hook() -> nn.Module:
    net = Net(lambda h: h.sin())
    net.a.register_full_backward_hook(lambda module, grads, outs: None)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "no_grad": lambda: Net(no_grad),
    "a decorated function": lambda: Net(lambda h: h / decorated(h)),
    "set_grad_enabled": lambda: Net(set_grad_enabled),
    "inference_mode": lambda: Net(inference),
    "enable_grad within no_grad": lambda: Net(within),
    "a part": lambda: Net(partly),
    "detach": lambda: Net(lambda h: h / h.norm(dim=1, keepdim=True).detach()),
    ".data": lambda: Net(lambda h: h / h.norm(dim=1, keepdim=True).data),
    "straight through": lambda: Net(lambda h: h + (h.round() - h).detach()),
    "in-place under no_grad": lambda: Net(written),
    "wrong jvp": lambda: Net(lambda h: WrongJvp.apply(h)),
    "no jvp": lambda: Net(lambda h: NoJvp.apply(h)),
    "gradient reversal": lambda: Net(lambda h: Reversed.apply(h)),
    "function of the old form": lambda: Net(lambda h: Old.apply(h)),
    "hook on a tensor": lambda: Hooked(lambda h: h),
    "hook on a module": full_hook,
    "branch on the data": lambda: Net(lambda h: no_grad(h) if h.sum() > 0 else h.sin()),
}


@pytest.mark.parametrize("name", NETS)
def test_gram_products_and_linearized_network_are_one_derivative(name: str) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]().to(D), torch.randn(7, 6, dtype=D)
    j = jacobian(net, [(s[None],) for s in x])
    gram = torch.einsum("iap,jbp->ijab", j, j)
    kernel, full, v = EmpiricalNTK(net), EmpiricalNTK(net, full=True), torch.randn(7, 2, dtype=D)
    assert relative(full(x), gram) < 1e-12
    assert relative(full.matvec(x, v), torch.einsum("ijab,jb->ia", gram, v)) < 1e-12
    assert relative(kernel.matvec(x, v), gram.diagonal(dim1=2, dim2=3).mean(-1) @ v) < 1e-12
    if name == "branch on the data":  # of the whole batch, which is then one function of all samples
        return
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    with torch.no_grad():
        assert relative(twin(x), j @ along) < 1e-12
    assert relative(twin(x).detach(), j @ along) < 1e-12
    (twin(x) * v).sum().backward()
    assert relative(torch.cat([d.grad.reshape(-1) for d in twin.displacement]), torch.einsum("iap,ia->p", j, v)) < 1e-12


def test_a_branch_that_the_trial_did_not_see_is_noticed() -> None:
    torch.manual_seed(0)
    net = Net(lambda h: h.sin() if h.shape[0] < 3 or h.sum() < 0 else no_grad(h)).to(D)
    x = torch.randn(7, 6, dtype=D)
    while net.a(x).tanh().sum() < 0:
        x = torch.randn(7, 6, dtype=D)
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    parameters = list(net.parameters())
    exact = []
    for output in net(x).flatten():
        gradients = torch.autograd.grad(output, parameters, retain_graph=True)
        exact.append(sum((g * d.detach()).sum() for g, d in zip(gradients, twin.displacement, strict=True)))
    twin(x[:2])
    assert relative(twin(x).detach().flatten(), torch.stack(exact)) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", ["no_grad", "inference_mode", "wrong jvp", "no jvp", "detach"])
def test_higher_orders_hold_fixed_what_gets_no_gradient(name: str, order: int) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]().to(D), torch.randn(4, 6, dtype=D)
    w0 = {key: weight.detach().clone() for key, weight in net.named_parameters()}
    d = {key: 0.3 * torch.randn_like(weight) for key, weight in w0.items()}
    h0 = torch.tanh(F.linear(x, w0["a.weight"], w0["a.bias"]))
    norm = h0.norm(dim=1, keepdim=True)

    def explicit(t: Tensor) -> Tensor:  # the same function with the scale as a constant
        w = {key: w0[key] + t * d[key] for key in w0}
        h = torch.tanh(F.linear(x, w["a.weight"], w["a.bias"]))
        return F.linear(h.sin() if "jvp" in name else h / norm, w["b.weight"], w["b.bias"])

    t = torch.zeros((), dtype=D, requires_grad=True)
    derivatives, expected = list(explicit(t).flatten()), torch.zeros(8, dtype=D)
    for k in range(1, order + 1):
        derivatives = [torch.autograd.grad(value, t, create_graph=True)[0] for value in derivatives]
        expected += torch.stack(derivatives).detach() / math.factorial(k)
    assert relative(taylor_expansion(net, w0, d, x, order).flatten(), expected) < 1e-12


class Once(torch.autograd.Function):
    """Its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return grad.detach() * 2


def test_without_a_second_derivative_order_one_is_right_and_more_is_refused() -> None:
    torch.manual_seed(0)
    net, x = Net(lambda h: Once.apply(h)).to(D), torch.randn(5, 6, dtype=D)
    j, v = jacobian(net, [(s[None],) for s in x]), torch.randn(5, dtype=D)
    gram = torch.einsum("iap,jap->ij", j, j) / 2
    assert relative(EmpiricalNTK(net).matvec(x, v), gram @ v) < 1e-12
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    assert relative(twin(x).detach(), j @ along) < 1e-12
    twin(x).sum().backward()
    assert relative(torch.cat([d.grad.reshape(-1) for d in twin.displacement]), j.sum((0, 1))) < 1e-12
    with pytest.raises(ValueError, match="cannot be expanded to order 2"):
        LinearizedNetwork(net, order=2)(x)


@pytest.mark.parametrize("name", ["no_grad", "detach"])
def test_the_linearized_network_is_trained_like_its_kernel(name: str) -> None:
    torch.manual_seed(0)
    net, x = NETS[name]().to(D), torch.randn(16, 6, dtype=D)
    y = torch.nn.functional.one_hot(torch.arange(16) % 2).to(D)
    twin = LinearizedNetwork(net, OptimizerConfig(lr=0.1, momentum=0.0, batch_size=16))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    Trainer(max_epochs=20, precision="64-true", **QUIET).fit(twin, loader)
    gram, f = EmpiricalNTK(net, full=True)(x), torch.zeros(16, 2, dtype=D)
    for _ in range(20):
        f = f - 0.1 / 16 * torch.einsum("ijab,jb->ia", gram, f - y)
    assert relative(twin(x).detach(), f) < 1e-10


class Attention(nn.Module):
    """One of torch's attention layers."""

    def __init__(self, layer: nn.Module, functional: bool = False) -> None:
        super().__init__()
        self.mix, self.out, self.functional = layer, nn.Linear(8, 1), functional

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            q = self.mix(x)[:, None]
            h = F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        elif isinstance(self.mix, nn.MultiheadAttention):
            h = self.mix(x, x, x, need_weights=False)[0]
        else:
            h = self.mix(x)
        return self.out(h.mean(1))


ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "MultiheadAttention": lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)),
    "TransformerEncoderLayer": lambda: Attention(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)),
    "TransformerEncoder": lambda: Attention(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True), 2)
    ),
    "scaled_dot_product_attention": lambda: Attention(nn.Linear(8, 8), functional=True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_all_derivatives_without_a_warning(name: str, training: bool) -> None:
    torch.manual_seed(0)
    net, x, v = ATTENTION[name]().to(D).train(training), torch.randn(4, 5, 8, dtype=D), torch.randn(4, dtype=D)
    j = jacobian(net, [(s[None],) for s in x])[:, 0]
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert relative(EmpiricalNTK(net)(x), j @ j.T) < 1e-12
        assert relative(EmpiricalNTK(net).matvec(x, v), j @ (j.T @ v)) < 1e-12
        assert relative(twin(x)[:, 0].detach(), j @ along) < 1e-12
        with torch.no_grad():
            assert relative(twin(x)[:, 0], j @ along) < 1e-12
    assert [str(w.message) for w in caught if w.category is not DeprecationWarning] == []
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_the_switches_of_attention_are_turned_back_by_the_last_thread_and_after_an_error() -> None:
    def state() -> tuple[bool, bool]:
        return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before, entered, leave = state(), threading.Event(), threading.Event()

    def other() -> None:
        with differentiable_attention():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with differentiable_attention():
        thread.start()
        entered.wait(10)
        assert state() == (False, False)
    assert state() == (False, False)  # the other thread is still inside
    leave.set()
    thread.join()
    assert state() == before
    with pytest.raises(RuntimeError, match="within"), differentiable_attention():
        raise RuntimeError("within")
    assert state() == before


def test_the_linearized_network_of_a_recurrent_one_in_both_precisions() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (D, 1e-12)):
        for cell in (nn.LSTM, nn.GRU, nn.RNN):
            torch.manual_seed(0)
            net, x = Recurrent(cell).to(dtype), torch.randn(4, 5, 3, dtype=dtype)
            j = jacobian(net, [(s[None],) for s in x])
            twin = LinearizedNetwork(net)
            with torch.no_grad():
                for d in twin.displacement:
                    d.normal_()
            along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
            assert relative(twin(x).detach(), j @ along) < tolerance
            twin(x).sum().backward()
            assert relative(torch.cat([d.grad.reshape(-1) for d in twin.displacement]), j.sum((0, 1))) < tolerance


def test_batch_statistics_are_refused_in_the_words_of_the_kernel() -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), torch.randn(8, 3)
    words = []
    for make in (lambda: EmpiricalNTK(net)(x), lambda: LinearizedNetwork(net)(x)):
        with pytest.raises(ValueError, match=r"BatchNorm1d '1' .* net\.eval\(\)") as error:
            make()
        words.append(str(error.value))
    assert words[0] == words[1]
    assert LinearizedNetwork(net.eval())(x).shape == (8, 1)
