"""J d of a network with one output, by the gradients of that output in what its layers give.

The linearized network <grad_w f, d> is a sum over layers l. Where a layer's output z_l is linear in its weights, z_l =
w_l(a_l), its term is <df/dz_l, d_l(a_l)>. One backward pass gives all df/dz_l; nothing is carried forward, and the
gradient in d is that of one more layer each. A step takes four products a layer where jvp takes five.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.layer_by_layer import LINEAR_IN_WEIGHTS, LayerWeights
from ntk_lightning.kernels.empirical.layer_products import record
from ntk_lightning.kernels.empirical.network_state import Weights

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
    weights = LayerWeights(net, w0)
    f, calls, edges = record(net, weights.at_w0, lambda module: weights.moves(module, direction), x)
    f = f if output is None else f[..., output : output + 1]
    if f.numel() != len(x) or any(type(module) not in LINEAR_IN_WEIGHTS for module, _ in calls):
        return None
    gradients = torch.autograd.grad(f.sum(), edges)  # of samples apart: df(x_i)/dz_l(x_i)
    terms = [
        (weights.along(module, direction, a).flatten(1) * g.flatten(1)).sum(1)
        for (module, a), g in zip(calls, gradients, strict=True)
    ]
    return f.detach(), torch.stack(terms).sum(0).reshape(f.shape)
