"""Fully connected layers of one vector a sample, whose gradients are kept in two factors.

A layer z = s W a + t b has the gradient (s g a^T, t g) with the cotangent g = df/dz, so

    <grad f(x), grad f(x')> = <g, g'> <(s a, t), (s a', t)>:

a row of gradients holds both factors and never their product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.networks import NTKLinear

__all__ = ["AffineLayer", "factored_layers", "hooked", "join"]


@dataclass(frozen=True)
class AffineLayer:
    """A layer kept in factors, with the scales s and t of its weight and bias; None where not trained."""

    module: nn.Linear | NTKLinear
    weight: float | None
    bias: float | None

    @property
    def num_inputs(self) -> int:
        """Entries of (s a, t)."""
        return (self.weight is not None) * self.module.in_features + (self.bias is not None)


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


def factored_layers(function: NetworkFunction, tensors: Weights, sample: Inputs) -> tuple[dict[str, AffineLayer], int]:
    """Find the layers that may be kept in factors, by running one sample.

    Args:
        function: The network and its trainable parameters.
        tensors: All parameters and buffers.
        sample: One sample.

    Returns:
        The layers by name: each is called with one vector, and nothing else reads its parameters. And the number of
        outputs.
    """
    layers = _candidates(function)
    vectors: Counter[str] = Counter()  # how many vectors each layer was called with

    def without_parameters(name: str, a: Tensor, z: Tensor) -> Tensor:
        # The output keeps its value and its dependence on the input a, but not that on the layer's own weight and bias.
        # A gradient that still reaches those comes from another use of them: a tied layer, F.linear(h, layer.weight).
        vectors[name] += a.numel() // layers[name].module.in_features
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
        return vectors[name] == 1 and used.isdisjoint(join(name, key) for key in ("weight", "bias"))

    return {name: layer for name, layer in layers.items() if alone(name)}, outputs.numel()


def _candidates(function: NetworkFunction) -> dict[str, AffineLayer]:
    """Fully connected layers without hooks that own plain, real, untied parameters."""
    net = function.net
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    layers = {}
    for name, module in net.named_modules():
        if type(module) not in (nn.Linear, NTKLinear) or module._forward_hooks or module._forward_pre_hooks:
            continue
        own = dict(module.named_parameters())
        plain = all(uses[id(p)] == 1 and p.is_floating_point() for p in own.values())
        if "weight" in own and own.keys() <= {"weight", "bias"} and plain:
            ntk = isinstance(module, NTKLinear)
            scales = {
                "weight": module.weight_std / module.fan_in**0.5 if ntk else 1.0,
                "bias": module.bias_std if ntk else 1.0,
            }
            trained = (scales[key] if join(name, key) in function.trainable else None for key in ("weight", "bias"))
            weight, bias = trained
            if weight is not None or bias is not None:
                layers[name] = AffineLayer(module, weight, bias)
    return layers
