"""Modules as users write them, for the infinite-width kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks import ChannelNorm, NTKConv1d, NTKConv2d, NTKLinear, SelfAttention


class BasicBlock(nn.Module):
    """Of torchvision's ResNet, without batch normalization."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        project = stride != 1 or inplanes != planes
        self.downsample = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False)) if project else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.relu(out)
        out = self.conv2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Torchvision's ResNet with a small stem."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(BasicBlock(width, width), BasicBlock(width, width))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.layer2(self.layer1(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


class PreActivationResNet(nn.Module):
    """Identity shortcuts around affine layers, in the NTK parameterization."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = NTKConv2d(3, width, 3)
        self.convs = nn.ModuleList([NTKConv2d(width, width, 3, bias_std=0.1) for _ in range(4)])
        self.head = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for first, second in zip(self.convs[::2], self.convs[1::2], strict=True):
            x = x + second(F.relu(first(F.relu(x))))
        return self.head(F.relu(x).mean(dim=(2, 3)))


class DenseBlock(nn.Module):
    """DenseNet: every layer sees all earlier features, activations after the concatenation."""

    def __init__(self, width: int = 6, growth: int = 4) -> None:
        super().__init__()
        self.stem = NTKConv2d(3, width, 3)
        self.layers = nn.ModuleList([NTKConv2d(width + i * growth, growth, 3) for i in range(3)])
        self.transition = NTKConv2d(width + 3 * growth, width, 1)
        self.classifier = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, dim=1))))
        x = self.transition(F.relu(torch.cat(features, dim=1)))
        x = F.avg_pool2d(F.gelu(x), 2)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class PatchMixer(nn.Module):
    """Patches, then spatial and pixelwise layers with residual sums: a ConvMixer with full convolutions."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.patches = NTKConv2d(3, width, 2, padding="valid", stride=2)
        self.spatial = NTKConv2d(width, width, (3, 1), padding_mode="circular", bias_std=0.1)
        self.mix = NTKConv2d(width, width, 1)
        self.head = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.patches(x))
        x = x + self.spatial(x)
        return self.head(F.gelu(self.mix(x)).mean((-2, -1)))


class AudioCNN(nn.Module):
    """Strided one-dimensional convolutions on a waveform."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv1d(1, width, 5, stride=2, padding=2), nn.GELU()),
            *(nn.Conv1d(width, width, 3, stride=2, padding=1), nn.GELU(), nn.AvgPool1d(2)),
        )
        self.classifier = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(F.adaptive_avg_pool1d(x, 1).squeeze(-1))


class TransformerEncoder(nn.Module):
    """Self-attention and pixelwise layers with residual sums, normalized before; channels first."""

    def __init__(self, width: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.embed = NTKConv1d(3, width, 1)
        self.norms = nn.ModuleList([ChannelNorm() for _ in range(2 * depth)])
        self.attentions = nn.ModuleList([SelfAttention(width, width, mechanism="relu") for _ in range(depth)])
        self.mlps = nn.ModuleList(
            [nn.Sequential(NTKConv1d(width, width, 1), nn.GELU(), NTKConv1d(width, width, 1)) for _ in range(depth)]
        )
        self.head = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(x.mean(-1))


class SqueezeAndExcite(nn.Module):
    """Channels are gated by a function of their means over all pixels."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.out = NTKConv2d(3, width, 3), NTKConv2d(width, width, 3)
        self.squeeze, self.excite = NTKConv2d(width, width, 1), NTKConv2d(width, width, 1)
        self.head = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.relu(self.out(x * gate)).mean((2, 3)))


class GatedMLP(nn.Module):
    """Gated linear units."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.value, self.gate = NTKLinear(5, width, bias_std=0.2), NTKLinear(5, width, bias_std=0.2)
        self.head = NTKLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.value(x) * torch.sigmoid(self.gate(x)))


class WideAndDeep(nn.Module):
    """A linear model plus a network."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = NTKLinear(5, 1)
        self.deep = nn.Sequential(
            NTKLinear(5, width), nn.LayerNorm(width, elementwise_affine=False), nn.ReLU(), NTKLinear(width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.linear(x) - self.deep(x) / 2


class UNetLike(nn.Module):
    """Features from before and after a bottleneck, concatenated; the same size throughout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down, self.middle = NTKConv2d(3, width, 3), NTKConv2d(width, 2 * width, 3)
        self.up = NTKConv2d(3 * width, width, 3)
        self.head = NTKLinear(36 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        down = torch.tanh(self.down(x))
        middle = torch.tanh(self.middle(down))
        batch, _, _, _ = x.shape
        return self.head(F.silu(self.up(torch.cat([down, middle], 1))).reshape(batch, -1))


LIFTED: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "a pre-activation ResNet": (PreActivationResNet, (3, 5, 5)),
    "a DenseNet block": (DenseBlock, (3, 5, 5)),
    "patches and mixing": (PatchMixer, (3, 6, 6)),
    "a CNN on audio": (AudioCNN, (1, 24)),
    "a transformer encoder without softmax": (TransformerEncoder, (3, 5)),
    "squeeze and excitation": (SqueezeAndExcite, (3, 4, 4)),
    "gated linear units": (GatedMLP, (5,)),
    "wide and deep": (WideAndDeep, (5,)),
    "features before and after a bottleneck": (UNetLike, (3, 6, 6)),
}
