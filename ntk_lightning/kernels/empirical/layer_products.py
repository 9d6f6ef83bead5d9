"""Products with the Jacobian of a chain of layers, from the inputs and output gradients of its layers.

Where a layer's output z_l = w_l(a_l) is linear in its weights, with g_l the gradient of u^T f in z_l,

    J^T v: sum_i v_i grad_{w_l} u^T f(x_i) is the gradient in w_l of sum_i v_i <g_l(x_i), w_l(a_l(x_i))>, of one layer;
    J d: <grad_w u^T f(x_i), d> is a sum over layers, of <g_l(x_i), d_l(a_l(x_i))>.

One forward and one backward pass of the network serve both, for any number of vectors.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import vjp, vmap

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_by_layer import LINEAR_IN_WEIGHTS, LayerWeights, is_chain, walk
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights, usable
from ntk_lightning.kernels.empirical.standard_layers import is_standard

__all__ = ["LayerProducts", "products_of_layers", "record"]

Calls = list[tuple[nn.Module, Tensor]]  # layers that move and their inputs a_l; a shared layer at each call


def record(
    net: nn.Module, weights: LayerWeights, moving: Container[str], x: Tensor
) -> tuple[Tensor, Calls, list[GradientEdge]]:
    """Run a chain at w0, and note the layers that move.

    Args:
        net: The chain.
        weights: w0.
        moving: Names of the weights that move.
        x: Inputs (n, ...).

    Returns:
        The outputs, the calls of layers that move, and where the graph of the outputs begins at each z_l.
    """
    calls: Calls = []
    edges: list[GradientEdge] = []  # z_l itself need not stay

    def layer(module: nn.Module, a: Tensor) -> Tensor:
        z = weights.at_w0(module, a)
        if weights.moves(module, moving):
            z = z if z.requires_grad else z.detach().requires_grad_()  # gradients begin at the first
            calls.append((module, a.detach()))
            edges.append(get_gradient_edge(z))
        return z

    return walk(net, x, layer, torch.add), calls, edges


class _Linearized:
    """The linearization of u^T f at some samples, for one cotangent u, or of all outputs.

    Args:
        calls: Layers that move, with their inputs a_l.
        gradients: Of each, g_l for every cotangent, (U, n, ...).
        products: What they are of.
        full: Keep the cotangents apart.
    """

    def __init__(self, calls: Calls, gradients: list[Tensor], products: LayerProducts, full: bool) -> None:
        self.calls, self.gradients, self.products, self.full = calls, gradients, products, full

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(a.nbytes + g.nbytes for (_, a), g in zip(self.calls, self.gradients, strict=True))

    def transposed(self, v: Tensor) -> Weights:
        """J^T of vectors v (k, n), or (k, n, U) for all outputs: the weights' gradients, (k, ...)."""
        total: Weights = {}
        for (module, a), g in zip(self.calls, self.gradients, strict=True):
            if self.full:
                cotangent = torch.einsum("knu,un...->kn...", v, g)
            else:
                cotangent = v.reshape(*v.shape, *[1] * (g.dim() - 2)) * g[0]
            zeros = self.products.own_weights(module)
            pull = vjp(lambda d, module=module, a=a: self.products.weights.along(module, d, a), zeros)[1]
            found = (
                vmap(pull)(cotangent)[0] if len(v) > 1 else {name: p[None] for name, p in pull(cotangent[0])[0].items()}
            )
            for name, gradient in found.items():
                total[name] = total[name] + gradient if name in total else gradient
        return total

    def forward(self, directions: Weights) -> Tensor:
        """J of directions (k, ...): (k, n), or (k, n, U) for all outputs."""
        k = len(next(iter(directions.values())))
        total: Tensor | float = 0.0
        for (module, a), g in zip(self.calls, self.gradients, strict=True):
            names = self.products.own_weights(module)
            own = {name: directions[name] for name in names}

            def along(d: Weights, module: nn.Module = module, a: Tensor = a) -> Tensor:
                return self.products.weights.along(module, d, a)

            z = vmap(along)(own) if k > 1 else along({name: d[0] for name, d in own.items()})[None]  # (k, n, ...)
            total = total + (z.flatten(2)[:, None] * g.flatten(2)).sum(-1)  # (k, U, n)
        assert isinstance(total, Tensor), "some layer moves"
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

    def own_weights(self, module: nn.Module) -> Weights:
        """Zeros for the weights of a layer that move, by the network's names."""
        names = self.weights.names(module)
        return {name: torch.zeros_like(self.tensors[name]) for name in names if name in self.function.trainable}

    def linearize(self, x: Inputs, cotangent: Tensor | None, num_outputs: int) -> _Linearized:
        """Linearize at some samples.

        Args:
            x: The samples.
            cotangent: u, (C,); None for all outputs.
            num_outputs: C.

        Returns:
            The linearization.
        """
        with torch.enable_grad():
            f, calls, edges = record(self.function.net, self.weights, self.function.trainable, x.arguments()[0][0])
            f = self.function.select(f, len(x)).reshape(len(x), num_outputs)
        if cotangent is not None:
            u = cotangent.expand(1, len(x), -1)
        else:
            u = torch.eye(num_outputs).to(f)[:, None].expand(-1, len(x), -1)  # (C, n, C)
        if len(u) > 1:
            return _Linearized(calls, list(torch.autograd.grad(f, edges, u, is_grads_batched=True)), self, True)
        gradients = [g[None] for g in torch.autograd.grad(f, edges, u[0])]
        return _Linearized(calls, gradients, self, cotangent is None)


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
