"""The compiled CPU kernel against the reference, on tiny networks and at its edges."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.infinite import fused_cpu, reference
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear

KINDS = ("nngp", "ntk")


def ignore(_: float) -> None:
    pass


def conv(fan_in: int = 2, bias: float = 0.0, std: float = 1.4) -> NTKConv2d:
    return NTKConv2d(fan_in, 2, 3, bias_std=bias, weight_std=std)


def end(features: int = 2) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(features, 1)


NETS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, int, int]]] = {
    "myrtle5": (lambda: MyrtleCNN(1), (3, 8, 8)),
    "myrtle7_bias_oblong": (lambda: MyrtleCNN(1, 7, 1, weight_std=1.2, bias_std=0.3), (1, 8, 12)),
    "myrtle10_channels": (lambda: MyrtleCNN(1, 10, in_channels=5), (5, 12, 4)),
    "cnn5": (lambda: FiveLayerCNN(1), (3, 8, 16)),
    "wide_rows": (lambda: nn.Sequential(conv(1), nn.ReLU(), nn.AvgPool2d(2), conv(), nn.ReLU(), *end()), (1, 2, 36)),
    "one_row": (lambda: nn.Sequential(conv(1), nn.ReLU(), conv(), nn.ReLU(), *end()), (1, 1, 7)),
    "one_pixel": (lambda: nn.Sequential(conv(3), nn.ReLU(), *end()), (3, 1, 1)),
    "leaky": (lambda: nn.Sequential(conv(1, 0.2), nn.LeakyReLU(0.3), conv(), nn.LeakyReLU(0.1), *end()), (1, 5, 6)),
    "erf": (lambda: nn.Sequential(conv(3, 0.1), Erf(), nn.AvgPool2d(2), conv(), Erf(), *end()), (3, 6, 4)),
    "gelu": (lambda: nn.Sequential(conv(3, 0.1), nn.GELU(), conv(), nn.GELU(), nn.AvgPool2d(2), *end()), (3, 6, 4)),
    "linear_layers": (
        lambda: nn.Sequential(conv(3), conv(), nn.ReLU(), conv(), nn.AvgPool2d(2), conv(), *end()),
        (3, 4, 4),
    ),
    "pools_in_a_row": (
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.AvgPool2d(2), nn.AvgPool2d(2), nn.AvgPool2d(2), conv(), *end()),
        (3, 8, 8),
    ),
    "flat": (lambda: nn.Sequential(conv(3), nn.ReLU(), conv(2, 0.2), Erf(), nn.Flatten(), NTKLinear(60, 1)), (3, 5, 6)),
    "flat_after_pool": (
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.AvgPool2d(2), conv(), nn.ReLU(), nn.Flatten(), NTKLinear(12, 1)),
        (3, 4, 6),
    ),
    "flat_after_pools": (
        lambda: nn.Sequential(
            conv(1), nn.GELU(), nn.AvgPool2d(2), conv(), nn.AvgPool2d(2), nn.Flatten(), NTKLinear(4, 1)
        ),
        (1, 8, 4),
    ),
    "head": (lambda: nn.Sequential(conv(1), nn.ReLU(), *end(), nn.ReLU(), NTKLinear(1, 1, bias_std=0.5)), (1, 4, 4)),
    "flat_head": (
        lambda: nn.Sequential(conv(1), nn.ReLU(), nn.Flatten(), NTKLinear(32, 9, 1.3, 0.2), Erf(), NTKLinear(9, 1)),
        (1, 4, 4),
    ),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor]:
    """A network and nine images in float64: two equal ones, a negative, a blank one and one with a blank half."""
    make, shape = NETS[request.param]
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[4], x[5], x[6], x[7, ..., shape[2] // 2 :] = x[0], -x[1], 0, 0
    return make(), x


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_reference(case: tuple[nn.Sequential, Tensor], kind: str) -> None:
    net, x = case
    layers = parse(net)
    expected = reference.gram(layers, x, x)[KINDS.index(kind)]
    gram = fused_cpu.gram(layers, kind, x, x[[6, 7, 8]], ignore)
    torch.testing.assert_close(gram[:5], expected[:5, 6:], rtol=1e-11, atol=1e-13)
    gram = fused_cpu.gram(layers, kind, x, x, ignore)  # at correlations of 1 and -1, the NTK has a square root
    torch.testing.assert_close(gram, expected, rtol=0, atol=2e-8 * float(expected.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_gram_and_diagonal_equal_the_rectangular_gram(case: tuple[nn.Sequential, Tensor], kind: str) -> None:
    net, x = case
    layers = parse(net)
    rectangle = fused_cpu.gram(layers, kind, x, x, ignore)
    symmetric = fused_cpu.gram(layers, kind, x, None, ignore)
    torch.testing.assert_close(symmetric, rectangle, rtol=1e-12, atol=1e-14)
    assert torch.equal(symmetric, symmetric.T)
    diagonal = fused_cpu.diag(layers, kind, x)
    torch.testing.assert_close(diagonal, rectangle.diagonal(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(case: tuple[nn.Sequential, Tensor], kind: str) -> None:
    net, x = case
    layers, x = parse(net), x.float()
    gram = fused_cpu.gram(layers, kind, x, None, ignore)
    expected = fused_cpu.gram(layers, kind, x.double(), None, ignore)
    assert gram.dtype == torch.float32
    scale = expected.diagonal().sqrt()
    assert ((gram - expected).abs() <= 5e-6 * (scale[:, None] * scale)).all()


@pytest.mark.parametrize("activation", [Erf, nn.GELU])
@pytest.mark.parametrize("kind", KINDS)
def test_dark_and_black_images_keep_their_relative_precision(activation: type[nn.Module], kind: str) -> None:
    layers = parse(nn.Sequential(conv(3), activation(), conv(), activation(), conv(), activation(), *end()))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x = torch.cat([x, 0.01 * x, 0 * x[:1]])
    expected = reference.gram(layers, x, x)[KINDS.index(kind)]
    for dtype, rtol in ((torch.float32, 1e-6), (torch.float64, 1e-10)):
        gram = fused_cpu.gram(layers, kind, x.to(dtype), None, ignore).double()
        torch.testing.assert_close(gram, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("scale", [10, 255])
def test_images_that_saturate_an_erf_are_computed_in_float64(scale: float) -> None:
    layers = parse(nn.Sequential(conv(3), nn.LeakyReLU(1.5), conv(), Erf(), conv(), Erf(), *end()))
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    for pair in ((x * scale, None), (x * scale, x), (x, x * scale)):
        gram = fused_cpu.gram(layers, "ntk", *pair, ignore)
        expected = fused_cpu.gram(layers, "ntk", *(None if y is None else y.double() for y in pair), ignore)
        assert gram.dtype == torch.float32
        torch.testing.assert_close(gram.double(), expected, rtol=1e-7, atol=0)
    diagonal = fused_cpu.diag(layers, "ntk", x * scale).double()
    torch.testing.assert_close(diagonal, fused_cpu.diag(layers, "ntk", x.double() * scale), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gelu_of_what_pooling_cancels_is_finite(dtype: torch.dtype) -> None:
    net = nn.Sequential(conv(1), nn.AvgPool2d(2), nn.AvgPool2d(2), conv(), nn.GELU(), *end())
    pattern = torch.randn(20, 1, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (pattern - pattern.mean(2, keepdim=True)).repeat(1, 1, 7, 28).to(dtype)
    assert torch.isfinite(fused_cpu.diag(parse(net), "ntk", images)).all()


def smooth_images(n: int) -> Tensor:
    """Correlated images with saturated regions, as photographs have: (n, 3, 32, 32) in float32."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.randn(n, 3, 5, 5, generator=generator)
    x = nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return x.clamp(-1.0, 0.8)


@pytest.mark.parametrize("depth", [5, 7, 10])
def test_float32_bound_at_full_size_with_near_duplicates(depth: int) -> None:
    layers, x = parse(MyrtleCNN(1, depth)), smooth_images(5)
    generator = torch.Generator().manual_seed(8)
    near = [x[:1] + noise * torch.randn(1, 3, 32, 32, generator=generator) for noise in (1e-5, 3e-4, 1e-3, 1e-2)]
    x = torch.cat([x, x[:1], x[1:2] * 1.001, *near])
    for kind in KINDS:
        gram = fused_cpu.gram(layers, kind, x, None, ignore)
        expected = fused_cpu.gram(layers, kind, x.double(), None, ignore)
        assert (gram.double() / expected - 1).abs().max() < 5e-6
        assert torch.equal(gram, gram.T)
        cross = fused_cpu.gram(layers, kind, x[3:6], x, ignore)
        assert (cross.double() / expected[3:6] - 1).abs().max() < 5e-6


def test_float64_equals_the_reference_at_full_size() -> None:
    layers, x = parse(MyrtleCNN(1)), smooth_images(2).double()
    for kind, expected in zip(KINDS, reference.gram(layers, x[:1], x[1:]), strict=True):
        torch.testing.assert_close(fused_cpu.gram(layers, kind, x[:1], x[1:], ignore), expected, rtol=1e-11, atol=0)


def test_blocks_threads_and_order_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = parse(MyrtleCNN(1))
    x = torch.randn(11, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = fused_cpu.gram(layers, "ntk", x, None, ignore)
    monkeypatch.setattr(fused_cpu, "_JOB", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    counts: list[float] = []
    assert torch.equal(fused_cpu.gram(layers, "ntk", x, None, counts.append), whole)
    assert sum(counts) == 121
    assert len(counts) > 10
    torch.testing.assert_close(fused_cpu.gram(layers, "ntk", x[:7], x[2:], ignore), whole[:7, 2:])


def test_concurrent_callers_do_not_disturb_each_other() -> None:
    layers = parse(MyrtleCNN(1))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = fused_cpu.gram(layers, "ntk", x, None, ignore)
    with ThreadPoolExecutor(4) as pool:
        grams = pool.map(lambda _: fused_cpu.gram(layers, "ntk", x, None, ignore), range(8))
    assert all(torch.equal(gram, expected) for gram in grams)


def test_an_error_in_the_caller_stops_the_remaining_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cpu, "_JOB", 1)
    started = []
    sums = fused_cpu._Program.run

    def slow(*arguments: object, **options: object) -> Tensor:
        started.append(threading.get_ident())
        time.sleep(0.005)
        return sums(*arguments, **options)  # type: ignore[arg-type]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_cpu._Program, "run", slow)
    with pytest.raises(KeyboardInterrupt):
        fused_cpu.gram(parse(MyrtleCNN(1)), "ntk", torch.ones(120, 3, 4, 4), torch.ones(120, 3, 4, 4), interrupt)
    assert len(started) < 200  # of 960 blocks


def test_transposed_and_sliced_inputs_are_read_right() -> None:
    layers = parse(MyrtleCNN(1))
    x = torch.randn(4, 8, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view = x.permute(0, 3, 1, 2)[::2, ::2]
    expected = fused_cpu.gram(layers, "ntk", view.contiguous(), None, ignore)
    assert torch.equal(fused_cpu.gram(layers, "ntk", view, None, ignore), expected)


@pytest.mark.ci
@pytest.mark.slow
def test_a_second_process_finds_the_compiled_code() -> None:
    code = """
import torch
from ntk_lightning.kernels.infinite import fused_cpu, fused_cpu_numba
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import MyrtleCNN
fused_cpu.gram(parse(MyrtleCNN(1)), "ntk", torch.ones(1, 3, 4, 4), None, lambda _: None)
stats = fused_cpu_numba.run_block.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[1].stdout.split() == ["1", "0"]
