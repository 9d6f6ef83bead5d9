"""Faults that users of other libraries reported, tried on infinite-width kernels, each with every relative of its kind.

Longer than 300 lines, since each kind has its own oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import mpmath
import pytest
import torch
from tiny import OPTIMIZER, data, fit
from tiny import net as tiny_net
from torch import Tensor, nn

from ntk_lightning.callbacks import InfiniteNTKFit
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.grams.kernel_key import kernel_key
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP, Erf, MyrtleCNN, NTKConv2d, NTKLinear, Residual

D = torch.float64
Backend = Literal["reference", "cpu"]
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.25),
    "erf": Erf,
    "gelu": nn.GELU,
}
# A second GELU sees multiples of large inputs at correlations close to 1, but not equal to it: float64 does not hold
# the distance from 1, of which the derivative is a square root.
DEEP_GELU = 1e-7
SCALES = 2.0**-300, 2.0**-20, 1.0, 2.0**10, 1e3, 1e4, 1e5, 2.0**27, 1e8, 2.0**50, 2.0**300


# Large inputs, and correlations of 1: a recursion in 400 digits, whatever rounds or cancels in float64.


def expectations(name: str, k12: Any, k11: Any, k22: Any) -> tuple[Any, Any]:  # noqa: ANN401 - mpmath has no types
    """E[phi(u) phi(v)] and E[phi'(u) phi'(v)] by the formulas of the textbooks."""
    pi, one = mpmath.pi, mpmath.mpf(1)
    if name == "erf":
        determinant = (1 + 2 * k11) * (1 + 2 * k22) - 4 * k12**2
        angle = mpmath.asin(2 * k12 / mpmath.sqrt((1 + 2 * k11) * (1 + 2 * k22)))
        return 2 / pi * angle, 4 / pi / mpmath.sqrt(determinant)
    if name == "gelu":
        a, b = 1 + k11, 1 + k22
        determinant = a * b - k12**2
        density = 1 / (2 * pi * mpmath.sqrt(determinant))
        orthant = one / 4 + mpmath.asin(k12 / mpmath.sqrt(a * b)) / (2 * pi)
        tilt = k12 / a + k12 / b
        nngp = density * (k11 * k22 - k12**2 + k12 * tilt) + k12 * orthant
        return nngp, orthant + density * (tilt + k12 / determinant)
    slope = mpmath.mpf(0.25 if name == "leaky" else 0)
    even, odd, scale = (1 - slope) / 2, (1 + slope) / 2, mpmath.sqrt(k11 * k22)
    r = k12 / scale
    if abs(abs(r) - 1) < mpmath.mpf(10) ** -390:
        r = mpmath.sign(r)
    arcsin = 2 / pi * mpmath.asin(r)
    return odd**2 * k12 + even**2 * scale * (2 / pi * mpmath.sqrt(1 - r**2) + r * arcsin), odd**2 + even**2 * arcsin


def exact(name: str, x: Tensor, y: Tensor, depth: int, fan_in: int = 1, bias: float = 0) -> tuple[float, float]:
    """NNGP and NTK of one pair of vectors; a convolution of 3x3 sees one pixel in nine (fan_in)."""
    with mpmath.workdps(400):
        v, w = ([mpmath.mpf(float(entry)) for entry in z] for z in (x, y))
        variance = mpmath.mpf(2**0.5) ** 2
        ks = [sum(a * b for a, b in zip(p, q, strict=True)) / len(v) for p, q in ((v, w), (v, v), (w, w))]
        theta = mpmath.mpf(0)
        for layer in range(depth + 1):
            if layer:
                nngp, derivative = expectations(name, *ks)
                ks = [nngp, expectations(name, *[ks[1]] * 3)[0], expectations(name, *[ks[2]] * 3)[0]]
                theta *= derivative
            scale = variance / (fan_in if layer < depth else 1)
            ks = [scale * k + mpmath.mpf(bias) ** 2 for k in ks]
            theta = scale * theta + ks[0]
        return float(ks[0]), float(theta)


def integers(*shape: int) -> Tensor:
    """Entries of which small multiples are exact."""
    x = torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0))
    return torch.where(x == 0, 1, x).to(D)


def relatives(x: Tensor) -> Tensor:
    """The same inputs, and multiples of them."""
    return torch.cat([x, 3 * x, -x, -5 * x, x / 4, 2.0**20 * x])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("depth", "bias"), [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_vectors_of_any_size_with_equal_ones_and_multiples(name: str, depth: int, bias: float, scale: float) -> None:
    x = scale * integers(2, 5)
    y = relatives(x)
    net = MLP(4, depth, 5, ACTIVATIONS[name], bias_std=bias)
    expected = torch.tensor([[exact(name, a, b, depth, bias=bias) for b in y] for a in x], dtype=D)
    for kind, values in zip(("nngp", "ntk"), expected.unbind(-1), strict=True):
        kernel = InfiniteNTK(net, kind)  # type: ignore[arg-type]
        floor = 1e-15 * float(values.abs().max()) if name in ("relu", "leaky") else 0.0  # opposite vectors: exactly 0
        torch.testing.assert_close(kernel(x, y), values, rtol=1e-12, atol=floor)
        torch.testing.assert_close(kernel(x), values[:, :2], rtol=1e-12, atol=0)
        torch.testing.assert_close(kernel.diag(x), values.diagonal(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_images_of_one_pixel_of_any_size(backend: Backend, name: str, scale: float) -> None:
    x = scale * integers(2, 5, 1, 1)
    y = relatives(x)
    act = ACTIVATIONS[name]
    layers = NTKConv2d(5, 4, 3), act(), NTKConv2d(4, 4, 3), act()
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(4, 1))
    pairs = [[exact(name, a.flatten(), b.flatten(), 2, 9) for b in y] for a in x]
    for kind, values in zip(("nngp", "ntk"), torch.tensor(pairs, dtype=D).unbind(-1), strict=True):
        kernel = InfiniteNTK(net, kind, backend)  # type: ignore[arg-type]
        floor = 1e-15 * float(values.abs().max()) if name in ("relu", "leaky") else 0.0
        rtol = DEEP_GELU if name == "gelu" else 1e-12
        torch.testing.assert_close(kernel(x, y), values, rtol=rtol, atol=floor)
        torch.testing.assert_close(kernel(x, y[:2]), values[:, :2], rtol=1e-12, atol=0)
        torch.testing.assert_close(kernel.diag(x), values.diagonal(), rtol=1e-12, atol=0)


def convolutional(act: Callable[[], nn.Module], end: str) -> nn.Sequential:
    convolutions = NTKConv2d(3, 2, 3), act(), NTKConv2d(2, 2, 3), act(), nn.AvgPool2d(2), NTKConv2d(2, 2, 3), act()
    if end == "flat":
        return nn.Sequential(*convolutions, nn.Flatten(), NTKLinear(8, 1))
    head = [NTKLinear(2, 2), act(), NTKLinear(2, 1)] if end == "head" else [NTKLinear(2, 1)]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


@pytest.mark.parametrize("end", ["mean", "flat", "head"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scale", [2.0**-300, 1.0, 1e7, 2.0**300])
def test_images_with_equal_pixels_equal_images_and_multiples(name: str, end: str, scale: float) -> None:
    x = integers(3, 3, 4, 4)
    x[:, :, :2, :3] = x[:1, :, :1, :1]  # pixels that are equal, of one image and across images
    x = scale * torch.cat([x, x[:1]])
    y = relatives(x)
    for kind in ("nngp", "ntk"):
        net = convolutional(ACTIVATIONS[name], end)
        plain, compiled = (InfiniteNTK(net, kind, backend) for backend in ("reference", "cpu"))  # type: ignore[arg-type]
        gram = plain(x, y)
        floor = 1e-13 * float(gram.abs().max())
        torch.testing.assert_close(compiled(x, y), gram, rtol=1e-12, atol=floor)
        for kernel in (plain, compiled):
            own = kernel(x)
            torch.testing.assert_close(kernel(x, x.clone()), own, rtol=1e-12, atol=0)
            torch.testing.assert_close(kernel.diag(x), own.diagonal(), rtol=1e-12, atol=0)
            torch.testing.assert_close(own[0, 3], own[0, 0], rtol=1e-12, atol=0)  # an equal image
            if name in ("relu", "leaky"):  # homogeneous
                torch.testing.assert_close(kernel(x, 3 * x), 3 * own, rtol=1e-12, atol=0)


@pytest.mark.parametrize("depth", [1, 10, 50])
def test_the_diagonal_of_a_relu_network(depth: int) -> None:
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(0), dtype=D)
    variance = 2 * x.square().mean(1)
    kernel, expected = InfiniteNTK(MLP(4, depth, 7)), (depth + 1) * variance
    torch.testing.assert_close(kernel(x).diagonal(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kernel.diag(x), expected, rtol=1e-12, atol=0)
    cross = kernel(x, torch.cat([x.flip(0), x / 7, -x]))
    torch.testing.assert_close(cross[:, :200].flip(1).diagonal(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(cross[:, 200:400].diagonal(), expected / 7, rtol=1e-12, atol=0)


@pytest.mark.parametrize("features", [5, 100, 20000])
@pytest.mark.parametrize("n", [1, 3, 17])
def test_equal_vectors_of_another_set_whatever_the_order_of_a_sum(n: int, features: int) -> None:
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(1), dtype=D)
    others = torch.cat([torch.randn(5, features, generator=torch.Generator().manual_seed(2), dtype=D), x, 0.3 * x])
    gram = InfiniteNTK(MLP(4, 3, features))(x, others)
    expected = 8 * x.square().mean(1)
    torch.testing.assert_close(gram[:, 5 : 5 + n].diagonal(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gram[:, 5 + n :].diagonal(), 0.3 * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_near_duplicates_are_not_taken_for_equal(name: str, distance: float, bias: float) -> None:
    x, other = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(0), dtype=D)
    for y in (x + distance * other, -3 * x + distance * other):
        expected = exact(name, x[0], y[0], 2, bias=bias)
        for kind, value in zip(("nngp", "ntk"), expected, strict=True):
            kernel = InfiniteNTK(MLP(4, 2, 50, ACTIVATIONS[name], bias_std=bias), kind)  # type: ignore[arg-type]
            floor = 1e-12 * float((kernel.diag(x) * kernel.diag(y)).sqrt())
            torch.testing.assert_close(float(kernel(x, y)), value, rtol=1e-12, atol=floor)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("act", [nn.ReLU, Erf, nn.GELU])
def test_an_overflow_is_an_error_and_nobody_is_told_to_use_the_precision_that_they_use(
    act: type[nn.Module], backend: Backend
) -> None:
    net = nn.Sequential(NTKConv2d(3, 2, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(2, 1))
    x, kernel = torch.ones(2, 3, 4, 4, dtype=D), InfiniteNTK(net, backend=backend)
    x[1] *= 1e160
    for call in (kernel, kernel.diag, lambda x: kernel(x[:1], x[1:])):
        with pytest.raises(FloatingPointError, match="scale the inputs down") as raised:
            call(x)
        assert "float64" not in str(raised.value)


# Inputs that the network refuses.


def images(*shape: int) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def block(channels: int, **options: Any) -> nn.Sequential:  # noqa: ANN401 - of the convolution in the body
    body = nn.Sequential(nn.ReLU(), NTKConv2d(channels, 4, 3, **options))
    layers = NTKConv2d(3, 4, 3), Residual(body), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(4, 1)
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("net", "shape", "message"),
    [
        (MyrtleCNN(4), (8, 8, 3), r"net\.0 has in_channels=3, but 8 channels reach it.*\(n, C, H, W\)"),
        (MyrtleCNN(4), (1, 8, 8), r"net\.0 has in_channels=3, but 1 channels"),
        (MLP(4, 1, 6), (5,), r"net\.1 has in_features=6, but 5 features reach it"),
        (MLP(4, 1, 12), (3, 4, 4), "in_features=12, but 48 features"),
        (nn.Sequential(NTKConv2d(3, 2, 3), nn.Flatten(), NTKLinear(32, 1)), (3, 8, 8), "in_features=32, but 128"),
        (block(4), (2, 4, 4), "in_channels=3, but 2 channels"),
        (nn.Sequential(Residual(NTKLinear(4, 4)), NTKLinear(4, 1)), (5,), r"net\.0\.body has in_features=4, but 5"),
        (nn.Sequential(nn.Flatten(), Residual(NTKLinear(4, 4)), NTKLinear(4, 1)), (2, 1, 1), "in_features=4, but 2"),
        (block(4, padding="valid"), (3, 4, 4), "different shapes"),
    ],
)
def test_inputs_that_the_network_refuses(net: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        net(images(*shape))
    kernel = InfiniteNTK(net)
    for call in (kernel, kernel.diag, kernel.check):
        with pytest.raises(ValueError, match=message):
            call(images(*shape))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(NTKLinear(3, 4), nn.ReLU(), NTKLinear(5, 1)), r"net\.2 has in_features=5, but 4 features"),
        (nn.Sequential(NTKConv2d(3, 4, 3), nn.ReLU(), NTKConv2d(3, 4, 3), nn.Flatten(), NTKLinear(4, 1)), r"net\.2"),
        (nn.Sequential(NTKConv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(36, 1)), "=36, but 4"),
        (block(5), r"net\.1\.body\.1 has in_channels=5, but 4 channels"),
        (nn.Sequential(NTKLinear(3, 4), Residual(NTKLinear(4, 5)), NTKLinear(5, 1)), "different channels, 5 and 4"),
        (nn.Sequential(Residual(NTKLinear(4, 5), NTKLinear(4, 6)), NTKLinear(5, 1)), "different channels, 5 and 6"),
    ],
)
def test_layers_that_do_not_fit_each_other_are_refused_at_once(net: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfiniteNTK(net)


def test_widths_are_no_part_of_the_kernel() -> None:
    narrow, wide = InfiniteNTK(MyrtleCNN(2, in_channels=3)), InfiniteNTK(MyrtleCNN(64, in_channels=5))
    assert narrow.layers == wide.layers
    assert hash(narrow.layers) == hash(wide.layers)
    assert repr(narrow.layers) == repr(wide.layers)
    assert repr(narrow.layers[:2]) == (
        "(Conv(kernel_size=3, pad=1, stride=1, weight_std=1.4142135623730951, bias_std=0.0), "
        "Activation(name='relu', negative_slope=0.0))"
    )


# Gradients: finite differences in float64; at kinks, of both sides.


def differences(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central finite differences of a scalar function."""
    gradient = torch.zeros_like(x)
    for index in range(x.numel()):
        shift = torch.zeros(x.numel(), dtype=x.dtype)
        shift[index] = step
        shift = shift.view_as(x)
        gradient.view(-1)[index] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


VECTORS = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=D)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "others",
    [VECTORS.flip(1), VECTORS.clone(), torch.cat([2 * VECTORS, -VECTORS, VECTORS / 3]), None],
    ids=["different", "equal", "multiples", "symmetric"],
)
def test_gradients_are_finite_and_right(
    others: Tensor | None, depth: int, name: str, kind: Literal["nngp", "ntk"]
) -> None:
    kernel = InfiniteNTK(MLP(4, depth, 4, ACTIVATIONS[name]), kind)
    n = len(VECTORS if others is None else others)
    weights = torch.randn(3, n, generator=torch.Generator().manual_seed(4), dtype=D)

    def total(x: Tensor, y: Tensor | None) -> Tensor:
        return (weights * kernel(x, y)).sum()

    x = VECTORS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(x, others), x)
    tolerance = {"rtol": 1e-4, "atol": 2e-5}  # differences across a kink are right to the step
    torch.testing.assert_close(gradient, differences(lambda x: total(x, others), VECTORS), **tolerance)
    if others is not None:
        y = others.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(VECTORS, y), y)
        torch.testing.assert_close(gradient, differences(lambda y: total(VECTORS, y), others), **tolerance)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("depth", [1, 3])
def test_gradients_at_zero(depth: int, name: str, kind: Literal["nngp", "ntk"]) -> None:
    kernel, zero = InfiniteNTK(MLP(4, depth, 4, ACTIVATIONS[name]), kind), torch.zeros(1, 4, dtype=D)
    y = zero.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(VECTORS, y).sum(), y)
    assert gradient.isfinite().all()
    if depth == 1 or name in ("erf", "gelu"):  # deeper ReLU networks have no linear part there
        expected = differences(lambda y: kernel(VECTORS, y).sum(), zero)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    y = zero.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kernel(y).sum(), y)
    assert torch.equal(gradient, zero)


@pytest.mark.parametrize("act", [nn.ReLU, Erf, nn.GELU])
def test_gradients_of_images_with_equal_pixels_and_black_ones(act: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=D)
    x[1] = x[0]
    x[:, :, :2, :2] = 0
    kernel = InfiniteNTK(convolutional(act, "mean"))

    def total(x: Tensor) -> Tensor:
        return kernel(x).sum() + kernel.diag(x).sum()

    variable = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(variable), variable)
    assert gradient.isfinite().all()
    bright = (x != 0).to(D)
    torch.testing.assert_close(gradient * bright, differences(total, x) * bright, rtol=1e-4, atol=1e-6)


def test_compiled_backends_refuse_gradients_and_auto_gives_them_by_the_reference() -> None:
    x, y = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=D)
    net = MyrtleCNN(4)
    compiled, auto = InfiniteNTK(net, backend="cpu"), InfiniteNTK(net)
    assert not auto(x, y).requires_grad
    for pair in ((x.clone().requires_grad_(), y), (x, y.clone().requires_grad_())):
        with pytest.raises(ValueError, match=r'require gradients, which only the reference.*backend="auto"'):
            compiled(*pair)
        assert auto.backend_for(*pair) == "reference"
        assert auto(*pair).requires_grad
        with torch.no_grad():
            assert auto.backend_for(*pair) == "cpu"
            assert torch.equal(compiled(*pair), auto(*pair))
            assert not auto(*pair).requires_grad
    with pytest.raises(ValueError, match="require gradients"):
        compiled.diag(x.clone().requires_grad_())
    assert auto.diag(x.clone().requires_grad_()).requires_grad


# Compiled networks.


def compiled_parts() -> list[nn.Module]:
    whole = torch.compile(MLP(4, 2, 5), backend="eager")
    part = MLP(4, 2, 5)
    part[1] = torch.compile(part[1], backend="eager")
    part[2] = torch.compile(part[2], backend="eager")
    in_place = MLP(4, 2, 5)
    in_place.compile(backend="eager")
    assert isinstance(whole, nn.Module)
    return [whole, part, in_place, nn.Sequential(torch.compile(MLP(4, 2, 5), backend="eager"))]


@pytest.mark.parametrize("index", range(4))
def test_compiled_networks_have_the_kernel_of_what_they_compile(index: int) -> None:
    net, x = compiled_parts()[index], torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    kernel, expected = InfiniteNTK(net), InfiniteNTK(MLP(4, 2, 5))
    assert torch.equal(kernel(x), expected(x))
    assert kernel_key(kernel) == kernel_key(expected)


def test_a_compiled_block_of_a_residual() -> None:
    net = nn.Sequential(NTKLinear(3, 4), torch.compile(Residual(NTKLinear(4, 4)), backend="eager"), NTKLinear(4, 1))
    plain = nn.Sequential(NTKLinear(3, 4), Residual(NTKLinear(4, 4)), NTKLinear(4, 1))
    assert InfiniteNTK(net).layers == InfiniteNTK(plain).layers


@pytest.mark.parametrize("where", ["wrapper", "inside"])
def test_hooks_of_a_compiled_network_are_refused(where: str) -> None:
    net: Any = torch.compile(MLP(4, 2, 5), backend="eager")
    (net if where == "wrapper" else net._orig_mod).register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="forward hooks"):
        InfiniteNTK(net)


def test_a_wrapper_that_changes_what_is_computed_counts() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self._orig_mod(x)
            return out

    net, x = MLP(4, 2, 5), torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(InfiniteNTK(Doubled(net))(x), 4 * InfiniteNTK(net)(x))


def test_the_callback_takes_a_compiled_network(tmp_path: Any) -> None:  # noqa: ANN401 - a path
    errors = []
    for compiled in (False, True):
        net: nn.Module = tiny_net()
        if compiled:
            net = torch.compile(net, backend="eager")  # type: ignore[assignment]
        callback = InfiniteNTKFit()
        fit(FiniteNetwork(net, OPTIMIZER), data(), epochs=1, callbacks=[callback], default_root_dir=tmp_path)
        errors.append([model.row() for model in callback.model_errors()])
    assert errors[0] == errors[1]
    assert math.isfinite(errors[0][0]["optimal_error"])
