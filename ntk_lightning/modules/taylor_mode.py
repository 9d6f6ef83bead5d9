"""Taylor coefficients of a network along a direction of its weights: layer by layer, or by nested jvp.

The weights move on a line, w0 + t d, and every value within the network is carried as its Taylor polynomial in t,
a(t) = a_0 + a_1 t + ... + a_k t^k, without the coefficients that are zero. A layer costs about k times itself, where
nested Jacobian-vector products cost 2^k. Griewank and Walther (2008), Evaluating Derivatives, chapter 13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import jvp

from ntk_lightning.kernels.empirical.layer_by_layer import BILINEAR, LayerWeights, walk
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.networks import Erf

__all__ = ["nested_derivatives", "taylor_coefficients"]

Polynomial = dict[int, Tensor]  # coefficients by the power of t, those that are not zero

_LINEAR = {
    *(nn.Identity, nn.Flatten, nn.Dropout),  # in evaluation mode
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
}
_PIECEWISE_LINEAR = {nn.ReLU, nn.LeakyReLU, nn.MaxPool2d}
_POINTWISE = {nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, Erf}


def taylor_coefficients(net: nn.Module, w0: Weights, direction: Weights, x: Tensor, order: int) -> list[Tensor]:
    """Compute the Taylor coefficients of phi(t) = f(w0 + t d, x) at t = 0, layer by layer.

    Args:
        net: A chain of standard layers.
        w0: Where to expand, by name.
        direction: d, by name, which the result can be differentiated in.
        x: Inputs (n, ...).
        order: The highest power k of t.

    Returns:
        phi^(j)(0) / j! for j = 0 to k, each of the shape of ``net(x)``.
    """
    weights = LayerWeights(net, w0)
    a = walk(net, {0: x}, partial(_layer, weights, direction, order), _sum)
    return [a[j] if j in a else torch.zeros_like(a[0]) for j in range(order + 1)]


def nested_derivatives(
    f: Callable[[Weights], Tensor], w: Weights, direction: Weights, order: int
) -> tuple[Tensor, ...]:
    """Compute f and its derivatives along a direction by nested Jacobian-vector products.

    Args:
        f: A function of weights.
        w: Where to differentiate.
        direction: d.
        order: The highest derivative k.

    Returns:
        f, D f[d], ..., D^k f[d, ..., d].
    """
    if order == 0:
        return (f(w),)
    values, tangents = jvp(lambda w: nested_derivatives(f, w, direction, order - 1), (w,), (direction,))[:2]
    return (*values, tangents[-1])


def _layer(weights: LayerWeights, d: Weights, order: int, module: nn.Module, a: Polynomial) -> Polynomial:
    """The polynomial of a layer's output from that of its input, by the layer's type."""
    kind = type(module)
    if kind in BILINEAR:
        return _bilinear(weights, d, order, module, a)
    if kind in _LINEAR:
        return {j: module(coefficient) for j, coefficient in a.items()}
    if len(a) == 1 and not weights.moves(module, d):  # a constant stays one
        return {0: weights.at_w0(module, a[0])}
    if kind in _PIECEWISE_LINEAR:
        return _piecewise_linear(module, a)
    return _pointwise(module, a, order) if kind in _POINTWISE else _any(weights, d, order, module, a)


def _bilinear(weights: LayerWeights, d: Weights, order: int, module: nn.Module, a: Polynomial) -> Polynomial:
    """z(t) = (w0 + t d) a(t): z_j = w0 a_j + d a_{j-1}."""
    z = {j: weights.at_w0(module, coefficient, linear=j > 0) for j, coefficient in a.items()}
    if weights.moves(module, d):
        for j, coefficient in a.items():
            if j < order:
                z = _sum(z, {j + 1: weights.along(module, d, coefficient, linear=j > 0)})
    return z


def _piecewise_linear(module: nn.Module, a: Polynomial) -> Polynomial:
    """On the piece of a_0, z(t) is linear in a(t)."""
    constant = a[0]
    if type(module) is nn.ReLU:
        mask = torch.ops.aten.threshold_backward
        return {j: mask(coefficient, constant, 0) if j else module(constant) for j, coefficient in a.items()}
    return {j: jvp(module, (constant,), (coefficient,))[1] if j else module(constant) for j, coefficient in a.items()}


def _pointwise(module: nn.Module, a: Polynomial, order: int) -> Polynomial:
    """Sum the series z = s(a_0) + sum_i s^(i)(a_0) / i! u^i with u = a_1 t + a_2 t^2 + ..."""
    constant = a[0].detach().requires_grad_()  # the network at w0, whatever d is
    derivative = module(constant)
    z, u = {0: derivative.detach()}, {j: coefficient for j, coefficient in a.items() if j}
    power = u
    for i in range(1, order + 1):  # the function's derivative at every entry is the gradient of the sum
        derivative = torch.autograd.grad(derivative.sum(), constant, create_graph=i < order)[0]
        c = derivative.detach() / math.factorial(i)
        z = _sum(z, {j: c * coefficient for j, coefficient in power.items()})
        power = _product(power, u, order)
    return z


def _any(weights: LayerWeights, d: Weights, order: int, module: nn.Module, a: Polynomial) -> Polynomial:
    """Any other layer by nested jvp in t, of itself alone."""

    def at(w: Weights) -> Tensor:
        t = w["t"]
        x: Tensor = sum((t**j * coefficient for j, coefficient in a.items() if j), a[0])
        return weights.at(module, d, t, x)

    t = a[0].new_zeros(())
    derivatives = nested_derivatives(at, {"t": t}, {"t": torch.ones_like(t)}, order)
    return {j: derivative / math.factorial(j) for j, derivative in enumerate(derivatives)}


def _sum(p: Polynomial, q: Polynomial) -> Polynomial:
    """Add two polynomials."""
    return {**p, **q, **{j: p[j] + q[j] for j in p.keys() & q.keys()}}


def _product(p: Polynomial, q: Polynomial, order: int) -> Polynomial:
    """Multiply two polynomials, without the powers of t beyond the order."""
    total: Polynomial = {}
    for (i, left), (j, right) in itertools.product(p.items(), q.items()):
        if i + j <= order:
            total = _sum(total, {i + j: left * right})
    return total
