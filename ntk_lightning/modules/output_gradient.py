"""J d of a network with one output, by the gradients of that output in what its layers give.

The linearized network <grad_w f, d> is a sum over layers l. Where a layer's output z_l is linear in its weights, z_l =
w_l(a_l), its term is <df/dz_l, d_l(a_l)>. One backward pass gives all df/dz_l; nothing is carried forward, and the
gradient in d is that of one more layer each. A step takes four products a layer where jvp takes five.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.modules.layer_by_layer import LINEAR_IN_WEIGHTS, LayerWeights, walk

__all__ = ["by_output_gradient"]


def by_output_gradient(
    net: nn.Module, w0: Weights, direction: Weights, x: Tensor, output: int | None
) -> tuple[Tensor, Tensor] | None:
    """Compute f and f' = J d of a network with one output.

    Args:
        net: A chain of standard layers.
        w0: Weights where J is taken.
        direction: d, which f' can be differentiated in.
        x: Inputs (n, ...).
        output: The one output, or None for all that there are.

    Returns:
        f and J d, (n,) or (n, 1); or None where the network has several outputs, or a layer that moves is
        not linear in its weights.
    """
    weights = LayerWeights(net, w0, direction)
    calls: list[tuple[nn.Module, Tensor]] = []  # layers that move, and a_l; a shared one at each call
    edges = []  # of the graph at z_l, which itself need not stay

    def layer(module: nn.Module, a: Tensor) -> Tensor:
        z = weights.at_w0(module, a)
        if weights.moves(module):
            z = z if z.requires_grad else z.detach().requires_grad_()  # gradients begin at the first
            calls.append((module, a.detach()))
            edges.append(get_gradient_edge(z))
        return z

    f = walk(net, x, layer, torch.add)
    f = f if output is None else f[..., output : output + 1]
    if f.numel() != len(x) or any(type(module) not in LINEAR_IN_WEIGHTS for module, _ in calls):
        return None
    gradients = torch.autograd.grad(f.sum(), edges)  # of samples apart: df(x_i)/dz_l(x_i)
    terms = [
        (weights.along_d(module, a).flatten(1) * g.flatten(1)).sum(1)
        for (module, a), g in zip(calls, gradients, strict=True)
    ]
    return f.detach(), torch.stack(terms).sum(0).reshape(f.shape)
