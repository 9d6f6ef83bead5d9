"""Affine layers whose gradients are made from their inputs and the cotangents of their outputs, and in which way.

A layer z_p = s W a_p + t b at positions p = 1..T (of one vector T = 1, of tokens, or of pixels: then a_p is the patch
of a convolution's input below the filter) has, with the cotangents g_cp = d f_c / d z_p of C outputs, the gradients

    grad_W f_c = s sum_p g_cp a_p^T,    grad_b f_c = t sum_p g_cp.

The ways to make them, what each multiplies for a sample and keeps in its row (d_in entries of a_p, d_out of z_p), and
which one ``AffineLayer.way`` chooses:

| way     | what is done                                  | multiplications | kept           | chosen for           |
|---------|-----------------------------------------------|-----------------|----------------|----------------------|
| factors | nothing: a row holds (s a, t) and all g_c     | 0               | d_in + C d_out | one vector           |
| product | [g_1 .. g_C] (C d_out, T) times a^T, once     | C T d_in d_out  | C d_in d_out   | C > 1                |
| vmap    | for each c the gradient of a batch of one     | C T d_in d_out  | C d_in d_out   | C = 1, all else      |

Two rows in factors multiply as <g, g'> <(s a, t), (s a', t)>, and never form the gradient. ``product`` unfolds the
patches once for all outputs and multiplies them with one wide matrix; ``vmap`` makes a grouped convolution of every
output, which reads the input again for each and has only d_out columns. With C = 1 both multiply as much, and the
grouped convolution, which unfolds nothing, is the faster one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.networks import NTKConv2d, NTKLinear

__all__ = ["AffineLayer", "Way", "candidates", "hooked", "join", "layers_with_rules"]

Way = Literal["factors", "product", "vmap"]

_UNFOLDED_BYTES = 2**22  # of patches at once on a CPU, so that they are multiplied while they are in its cache


@dataclass(frozen=True)
class AffineLayer:
    """A layer with the scales s and t of its weight and bias, which are None where these are not trained.

    Args:
        module: The layer.
        weight: s.
        bias: t.
        shape: Of its output for one sample, empty before that is known.
    """

    module: nn.Linear | NTKLinear | nn.Conv2d | NTKConv2d
    weight: float | None
    bias: float | None
    shape: tuple[int, ...] = ()

    @property
    def convolves(self) -> bool:
        """Whether its positions are the pixels of a convolution."""
        return isinstance(self.module, nn.Conv2d | NTKConv2d)

    @property
    def d_in(self) -> int:
        """Entries of a_p."""
        return prod(self.module.weight.shape[1:])

    @property
    def d_out(self) -> int:
        """Entries of z_p."""
        return len(self.module.weight)

    @property
    def num_inputs(self) -> int:
        """Entries of (s a, t)."""
        return (self.weight is not None) * self.d_in + (self.bias is not None)

    def way(self, num_cotangents: int) -> Way:
        """Choose by the table of this file how the gradients of C outputs are made."""
        if not self.convolves and prod(self.shape) == self.d_out:
            return "factors"
        return "product" if num_cotangents > 1 else "vmap"

    def write_gradients(self, a: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """Write the gradients of n samples, as one product a sample that is as wide as all outputs' cotangents.

        Args:
            a: Inputs of the layer, (n, ...).
            g: Cotangents of its output, (n, C, ...).
            weight: Where the gradients of the weight go, (n, C * d_out, d_in), or None where it is not trained.
            bias: Where those of the bias go, (n, C * d_out), or None.
        """
        n, d_in, d_out = len(a), self.d_in, self.d_out
        if self.convolves:
            g = g.reshape(n, -1, prod(self.shape[-2:]))  # (n, C d_out, T)
        else:
            g = g.reshape(n, g.shape[1], -1, d_out).mT.reshape(n, g.shape[1] * d_out, -1)
        if bias is not None:
            bias.copy_(g.sum(-1).mul_(self.bias or 0.0))
        if weight is None:
            return
        together = n
        if a.device.type == "cpu":
            together = max(1, _UNFOLDED_BYTES // (g.shape[-1] * d_in * a.element_size()))
        for a_few, g_few, out in zip(a.split(together), g.split(together), weight.split(together), strict=True):
            patches = self._patches(a_few)  # (n, T, d_in)
            if out.dtype == g.dtype:
                torch.baddbmm(out, g_few, patches, beta=0, alpha=self.weight or 0.0, out=out)
            else:
                out.copy_(torch.bmm(g_few, patches).mul_(self.weight or 0.0))

    def _patches(self, a: Tensor) -> Tensor:
        """What the layer multiplies with its weight at every position, (n, T, d_in)."""
        if not self.convolves:
            return a.reshape(len(a), -1, self.d_in)
        return F.unfold(a.flatten(0, 1), **_unfolding(self.module)).mT


def _unfolding(conv: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Size, padding, stride and dilation of a convolution's filter, as F.unfold wants them."""
    if isinstance(conv, NTKConv2d):
        return {"kernel_size": conv.kernel_size, "padding": conv.pad, "stride": conv.stride}
    assert isinstance(conv, nn.Conv2d)
    padding = conv.padding
    if isinstance(padding, str):  # "same" pads an odd filter alike on both sides
        reach = [d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        padding = (reach[0], reach[1]) if padding == "same" else (0, 0)
    return {
        "kernel_size": conv.kernel_size,
        "padding": padding,
        "stride": conv.stride,
        "dilation": conv.dilation,
    }


def join(prefix: str, name: str) -> str:
    """Name of a parameter of a module; the network itself has an empty name."""
    return f"{prefix}.{name}" if prefix else name


@contextmanager
def hooked(layers: dict[str, AffineLayer], replace: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``replace(name, input, output)`` give the layers' outputs while the body runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda module, inputs, z: replace(name, inputs[0], z)

    handles = [layer.module.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_with_rules(function: NetworkFunction, tensors: Weights, sample: Inputs) -> tuple[dict[str, torch.Size], int]:
    """Find the layers to which the rules of this file apply, by running one sample.

    Args:
        function: The network and its trainable parameters.
        tensors: All parameters and buffers.
        sample: One sample.

    Returns:
        The shapes of the layers' outputs by name: each is called once, on one sample, and nothing else reads its
        parameters. And the number of outputs.
    """
    layers = candidates(function)
    calls: Counter[str] = Counter()
    shapes: dict[str, torch.Size] = {}

    def without_parameters(name: str, a: Tensor, z: Tensor) -> Tensor:
        # The output keeps its value and its dependence on the input a, but not that on the layer's own weight and bias.
        # A gradient that still reaches those comes from another use of them: a tied layer, F.linear(h, layer.weight).
        calls[name] += 1
        if len(z) == 1 and (z.dim() == 4 or not layers[name].convolves):
            shapes[name] = z.shape
        return z.detach() + 0 * a.sum()

    leaves = {name: tensors[name].clone().requires_grad_() for name in function.trainable}
    buffers = {name: tensors[name].clone() for name, _ in function.net.named_buffers()}  # it may write into them
    with torch.enable_grad(), hooked(layers, without_parameters):
        returned = functional_call(function.net, {**tensors, **leaves, **buffers}, *sample.arguments())
        outputs = function.select(returned)
        summed = outputs.sum()
    used = set()
    if summed.requires_grad:
        gradients = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
        used = {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def alone(name: str) -> bool:
        return calls[name] == 1 and used.isdisjoint(join(name, key) for key in ("weight", "bias"))

    return {name: shape for name, shape in shapes.items() if alone(name)}, outputs.numel()


def candidates(function: NetworkFunction) -> dict[str, AffineLayer]:
    """Find fully connected layers and convolutions without hooks that own plain, real, untied parameters.

    Args:
        function: The network and its trainable parameters.

    Returns:
        The layers by name, without the shapes of their outputs.
    """
    net = function.net
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    layers = {}
    for name, module in net.named_modules():
        if not _has_rule(module) or module._forward_hooks or module._forward_pre_hooks:
            continue
        own = dict(module.named_parameters())
        plain = all(uses[id(p)] == 1 and p.is_floating_point() for p in own.values())
        if "weight" in own and own.keys() <= {"weight", "bias"} and plain:
            ntk = isinstance(module, NTKLinear | NTKConv2d)
            scales = {
                "weight": module.weight_scale if ntk else 1.0,
                "bias": module.bias_scale if ntk else 1.0,
            }
            trained = (scales[key] if join(name, key) in function.trainable else None for key in ("weight", "bias"))
            weight, bias = trained
            if weight is not None or bias is not None:
                layers[name] = AffineLayer(module, weight, bias)
    return layers


def _has_rule(module: nn.Module) -> bool:
    """Whether it is affine at every position, by its type and its filter."""
    if type(module) is NTKConv2d:
        return module.padding_mode == "zeros"
    if type(module) is not nn.Conv2d:
        return type(module) in (nn.Linear, NTKLinear)
    even = any(d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return module.groups == 1 and module.padding_mode == "zeros" and not (module.padding == "same" and even)
