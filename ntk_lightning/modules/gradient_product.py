"""The product J d of a network's Jacobian with a direction of its weights, by the gradient of every single output.

For networks whose forward mode and second derivatives are not to be had, or not exact. It takes n C backward passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntk_lightning.kernels.empirical.derivatives import at_size_one, differentiable_attention, dot
from ntk_lightning.kernels.empirical.network_state import Weights

__all__ = ["by_gradients"]

Function = Callable[[Weights], Tensor]  # w -> f


def by_gradients(singles: list[Function], w: Weights, direction: Weights) -> tuple[Tensor, ...]:
    """Compute outputs f and f' = J d from single samples, by first derivatives only.

    Args:
        singles: For each sample a function of the weights to its outputs (1,) or (1, C).
        w: Weights where J is taken.
        direction: d, which the result can be differentiated in.

    Returns:
        f and J d, (n,) or (n, C).
    """
    apply: Callable[..., Tensor] = _GradientProduct.apply
    product = apply(singles, w, tuple(direction), *direction.values())
    with torch.no_grad():
        return torch.cat([f(w) for f in singles]), product


class _GradientProduct(torch.autograd.Function):
    """J d, one gradient for every output of every sample; its backward is J^T u, one for every sample."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        singles: list[Function],
        w: Weights,
        names: tuple[str, ...],
        *direction: Tensor,
    ) -> Tensor:
        """Multiply."""
        ctx.singles, ctx.w, ctx.names = singles, {name: w[name].detach() for name in names}, names
        products = []
        for f in singles:
            value, leaves = _GradientProduct.graph(f, ctx.w)
            slopes = []
            for u in torch.eye(value.numel(), dtype=value.dtype, device=value.device):
                gradient = _GradientProduct.gradient(value, leaves, u.reshape(value.shape))
                slopes.append(dot(gradient, dict(zip(names, direction, strict=True))))
            products.append(torch.stack(slopes).to(value).reshape(value.shape))
        return torch.cat(products)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Multiply with the transpose."""
        total = {name: torch.zeros_like(weight) for name, weight in ctx.w.items()}
        for f, part in zip(ctx.singles, u.split(1), strict=True):
            value, leaves = _GradientProduct.graph(f, ctx.w)
            for name, gradient in _GradientProduct.gradient(value, leaves, part).items():
                total[name] += gradient
        return None, None, None, *total.values()

    @staticmethod
    def graph(f: Function, w: Weights) -> tuple[Tensor, Weights]:
        """The output of one sample and the weights that it can be differentiated in."""
        leaves = {name: weight.clone().requires_grad_() for name, weight in w.items()}
        with torch.enable_grad(), differentiable_attention():
            return f(leaves), leaves

    @staticmethod
    def gradient(value: Tensor, leaves: Weights, u: Tensor) -> Weights:
        """The gradient of u^T f."""
        inputs = list(leaves.values())
        unit, size = at_size_one(u)
        found = torch.autograd.grad(value, inputs, unit, retain_graph=True, allow_unused=True, materialize_grads=True)
        dense = (gradient.to_dense() if gradient.is_sparse else gradient for gradient in found)  # of sparse embeddings
        return {name: gradient * size for name, gradient in zip(leaves, dense, strict=True)}
