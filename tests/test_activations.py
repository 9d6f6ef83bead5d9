"""The table of activations: what is not in it, or not in a backend, is refused there."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels import InfiniteNTK, kernel_key
from ntk_lightning.kernels.infinite import fused_cpu, fused_cpu_program
from ntk_lightning.kernels.infinite.activations import (
    ACTIVATIONS,
    Activation,
    Pair,
    Row,
    dual_activation,
    read_activation,
)
from ntk_lightning.kernels.infinite.architecture import Conv, Flatten, Linear
from ntk_lightning.kernels.infinite.functions import MODULES, read_function
from ntk_lightning.kernels.infinite.fused import unsupported
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.kernels.infinite.quadrature import Duals, expectations
from ntk_lightning.networks import MLP, NTKConv2d, NTKLinear, Pointwise

LAYERS = Conv(3, 1, 1, 1.0, 0.0), Activation("cube"), Flatten(), Linear(1.0, 0.0)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


def dual(pair: Pair, _: Activation) -> tuple[Tensor, Tensor]:
    """E[u^3 v^3] and E[9 u^2 v^2], by Isserlis."""
    k12, k11, k22 = pair.k12, pair.k11, pair.k22
    return 6 * k12**3 + 9 * k11 * k22 * k12, 9 * (k11 * k22 + 2 * k12**2)


@pytest.fixture(name="cube")
def _cube(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row more in the table."""
    monkeypatch.setitem(ACTIVATIONS, "cube", Row("Cube", (Cube,), lambda _: Activation("cube"), dual))


@pytest.mark.usefixtures("cube")
def test_a_row_makes_an_activation_known_to_the_reference() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    k = x @ x.T / 2
    nngp = 6 * k**3 + 9 * k.diagonal()[:, None] * k.diagonal() * k
    net = MLP(1, 1, 2, Cube, weight_std=1.0)
    torch.testing.assert_close(InfiniteNTK(net, "nngp")(x), nngp)
    derivative = 9 * (k.diagonal()[:, None] * k.diagonal() + 2 * k**2)
    torch.testing.assert_close(InfiniteNTK(net)(x), nngp + k * derivative)


@pytest.mark.usefixtures("cube")
def test_a_backend_that_its_row_does_not_name_never_runs_it() -> None:
    net = nn.Sequential(NTKConv2d(1, 1, 3), Cube(), nn.Flatten(), NTKLinear(16, 1))
    x = torch.ones(2, 1, 4, 4)
    assert InfiniteNTK(net).backend_for(x) == "reference"
    with pytest.raises(ValueError, match="the cpu kernel does not have the activation cube"):
        InfiniteNTK(net, backend="cpu")(x)
    for backend in ("cpu", "cuda"):
        assert unsupported(parse(net), (4, 4), backend) == f"the {backend} kernel does not have the activation cube"


@pytest.mark.usefixtures("cube")
def test_an_activation_after_the_mean_over_pixels_counts_too() -> None:
    net = nn.Sequential(NTKConv2d(1, 1, 3), nn.Flatten(), NTKLinear(16, 4), Cube(), NTKLinear(4, 1))
    assert "cube" in str(unsupported(parse(net), (4, 4), "cpu"))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_a_name_without_a_row_is_refused(backend: str) -> None:
    assert unsupported(LAYERS, (4, 4), backend) == f"the {backend} kernel does not have the activation cube"


def test_the_table_names_the_cpu_kernel_where_it_has_the_activation() -> None:
    assert {name for name, row in ACTIVATIONS.items() if "cpu" in row.compiled} == set(fused_cpu_program._KINDS)


def test_no_branch_of_the_cpu_kernel_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(fused_cpu_program.Unsupported, match="cube"):
        fused_cpu.gram(LAYERS, "ntk", x, None, lambda _: None)
    monkeypatch.setitem(fused_cpu_program._KINDS, "cube", 1 + fused_cpu_program.NORM)
    monkeypatch.setattr(fused_cpu_program, "_check_compiled", lambda _: None)
    assert fused_cpu.gram(LAYERS, "ntk", x, None, lambda _: None).isnan().all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists on Linux only")
def test_no_branch_of_the_cuda_tables_falls_through(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntk_lightning.kernels.infinite import fused_cuda

    monkeypatch.setattr(fused_cuda.triton.knobs.runtime, "interpret", True)  # takes tensors in main memory
    x = torch.rand(2, 1, 4, 4)
    work = fused_cuda._Work(LAYERS, "ntk", x, fused_cuda.Tiling())
    monkeypatch.setattr(fused_cuda, "pixel_variances", lambda *_: [torch.ones(2, 4, 4)])
    with pytest.raises(NotImplementedError, match="CUDA kernel has no activation 'cube'"):
        work.tables(x)


# Functions without a closed form.

D = torch.float64
CORRELATIONS = torch.tensor([0.0, 0.3, -0.6, 0.9, -0.97, 0.99, 0.9999, 1 - 1e-8, 1.0, -1.0, -0.999], dtype=D)


def integrated(function: Callable[[Tensor], Tensor], variance: float, kinks: tuple[float, ...] = ()) -> Duals:
    """Duals at :data:`CORRELATIONS` and unequal variances."""
    root = torch.tensor(variance, dtype=D).sqrt()
    return expectations(function, kinks, root, 1.5 * root, CORRELATIONS, 1 - CORRELATIONS**2)


def scaled_error(duals: Duals, exact: tuple[Tensor, Tensor]) -> float:
    return max(float((dual - e).abs().max() / e.abs().max()) for dual, e in zip(duals[:2], exact, strict=True))


@pytest.mark.parametrize("variance", [1e-3, 1.0, 30.0, 1e3])
@pytest.mark.parametrize("name", ["relu", "erf", "gelu", "exp", "sin", "cos", "leaky", "abs"])
def test_the_quadrature_agrees_with_closed_forms_and_knows_its_error(name: str, variance: float) -> None:
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Activation]] = {
        "relu": (F.relu, Activation("relu")),
        "leaky": (lambda u: F.leaky_relu(u, 0.2), Activation("relu", 0.2)),
        "abs": (torch.abs, Activation("relu", -1.0)),
        "erf": (torch.erf, Activation("erf")),
        "gelu": (F.gelu, Activation("gelu")),
        "exp": (torch.exp, Activation("exp")),
        "sin": (torch.sin, Activation("sin")),
        "cos": (torch.cos, Activation("cos")),
    }
    function, activation = functions[name]
    k11, k22 = torch.tensor(variance, dtype=D), torch.tensor(2.25 * variance, dtype=D)
    exact = dual_activation(activation, CORRELATIONS * 1.5 * variance, k11, k22)
    duals = integrated(function, variance)
    if name in ("exp", "sin", "cos") and variance > 1:  # they grow, or turn, too fast for it there
        assert not duals.error <= 1e-2 or scaled_error(duals, exact) < max(1e-11, duals.error)
    else:
        assert scaled_error(duals, exact) < max(1e-12, 2 * duals.error)
        assert duals.error < 1e-8


@pytest.mark.parametrize("variance", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "module", [kind() for kind in MODULES if kind is not nn.Softshrink] + [nn.GELU("tanh")], ids=str
)
def test_every_module_is_integrated_to_1e_8(module: nn.Module, variance: float) -> None:
    function = read_function(module)
    u = torch.linspace(-5, 5, 41, dtype=D)
    torch.testing.assert_close(function(u), module(u), rtol=1e-12, atol=1e-12)
    assert integrated(function, variance, function.kinks).error < 1e-8


@pytest.mark.parametrize("variance", [0.1, 1.0, 50.0])
def test_the_derivative_of_hardtanh_is_a_bivariate_normal_probability(variance: float) -> None:
    duals = integrated(F.hardtanh, variance, (-1.0, 1.0))
    root = variance**0.5
    for r, derivative in zip(CORRELATIONS.tolist(), duals.derivative.tolist(), strict=True):
        if abs(r) < 0.9999:
            normal = scipy.stats.multivariate_normal(cov=[[1, r], [r, 1]], abseps=1e-13, releps=1e-13)
            a, b = 1 / root, 1 / (1.5 * root)
            assert derivative == pytest.approx(normal.cdf([a, b], lower_limit=[-a, -b]), abs=1e-9)
        else:  # the narrower of both intervals
            assert derivative == pytest.approx(math.erf(1 / (1.5 * root) / 2**0.5), abs=2e-4 if abs(r) < 1 else 1e-12)


def test_a_polynomial_is_integrated_exactly() -> None:
    r, v = CORRELATIONS, 1.5
    duals = integrated(lambda u: u**3, 1.0)
    torch.testing.assert_close(duals.nngp, v**3 * (6 * r**3 + 9 * r), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(duals.derivative, 9 * v**2 * (1 + 2 * r**2), rtol=1e-12, atol=1e-12)


def test_variances_of_zero_give_the_value_at_zero() -> None:
    zero = torch.zeros(2, dtype=D)
    duals = expectations(torch.exp, (), zero, zero, zero, zero + 1)
    torch.testing.assert_close(torch.stack(duals[:2]), torch.ones(2, 2, dtype=D))
    assert expectations(lambda u: 0 * u, (), zero + 1, zero + 1, zero, zero + 1).error == 0


def test_a_kink_that_is_not_named_is_told_and_one_that_is_named_is_not() -> None:
    def kinked(u: Tensor) -> Tensor:
        return (u - 0.3).abs()

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = InfiniteNTK(MLP(2, 1, 4, lambda: Pointwise(kinked, kinks=(0.3,))))(x)
    with pytest.warns(UserWarning, match=r"kinked.* has an estimated relative error of .*e-0.*kinks=") as caught:
        wrong = InfiniteNTK(MLP(2, 1, 4, lambda: Pointwise(kinked)))(x)
    told = float(re.findall(r"error of (\S+):", str(caught[0].message))[0])
    assert 1e-9 < float((right - wrong).abs().max() / right.abs().max()) < 10 * told


@pytest.mark.parametrize("function", [torch.round, torch.floor, lambda u: (u > 0.4).to(u), lambda u: u + u.sign()])
def test_a_function_that_jumps_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"do not converge.*jumps"):
        InfiniteNTK(MLP(2, 1, 4, lambda: Pointwise(function)))(torch.ones(1, 4))


@pytest.mark.parametrize(
    "function",
    [lambda u: u.softmax(0), torch.rand_like, torch.log, lambda u: u.sum(), lambda u: 3.0, lambda u: u.float()],
)
def test_what_is_not_pointwise_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match="Pointwise"):
        InfiniteNTK(MLP(2, 1, 4, lambda: Pointwise(function)))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((3,), TypeError),
        ((nn.Tanh(),), TypeError),
        ((nn.Tanh,), TypeError),
        ((torch.sin, ["0"]), TypeError),
        ((torch.sin, [math.inf]), ValueError),
    ],
)
def test_arguments_of_pointwise_are_checked(arguments: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        Pointwise(*arguments)


def test_functions_with_a_closed_form_are_recognized() -> None:
    pairs: list[tuple[Callable[[Tensor], Tensor], Activation]] = [
        *((torch.relu, Activation("relu")), (F.relu, Activation("relu")), (torch.abs, Activation("relu", -1.0))),
        *((torch.erf, Activation("erf")), (F.gelu, Activation("gelu")), (torch.sign, Activation("sign"))),
        *((torch.sin, Activation("sin")), (torch.cos, Activation("cos")), (torch.exp, Activation("exp"))),
    ]
    for function, activation in pairs:
        assert read_activation(Pointwise(function)) == activation
        u = torch.linspace(-2, 2, 5, dtype=D)
        assert torch.equal(Pointwise(function)(u), function(u))
    for module, function in ((nn.Tanh(), torch.tanh), (nn.SiLU(), F.silu), (nn.Mish(), F.mish)):
        assert read_activation(module) == read_activation(Pointwise(function))


def test_compiled_backends_refuse_the_quadrature() -> None:
    for activation in (nn.Tanh(), Pointwise(torch.tan), Pointwise(lambda u: u**2)):
        net = nn.Sequential(NTKConv2d(1, 1, 3), activation, nn.Flatten(), NTKLinear(16, 1))
        x = torch.ones(2, 1, 4, 4)
        assert InfiniteNTK(net).backend_for(x) == "reference"
        with pytest.raises(ValueError, match="does not have the activation"):
            InfiniteNTK(net, backend="cpu")(x)


def square(u: Tensor) -> Tensor:
    return u**2


def cube(u: Tensor) -> Tensor:
    return u**3


def test_functions_have_keys_of_their_own_and_lambdas_none() -> None:
    keys = [kernel_key(InfiniteNTK(MLP(2, 1, 4, lambda f=f: Pointwise(f)))) for f in (square, cube, torch.tanh)]
    keys += [kernel_key(InfiniteNTK(MLP(2, 1, 4, lambda: Pointwise(square, kinks=(1.0,)))))]
    keys += [kernel_key(InfiniteNTK(MLP(2, 1, 4, lambda a=a: nn.ELU(a)))) for a in (0.5, 1.0)]
    assert len(set(keys)) == 6
    assert kernel_key(InfiniteNTK(MLP(3, 1, 4, nn.Tanh))) == keys[2]
    first = read_function(Pointwise(square)).name
    changed = types.FunctionType(cube.__code__, {"__name__": square.__module__}, "square")
    changed.__qualname__ = "square"  # as in a cell of a notebook that was changed
    assert read_function(Pointwise(changed)).name != first
    power = 2
    for function in (lambda u: u**2, lambda u: u**power, functools.partial(torch.pow, exponent=2)):
        kernel = InfiniteNTK(MLP(2, 1, 4, lambda f=function: Pointwise(f)))
        assert kernel(torch.ones(1, 4)).isfinite().all()
        with pytest.raises(TypeError, match=r"cannot be named in a store.*fingerprint"):
            kernel_key(kernel)


@pytest.mark.parametrize("make", [nn.Tanh, lambda: Pointwise(torch.sin), lambda: Pointwise(torch.exp), nn.ELU])
def test_gradients_by_inputs_equal_finite_differences(make: Callable[[], nn.Module]) -> None:
    generator = torch.Generator().manual_seed(0)
    x1, x2 = (torch.randn(n, 3, generator=generator, dtype=D) for n in (2, 3))
    kernel = InfiniteNTK(MLP(2, 2, 3, make, weight_std=1.1, bias_std=0.2))
    assert torch.autograd.gradcheck(lambda x: kernel(x, x2), x1.requires_grad_(), atol=1e-6)
