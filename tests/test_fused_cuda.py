"""The CUDA kernel against the reference: interpreted, compiled for sm_90, and on a GPU where there is one.

Triton decides at import whether it interprets, so this file also runs as a script, ``TRITON_INTERPRET=1 python
test_fused_cuda.py OUT``, which writes the Gram of every case to OUT.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.infinite import reference
from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import plan, unsupported
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.networks import Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear

kernel = pytest.importorskip("ntk_lightning.kernels.infinite.fused_cuda_triton", reason="Triton exists on Linux only")
tl = kernel.tl
CompilationError = kernel.triton.compiler.errors.CompilationError


def random(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def alike(n: int, *shape: int) -> Tensor:
    """An image with a black part, its double, and images ever farther from it."""
    image = random(1, *shape)
    image[..., : shape[-2] // 2, :] = 0
    noise = torch.tensor([0, 0, 1e-5, 1e-3, 2e-2, 0.1, 0.5][:n])[:, None, None, None]
    return image + noise * random(n, *shape)


def dark(n: int, *shape: int) -> Tensor:
    return 0.01 * random(n, *shape).abs()


def bright(n: int, *shape: int) -> Tensor:
    return 255 * random(n, *shape)


def equal_pixels(n: int, *shape: int) -> Tensor:
    return torch.arange(1.0, n + 1)[:, None, None, None].expand(n, *shape) - 2.5


def cnn(*layers: object, channels: int = 2) -> nn.Sequential:
    """Sequential in which 3 stands for a convolution with a bias; :func:`fitting` mends its sizes."""
    modules: list[nn.Module] = []
    for layer in layers:
        match layer:
            case 3:
                modules.append(NTKConv2d(channels, channels, 3, bias_std=0.2))
            case "pool":
                modules.append(nn.AvgPool2d(2))
            case "flat":
                modules.append(nn.Flatten())
            case "mean":
                modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            case nn.Module():
                modules.append(layer)
    return nn.Sequential(*modules, NTKLinear(1, 1, bias_std=0.1))


def fitting(net: nn.Sequential, shape: tuple[int, int, int]) -> nn.Sequential:
    """The network with the sizes that images of a shape ask for."""
    x, modules = torch.zeros(1, *shape), list[nn.Module]()
    for module in net:
        match module:
            case NTKConv2d(weight_std=weight_std, bias_std=bias_std):
                module = NTKConv2d(
                    x.shape[1], module.out_channels, module.kernel_size, weight_std=weight_std, bias_std=bias_std
                )
            case NTKLinear(weight_std=weight_std, bias_std=bias_std):
                module = NTKLinear(x.shape[1], module.out_features, weight_std, bias_std)
        x = module(x)
        modules.append(module)
    return nn.Sequential(*modules)


def erf_net() -> nn.Sequential:
    """Without biases, whose variances would outweigh those of dark images."""
    pooled = NTKConv2d(2, 2, 3), Erf(), nn.AvgPool2d(2), NTKConv2d(2, 2, 3), Erf(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*pooled, nn.Flatten(), NTKLinear(2, 1))


WARPS = {"cuda": 1, "cpu": 64}  # the interpreter takes as long for many lanes as for few


@dataclass(frozen=True)
class Case:
    net: Callable[[], nn.Sequential]
    shape: tuple[int, int, int]
    images: tuple[int, int] = (3, 2)  # of x1, and of x2; 0 for the symmetric Gram
    kind: str = "ntk"
    make: Callable[..., Tensor] = random
    columns: int = 8
    workspace_bytes: int = 2**27

    def layers(self) -> tuple[Layer, ...]:
        return parse(fitting(self.net(), self.shape))

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        n1, n2 = self.images
        return self.make(n1, *self.shape), self.make(n2, *self.shape) if n2 else None

    def expected(self) -> Tensor:
        x1, x2 = self.inputs()
        nngp, ntk = reference.gram(self.layers(), x1.double(), (x1 if x2 is None else x2).double())
        return ntk if self.kind == "ntk" else nngp

    def compute(self, device: str) -> tuple[Tensor, int]:
        """The Gram, and the number of entries that were announced."""
        from ntk_lightning.kernels.infinite.fused_cuda import Tiling, gram

        layers = self.layers()
        assert unsupported(layers, self.shape[1:], "cuda") is None
        x1, x2 = (None if x is None else x.to(device) for x in self.inputs())
        assert x1 is not None
        tiling = Tiling(self.columns, WARPS[device], self.workspace_bytes)
        announced: list[int] = []
        return gram(layers, self.kind, x1, x2, announced.append, tiling).cpu(), sum(announced)

    def diagonal(self, device: str) -> Tensor:
        from ntk_lightning.kernels.infinite.fused_cuda import Tiling, diag

        return diag(self.layers(), self.kind, self.inputs()[0].to(device), Tiling(warps=WARPS[device])).cpu()


CASES = {
    "myrtle5": Case(lambda: MyrtleCNN(2), (3, 8, 8), (4, 0)),
    "myrtle5_nngp": Case(lambda: MyrtleCNN(2, weight_std=1.3, bias_std=0.2), (3, 8, 8), kind="nngp"),
    "myrtle5_pair_by_pair": Case(lambda: MyrtleCNN(2), (3, 4, 8), (2, 0), columns=4, workspace_bytes=1),
    "myrtle7_three_chunks": Case(lambda: MyrtleCNN(2, 7, 1), (1, 8, 12), (2, 1), columns=4),
    "myrtle10_alike": Case(lambda: MyrtleCNN(2, 10, 1), (1, 4, 8), (7, 1), make=alike),
    "cnn5": Case(lambda: FiveLayerCNN(2), (3, 16, 16), (2, 1)),
    "cnn5_to_one_pixel": Case(lambda: FiveLayerCNN(2), (3, 8, 8), (3, 0)),
    "odd_sides": Case(lambda: cnn(3, nn.LeakyReLU(0.2), 3, nn.ReLU(), "mean"), (2, 7, 5)),
    "offset_zero": Case(lambda: cnn(3, nn.ReLU(), 3, nn.ReLU(), "flat"), (2, 7, 9), (4, 0), columns=4),
    "offset_zero_equal_pixels": Case(lambda: cnn(*[3, nn.ReLU()] * 5, "flat"), (2, 4, 5), (2, 0), make=equal_pixels),
    "offset_zero_alike": Case(lambda: cnn(3, nn.ReLU(), 3, nn.GELU(), 3, Erf(), "flat"), (2, 4, 5), (7, 2), make=alike),
    "few_offsets": Case(lambda: cnn(3, nn.ReLU(), "pool", 3, nn.ReLU(), "pool", 3, Erf(), "flat"), (2, 8, 24), (2, 2)),
    "few_offsets_of_one_side": Case(
        lambda: cnn(3, nn.GELU(), "pool", 3, nn.ReLU(), "pool", "flat"), (2, 8, 16), (2, 2)
    ),
    "erf": Case(lambda: cnn(3, Erf(), "pool", 3, Erf(), "mean", NTKLinear(1, 1), Erf()), (2, 6, 10), (3, 0)),
    "gelu": Case(lambda: cnn(3, nn.GELU(), "pool", 3, nn.GELU(), "mean", NTKLinear(1, 1), nn.ReLU()), (2, 6, 8)),
    "erf_dark": Case(erf_net, (2, 6, 4), (3, 0), make=dark),
    "erf_saturated": Case(erf_net, (2, 6, 4), make=bright),
    "head_alike": Case(lambda: cnn(3, nn.ReLU(), "mean", NTKLinear(1, 1), nn.ReLU()), (2, 3, 4), (5, 1), make=alike),
    "head_alike_symmetric": Case(
        lambda: cnn(3, nn.ReLU(), "mean", NTKLinear(1, 1), nn.ReLU()), (2, 3, 4), (4, 0), make=alike
    ),
    "two_pools_last": Case(lambda: cnn(3, 3, nn.ReLU(), "pool", "pool", "flat"), (2, 8, 16), (2, 2)),
    "no_activation": Case(lambda: cnn(3, "pool", 3, "mean"), (5, 6, 6)),
}


DIAGONALS = ("cnn5_to_one_pixel", "erf", "erf_dark")
Results = dict[str, tuple[Tensor, int, Tensor | None]]


def compute(device: str, name: str) -> tuple[Tensor, int, Tensor | None]:
    return *CASES[name].compute(device), CASES[name].diagonal(device) if name in DIAGONALS else None


def far_rows() -> Tensor:
    """One row that a level takes from the level below, more than 2^31 entries away, at a quarter of 260x260 pixels."""
    side, count, y, dy = 130, 260, 129, 258
    stride = 2 * side

    @kernel.triton.jit
    def take(below, out, H: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr, DY: tl.constexpr):  # noqa: ANN001, ANN202
        lane = tl.arange(0, 2)
        row = kernel._pooled_row(below + lane, DY - 2 + 0 * lane, H - 1, 0 * lane, H, W, STRIDE, DY, 1, 1)
        tl.store(out + lane, row[0])

    below = torch.empty(count, 2 * side, side, stride, dtype=torch.int8)  # the pages that nothing touches cost nothing
    for value, row in ((4, (dy, 2 * y)), (8, (dy, 2 * y + 1)), (16, (dy + 1, 2 * y)), (32, (dy - 1, 2 * y + 1))):
        below[row][-1, :2] = torch.tensor([value, value + 1])
    out = torch.zeros(2)
    take[(1,)](below, out, side, side, stride, count)
    return out


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Tensor]:
    """What this file writes when it runs as a script."""
    path = tmp_path_factory.mktemp("interpreted") / "grams.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(path)], check=True, env=environment)
    results: tuple[Results, Tensor] = torch.load(path, weights_only=True)
    return results


@pytest.fixture
def interpreted(written: tuple[Results, Tensor]) -> Results:
    return written[0]


def check(name: str, gram: Tensor, announced: int, diagonal: Tensor | None) -> None:
    case = CASES[name]
    assert gram.dtype == torch.float32
    assert announced == gram.numel()
    expected = case.expected()
    assert expected.abs().min() > 0
    torch.testing.assert_close(gram.double(), expected, rtol=5e-6, atol=0)
    if not case.images[1]:
        assert torch.equal(gram, gram.T)
    if diagonal is not None:
        torch.testing.assert_close(diagonal, gram.diagonal(), rtol=1e-6, atol=0)


@pytest.mark.ci
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernel_equals_reference(name: str, interpreted: Results) -> None:
    check(name, *interpreted[name])


@pytest.mark.ci
def test_rows_beyond_32_bits_are_found(written: tuple[Results, Tensor]) -> None:
    assert written[1].tolist() == [3.75, 4.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
def test_kernel_on_a_gpu_equals_reference(name: str) -> None:
    check(name, *compute("cuda", name))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_run_and_every_blocking_gives_the_same_bits() -> None:
    from ntk_lightning.kernels.infinite.fused_cuda import Tiling, gram

    layers, x = parse(MyrtleCNN(2)), random(40, 3, 32, 32).cuda()
    runs = [
        gram(layers, "ntk", x, None, lambda _: None, Tiling(workspace_bytes=size)) for size in (2**27, 2**27, 2**23)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("net", "shape", "kind"),
    [
        (lambda: MyrtleCNN(2), (3, 32, 32), "ntk"),
        (lambda: FiveLayerCNN(2), (1, 64, 64), "nngp"),
        (lambda: cnn(3, nn.GELU(), "pool", 3, nn.LeakyReLU(), "pool", 3, Erf(), "flat"), (3, 12, 28), "ntk"),
    ],
    ids=["myrtle5", "cnn5", "flat"],
)
def test_sm_90_compiles_into_registers_alone(
    net: Callable[[], nn.Sequential], shape: tuple[int, int, int], kind: str, double: bool
) -> None:
    from ntk_lightning.kernels.infinite.fused_cuda import Tiling, compile_levels

    levels = compile_levels(parse(net()), kind, shape, Tiling(columns=4), double)
    assert len(levels) > 1
    assert [level["shared"] for level in levels] == [0] * len(levels)
    assert max(level["spilled"] for level in levels) <= 64
    assert max(level["registers"] for level in levels) <= 255


def test_an_activation_that_the_kernel_does_not_know_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    from ntk_lightning.kernels.infinite import fused_cuda

    launch = fused_cuda._launches(plan(parse(MyrtleCNN(2))), "ntk", (3, 8, 8), fused_cuda.Tiling())[0]
    launch.constants["NAMES"] = ("cube",) * 2
    monkeypatch.setattr(fused_cuda, "_launches", lambda *_: [launch])
    with pytest.raises(CompilationError) as raised:
        fused_cuda.compile_levels(parse(MyrtleCNN(2)), "ntk", (3, 8, 8))
    assert "no such activation" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.float64, 'backend="reference"'), (torch.float32, "needs images on a CUDA device")]
)
def test_inputs_that_it_cannot_take(dtype: torch.dtype, message: str) -> None:
    from ntk_lightning.kernels.infinite.fused_cuda import gram

    with pytest.raises(ValueError, match=message):
        gram(parse(MyrtleCNN(2)), "ntk", torch.ones(2, 3, 8, 8, dtype=dtype), None, lambda _: None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(({name: compute("cpu", name) for name in CASES}, far_rows()), Path(sys.argv[1]))
