"""Per-image variances and the split of a network, against the dense reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.infinite import reference
from ntk_lightning.kernels.infinite.activations import Activation
from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import finish, near_duplicates, pixel_variances, plan, unsupported
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.kernels.infinite.shapes import check_shape
from ntk_lightning.networks import MLP, Erf, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear, Residual, SelfAttention


def dense_variances(layers: tuple[Layer, ...], x: Tensor) -> list[Tensor]:
    """Variances of all pixels before each activation, one sample at a time through the whole covariance."""
    rows = [reference.variances(reference.Network.of(layers, image), image) for image in x.split(1)]
    before = [i for i, layer in enumerate(layers, 1) if isinstance(layer, Activation)]
    return [torch.cat([row[i] for row in rows]) for i in before]


END = nn.Flatten(), NTKLinear(2, 1)


class Branches(nn.Module):
    """Two convolutions of one image, joined by a function."""

    def __init__(self, join: Callable[[tuple[Tensor, Tensor], int], Tensor]) -> None:
        super().__init__()
        self.left, self.right, self.join = NTKConv2d(2, 2, 3), NTKConv2d(2, 2, 3), join
        self.readout = NTKConv2d(4 if join is torch.cat else 2, 2, 1)
        self.end = nn.Sequential(nn.Flatten(), NTKLinear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.end(self.readout(self.join((self.left(x), self.right(x)), 1)))
        return out


def conv_erf_gelu() -> nn.Sequential:
    body = NTKConv2d(1, 4, 3, bias_std=0.5), Erf(), nn.AvgPool2d(2), NTKConv2d(4, 4, 3), NTKConv2d(4, 4, 3), nn.GELU()
    return nn.Sequential(*body, nn.AvgPool2d(2), nn.Flatten(), NTKLinear(8, 1))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (MyrtleCNN(1, weight_std=1.3, bias_std=0.2), (3, 8, 12)),
        (MyrtleCNN(1, 7, in_channels=5), (5, 4, 8)),
        (FiveLayerCNN(1), (3, 8, 8)),
        (conv_erf_gelu(), (1, 8, 4)),
    ],
)
def test_pixel_variances_equal_the_dense_diagonal(net: nn.Sequential, shape: tuple[int, int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layers = parse(net)
    variances = pixel_variances(layers, x)
    expected = dense_variances(layers, x)
    assert len(variances) == len(expected)
    for variance, dense in zip(variances, expected, strict=True):
        torch.testing.assert_close(variance, dense, rtol=1e-12, atol=0)


def test_pixel_variances_are_float64_whatever_the_images_are() -> None:
    assert {v.dtype for v in pixel_variances(parse(MyrtleCNN(1)), torch.ones(1, 3, 8, 8))} == {torch.float64}


def test_pixel_variances_without_activation_is_empty() -> None:
    linear = nn.Sequential(NTKConv2d(1, 1, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(1, 1))
    assert pixel_variances(parse(linear), torch.ones(1, 1, 4, 4)) == []


def test_pixel_variances_are_not_negative_where_pooling_cancels() -> None:
    pools = nn.AvgPool2d(2), nn.AvgPool2d(2)
    net = nn.Sequential(NTKConv2d(1, 1, 3), *pools, NTKConv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), NTKLinear(49, 1))
    pattern = torch.randn(40, 1, 4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = (pattern - pattern.mean(2, keepdim=True)).repeat(1, 1, 7, 28)
    (variances,) = pixel_variances(parse(net), images)
    assert variances.min() == 0
    assert variances.max() > 1e-3


def test_near_duplicates_are_close_in_direction_and_not_equal() -> None:
    x = torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    others = torch.cat([x[:1], x[:1] * 1.01, x[:1] + 1e-3, x[:1] + 1, -x[:1], x[4:]])
    found = {i: near.tolist() for i, near in near_duplicates(x, others, 1e-2)}
    assert found == {0: [1, 2]}


@pytest.mark.parametrize(
    ("net", "shape", "obstacle"),
    [
        (MLP(2, 2, 12), (2, 2), "no convolution"),
        (
            nn.Sequential(nn.AvgPool2d(2), NTKConv2d(1, 1, 3), nn.Flatten(), NTKLinear(16, 1)),
            (8, 8),
            "pools the images",
        ),
        (MLP(2, 2, 12), (), "vectors"),
        (MyrtleCNN(1), (32, 32), None),
        (FiveLayerCNN(1), (8, 16), None),
        (nn.Sequential(NTKConv2d(1, 1, 5), nn.Flatten(), NTKLinear(64, 1)), (8, 8), "Conv"),
        (nn.Sequential(NTKConv2d(1, 1, 3, stride=2), nn.Flatten(), NTKLinear(16, 1)), (8, 8), "Conv"),
        (nn.Sequential(NTKConv2d(1, 1, 3, "valid"), nn.Flatten(), NTKLinear(36, 1)), (8, 8), "Conv"),
        (nn.Sequential(NTKConv2d(1, 1, 3), nn.AvgPool2d(4), nn.Flatten(), NTKLinear(4, 1)), (8, 8), "Pool"),
        (
            nn.Sequential(NTKConv2d(1, 1, 3), nn.AvgPool2d(2), nn.ReLU(), nn.Flatten(), NTKLinear(16, 1)),
            (8, 8),
            "directly",
        ),
        (nn.Sequential(Residual(NTKConv2d(1, 1, 3)), nn.Flatten(), NTKLinear(64, 1)), (8, 8), "Sum"),
        (nn.Sequential(NTKConv2d(1, 1, 3), nn.Flatten(), NTKLinear(64, 1), nn.ReLU(), NTKLinear(1, 1)), (8, 8), None),
    ],
)
def test_what_the_cuda_kernel_lacks_is_named(net: nn.Sequential, shape: tuple[int, ...], obstacle: str | None) -> None:
    layers = parse(net)
    check_shape(layers, shape)
    reason = unsupported(layers, shape, "cuda")
    assert reason is None if obstacle is None else obstacle in str(reason)


def test_plan_and_finish_equal_the_reference_on_one_pixel() -> None:
    head = nn.Flatten(), NTKLinear(3, 4, 1.2, 0.3), nn.LeakyReLU(0.1), NTKLinear(4, 1, 0.9, 0.1)
    layers = parse(nn.Sequential(*head))
    x = torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k = x[:, :, 0, 0] @ x[:, :, 0, 0].T / 3
    network = plan(layers)
    assert network.levels == ((),)
    assert network.flat
    for kind, expected in zip(("nngp", "ntk"), reference.gram(layers, x, x), strict=True):
        gram = finish(network.head, kind, k, torch.zeros_like(k), k.diagonal(), k.diagonal())
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=0)


def with_convolution(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(NTKConv2d(2, 2, 3), *layers, nn.Flatten(), NTKLinear(1, 1))


@pytest.mark.parametrize(
    ("net", "shape", "obstacle"),
    [
        (MLP(2, 2, 12), (2, 2), "no convolution"),
        (MLP(2, 2, 12), (), "vectors"),
        (with_convolution(nn.Tanh()), (4, 4), "the cpu kernel does not have the activation quadrature"),
        (with_convolution(NTKConv2d(2, 2, 3, padding_mode="circular")), (4, 4), "circular padding"),
        (with_convolution(NTKConv2d(2, 2, 3, padding=2)), (4, 4), "pads more"),
        (with_convolution(NTKConv2d(2, 2, 1, padding=1)), (4, 4), "pads more"),
        (with_convolution(nn.AvgPool2d(3, 1, 1, count_include_pad=False)), (4, 4), "fewer pixels at the border"),
        (with_convolution(SelfAttention(2, 2, mechanism="identity")), (4, 4), "Attention"),
        (with_convolution(nn.Dropout(0.5).train()), (4, 4), "Dropout"),
        (with_convolution(Residual(nn.Sequential(nn.AvgPool2d(1), NTKConv2d(2, 2, 3)))), (4, 4), "Pool"),
        (Branches(torch.cat), (4, 4), "product or a concatenation"),
        (Branches(lambda branches, _: branches[0] * branches[1]), (4, 4), "product or a concatenation"),
        (nn.Sequential(NTKConv2d(2, 2, 3), nn.AdaptiveAvgPool2d(1), NTKConv2d(2, 2, 1), *END), (4, 4), "behind the"),
        (Branches(lambda branches, _: branches[0] + branches[1]), (4, 4), None),
        (MyrtleCNN(1), (33, 30), None),
    ],
)
def test_what_the_cpu_kernel_lacks_is_named(net: nn.Module, shape: tuple[int, ...], obstacle: str | None) -> None:
    reason = unsupported(parse(net), shape, "cpu")
    assert reason is None if obstacle is None else obstacle in str(reason)
