"""Layer by layer from kept inputs, the trace's last layers in one vector, embeddings by id: all plain autograd.

Longer than 300 lines for its counterexamples: networks in which a way would be wrong, and must not be taken.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import dense, jacobian, relative, trace
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical import empirical_ntk, inner_products, layer_rules, memory_plan
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer
from ntk_lightning.kernels.empirical.memory_plan import Plan
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.rows import Rows
from ntk_lightning.networks import MLP, MyrtleCNN, NTKConv2d, NTKLinear, Residual

D = torch.float64


def rows_of(net: nn.Module, x: Tensor, **options: Any) -> GradientRows:  # noqa: ANN401 - of the rows
    names = tuple(name for name, parameter in net.named_parameters() if parameter.requires_grad)
    function = NetworkFunction(net, names, None, False, D, x.device)
    return GradientRows(function, Inputs.of(x[:1]), **options)


# ------------------------------------------------------------------------------- layer by layer


def wide(num_outputs: int) -> nn.Module:
    """Convolutions of so few pixels that their inputs and cotangents are fewer numbers than their gradients."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(NTKConv2d(2, 24, 3), nn.Tanh(), NTKConv2d(24, 24, 3, bias_std=0.3), nn.Tanh()),
        *(nn.Conv2d(24, 20, 2), nn.Tanh(), nn.Conv2d(20, 20, 1, bias=False), nn.Tanh()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, num_outputs)),
    ).double()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Rows, Plan]]:
    """The plans that are chosen in a test."""
    chosen: list[tuple[Rows, Plan]] = []
    choose = memory_plan.choose_plan

    def noted(*args: Any, **kwargs: Any) -> tuple[Rows, Plan]:  # noqa: ANN401 - passed on
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(empirical_ntk, "choose_plan", noted)
    return chosen


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Gradients (samples times channels) that are formed to be multiplied, by the layer's channels times inputs."""
    counts: Counter[int] = Counter()
    form = inner_products._form

    def noted(layer: AffineLayer, inputs: Tensor, cotangents: Tensor, c: int, channels: slice, *rest: Any) -> Any:  # noqa: ANN401
        counts[layer.d_in * layer.d_out] += len(inputs) * (channels.stop - channels.start)
        return form(layer, inputs, cotangents, c, channels, *rest)

    monkeypatch.setattr(inner_products, "_form", noted)
    return counts


def budget(net: nn.Module, x: Tensor, others: int, half: bool = False, **options: Any) -> int:  # noqa: ANN401 - passed on
    """Bytes that hold the inputs and cotangents of all samples together, but not their gradients."""
    kernel = EmpiricalNTK(net, **options)
    with kernel._computing(x) as (rows, inputs):
        for memory in range(500_000, 20_000_000, 100_000):
            try:
                plans = [memory_plan.choose_plan(memory, rows, inputs[0], m, half, True)[1] for m in (0, others)]
            except ValueError:
                continue
            if all(plan.together for plan in plans):
                return memory
    raise AssertionError("There is no such budget.")


@pytest.mark.parametrize("num_outputs", [1, 3])
@pytest.mark.parametrize("full", [False, True])
def test_each_gradient_is_formed_once_where_inputs_and_cotangents_fit(
    num_outputs: int, full: bool, plans: list[tuple[Rows, Plan]], formed: Counter[int]
) -> None:
    net, n, m = wide(num_outputs), 90 if num_outputs == 1 else 50, 8
    x, y = torch.randn(n, 2, 5, 5, dtype=D), torch.randn(m, 2, 5, 5, dtype=D)
    kernel = EmpiricalNTK(net, full=full, memory=budget(net, x, m, full=full))
    square, cross = dense(net, x, x), dense(net, y, x)
    if not full:
        square, cross = trace(square), trace(cross)
    once = {24 * 216: 24, 20 * 96: 20, 20 * 20: 20}  # channels by the layer's channels times inputs
    for call, samples, values in (
        (lambda: (kernel(x),), n, (square,)),
        (lambda: kernel.gram_and_cross(x, y), n + m, (square, cross)),
    ):
        formed.clear()
        for actual, expected in zip(call(), values, strict=True):
            assert relative(actual, expected) < 1e-12
        rows, plan = plans[-1]
        assert plan.together
        assert {"kept"} < set(rows.ways.values())
        kept = [rows.layers[name] for name, way in rows.ways.items() if way == "kept"]
        assert formed == {c.d_in * c.d_out: samples * once[c.d_in * c.d_out] for c in kept}
        assert 24 * 216 in formed
    gram = kernel(x)
    assert torch.equal(gram, gram.transpose(0, 1).transpose(2, 3) if full else gram.T)


@pytest.mark.parametrize("memory", ["3MB", "6MB"])
def test_panels_of_inputs_and_cotangents_give_the_same_kernel(
    memory: str, plans: list[tuple[Rows, Plan]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise ValueError("a budget that holds no gradients")

    monkeypatch.setattr(memory_plan, "divide", refuse)
    net, x, y = wide(3), torch.randn(50, 2, 5, 5, dtype=D), torch.randn(9, 2, 5, 5, dtype=D)
    gram, cross = EmpiricalNTK(net, memory=memory).gram_and_cross(x, y)
    assert plans[-1][0].keeps
    assert not plans[-1][1].together
    assert relative(gram, trace(dense(net, x, x))) < 1e-12
    assert relative(cross, trace(dense(net, y, x))) < 1e-12
    assert torch.equal(gram, gram.T)


def test_rows_of_inputs_in_bfloat16_are_those_of_float32_to_its_precision(plans: list[tuple[Rows, Plan]]) -> None:
    net, x = wide(1).float(), torch.randn(50, 2, 5, 5)
    exact = EmpiricalNTK(net)(x)
    assert not plans[-1][0].keeps
    rounded = EmpiricalNTK(net, features="bfloat16", memory=budget(net, x, 0, half=True))(x)
    assert plans[-1][0].keeps
    assert 1e-6 < relative(rounded, exact) < 1e-2


@pytest.mark.parametrize("conv", [
    NTKConv2d(2, 3, 3, bias_std=0.3), nn.Conv2d(2, 3, (3, 1), padding=(0, 2)), nn.Conv2d(2, 3, (1, 3), dilation=(1, 2)),
    nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, (2, 4), padding="same"), nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(2, 3, (3, 2), padding=(2, 1), dilation=(2, 1)),
])  # fmt: skip
@pytest.mark.parametrize("num_outputs", [1, 2])
def test_patches_shifted_along_columns_are_those_of_plain_autograd(
    conv: nn.Module, num_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_rules, "_SHIFTED_POSITIONS", 1)
    monkeypatch.setattr(layer_rules, "_SHIFTED_INPUTS", 1)
    torch.manual_seed(0)
    net = nn.Sequential(copy.deepcopy(conv), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten(), nn.LazyLinear(num_outputs))
    x = torch.randn(5, 2, 5, 6)
    net(x)
    net, x = net.double(), x.double()
    rows = rows_of(net, x)
    assert rows.layers["0"].blocks == rows.layers["0"].filter[0]
    expected = dense(net, x, x)
    assert relative(EmpiricalNTK(net)(x), trace(expected)) < 1e-12
    assert relative(EmpiricalNTK(net, full=True)(x), expected) < 1e-12


# ------------------------------------------------------------------------------- the trace's last layers


class Block(nn.Module):
    """The end of a ResNet: batch normalization, a sum of branches, activations in place, pooling, readout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2), nn.Conv2d(4, 5, 1, 2)
        self.na, self.nb, self.fc = nn.BatchNorm2d(5), nn.BatchNorm2d(5), nn.Linear(5, 3)
        for norm in (self.na, self.nb):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.stem(x))
        h = F.relu(self.na(self.a(h)) + self.nb(self.b(h[:, :, 1:, 1:])), inplace=True)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(h, 1), 1))


class Ends(nn.Module):
    """Two layers and a readout, with something between or behind them."""

    def __init__(self, between: Callable[[Tensor], Tensor], behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.readout = nn.Linear(4, 5), NTKLinear(5, 5, bias_std=0.2), nn.Linear(5, 5)
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(x)))
        return self.behind(self.readout(self.between(h)), h)


def _written_through_a_view(z: Tensor) -> Tensor:
    z.view(-1, z.shape[-1]).mul_(torch.arange(1.0, 6.0, dtype=z.dtype))
    return z


LAST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "mlp": (lambda: MLP(4, 2, 5, num_outputs=3, bias_std=0.3), (5,), {"3", "5"}),
    "myrtle": (lambda: MyrtleCNN(3, num_outputs=3, bias_std=0.3), (3, 8, 8), {"8", "12"}),
    "frozen readout": (lambda: _frozen(MLP(4, 2, 5, num_outputs=3), "5"), (5,), set()),
    "a channel that is not read": (lambda: _unread(MLP(4, 2, 5, num_outputs=3)), (5,), {"3", "5"}),
    "resnet": (Block, (2, 7, 7), {"a", "b", "fc"}),
    "no global pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)), (2, 4, 4), {"3"},
    ),
    "residual": (
        lambda: nn.Sequential(nn.Linear(4, 5), Residual(nn.Sequential(nn.Tanh(), nn.Linear(5, 5))), nn.Linear(5, 2)),
        (4,), {"1.body.1", "2"},
    ),
    "between: nothing": (lambda: Ends(lambda h: h, lambda z, h: z), (4,), {"second", "readout"}),
    "between: layer norm": (lambda: Ends(lambda h: F.layer_norm(h, (5,)), lambda z, h: z), (4,), {"readout"}),
    "between: flipped": (lambda: Ends(lambda h: torch.tanh(h.flip(1)), lambda z, h: z), (4,), {"readout"}),
    "between: times its sum": (lambda: Ends(lambda h: h * h.sum(1, keepdim=True), lambda z, h: z), (4,), {"readout"}),
    "between: a gate": (lambda: Ends(lambda h: h * torch.sigmoid(h), lambda z, h: z), (4,), {"second", "readout"}),
    "between: in place": (
        lambda: Ends(lambda h: torch.relu_(h.clone()), lambda z, h: z), (4,), {"second", "readout"},
    ),
    "between: through a view": (
        lambda: Ends(lambda h: _written_through_a_view(h.clone()), lambda z, h: z), (4,), {"readout"},
    ),
    "behind: softmax": (lambda: Ends(torch.tanh, lambda z, h: torch.softmax(z, 1)), (4,), set()),
    "behind: a skip": (lambda: Ends(torch.tanh, lambda z, h: z + h), (4,), set()),
    "behind: a part": (lambda: Ends(torch.tanh, lambda z, h: z[:, 1:3]), (4,), set()),
    "behind: through a view": (lambda: Ends(torch.tanh, lambda z, h: _written_through_a_view(z)), (4,), set()),
    "behind: another reader": (
        lambda: Ends(torch.tanh, lambda z, h: z.view(-1, 5) + 0 * h.sum(1, keepdim=True)), (4,), set(),
    ),
}  # fmt: skip


def _frozen(net: nn.Module, name: str) -> nn.Module:
    net.get_submodule(name).requires_grad_(False)
    return net


def _unread(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        net.get_submodule("5").weight[:, 1] = 0
    return net


@pytest.mark.parametrize("name", LAST)
def test_one_vector_stands_for_all_cotangents_of_the_last_layers(name: str) -> None:
    torch.manual_seed(0)
    make, shape, expected = LAST[name]
    net = make().to(D)
    x, y = torch.randn(6, *shape, dtype=D), torch.randn(4, *shape, dtype=D)
    rows = rows_of(net, x)
    assert {name for name, layer in rows.layers.items() if layer.unit is not None} == expected
    kernel = EmpiricalNTK(net)
    square, cross = dense(net, x, x), dense(net, y, x)
    for actual, values in (
        (kernel(x), trace(square)),
        (kernel(y, x), trace(cross)),
        (kernel.diag(x), trace(square).diagonal()),
        (sum(kernel.per_layer(x).values()), trace(square)),
        (EmpiricalNTK(net, full=True)(x), square),
        (EmpiricalNTK(net, output=1)(x), square[..., 1, 1]),
        (EmpiricalNTK(net, output=lambda out: out[:, :2])(x), trace(square[..., :2, :2])),
        (EmpiricalNTK(net, output=lambda out: out.unsqueeze(1).squeeze(1))(x), trace(square)),
    ):
        assert relative(actual, values) < 1e-12


# ------------------------------------------------------------------------------- embeddings


class Language(nn.Module):
    """A small transformer on tokens, its embedding as it is asked for."""

    def __init__(self, embedding: nn.Embedding, how: str = "") -> None:
        super().__init__()
        self.embedding, self.how, d = embedding, how, embedding.embedding_dim
        self.position = nn.Embedding(6, d)
        self.block = nn.TransformerEncoderLayer(d, 2, 2 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(d, embedding.num_embeddings if how in ("tied", "head") else 2, bias=False)
        if how == "tied":
            self.head.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        if self.how == "twice":
            h = h + torch.tanh(self.embedding((ids + 1) % self.embedding.num_embeddings))
        h = self.block(h)[:, -1]
        if self.how == "functional":
            return F.linear(h, self.embedding.weight)[:, :3]
        return self.head(h)[:, :3]


EMBEDDINGS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "plain": (lambda: Language(nn.Embedding(300, 4)), True),
    "head": (lambda: Language(nn.Embedding(300, 4), "head"), True),
    "padding": (lambda: Language(nn.Embedding(300, 4, padding_idx=299)), True),
    "few tokens": (lambda: Language(nn.Embedding(8, 4)), False),
    "tied": (lambda: Language(nn.Embedding(300, 4), "tied"), False),
    "functional": (lambda: Language(nn.Embedding(300, 4), "functional"), False),
    "twice": (lambda: Language(nn.Embedding(300, 4), "twice"), False),
    "max_norm": (lambda: Language(nn.Embedding(300, 4, max_norm=100.0)), False),
    "sparse": (lambda: Language(nn.Embedding(300, 4, sparse=True)), True),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_are_plain_autograd(name: str) -> None:
    torch.manual_seed(0)
    make, by_id = EMBEDDINGS[name]
    net = make().to(D)
    few = net.embedding.num_embeddings
    x, y = torch.randint(0, few, (5, 6)), torch.randint(0, few, (3, 6))
    x[0, :3], x[1, 1], x[2, 3:5], y[1, 2:4], y[2, 0] = few - 1, few - 1, few - 1, few - 1, x[3, 0]  # met more than once
    kernel, full = EmpiricalNTK(net), EmpiricalNTK(net, full=True)
    with kernel._computing(x) as (rows, _):
        ways = rows.ways if isinstance(rows, GradientRows) else {}
    assert ("embedding" in ways) == by_id
    j, j2 = (_dense_jacobian(net, ids) for ids in (x, y))
    square, cross = (torch.einsum("iap,jbp->ijab", left, j) for left in (j, j2))
    for actual, values in (
        (kernel(x), trace(square)),
        (kernel(y, x), trace(cross)),
        (kernel.diag(x), trace(square).diagonal()),
        (full(x), square),
        (full(y, x), cross),
        (full.diag(x), square.diagonal().movedim(-1, 0)),
        (sum(kernel.per_layer(x).values()), trace(square)),
        (EmpiricalNTK(net, output=1)(x), square[..., 1, 1]),
        (kernel.sharded(x), trace(square)),
    ):
        assert relative(actual, values) < 1e-12


def _dense_jacobian(net: nn.Module, ids: Tensor) -> Tensor:
    """By one backward pass for every output, also where gradients are sparse."""
    rows = []
    for sample in ids:
        out = net(sample[None].clone())[0]
        row = []
        for value in out:
            gradients = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, allow_unused=True)
            pairs = zip(gradients, net.parameters(), strict=True)
            row.append(torch.cat([(torch.zeros_like(p) if g is None else g.to_dense()).flatten() for g, p in pairs]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_ids_are_exact_in_bfloat16() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(70_000, 1), nn.Flatten(), nn.Linear(4, 1, bias=False))
    nn.init.ones_(net[2].weight)
    x = torch.tensor([[69_999, 256, 65_536, 1], [69_998, 257, 65_537, 0], [1, 65_536, 256, 69_999]])
    same = (x[:, None, :, None] == x[None, :, None, :]).sum((2, 3)).float()  # products of the embedding's gradients
    embedding = EmpiricalNTK(net, features="bfloat16").per_layer(x)["0"]
    assert torch.equal(embedding, same)


def test_scaled_gradients_are_refused_still() -> None:
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        EmpiricalNTK(Language(nn.Embedding(300, 4, scale_grad_by_freq=True)))(torch.randint(0, 300, (2, 6)))


# ------------------------------------------------------------------------------- the choice


def layer(kind: str, d_in: int, d_out: int, positions: int) -> AffineLayer:
    if kind == "embedding":
        return AffineLayer(nn.Embedding(d_in, d_out), 1.0, None, (1, positions), (1, positions, d_out))
    if kind == "linear":
        shapes = (1, positions, d_in), (1, positions, d_out)
        return AffineLayer(nn.Linear(d_in, d_out, bias=False), 1.0, None, *shapes)
    side = round(positions**0.5)
    conv = nn.Conv2d(d_in, d_out, 3, padding=1, bias=False)
    return AffineLayer(conv, 1.0, None, (1, d_in, side, side), (1, d_out, side, side))


# kind, d_in, d_out, T, C, full, the way, and that where gradients do not fit in memory
SIZES = [
    ("linear", 784, 2048, 1, 10, False, "factors", "factors"),
    ("linear", 256, 256, 32, 2, False, "product", "kept"),
    ("linear", 256, 1024, 32, 2, False, "product", "kept"),
    ("linear", 1024, 4096, 8, 1, False, "factors", "factors"),
    ("linear", 1024, 1024, 8, 10, True, "factors", "factors"),
    ("linear", 64, 64, 64, 1, False, "product", "product"),
    ("embedding", 10_000, 256, 32, 1, False, "factors", "factors"),
    ("embedding", 10_000, 256, 128, 1, False, "vmap", "vmap"),
    ("embedding", 100, 16, 32, 1, False, "vmap", "vmap"),
    ("conv", 3, 64, 1024, 10, False, "product", "product"),
    ("conv", 64, 64, 1024, 1, False, "product", "product"),
    ("conv", 64, 64, 64, 1, False, "product", "kept"),
    ("conv", 1024, 1024, 1024, 1, False, "product", "kept"),
    ("conv", 512, 512, 16, 1, False, "factors", "factors"),
    ("conv", 512, 512, 16, 10, False, "factors", "factors"),
    ("conv", 256, 256, 64, 10, False, "product", "kept"),
]


@pytest.mark.parametrize(("kind", "d_in", "d_out", "positions", "outputs", "full", "way", "kept"), SIZES)
def test_the_way_of_fewest_multiplications_is_chosen(
    kind: str, d_in: int, d_out: int, positions: int, outputs: int, full: bool, way: str, kept: str
) -> None:
    one = layer(kind, d_in, d_out, positions)
    assert one.way(outputs, full) == way
    assert one.way(outputs, full, keep=True) == kept
    costs = one.costs(outputs, full)
    assert min(costs.values()) == costs[one.way(outputs, full)]


@pytest.mark.parametrize(("partners", "expected"), [(4, "factors"), (1000, "product")])
def test_the_making_of_a_row_is_shared_by_all_its_products(partners: int, expected: str) -> None:
    assert layer("conv", 256, 256, 64).way(10, full=False, partners=partners) == expected


@pytest.mark.parametrize("shifted", [(3, 64, 32, False), (64, 64, 32, True), (64, 64, 8, True), (512, 512, 4, False)])
def test_patches_are_shifted_where_products_stay_large(shifted: tuple[int, int, int, bool]) -> None:
    d_in, d_out, side, expected = shifted
    assert layer("conv", d_in, d_out, side * side).shifts == expected


def test_per_layer_of_a_transformer_is_plain_autograd() -> None:
    torch.manual_seed(0)
    net = Language(nn.Embedding(300, 4)).to(D)
    x = torch.randint(0, 300, (4, 6))
    for name, actual in EmpiricalNTK(net).per_layer(x).items():
        j = jacobian(net, x, parameters=list(net.get_submodule(name).parameters(recurse=False)))
        assert relative(actual, torch.einsum("iap,jap->ij", j, j) / j.shape[1]) < 1e-12
