"""InfiniteNTK: which backend runs, what all of them agree on, and the errors that come before any work."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.infinite import infinite_ntk
from ntk_lightning.networks import MLP, MyrtleCNN, NTKConv2d, NTKLinear


def images(n: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["nngp", "ntk"])
def test_equals_neural_tangents(
    reference_case: tuple[str, nn.Sequential], kind: str, neural_tangents: dict[str, torch.Tensor]
) -> None:
    name, net = reference_case
    x1, x2 = neural_tangents[f"{name}/x1"], neural_tangents[f"{name}/x2"]
    gram = InfiniteNTK(net, kind)(x1, x2)  # type: ignore[arg-type]
    torch.testing.assert_close(gram, neural_tangents[f"{name}/{kind}"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_symmetric_gram_cross_gram_and_diagonal_agree(backend: str) -> None:
    x = images(7, 3, 4, 4)
    kernel = InfiniteNTK(MyrtleCNN(1), backend=backend)  # type: ignore[arg-type]
    gram = kernel(x)
    torch.testing.assert_close(gram, kernel(x, x.clone()), rtol=1e-7, atol=0)
    torch.testing.assert_close(gram[2:5, 4:], kernel(x[2:5], x[4:]), rtol=1e-7, atol=0)
    torch.testing.assert_close(kernel.diag(x), gram.diagonal(), rtol=1e-7, atol=0)
    assert torch.linalg.eigvalsh(gram)[0] > 0


def test_reference_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(NTKConv2d(2, 2, 3, "valid"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(2, 1))
    x, kernel = images(5, 2, 3, 3), InfiniteNTK(net, backend="reference")
    whole, cross = kernel(x), kernel(x, x[:3])
    monkeypatch.setitem(infinite_ntk._BLOCK_BYTES, "cpu", 2 * 2 * 81 * 8)
    torch.testing.assert_close(kernel(x), whole)
    torch.testing.assert_close(kernel(x, x[:3]), cross)


def test_auto_picks_and_says_the_backend_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    x = images(2, 3, 4, 4)
    kernel = InfiniteNTK(MyrtleCNN(1))
    assert kernel.backend_for(x) == "cpu"
    assert kernel.backend_for(x.bfloat16()) == "cpu"
    kernel(x)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "'cpu'" in message
    assert InfiniteNTK(MyrtleCNN(1), backend="reference").backend_for(x) == "reference"


def test_auto_names_the_obstacle(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kernel = InfiniteNTK(nn.Sequential(NTKConv2d(3, 3, 3, stride=2), nn.Flatten(), NTKLinear(12, 1)))
    assert kernel.backend_for(images(1, 3, 4, 4)) == "reference"
    assert "stride=2" in caplog.text


@pytest.mark.parametrize(
    ("net", "backend", "shape", "obstacle"),
    [
        (MLP(2, 1, 4), "cpu", (4,), "vectors"),
        (nn.Sequential(NTKConv2d(1, 1, 5), nn.Flatten(), NTKLinear(36, 1)), "cpu", (1, 6, 6), "kernel_size=5"),
        (MyrtleCNN(1), "cuda", (3, 4, 4), "inputs are on cpu"),
    ],
)
def test_a_backend_that_cannot_run_says_why(
    net: nn.Sequential, backend: str, shape: tuple[int, ...], obstacle: str
) -> None:
    kernel = InfiniteNTK(net, backend=backend)  # type: ignore[arg-type]
    for call in (kernel, kernel.diag):
        with pytest.raises(ValueError, match=f'{obstacle}.*backend="auto"'):
            call(images(2, *shape))


def test_images_of_a_multilayer_perceptron_are_vectors() -> None:
    x, kernel = images(3, 2, 2, 2), InfiniteNTK(MLP(2, 2, 8))
    torch.testing.assert_close(kernel(x), kernel(x.flatten(1)), rtol=0, atol=0)
    torch.testing.assert_close(kernel.diag(x), kernel(x).diagonal(), rtol=1e-7, atol=0)


def test_precision_is_that_of_the_inputs() -> None:
    x, kernel = images(3, 3, 4, 4), InfiniteNTK(MyrtleCNN(1))
    assert kernel(x).dtype == torch.float64
    assert kernel(x.float()).dtype == torch.float32
    torch.testing.assert_close(kernel(x.float()).double(), kernel(x), rtol=5e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_a_float32_kernel(backend: str, dtype: torch.dtype) -> None:
    x, kernel = images(3, 3, 4, 4).to(dtype), InfiniteNTK(MyrtleCNN(1), backend=backend)  # type: ignore[arg-type]
    for call in (kernel, kernel.diag, lambda x: kernel(x, x[:2])):
        assert call(x).dtype == torch.float32
        assert torch.equal(call(x), call(x.float()))


@pytest.mark.parametrize("net", [MLP(1, 3, 20), MLP(1, 2, 20, weight_std=1.0, bias_std=0.3)])
def test_the_reference_keeps_the_digits_of_almost_equal_float32_vectors(net: nn.Sequential) -> None:
    x = images(12, 20).float().repeat(3, 1)
    x[12:24] *= 1 + 1e-6
    x[24:] += 1e-4 * images(12, 20, seed=1).float()
    gram, exact = InfiniteNTK(net)(x), InfiniteNTK(net)(x.double())
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram.double(), exact, rtol=1e-7, atol=0)
    values = torch.linalg.eigvalsh(gram.double())
    assert values[0] > -1e-6 * values[-1]


@pytest.mark.parametrize(("backend", "entry"), [("cpu", "1"), ("reference", "1")])
def test_an_overflow_is_told_by_the_diagonal_too(backend: str, entry: str) -> None:
    x, kernel = images(2, 3, 4, 4).float(), InfiniteNTK(MyrtleCNN(1), backend=backend)  # type: ignore[arg-type]
    x[1] *= 1e20
    with pytest.raises(FloatingPointError, match=f"diagonal entry {entry} is .*float64"):
        kernel.diag(x)
    assert torch.isfinite(kernel.diag(x.double())).all()


def test_autocast_does_not_reach_the_kernel() -> None:
    x = images(40, 3, 8, 8).float()
    x[20:] = x[:20] + 2e-3 * images(20, 3, 8, 8, seed=1).float()
    kernel = InfiniteNTK(MyrtleCNN(1), backend="cpu")
    expected = kernel(x), kernel(x[:20], x[20:]), kernel.diag(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, (kernel(x), kernel(x[:20], x[20:]), kernel.diag(x)), expected))


@pytest.mark.parametrize("arguments", [{"kind": "kernel"}, {"backend": "gpu"}])
def test_unknown_arguments_are_refused(arguments: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be"):
        InfiniteNTK(MyrtleCNN(1), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x1", "x2", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, TypeError, "float"),
        (torch.full((2, 3, 4, 4), torch.nan), None, ValueError, "sample 0"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4).double(), ValueError, "dtype"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8), ValueError, "shapes"),
        (torch.zeros(0, 3, 4, 4), None, ValueError, "at least one"),
        (torch.zeros(2, 3, 4, 4, 4), None, ValueError, "must be"),
        (torch.zeros(2, 3, 4), None, ValueError, "needs images"),
        (torch.zeros(2, 3, 3, 6), None, ValueError, "too small"),
        (torch.zeros(2, 48), None, ValueError, "vector reaches it"),
    ],
)
def test_malformed_inputs_are_refused(
    x1: torch.Tensor, x2: torch.Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        InfiniteNTK(MyrtleCNN(1))(x1, x2)


def test_an_output_with_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nn\.Flatten"):
        InfiniteNTK(nn.Sequential(NTKConv2d(3, 1, 3), nn.AdaptiveAvgPool2d(1), NTKLinear(1, 1)))(images(1, 3, 4, 4))
