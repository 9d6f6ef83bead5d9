"""The empirical NTK equals explicit gradients, stays within its memory budget, and tends to the infinite one.

Longer than 300 lines, since every call of one class is held against the same explicit gradients.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from oracle import close, dense, trace
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.networks import MLP, Erf, MyrtleCNN, NTKConv2d, NTKLinear


class Attention(nn.Module):
    """Linear layers on sequences, a layer norm, a parameter of its own, and a functional use of another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm, self.first = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.gain, self.readout = nn.Parameter(torch.randn(6)), NTKLinear(6, 2, bias_std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x))
        h = torch.softmax(h @ h.transpose(1, 2), -1) @ h
        h = self.first(h.mean(1)) * self.gain + F.linear(h.mean(1), self.first.weight)
        return self.readout(h)


class Flat(nn.Module):
    """Outputs (n,), one layer called twice, in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.readout = NTKLinear(5, 5, bias_std=0.2), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.relu_(self.layer(torch.tanh_(self.layer(x))))).squeeze(1)


def tied() -> nn.Module:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, Erf(), second, nn.ReLU(inplace=True), NTKLinear(5, 2))


def frozen() -> nn.Module:
    net = MLP(6, 2, 5, num_outputs=2, bias_std=0.4)
    net[1].weight.requires_grad_(False)
    net[3].bias.requires_grad_(False)
    net[5].requires_grad_(False)
    return net


def normalized() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))
    net(torch.randn(20, 2, 4, 4))
    return net.eval()


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "myrtle": (lambda: MyrtleCNN(3, bias_std=0.3), (3, 8, 8)),
    "myrtle_3_outputs": (lambda: MyrtleCNN(3, num_outputs=3), (3, 8, 8)),
    "mlp": (lambda: MLP(7, 3, 5, num_outputs=3, bias_std=0.3), (5,)),
    "linear": (lambda: nn.Linear(5, 2), (5,)),
    "strided": (lambda: nn.Sequential(NTKConv2d(2, 3, 3, "valid", stride=2), nn.Flatten(), nn.Linear(3, 1)), (2, 4, 4)),
    "attention": (Attention, (4, 3)),
    "flat": (Flat, (5,)),
    "tied": (tied, (5,)),
    "frozen": (frozen, (5,)),
    "batch_norm": (normalized, (2, 4, 4)),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[request.param]
    return make().double(), torch.randn(9, *shape, dtype=torch.float64), torch.randn(5, *shape, dtype=torch.float64)


def test_equals_the_dense_jacobian(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    kernel, full = EmpiricalNTK(net), EmpiricalNTK(net, full=True)
    expected, square = dense(net, x, y), dense(net, x, x)
    close(kernel(x, y), trace(expected))
    close(kernel(x), trace(square))
    assert torch.equal(kernel(x), kernel(x).T)
    close(kernel.diag(x), trace(square).diagonal())
    close(full(x, y), expected)
    close(full(x), square)
    close(full.diag(x), square.diagonal().movedim(-1, 0))
    close(EmpiricalNTK(net, output=0)(x, y), expected[..., 0, 0])


def test_matvec_equals_the_formed_kernel(case: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, x, y = case
    expected, square = dense(net, y, x), dense(net, x, x)
    v = torch.randn(len(x), expected.shape[-1], dtype=torch.float64)
    kernel = EmpiricalNTK(net)
    close(kernel.matvec(x, v), trace(square) @ v)
    close(kernel.matvec(x, v[:, 0]), trace(square) @ v[:, 0])
    close(kernel.matvec(x, v, y), trace(expected) @ v)
    close(EmpiricalNTK(net, output=0).matvec(x, v[:, 0], y), expected[..., 0, 0] @ v[:, 0])
    close(EmpiricalNTK(net, full=True).matvec(x, v, y), torch.einsum("ijab,jb->ia", expected, v))


def least(net: nn.Module, x: Tensor, **options: bool) -> int:
    with pytest.raises(ValueError, match="cannot hold the gradients needed at once") as error:
        EmpiricalNTK(net, memory=1, **options)(x)
    return int(float(str(error.value).split("it takes ")[1].split("MB")[0]) * 1e6 + 1e5)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("rows", [0, 2, 5, 12])
def test_every_budget_gives_the_same_kernel(rows: int, full: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(NTKConv2d(2, 40, 3), nn.GELU(), NTKConv2d(40, 40, 3), nn.Flatten(), NTKLinear(160, 2)).double()
    x, y = torch.randn(17, 2, 2, 2, dtype=torch.float64), torch.randn(6, 2, 2, 2, dtype=torch.float64)
    width = 2 * sum(p.numel() for p in net.parameters()) * 8
    kernel = EmpiricalNTK(net, full=full, memory=least(net, x, full=full) + rows * width)
    unbounded = EmpiricalNTK(net, full=full)
    for actual, expected in (
        (kernel(x), unbounded(x)),
        (kernel(x, y), unbounded(x, y)),
        (kernel(y, x), unbounded(y, x)),
        (kernel.diag(x), unbounded.diag(x)),
        *zip(kernel.gram_and_cross(x, y, x[:1]), (unbounded(x), unbounded(y, x), unbounded(x[:1], x)), strict=True),
    ):
        close(actual, expected)


def test_gram_and_cross_forms_training_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = MLP(8, 2, 5), torch.randn(30, 5), torch.randn(10, 5)
    kernel, seen, fill = EmpiricalNTK(net), [], GradientRows.fill
    kernel(x)  # tries the network once
    monkeypatch.setattr(GradientRows, "workspace", lambda self, x: len(x) * 1000)
    monkeypatch.setattr(GradientRows, "fill", lambda self, out, x: (seen.append(len(x)), fill(self, out, x)))
    k_train, k_test = kernel.gram_and_cross(x, y)
    assert sum(seen) == 40
    torch.testing.assert_close(k_train, kernel(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k_test, kernel(y, x), rtol=1e-5, atol=1e-5)


def test_layers_in_factors_equal_generic_gradients() -> None:
    torch.manual_seed(0)
    net = MLP(9, 3, 5, num_outputs=2, bias_std=0.3).double()
    generic = copy.deepcopy(net)
    for module in generic:
        module.register_forward_hook(lambda module, inputs, out: None)  # a hooked layer is not taken apart
    x = torch.randn(6, 5, dtype=torch.float64)
    close(EmpiricalNTK(net)(x), EmpiricalNTK(generic)(x))
    names = tuple(name for name, _ in net.named_parameters())
    functions = [NetworkFunction(module, names, None, False, x.dtype, x.device) for module in (net, generic)]
    widths = [GradientRows(function, Inputs.of(x[:1])).width for function in functions]
    # of the last two layers one vector stands for the cotangents of both outputs
    cotangents = (2 * 9, 2 * 9, 9, 2)
    inputs = [m.in_features + 1 for m in net if isinstance(m, NTKLinear)]
    assert widths == [sum(inputs) + sum(cotangents), 2 * sum(p.numel() for p in net.parameters())]


def test_float32_network_on_float64_inputs_and_back() -> None:
    torch.manual_seed(0)
    net, x = MyrtleCNN(4), torch.randn(6, 3, 8, 8, dtype=torch.float64)
    expected = trace(dense(copy.deepcopy(net).double(), x, x))
    kernel = EmpiricalNTK(net)
    close(kernel(x), expected)
    close(EmpiricalNTK(net, dtype=torch.float64)(x.float()), kernel(x.float().double()))
    assert kernel(x.float()).dtype == torch.float32
    torch.testing.assert_close(kernel(x.float()).double(), expected, rtol=1e-5, atol=1e-6)
    assert next(kernel.parameters()).dtype == torch.float32


def test_bfloat16_features_report_their_error() -> None:
    torch.manual_seed(0)
    net, x = MyrtleCNN(8), torch.randn(20, 3, 8, 8)
    kernel = EmpiricalNTK(net, features="bfloat16")
    exact = EmpiricalNTK(net)(x)
    error = kernel.features_error(x)
    assert 1e-6 < error < 1e-2
    assert error == pytest.approx(float((kernel(x) - exact).abs().max() / exact.abs().max()))
    assert EmpiricalNTK(net).features_error(x) == 0


def test_products_stay_float32_whatever_training_uses() -> None:
    torch.manual_seed(0)
    net, x = MLP(64, 2, 5), torch.randn(40, 5)
    expected = EmpiricalNTK(net)(x)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = EmpiricalNTK(net)(x)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_a_trainer_validates(context: Callable[[], AbstractContextManager[None]]) -> None:
    torch.manual_seed(0)
    net, x = MyrtleCNN(3).double(), torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = trace(dense(net, x, x))
    outside = EmpiricalNTK(net)
    with context():
        kernel, y = EmpiricalNTK(net).to("cpu", torch.float32).double(), x + 0
        results = kernel(y), outside(y), outside.diag(y), outside.matvec(y, y.new_ones(5)), EmpiricalNTK(net)(y)
    close(results[1], expected)
    close(results[4], expected)
    close(results[2], expected.diagonal())
    close(results[3], expected.sum(1))
    torch.testing.assert_close(results[0], expected, rtol=1e-5, atol=1e-5)
    assert not results[1].requires_grad


def test_disturbs_nothing() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(normalized(), nn.Dropout(0.5)).eval(), torch.randn(5, 2, 4, 4, requires_grad=True)
    net[0][0].train()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    state = torch.get_rng_state()
    kernel = EmpiricalNTK(net)
    kernel.train()
    first = kernel(x)
    kernel.matvec(x, torch.ones(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes == [m.training for m in kernel.net.modules()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert x.grad is None
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)
    with torch.no_grad():
        net[0][0].weight.zero_()
    assert torch.equal(kernel(x), first)
    assert not any(module._forward_hooks for module in kernel.net.modules())


def test_checkpoint_carries_the_copy() -> None:
    torch.manual_seed(0)
    first, second = EmpiricalNTK(MLP(6, 2, 5)), EmpiricalNTK(MLP(6, 2, 5))
    x = torch.randn(4, 5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert not any(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmpiricalNTK(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 1)))(torch.ones(3, 5)), "of the batch"),
        (lambda: EmpiricalNTK(nn.Sequential(nn.Dropout(), nn.Linear(5, 1)))(torch.ones(3, 5)), "random numbers"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1).requires_grad_(False)), "unfreeze"),
        (lambda: EmpiricalNTK(nn.Conv2d(1, 1, 1))(torch.ones(3, 1, 4, 4)), "must map"),
        (lambda: EmpiricalNTK(nn.Linear(5, 2), output=2)(torch.ones(3, 5)), "0 to 1"),
        (lambda: EmpiricalNTK(nn.Linear(5, 2), output=1, full=True), "choose"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), memory=9).diag(torch.ones(3, 5)), "cannot hold"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), memory=9).matvec(torch.ones(3, 5), torch.ones(3)), "cannot hold"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), memory="4 parsecs"), "memory must be"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), features="float8"), "features must be"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), dtype=torch.float16), "dtype must be"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), features="tf32")(torch.ones(3, 5)), "CUDA"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1), features="bfloat16")(torch.ones(3, 5).double()), "one or the other"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1).to("meta"))(torch.ones(3, 5)), "kernel.to"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1)).matvec(torch.ones(3, 5), torch.ones(2)), "v must be"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1))(torch.full((3, 5), torch.nan)), "NaN"),
        (lambda: EmpiricalNTK(nn.Linear(5, 1))(torch.ones(3, 5), torch.ones(3, 4)), "different shapes"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_errors(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("full", [False, True])
def test_what_is_not_finite_is_an_error_in_every_call(full: bool) -> None:
    kernel, x = EmpiricalNTK(nn.Linear(5, 2), full=full), torch.ones(3, 5)
    x[1] = 1e25
    calls: dict[str, Callable[[], Tensor]] = {
        "kernel of inputs 1 and 1 is": lambda: kernel(x),
        "diagonal entry 1 is": lambda: kernel.diag(x),
        "product's entry 1 is .*: check v": lambda: kernel.matvec(x, torch.ones(3, 2)),
    }
    for message, call in calls.items():
        with pytest.raises(FloatingPointError, match=message):
            call()


def test_distance_to_the_infinite_kernel_falls_like_the_square_root_of_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 12, dtype=torch.float64)
    infinite = InfiniteNTK(MLP(1, 2, 12))(x)
    widths, distances = torch.tensor([32.0, 64, 128, 256, 512, 1024]), []
    for width in widths.int().tolist():
        kernels = [EmpiricalNTK(MLP(width, 2, 12))(x) for _ in range(10)]
        distances.append(torch.stack([(k - infinite).norm() / infinite.norm() for k in kernels]).mean())
    log_width = widths.double().log() - widths.double().log().mean()
    slope = float(log_width @ torch.stack(distances).log() / log_width.square().sum())
    assert -0.65 < slope < -0.35


def shard(rank: int, address: str, results: str) -> None:
    torch.manual_seed(0)
    net, x, y = MyrtleCNN(3), torch.randn(11, 3, 8, 8), torch.randn(4, 3, 8, 8)
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    kernel = EmpiricalNTK(net)
    torch.save((kernel.sharded(x), kernel.sharded(x, y), kernel(x), kernel(x, y)), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_share_the_work_and_end_with_the_same_bits(tmp_path: object) -> None:
    multiprocessing.spawn(shard, (f"file://{tmp_path}/rendezvous", str(tmp_path)), nprocs=2)
    first, second = (torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b, alone in zip(first[:2], second[:2], first[2:], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(first[0], first[0].T)


def test_without_a_process_group_sharded_is_the_plain_kernel() -> None:
    kernel, x = EmpiricalNTK(MLP(6, 2, 5)), torch.randn(4, 5)
    assert torch.equal(kernel.sharded(x), kernel(x))


PEAK = """
import re, sys, torch
from pathlib import Path
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.networks import MyrtleCNN

def status(field):
    return 1024 * int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.manual_seed(0)
outputs = int(sys.argv[2])
n = 400 // outputs
net, x, out = MyrtleCNN(64, num_outputs=outputs), torch.randn(n, 3, 8, 8), torch.ones(n, n, outputs, outputs)
EmpiricalNTK(net, full=True)(x[:4])
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
EmpiricalNTK(net, full=True, memory=sys.argv[1])(x)
print(status("VmHWM") - before - out.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("megabytes", [100, 1000])
def test_peak_memory_stays_under_the_budget(megabytes: int, outputs: int) -> None:
    command = [sys.executable, "-c", PEAK, f"{megabytes}MB", str(outputs)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e6
    assert 0.4 * min(megabytes, 180) < peak < megabytes  # the gradients of all samples take 180 MB
