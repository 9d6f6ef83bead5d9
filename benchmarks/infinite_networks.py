"""The networks that benchmarks/infinite_ntk.py times; infinite_networks_stax.py has the same by their names."""

from __future__ import annotations

from torch import nn

from ntk_lightning.networks import (
    MLP,
    ChannelNorm,
    MyrtleCNN,
    NTKConv1d,
    NTKConv2d,
    NTKLinear,
    Residual,
    SelfAttention,
)

__all__ = ["networks"]


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """For each name the network, the shape of an input and how many inputs a side to take."""
    pixels = 3, 32, 32
    return {
        "Myrtle-5": (MyrtleCNN(1, 5), pixels, 32),
        "Myrtle-10": (MyrtleCNN(1, 10), pixels, 32),
        "wide ResNet-16, no BatchNorm": (wide_resnet(2), pixels, 32),
        "wide ResNet-28, no BatchNorm": (wide_resnet(4), pixels, 32),
        "strided CNN": (
            nn.Sequential(conv(3), nn.ReLU(), conv(stride=2), nn.ReLU(), conv(stride=2), nn.ReLU(), *end()),
            *(pixels, 32),
        ),
        "3x3 and 1x1 convolutions": (
            nn.Sequential(conv(3), nn.ReLU(), conv(size=1), nn.ReLU(), conv(), nn.ReLU(), conv(size=1), *end()),
            *(pixels, 32),
        ),
        "rectangular images": (MyrtleCNN(1, 5), (3, 16, 48), 32),
        "LayerNorm CNN": (
            nn.Sequential(
                *(layer for i in range(3) for layer in (conv(1 if i else 3), ChannelNorm(), nn.GELU())), *end()
            ),
            *((3, 16, 16), 64),
        ),
        "flattened CNN": (
            nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), NTKLinear(1024, 1)),
            *(pixels, 128),
        ),
        "1-D CNN": (
            nn.Sequential(
                *(NTKConv1d(2, 1, 9, stride=2), nn.ReLU(), NTKConv1d(1, 1, 9, stride=2), nn.ReLU()),
                *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), NTKLinear(1, 1)),
            ),
            *((2, 256), 64),
        ),
        "MLP with GELU": (MLP(1, 3, 784, nn.GELU), (784,), 2048),
        "self-attention": (
            nn.Sequential(
                *(NTKConv1d(16, 1, 1), nn.ReLU(), SelfAttention(1, 1, mechanism="softmax", scaling="linear")),
                *(nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), NTKLinear(1, 1)),
            ),
            *((16, 64), 32),
        ),
    }


def conv(channels: int = 1, size: int = 3, stride: int = 1) -> NTKConv2d:
    return NTKConv2d(channels, 1, size, stride=stride)


def end() -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), NTKLinear(1, 1)


def wide_resnet(blocks: int) -> nn.Sequential:
    """Three groups of pre-activation blocks at strides 1, 2 and 2, the first of each with a 1x1 projection."""
    layers: list[nn.Module] = [conv(3)]
    for group in (1, 2, 2):
        for i in range(blocks):
            stride = 1 if i else group
            body = nn.Sequential(nn.ReLU(), conv(stride=stride), nn.ReLU(), conv())
            layers.append(Residual(body, None if i else conv(size=1, stride=stride)))
    return nn.Sequential(*layers, nn.ReLU(), *end())
