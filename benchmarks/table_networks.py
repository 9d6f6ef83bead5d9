"""Networks of the table that the package does not have: ResNet-18, a transformer encoder, a GPT-like network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks import NTKConv2d, NTKLinear

__all__ = ["GPT", "BasicBlock", "Encoder", "plain_twin", "resnet18"]


class BasicBlock(nn.Module):
    """Two convolutions with batch normalization, and a shortcut (He et al., 2016, arXiv 1512.03385)."""

    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False), nn.BatchNorm2d(d_out)
        self.conv2, self.bn2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False), nn.BatchNorm2d(d_out)
        shortcut = nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))
        self.shortcut = nn.Identity() if stride == 1 and d_in == d_out else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """The residual sum."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet18(num_outputs: int) -> nn.Sequential:
    """ResNet-18 for images of 32x32 pixels, in evaluation mode."""
    blocks = [
        BasicBlock(d_in if i == 0 else d_out, d_out, stride if i == 0 else 1)
        for d_in, d_out, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        for i in range(2)
    ]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_outputs)).eval()


class Encoder(nn.Module):
    """PyTorch's transformer encoder and a readout of the mean token."""

    def __init__(self, d: int = 256, layers: int = 4, num_outputs: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.readout = nn.Linear(d, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, C) of sequences (n, T, d)."""
        return self.readout(self.encoder(x).mean(1))


class _CausalBlock(nn.Module):
    def __init__(self, d: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(d), nn.LayerNorm(d), heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Token and position embeddings, causal blocks, and a readout of the last token."""

    def __init__(self, tokens: int = 10_000, d: int = 256, length: int = 32, layers: int = 4, outputs: int = 2) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, d), nn.Embedding(length, d)
        self.blocks = nn.Sequential(*(_CausalBlock(d) for _ in range(layers)))
        self.norm, self.readout = nn.LayerNorm(d), nn.Linear(d, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (n, C) of ids (n, T)."""
        h = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        return self.readout(self.norm(self.blocks(h))[:, -1])


def plain_twin(net: nn.Module) -> nn.Module | None:
    """A sequential network with layers of PyTorch's own parameterization, which nngeometry knows; or None."""
    if not isinstance(net, nn.Sequential):
        return None
    layers: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, NTKLinear):
            layers.append(nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None))
        elif isinstance(layer, NTKConv2d):
            layers.append(nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=layer.bias is not None))
        elif isinstance(layer, BasicBlock):
            return None  # it wants every layer called in the order of a chain
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
