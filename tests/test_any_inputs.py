"""Inputs of any kind, outputs by a function, kernels by layer, and copies of networks that deepcopy refuses.

Longer than 300 lines, since all of it is tried on one table of networks and inputs.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.utils import parametrizations, prune

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.grams.kernel_key import kernel_key
from ntk_lightning.modules import LinearizedNetwork
from ntk_lightning.networks import MLP
from tests.slow_modules import D, jacobian, relative


class Several(nn.Module):
    """Token ids, a mask, numbers; an option that is no tensor; an object as result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(11, 4), nn.Parameter(torch.randn(4))
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, ids: Tensor, more: dict[str, Tensor], kind: str = "plain") -> SimpleNamespace:
        h = (self.embed(ids) * more["mask"][..., None]).sum(1) * self.scale
        logits = self.first(h.tanh()) + self.second(more["numbers"])
        return SimpleNamespace(logits=logits.sin() if kind == "sin" else logits, other="text")


def logits(out: Any) -> Tensor:  # noqa: ANN401 - the network's
    return out.logits


def several(n: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randint(0, 11, (n, 5)), {"mask": torch.rand(n, 5) > 0.3, "numbers": torch.randn(n, 2, dtype=D)}


def one(inputs: tuple[Tensor, dict[str, Tensor]], i: int) -> tuple[Tensor, dict[str, Tensor]]:
    return inputs[0][i : i + 1], {k: v[i : i + 1] for k, v in inputs[1].items()}


@pytest.fixture
def case() -> tuple[nn.Module, Any, Any, Tensor, Tensor]:
    torch.manual_seed(0)
    net, x, y = Several().to(D), several(6), several(4)
    jx, jy = (jacobian(net, [one(t, i) for i in range(len(t[0]))], logits) for t in (x, y))
    return net, x, y, jx, jy


FORMS: dict[str, Callable[[Any], Any]] = {
    "tuple": lambda x: x,
    "list": list,
    "mapping": lambda x: {"ids": x[0], "more": x[1]},
    "UserDict": lambda x: UserDict(ids=x[0], more=UserDict(x[1])),
    "with an option": lambda x: (*x, "plain"),
    "keyword option": lambda x: {"ids": x[0], "more": x[1], "kind": "plain"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_call_takes_every_form(case: tuple[nn.Module, Any, Any, Tensor, Tensor], form: str) -> None:
    net, x, y, jx, jy = case
    x, y = FORMS[form](x), FORMS[form](y)
    square, cross = torch.einsum("iap,jbp->ijab", jx, jx), torch.einsum("iap,jbp->ijab", jx, jy)
    kernel, full = EmpiricalNTK(net, output=logits), EmpiricalNTK(net, output=logits, full=True)

    def trace(k: Tensor) -> Tensor:
        return k.diagonal(dim1=-2, dim2=-1).mean(-1)

    v = torch.randn(6, dtype=D)
    assert relative(kernel(x), trace(square)) < 1e-12
    assert relative(kernel(x, y), trace(cross)) < 1e-12
    assert relative(full(x, y), cross) < 1e-12
    assert relative(kernel.diag(x), trace(square).diagonal()) < 1e-12
    assert relative(kernel.gram_and_cross(x, y)[1], trace(cross).T) < 1e-12
    assert relative(kernel.matvec(x, v, y), trace(cross).T @ v) < 1e-12
    assert torch.equal(kernel.sharded(x), kernel(x))
    assert kernel.features_error(x) == 0
    layers = kernel.per_layer(x, y)
    assert relative(sum(layers.values()), trace(cross)) < 1e-12
    assert set(layers) == {"", "embed", "first", "second"}
    only = [net.first.weight, net.first.bias]
    samples = [(one((case[1]), i), one(case[2], j)) for i in range(6) for j in range(4)]
    a = jacobian(net, [s for s, _ in samples], logits, only)
    b = jacobian(net, [s for _, s in samples], logits, only)
    assert relative(layers["first"].flatten(), (a * b).sum(-1).mean(-1)) < 1e-12
    assert relative(EmpiricalNTK(net, output=lambda out: out.logits[:, 1])(x), square[..., 1, 1]) < 1e-12
    twin = LinearizedNetwork(net, output=logits)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    assert relative(twin(x).detach(), jx @ along) < 1e-12


def test_an_option_is_that_of_its_own_inputs(case: tuple[nn.Module, Any, Any, Tensor, Tensor]) -> None:
    net, x, y, jx, _ = case
    jy = jacobian(net, [(*one(y, i), "sin") for i in range(4)], logits)
    kernel = EmpiricalNTK(net, output=logits)
    assert relative(kernel((*x, "plain"), (*y, "sin")), torch.einsum("iap,jap->ij", jx, jy) / 3) < 1e-12


def test_a_network_that_takes_one_mapping() -> None:
    class Mapped(nn.Linear):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward(batch["x"])

    net, x = Mapped(3, 2).to(D), torch.randn(4, 3, dtype=D)
    assert relative(EmpiricalNTK(net)(({"x": x},)), x @ x.T + 1) < 1e-12
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        EmpiricalNTK(net)({"x": x})


def test_an_index_with_the_linearized_network() -> None:
    net, x = MLP(4, 1, 3, num_outputs=3), torch.randn(5, 3)
    twin, all_outputs = LinearizedNetwork(net, output=1), LinearizedNetwork(net)
    with torch.no_grad():
        for a, b in zip(twin.displacement, all_outputs.displacement, strict=True):
            a.normal_()
            b.copy_(a)
    torch.testing.assert_close(twin(x), all_outputs(x)[:, 1:2])


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, D])
@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32, D, torch.long])
def test_the_widest_precision_is_taken(parameters: torch.dtype, inputs: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1) if inputs != torch.long else nn.Sequential(nn.Embedding(9, 1), nn.Flatten(), nn.Linear(3, 1))
    net, x = net.to(parameters), torch.randint(0, 9, (4, 3)).to(inputs)
    expected = D if D in (parameters, inputs) else torch.float32
    kernel = EmpiricalNTK(net)(x)
    assert kernel.dtype == expected
    assert next(net.parameters()).dtype == parameters
    j = jacobian(copy.deepcopy(net).to(D), [(s[None].to(D) if inputs != torch.long else s[None],) for s in x])[:, 0]
    torch.testing.assert_close(kernel.to(D), j @ j.T, rtol=1e-5, atol=1e-5)
    assert EmpiricalNTK(net, dtype=torch.float32)(x).dtype == torch.float32


def test_tied_parameters_count_once_for_their_first_owner() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).to(D)
    net[2].weight = net[0].weight
    x = torch.randn(5, 4, dtype=D)
    layers, samples = EmpiricalNTK(net).per_layer(x), [(s[None],) for s in x]
    for name, own in {"0": [net[0].weight, net[0].bias], "2": [net[2].bias], "4": list(net[4].parameters())}.items():
        j = jacobian(net, samples, parameters=own)
        assert relative(layers[name], torch.einsum("iap,jap->ij", j, j) / 2) < 1e-12
    assert set(layers) == {"0", "2", "4"}
    full = EmpiricalNTK(net, full=True)
    assert relative(sum(full.per_layer(x).values()), full(x)) < 1e-12


@pytest.mark.parametrize("megabytes", [0.03, 0.1])
def test_kernels_by_layer_within_a_memory_budget(megabytes: float) -> None:
    torch.manual_seed(0)
    net, x, y = MLP(16, 2, 5).to(D), torch.randn(40, 5, dtype=D), torch.randn(70, 5, dtype=D)
    small, large = EmpiricalNTK(net, memory=int(megabytes * 1e6)), EmpiricalNTK(net)
    for args in ((x,), (x, y), (y, x)):
        for name, kernel in small.per_layer(*args).items():
            assert relative(kernel, large.per_layer(*args)[name]) < 1e-12


MALFORMED: dict[str, tuple[Any, type[Exception], str]] = {
    "no tensor": (({"a": 1},), TypeError, "at least one tensor"),
    "a number": (3, TypeError, "must be a tensor, a tuple or list"),
    "keys": ({1: torch.ones(3, 2)}, TypeError, "must be strings"),
    "other numbers of samples": ((torch.ones(3, 2), torch.ones(4, 2)), ValueError, r"x1\[1\] holds 4 samples"),
    "a scalar": ((torch.ones(3, 2), torch.tensor(1.0)), ValueError, "at least one sample"),
    "NaN": ({"a": torch.ones(3, 2), "b": torch.full((3,), torch.nan)}, ValueError, r"x1\['b'\] has a NaN"),
    "empty": ((torch.ones(0, 2),), ValueError, "at least one sample"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_inputs_are_errors(name: str) -> None:
    inputs, kind, message = MALFORMED[name]
    with pytest.raises(kind, match=message):
        EmpiricalNTK(nn.Linear(2, 1))(inputs)


def test_inputs_that_do_not_fit_each_other_are_errors() -> None:
    kernel, x = EmpiricalNTK(Several(), output=logits), several(3)
    with pytest.raises(TypeError, match="differ in structure"):
        kernel(x, (x[0], {"mask": x[1]["mask"]}))
    with pytest.raises(ValueError, match=r"x1\[0\] and x2\[0\] hold samples of different shapes"):
        kernel(x, (x[0][:, :4], x[1]))
    with pytest.raises(ValueError, match=r"x1\[0\] and x2\[0\] differ in dtype"):
        kernel(x, (x[0].int(), x[1]))


def test_outputs_that_cannot_be_differentiated_are_errors() -> None:
    x = several(3)
    with pytest.raises(ValueError, match="choose by output"):
        EmpiricalNTK(Several())(x)
    with pytest.raises(ValueError, match=r"output=\.\.\. must map"):
        EmpiricalNTK(Several(), output=lambda out: out.other)(x)
    with pytest.raises(ValueError, match="which have no gradient"):
        EmpiricalNTK(Several(), output=lambda out: out.logits.argmax(1))(x)
    with pytest.raises(ValueError, match="choose by output"):
        LinearizedNetwork(Several().to(D))(x)
    with pytest.raises(ValueError, match="output must be"):
        EmpiricalNTK(Several(), output="logits")  # type: ignore[arg-type]


class Physics(nn.Module):
    """A function u of (n, 2) points and the residual of a differential equation, from its derivatives in the points."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        def u(point: Tensor) -> Tensor:
            return self.body(point[None])[0, 0]

        laplacian = torch.func.vmap(lambda point: torch.func.hessian(u)(point).trace())(x)
        return self.body(x)[:, 0], laplacian + self.body(x)[:, 0] ** 3


def test_kernels_between_two_functions_of_the_same_weights() -> None:
    torch.manual_seed(0)
    net, x, y = Physics().to(D), torch.randn(6, 2, dtype=D), torch.randn(4, 2, dtype=D)
    u, residual = (lambda out: out[0]), (lambda out: out[1])
    f, g = (jacobian(net, [(s[None],) for s in t], o)[:, 0] for t, o in ((x, u), (y, residual)))
    gx = jacobian(net, [(s[None],) for s in x], residual)[:, 0]
    kernel, v = EmpiricalNTK(net, output=u, output2=residual), torch.randn(6, dtype=D)
    assert relative(kernel(x, y), f @ g.T) < 1e-12
    assert relative(kernel(x), f @ gx.T) < 1e-12
    assert relative(EmpiricalNTK(net, output=residual)(x), gx @ gx.T) < 1e-12
    assert relative(EmpiricalNTK(net, output=residual, output2=u)(y, x), g @ f.T) < 1e-12
    assert relative(kernel.diag(x), (f * gx).sum(1)) < 1e-12
    assert relative(kernel.matvec(x, v), f @ (gx.T @ v)) < 1e-12
    assert relative(kernel.sharded(x), f @ gx.T) < 1e-12
    assert relative(kernel.gram_and_cross(x, x[:2])[1], f[:2] @ gx.T) < 1e-12
    assert relative(sum(kernel.per_layer(x, y).values()), f @ g.T) < 1e-12


def test_two_functions_of_other_numbers_of_outputs() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5)).to(D), torch.randn(4, 3, dtype=D)
    j = jacobian(net, [(s[None],) for s in x])
    two, three = (lambda out: out[:, :2]), (lambda out: out[:, 2:])
    kernel, v = EmpiricalNTK(net, output=two, output2=three, full=True), torch.randn(4, 3, dtype=D)
    expected = torch.einsum("iap,jbp->ijab", j[:, :2], j[:, 2:])
    assert relative(kernel(x), expected) < 1e-12
    assert relative(kernel.matvec(x, v), torch.einsum("ijab,jb->ia", expected, v)) < 1e-12
    with pytest.raises(ValueError, match="use full=True"):
        EmpiricalNTK(net, output=two, output2=three)(x)


class Keeping(nn.Module):
    """Keeps an activation as an attribute, and others in a list and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.seen, self.by_name = nn.Linear(3, 4), nn.Linear(4, 1), [], {}

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.a(x).tanh()
        self.seen.append(self.hidden)
        self.by_name["hidden"] = [self.hidden]
        return self.b(self.hidden)


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    prune.l1_unstructured(net[0], "bias", amount=1)
    return net


COPIED: dict[str, Callable[[], nn.Module]] = {
    "kept activations": Keeping,
    "pruned": pruned,
    "weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)),
    "spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)).eval(),
    "parametrizations.weight_norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "parametrizations.spectral_norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 1)
    ).eval(),
    "parametrizations.orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 4)), nn.Linear(4, 1)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", COPIED)
def test_networks_that_keep_tensors_are_copied(name: str) -> None:
    torch.manual_seed(0)
    net, x = COPIED[name]().to(D), torch.randn(5, 3, dtype=D)
    net(x)  # leaves tensors that deepcopy refuses
    before = {key: value.clone() for key, value in net.state_dict().items()}
    j = jacobian(net, [(s[None],) for s in x])[:, 0]
    net(x)
    kernel, v = EmpiricalNTK(net), torch.randn(5, dtype=D)
    assert relative(kernel(x), j @ j.T) < 1e-12
    assert relative(kernel.matvec(x, v), j @ (j.T @ v)) < 1e-12
    assert relative(sum(kernel.per_layer(x).values()), j @ j.T) < 1e-12
    twin = LinearizedNetwork(net)
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    assert relative(twin(x)[:, 0].detach(), j @ along) < 1e-12
    again = copy.deepcopy(kernel)  # nothing of a derivative was left in it
    assert torch.equal(again(x), kernel(x))
    copy.deepcopy(twin.net)
    for state in (net.state_dict(), kernel.net.state_dict(), twin.net.state_dict()):
        assert all(torch.equal(value, before[key]) for key, value in state.items())
    if name == "kept activations":
        assert len(kernel.net.seen) == len(net.seen) == 7
        assert not kernel.net.hidden.requires_grad


def test_a_function_as_output_has_a_name_in_a_store_and_none_is_no_part_of_it() -> None:
    torch.manual_seed(0)
    net = MLP(4, 1, 3)
    assert kernel_key(EmpiricalNTK(net)) != kernel_key(EmpiricalNTK(net, output=logits))
    with pytest.raises(TypeError, match="fingerprint"):
        kernel_key(EmpiricalNTK(net, output=lambda out: out))


def shard(rank: int, address: str, results: str) -> None:
    torch.manual_seed(0)
    net, x, y = Several().to(D), several(7), several(4)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    kernel = EmpiricalNTK(net, output=logits)
    torch.save((kernel.sharded(x), kernel.sharded(x, y), kernel(x), kernel(x, y)), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_share_a_kernel_of_several_inputs(tmp_path: object) -> None:
    multiprocessing.spawn(shard, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    first, second = (torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b, alone in zip(first[:2], second[:2], first[2:], strict=True):
        assert torch.equal(a, b)
        assert relative(a, alone) < 1e-12


class Writing(nn.Module):
    """Writes into what it is given, as x.div_(255) or a first nn.ReLU(inplace=True) do."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.write, self.a, self.b = write, nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.write(x)
        return self.b(self.a(x).tanh())


class Cutting(Writing):
    """A write that torch.func does not transform."""

    def forward(self, x: Tensor) -> Tensor:
        x[x < 0] = 0
        return super().forward(x)


WRITING: dict[str, Callable[[], nn.Module]] = {
    "scaling": lambda: Writing(lambda x: x.mul_(2)),
    "shift": lambda: Writing(lambda x: x.add_(1)),
    "a feature": lambda: Writing(lambda x: x[:, 0].zero_()),
    "a mask": lambda: Cutting(lambda x: x.mul_(2)),
    "nn.ReLU": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
}


@pytest.mark.parametrize("name", WRITING)
def test_networks_that_write_into_their_inputs(name: str) -> None:
    torch.manual_seed(0)
    net, x = WRITING[name]().to(D), torch.randn(5, 3, dtype=D)
    before, j = x.clone(), jacobian(net, x)
    gram, v = torch.einsum("icp,jcp->ij", j, j) / 2, torch.randn(5, dtype=D)
    for _ in range(2):
        kernel = EmpiricalNTK(net)
        assert relative(kernel(x), gram) < 1e-12
        assert relative(kernel.diag(x), gram.diagonal()) < 1e-12
        assert relative(sum(kernel.per_layer(x).values()), gram) < 1e-12
        assert relative(kernel.matvec(x, v), gram @ v) < 1e-12
        twin = LinearizedNetwork(net)
        with torch.no_grad():
            for d in twin.displacement:
                d.normal_()
        along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
        assert relative(twin(x).detach(), j @ along) < 1e-12
        assert torch.equal(x, before)


class Read(nn.Module):
    """A readout of what a layer makes of tokens or vectors."""

    def __init__(self, layer: nn.Module, width: int, read: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.layer, self.read, self.out = layer, read, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.read(self.layer(x)))


class Twice(nn.Bilinear):
    """A bilinear form of one vector."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


TOKENS = torch.tensor([[1, 2], [2, 3], [0, 4], [1, 0], [5, 6]])  # padding is neither in the first two nor in the last
QUIETLY: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding bag": (lambda: Read(nn.EmbeddingBag(7, 4), 4), TOKENS),
    "embedding bag of maxima": (lambda: Read(nn.EmbeddingBag(7, 4, mode="max"), 4), TOKENS),
    "embedding with padding": (lambda: Read(nn.Embedding(7, 4, padding_idx=0), 4, lambda h: h.mean(1).tanh()), TOKENS),
    "negative padding": (lambda: Read(nn.Embedding(7, 4, padding_idx=-7), 4, lambda h: h.mean(1).tanh()), TOKENS),
    "sparse embedding": (lambda: Read(nn.Embedding(7, 4, sparse=True), 4, lambda h: h.mean(1).tanh()), TOKENS),
    "weight_norm": (lambda: Read(parametrizations.weight_norm(nn.Linear(2, 4)), 4), torch.randn(5, 2, dtype=D)),
    "bilinear": (lambda: Read(Twice(2, 2, 4), 4), torch.randn(5, 2, dtype=D)),
    "scale by .data": (lambda: ByData(2, 2), torch.randn(5, 2, dtype=D)),
    "squeezed": (lambda: Squeezed(2, 1), torch.randn(5, 2, dtype=D)),
}


class ByData(nn.Linear):
    """Weights over their norm, which gets no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.data.norm()


class Squeezed(nn.Linear):
    """One output, without a dimension of its own; one sample has then none at all."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh().squeeze()


@pytest.mark.parametrize("name", QUIETLY)
def test_layers_without_rules_are_right_and_raise_no_warning(name: str, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    make, x = QUIETLY[name]
    net = make().to(D)
    parameters = [p for p in net.parameters() if p.requires_grad]
    rows = []
    for output in net(x).reshape(len(x), -1).T.flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True)
        rows.append(torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in found]))
    j = torch.stack(rows).unflatten(0, (-1, len(x))).transpose(0, 1)  # (n, C, P)
    gram, v = torch.einsum("icp,jcp->ij", j, j) / j.shape[1], torch.randn(5, dtype=D)
    kernel, twin = EmpiricalNTK(net), LinearizedNetwork(net)
    assert relative(kernel(x), gram) < 1e-12
    assert relative(kernel.diag(x), gram.diagonal()) < 1e-12
    assert relative(kernel.matvec(x, v), gram @ v) < 1e-12
    with torch.no_grad():
        for d in twin.displacement:
            d.normal_()
    along = torch.cat([d.detach().reshape(-1) for d in twin.displacement])
    outputs = twin(x)
    assert relative(outputs.detach().reshape(len(x), -1), j @ along) < 1e-12
    outputs.sum().backward()
    found = [d.grad.to_dense() if d.grad.is_sparse else d.grad for d in twin.displacement]
    assert relative(torch.cat([g.flatten() for g in found]), j.sum((0, 1))) < 1e-12
    assert [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)] == []
