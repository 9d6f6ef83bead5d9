"""Products with the Jacobian of a chain of layers, from the inputs and output gradients of its layers.

Where a layer's output z_l = w_l(a_l) is linear in its weights, with g_l the gradient of u^T f in z_l,

    J^T v: sum_i v_i grad_{w_l} u^T f(x_i) is the gradient in w_l of sum_i v_i <g_l(x_i), w_l(a_l(x_i))>, of one layer;
    J d: <grad_w u^T f(x_i), d> is a sum over layers, of <g_l(x_i), d_l(a_l(x_i))>.

One forward and one backward pass of the network serve both, for any number of vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vmap

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_by_layer import LINEAR_IN_WEIGHTS, LayerWeights, is_chain, walk
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights, usable
from ntk_lightning.kernels.empirical.standard_layers import is_standard

__all__ = ["LayerProducts", "products_of_layers", "record"]

Calls = list[tuple[nn.Module, Tensor]]  # layers that move and their inputs a_l; a shared layer at each call


def record(
    net: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], moves: Callable[[nn.Module], bool], x: Tensor
) -> tuple[Tensor, Calls, list[GradientEdge]]:
    """Run a chain, and note the layers that move.

    Args:
        net: The chain.
        run: Runs a layer on its input.
        moves: Tells whether a layer's weights move.
        x: Inputs (n, ...).

    Returns:
        The outputs, the calls of layers that move, and where the graph of the outputs begins at each z_l.
    """
    calls: Calls = []
    edges: list[GradientEdge] = []  # z_l itself need not stay

    def layer(module: nn.Module, a: Tensor) -> Tensor:
        z = run(module, a)
        if moves(module):
            z = z if z.requires_grad else z.detach().requires_grad_()  # gradients begin at the first
            calls.append((module, a.detach()))
            edges.append(get_gradient_edge(z))
        return z

    return walk(net, x, layer, torch.add), calls, edges


@dataclass(frozen=True)
class _Linearized:
    """The linearization of u^T f at some samples, for one cotangent u, or of all outputs.

    Args:
        weights: Of the network.
        calls: Layers that move, with their inputs a_l.
        edges: Where each z_l is in the graph.
        leaves: The weights of each that move, by the network's names, of which z_l alone is a function.
        gradients: Of each, g_l for every cotangent, (U, n, ...).
        full: Keep the cotangents apart.
    """

    weights: LayerWeights
    calls: Calls
    edges: list[GradientEdge]
    leaves: list[Weights]
    gradients: list[Tensor]
    full: bool

    def transposed(self, v: Tensor) -> Weights:
        """J^T of vectors v (k, n), or (k, n, U) for all outputs: the weights' gradients, (k, ...)."""
        total: Weights = {}
        for edge, leaves, g in zip(self.edges, self.leaves, self.gradients, strict=True):
            if self.full:
                cotangent = torch.einsum("knu,un...->kn...", v, g)
            else:
                cotangent = v.reshape(*v.shape, *[1] * (g.dim() - 2)) * g[0]
            inputs, several = list(leaves.values()), len(v) > 1
            u = cotangent if several else cotangent[0]
            found = torch.autograd.grad([edge], inputs, [u], retain_graph=True, is_grads_batched=several)
            for name, gradient in zip(leaves, found if several else (p[None] for p in found), strict=True):
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def forward(self, directions: Weights) -> Tensor:
        """J of directions (k, ...): (k, n), or (k, n, U) for all outputs."""
        k = len(next(iter(directions.values())))
        terms = []
        for (module, a), leaves, g in zip(self.calls, self.leaves, self.gradients, strict=True):
            own = {name: directions[name] for name in leaves}

            def along(d: Weights, module: nn.Module = module, a: Tensor = a) -> Tensor:
                return self.weights.along(module, d, a)

            z = vmap(along)(own) if k > 1 else along({name: d[0] for name, d in own.items()})[None]  # (k, n, ...)
            terms.append((z.flatten(2)[:, None] * g.flatten(2)).sum(-1))  # (k, U, n)
        total = torch.stack(terms).sum(0)
        return total.mT if self.full else total[:, 0]


class LayerProducts:
    """Products of a network that is a chain.

    Args:
        function: The network, its outputs and its weights that move.
    """

    def __init__(self, function: NetworkFunction) -> None:
        net = function.net
        self.function = function
        self.tensors = {name: usable(t, function.dtype) for name, t in (*net.named_parameters(), *net.named_buffers())}
        self.weights = LayerWeights(net, self.tensors)

    def linearize(self, x: Inputs, cotangent: Tensor | None, num_outputs: int) -> _Linearized:
        """Linearize at some samples.

        Args:
            x: The samples.
            cotangent: u, (C,); None for all outputs.
            num_outputs: C.

        Returns:
            The linearization.
        """
        leaves: list[Weights] = []

        def moves(module: nn.Module) -> bool:
            return self.weights.moves(module, self.function.trainable)

        def run(module: nn.Module, a: Tensor) -> Tensor:
            if not moves(module):
                return self.weights.at_w0(module, a)
            names = [name for name in self.weights.names(module) if name in self.function.trainable]
            leaves.append({name: self.tensors[name].detach().requires_grad_() for name in names})
            return self.weights.with_weights(module, leaves[-1], a)

        with torch.enable_grad():
            f, calls, edges = record(self.function.net, run, moves, x.arguments()[0][0])
            f = self.function.select(f, len(x)).reshape(len(x), num_outputs)
        one_hot = torch.eye(num_outputs).to(f)
        u = (one_hot if cotangent is None else cotangent[None])[:, None].expand(-1, len(x), -1)  # (U, n, C)
        if len(u) > 1:
            gradients = list(torch.autograd.grad(f, edges, u, retain_graph=True, is_grads_batched=True))
        else:
            gradients = [g[None] for g in torch.autograd.grad(f, edges, u[0], retain_graph=True)]
        return _Linearized(self.weights, calls, edges, leaves, gradients, cotangent is None)


def products_of_layers(function: NetworkFunction, x: Inputs) -> LayerProducts | None:
    """Make the products of a network by its layers, if it is a chain and all that moves is linear in its weights.

    Args:
        function: The network and its outputs.
        x: Inputs.

    Returns:
        The products, or None for other networks.
    """
    if callable(function.output) or not is_standard(function.net) or not is_chain(function.net, x):
        return None
    moving = {id(function.net.get_parameter(name)) for name in function.trainable}
    layers = [m for m in function.net.modules() if any(id(p) in moving for p in m._parameters.values())]
    return LayerProducts(function) if all(type(layer) in LINEAR_IN_WEIGHTS for layer in layers) else None
