"""The compiled CPU kernel against the reference, on tiny networks and at its edges.

Longer than 300 lines because one table of networks serves every test.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.infinite import fused_cpu, reference
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import (
    ChannelNorm,
    Erf,
    FiveLayerCNN,
    MyrtleCNN,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Pointwise,
    Residual,
)

KINDS = ("nngp", "ntk")


def ignore(_: float) -> None:
    pass


def conv(
    fan_in: int = 2,
    bias: float = 0.0,
    std: float = 1.4,
    size: int | tuple[int, int] = 3,
    **options: Any,  # noqa: ANN401
) -> NTKConv2d:
    return NTKConv2d(fan_in, 2, size, bias_std=bias, weight_std=std, **options)


def block(stride: int = 1, *, project: bool = False) -> Residual:
    """Of a wide ResNet without batch normalization."""
    body = nn.ReLU(), conv(stride=stride), nn.ReLU(), conv(bias=0.1)
    return Residual(nn.Sequential(*body), conv(size=1, stride=stride) if project else None)


class Written(nn.Module):
    """Residuals as a forward of one's own says them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second, self.strided = conv(3), conv(), conv(), conv(stride=2)
        self.shortcut, self.readout = conv(size=1, stride=2), NTKLinear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.second(torch.relu(self.first(torch.relu(x))))
        x = self.shortcut(x) + self.strided(torch.relu(x))
        out: Tensor = self.readout(torch.relu(x).mean((2, 3)))
        return out


def end(features: int = 2) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(features, 1)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
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
    "wide_resnet": (
        lambda: nn.Sequential(conv(3), block(1, project=True), block(2, project=True), block(), nn.ReLU(), *end()),
        (3, 7, 8),
    ),
    "quarter_of_the_side": (  # whose last levels are computed in float64
        lambda: nn.Sequential(
            conv(3), block(2, project=True), block(2, project=True), block(), nn.ReLU(), conv(stride=2), *end()
        ),
        (3, 9, 8),
    ),
    "written": (Written, (3, 6, 5)),
    "nested_sums": (
        lambda: nn.Sequential(
            conv(3),
            Residual(
                nn.Sequential(nn.ReLU(), conv(), Residual(nn.Sequential(nn.GELU(), conv())), nn.ReLU(), conv()),
                nn.Sequential(Residual(nn.Sequential(nn.LeakyReLU(0.2), conv())), conv(size=1)),
            ),
            nn.ReLU(),
            *end(),
        ),
        (3, 4, 5),
    ),
    "sums_of_images": (
        lambda: nn.Sequential(
            Residual(nn.Sequential(conv(3), nn.ReLU(), conv()), conv(3, size=1)),
            Residual(conv()),
            nn.AvgPool2d(2),
            Residual(conv(), conv(size=1)),
            *end(),
        ),
        (3, 4, 5),
    ),
    "filters": (
        lambda: nn.Sequential(
            conv(3, size=5), nn.ReLU(), conv(size=(1, 5)), nn.GELU(), conv(bias=0.2, size=(3, 1)), Erf(), *end()
        ),
        (3, 5, 4),
    ),
    "strides": (
        lambda: nn.Sequential(
            conv(3, size=4, padding=1, stride=(3, 2)), nn.ReLU(), conv(size=2, padding="valid"), nn.ReLU(), *end()
        ),
        (3, 10, 7),
    ),
    "patches": (
        lambda: nn.Sequential(
            conv(3, size=4, padding="valid", stride=4),
            nn.GELU(),
            conv(size=1),
            Residual(nn.Sequential(nn.GELU(), conv(size=5), nn.GELU(), conv(size=1))),
            *end(),
        ),
        (3, 12, 8),
    ),
    "pooling_windows": (
        lambda: nn.Sequential(
            *(conv(3), nn.ReLU(), nn.AvgPool2d(3, 2), conv(), nn.ReLU(), nn.AvgPool2d((2, 3), (2, 1), (1, 1))),
            *(conv(), nn.AvgPool2d(2, 1, divisor_override=3), nn.ReLU(), *end()),
        ),
        (3, 9, 8),
    ),
    "pooled_images_and_a_sum": (
        lambda: nn.Sequential(
            *(nn.AvgPool2d(2), conv(3), nn.ReLU(), nn.AvgPool2d(2, divisor_override=1)),
            *(nn.AvgPool2d((1, 2), divisor_override=1), nn.Flatten(), NTKLinear(2, 1)),
        ),
        (3, 4, 9),
    ),
    "norms": (
        lambda: nn.Sequential(
            *(
                conv(3),
                ChannelNorm(1e-3),
                nn.ReLU(),
                conv(bias=0.3),
                nn.GroupNorm(1, 2, affine=False),
                nn.GELU(),
                conv(size=1),
            ),
            *(nn.GroupNorm(1, 2, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(2, 4)),
            *(nn.LayerNorm(4, elementwise_affine=False), nn.ReLU(), NTKLinear(4, 1)),
        ),
        (3, 4, 5),
    ),
    "waves": (
        lambda: nn.Sequential(
            *(conv(3), Pointwise(torch.sin), conv(bias=0.1), Pointwise(torch.cos), conv(std=0.7)),
            *(Pointwise(torch.exp), *end()),
        ),
        (3, 4, 3),
    ),
    "kinks": (
        lambda: nn.Sequential(
            *(conv(3), Pointwise(torch.abs), conv(), nn.LeakyReLU(1.0), conv(), Pointwise(torch.sign), conv()),
            *(nn.LeakyReLU(-0.5), *end()),
        ),
        (3, 4, 3),
    ),
    "standard": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, bias=False), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)),
        ),
        (3, 5, 6),
    ),
    "head": (lambda: nn.Sequential(conv(1), nn.ReLU(), *end(), nn.ReLU(), NTKLinear(1, 1, bias_std=0.5)), (1, 4, 4)),
    "flat_head": (
        lambda: nn.Sequential(conv(1), nn.ReLU(), nn.Flatten(), NTKLinear(32, 9, 1.3, 0.2), Erf(), NTKLinear(9, 1)),
        (1, 4, 4),
    ),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A network and nine images in float64: two equal ones, a negative, a blank one and one with a blank half."""
    make, shape = NETS[request.param]
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[4], x[5], x[6], x[7, ..., shape[2] // 2 :] = x[0], -x[1], 0, 0
    return make(), x


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_reference(case: tuple[nn.Module, Tensor], kind: str) -> None:
    net, x = case
    layers = parse(net)
    expected = reference.gram(layers, x, x)[KINDS.index(kind)]
    gram = fused_cpu.gram(layers, kind, x, x[[6, 7, 8]], ignore)
    torch.testing.assert_close(gram[:5], expected[:5, 6:], rtol=1e-11, atol=1e-13)
    gram = fused_cpu.gram(layers, kind, x, x, ignore)  # at correlations of 1 and -1, the NTK has a square root
    torch.testing.assert_close(gram, expected, rtol=0, atol=2e-8 * float(expected.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_symmetric_gram_and_diagonal_equal_the_rectangular_gram(case: tuple[nn.Module, Tensor], kind: str) -> None:
    net, x = case
    layers = parse(net)
    rectangle = fused_cpu.gram(layers, kind, x, x, ignore)
    symmetric = fused_cpu.gram(layers, kind, x, None, ignore)
    torch.testing.assert_close(symmetric, rectangle, rtol=1e-12, atol=1e-14)
    assert torch.equal(symmetric, symmetric.T)
    diagonal = fused_cpu.diag(layers, kind, x)
    torch.testing.assert_close(diagonal, rectangle.diagonal(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_close_to_float64(case: tuple[nn.Module, Tensor], kind: str) -> None:
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
    x = torch.randn(37, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = fused_cpu.gram(layers, "ntk", x, None, ignore)
    monkeypatch.setattr(fused_cpu, "_JOB", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    counts: list[float] = []
    assert torch.equal(fused_cpu.gram(layers, "ntk", x, None, counts.append), whole)
    assert sum(counts) == 37**2
    assert len(counts) > 40
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
    sums = fused_cpu.Program.run

    def slow(*arguments: object, **options: object) -> Tensor:
        started.append(threading.get_ident())
        time.sleep(0.005)
        return sums(*arguments, **options)  # type: ignore[arg-type]

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fused_cpu.Program, "run", slow)
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


def test_sequences_are_images_of_height_one() -> None:
    layers = parse(
        nn.Sequential(
            *(NTKConv1d(3, 2, 5), nn.ReLU(), nn.AvgPool1d(2), NTKConv1d(2, 2, 3, stride=2), nn.GELU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), NTKLinear(2, 1)),
        )
    )
    x = torch.randn(5, 3, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind, expected in zip(KINDS, reference.gram(layers, x, x), strict=True):
        torch.testing.assert_close(fused_cpu.gram(layers, kind, x, None, ignore), expected, rtol=1e-11, atol=0)
        torch.testing.assert_close(fused_cpu.diag(layers, kind, x), expected.diagonal(), rtol=1e-11, atol=0)


def test_few_pairs_and_many_fill_the_lanes_differently_and_have_the_same_values() -> None:
    layers = parse(nn.Sequential(conv(3), block(), block(2, project=True), nn.ReLU(), *end()))
    x = torch.randn(37, 3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = fused_cpu.gram(layers, "ntk", x, x, ignore)
    torch.testing.assert_close(fused_cpu.gram(layers, "ntk", x, None, ignore), whole, rtol=1e-12, atol=0)
    for rows, columns in ((1, 1), (1, 37), (3, 2), (37, 1), (20, 17)):
        part = fused_cpu.gram(layers, "ntk", x[:rows], x[-columns:], ignore)
        torch.testing.assert_close(part, whole[:rows, -columns:], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e3, 1e20])
def test_a_residual_network_of_images_of_any_scale(scale: float) -> None:
    net = nn.Sequential(conv(3), Residual(nn.Sequential(nn.ReLU(), conv())), nn.ReLU(), conv(stride=2), *end())
    layers, x = parse(net), torch.randn(4, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind, expected in zip(KINDS, reference.gram(layers, scale * x, scale * x), strict=True):
        gram = fused_cpu.gram(layers, kind, scale * x, None, ignore)
        torch.testing.assert_close(gram / scale**2, expected / scale**2, rtol=1e-11, atol=0)


def test_near_duplicates_of_a_residual_network_are_right_in_float32() -> None:
    layers = parse(nn.Sequential(conv(3), block(), block(2, project=True), nn.ReLU(), *end()))
    x, noise = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, *(x[:1] + distance * noise for distance in (0.0, 1e-6, 1e-4, 3e-3, 0.1))])
    for kind in KINDS:
        gram = fused_cpu.gram(layers, kind, x, None, ignore)
        expected = fused_cpu.gram(layers, kind, x.double(), None, ignore)
        assert (gram.double() / expected - 1).abs().max() < 5e-6
