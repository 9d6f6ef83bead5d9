r"""Plain infinite-width kernels, to read and to test against.

One class of formulas in the order in which a network computes: with K the covariance of the pre-activations (NNGP) and
Theta the NTK, both indexed by a pair of inputs and, for images, a pair of pixels,

    affine:      K <- weight_std^2 A(K) + bias_std^2,   Theta <- weight_std^2 A(Theta) + K (the new one),
    activation:  K <- E[phi(u) phi(v)],                 Theta <- Theta E[phi'(u) phi'(v)],   (u, v) ~ N(0, K),

where A is the identity (linear) or the average over the filter's shifts of both pixels (convolution). See Jacot et al.
(2018, arXiv 1806.07572), Arora et al. (2019, arXiv 1904.11955) and Novak et al. (2019, arXiv 1810.05148). In the
standard parameterization the layer's own part of the new Theta is fan_in A(K) + 1 instead of K (Sohl-Dickstein et al.,
2020, arXiv 2001.07301).

What an activation, a normalization or attention needs of each input alone, its variances, is computed once an input
(:func:`variances`), not for every pair (:func:`pairs`). Where no layer mixes pixels before they are flattened, only
covariances of equal pixels are held.

Longer than 300 lines because every operation has its formula here, side by side.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ntk_lightning.kernels.infinite.activations import Activation, Near, dual_activation
from ntk_lightning.kernels.infinite.alignment import after_activation, after_affine
from ntk_lightning.kernels.infinite.architecture import (
    Add,
    Attention,
    Concat,
    Conv,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GlobalSumPool,
    Graph,
    Layer,
    Linear,
    Norm,
    Operation,
    Pool,
    Product,
    Scale,
)
from ntk_lightning.kernels.infinite.graphs import to_graph
from ntk_lightning.kernels.infinite.input_covariances import covariance, own_covariance
from ntk_lightning.kernels.infinite.linear_maps import attend, axes_of, equal_pixels, pool, sum_over_window
from ntk_lightning.kernels.infinite.shapes import Size, follow

__all__ = ["Network", "Variances", "diagonal", "dual_activation", "gram", "pairs", "variances"]


class Network(NamedTuple):
    """A graph on inputs of one shape.

    Args:
        graph: Of its operations.
        sizes: Of its values.
        full: Of which values covariances of all pairs of pixels are held, not of equal pixels alone.
    """

    graph: Graph
    sizes: list[Size]
    full: list[bool]

    @classmethod
    def of(cls, layers: Sequence[Layer], x: Tensor) -> Network:
        """Prepare layers for inputs like some.

        Args:
            layers: From :func:`ntk_lightning.kernels.infinite.lift.parse`, with shapes checked.
            x: Inputs (n, ...).

        Returns:
            The network.
        """
        graph = to_graph(layers)
        full = [False] * (len(graph.nodes) + 1)
        for i in range(len(graph.nodes), 0, -1):
            node = graph.nodes[i - 1]
            for value in node.inputs:
                full[value] |= full[i] or isinstance(node.operation, _MIXING)
        return cls(graph, follow(graph, Size(tuple(x.shape[2:]), x.shape[1])), full)

    def entries(self) -> int:
        """Count the covariances of one pair in its largest value."""
        sizes = zip(self.sizes, self.full, strict=True)
        return max(math.prod(size.shape or ()) ** (2 if full else 1) for size, full in sizes)


_MIXING = Pool | GlobalAvgPool | GlobalSumPool | Attention  # what mixes pixels: variances do not suffice before it
_MECHANISMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(-1),
    "identity": lambda scores: scores,
    "relu": torch.relu,
    "abs": torch.abs,
}

Variances = dict[int, Tensor]  # by the number of a value: what its operation needs of each input alone, (n, ...)


class _Fields(NamedTuple):
    """Covariances of a block of pairs, (n1, n2) for vectors, (n1, n2, H, W, H, W) or (n1, n2, H, W) for images.

    ``ntk`` is None where it is zero, or not asked for. ``near`` are pairs of vectors whose correlation is known better
    than the covariances tell it.
    """

    nngp: Tensor
    ntk: Tensor | None = None
    near: Near | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> _Fields:
        """Apply a linear function to both covariances."""
        return _Fields(function(self.nngp), None if self.ntk is None else function(self.ntk))


def gram(layers: Sequence[Layer], x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both infinite-width kernels of all pairs at once; memory grows with n1 * n2 * (H * W)^2.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.lift.parse`, with shapes checked.
        x1: Inputs (n1, d), (n1, C, L) or (n1, C, H, W).
        x2: Inputs (n2, ...) of the same dtype; x1 itself for its symmetric Gram.

    Returns:
        NNGP and NTK, each (n1, n2).
    """
    network = Network.of(layers, x1)
    own1 = variances(network, x1)
    return pairs(network, x1, x2, own1, own1 if x1 is x2 else variances(network, x2))


def diagonal(network: Network, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both kernels of every input with itself; memory grows with n * (H * W)^2.

    Args:
        network: On such inputs.
        x: Inputs (n, ...).

    Returns:
        NNGP and NTK, each (n,).
    """
    own: Variances = {}
    block = _Block(network, own, own, alone=True, same=True, ntk=True)
    out = block.run(_Fields(own_covariance(x, network.full[0])))
    return out.nngp, torch.zeros_like(out.nngp) if out.ntk is None else out.ntk


def variances(network: Network, x: Tensor) -> Variances:
    """Compute what pairs need of each input alone; memory grows with n * (H * W)^2.

    Args:
        network: On such inputs.
        x: Inputs (n, ...).

    Returns:
        By the number of a value, of its operation's input: variances of the pixels before an activation or a
        normalization over channels, (n, H, W), their mean before one over pixels, (n, 1, 1), and before attention its
        matrix, (n, P, P).
    """
    own: Variances = {}
    _Block(network, own, own, alone=True, same=True, ntk=False).run(_Fields(own_covariance(x, network.full[0])))
    return own


def pairs(
    network: Network,
    x1: Tensor,
    x2: Tensor,
    own1: Variances,
    own2: Variances,
    *,
    ntk: bool = True,
    same: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute both kernels of all pairs, given what they need of each input alone.

    Args:
        network: On such inputs.
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...); x1 itself for its symmetric Gram.
        own1: Of x1, from :func:`variances`.
        own2: Of x2.
        ntk: Whether the NTK is asked for; without, it is 0.
        same: Whether the i-th inputs of both are one sample, which has one mask of dropout; by default if x2 is x1.

    Returns:
        NNGP and NTK, each (n1, n2).
    """
    nngp, near = covariance(x1, x2, network.full[0])
    if x1 is x2:
        own = own_covariance(x1, network.full[0])
        nngp.diagonal().copy_(own.movedim(0, -1))  # equal to the last bit, so that correlations are one
    block = _Block(network, own1, own2, alone=False, same=x1 is x2 if same is None else same, ntk=ntk)
    out = block.run(_Fields(nngp, None, near))
    return out.nngp, torch.zeros_like(out.nngp) if out.ntk is None else out.ntk


class _Block(NamedTuple):
    """What is evaluated: all pairs of n1 and n2 inputs, or n inputs with themselves, which have one dimension less."""

    network: Network
    own1: Variances
    own2: Variances
    alone: bool  # inputs with themselves: variances are found, not used
    same: bool  # the second inputs are the first
    ntk: bool  # whether it is asked for

    def run(self, fields: _Fields) -> _Fields:
        """Evaluate the graph.

        Args:
            fields: Covariances of its input.

        Returns:
            Those of its output.
        """
        graph, sizes, full = self.network
        last = {value: i for i, node in enumerate(graph.nodes, 1) for value in node.inputs}
        values = {0: fields}
        for i, node in enumerate(graph.nodes, 1):
            mixes = isinstance(node.operation, _MIXING)
            inputs = [_narrowed(values[v], sizes[v], full[v] and not (full[i] or mixes)) for v in node.inputs]
            spatial = len(sizes[node.inputs[0]].shape or ())
            made = self._apply(i, node.operation, inputs, spatial, full[i] or mixes)
            values[i] = _narrowed(made, sizes[i], mixes and not full[i])
            for value in node.inputs:
                if last[value] == i:
                    values.pop(value, None)  # nothing needs it any more
        return values[len(graph.nodes)]

    def _apply(self, i: int, operation: Operation, inputs: list[_Fields], spatial: int, full: bool) -> _Fields:
        """One operation on values with so many spatial axes, of all pairs of pixels or of equal ones."""
        k = inputs[0]
        if self.alone:
            self._keep(i, operation, k.nngp, spatial, full)
        match operation:
            case Linear() | Conv():
                return self._affine(i, operation, k, spatial, full)
            case Activation():
                left, right = self._sides(i, spatial, full)
                near = None if k.near is None else after_activation(operation, k.near, k.nngp, left, right)
                if not k.nngp.requires_grad and (k.near is None or not k.near.sine2.numel()):
                    return _activated(operation, k, left, right)._replace(near=near)
                nngp, derivative = dual_activation(operation, k.nngp, left, right, k.near)
                return _Fields(nngp, None if k.ntk is None else k.ntk * derivative, near)
            case Norm(eps):
                left, right = ((v + eps).rsqrt() for v in self._sides(i, spatial, full))
                return k.map(lambda c: c * left * right)
            case Attention():
                return self._attention(i, operation, k, spatial)
            case Dropout(keep):
                return k.map(lambda c: self._dropped(c, keep, spatial, full))
            case Add():
                return _Fields(_total(f.nngp for f in inputs), reduce(_plus, (f.ntk for f in inputs)))
            case Product():
                a, b = inputs
                parts = [None if f.ntk is None else f.ntk * other.nngp for f, other in ((a, b), (b, a))]
                return _Fields(a.nngp * b.nngp, _plus(*parts))
            case Concat():
                widths = [self.network.sizes[v].channels or 0 for v in self.network.graph.nodes[i - 1].inputs]
                shares = [width / sum(widths) for width in widths]
                weighted = [f.map(lambda c, s=share: s * c) for f, share in zip(inputs, shares, strict=True)]  # type: ignore[misc]
                return _Fields(_total(f.nngp for f in weighted), reduce(_plus, (f.ntk for f in weighted)))
            case Scale(factor):
                return k.map(lambda c: factor**2 * c)._replace(near=k.near)
            case Flatten():  # vectors, of which alone near is known, pass nn.Flatten only
                return k.map(lambda c: c.flatten(c.dim() - spatial).mean(-1)) if spatial else k
            case Pool():
                return k.map(lambda c: pool(c, operation, axes_of(spatial, True)))
            case GlobalAvgPool() | GlobalSumPool():
                pixels = tuple(range(-2 * spatial, 0))
                mean = isinstance(operation, GlobalAvgPool)
                return k.map(lambda c: c.mean(pixels, True) if mean else c.sum(pixels, True))
        raise NotImplementedError(f"The reference does not know {operation}.")

    def _keep(self, i: int, operation: Operation, k: Tensor, spatial: int, full: bool) -> None:
        """Keep what pairs need of inputs alone."""
        match operation:
            case Activation() | Norm() | Linear():
                v = equal_pixels(k, spatial) if full else k
                mean = isinstance(operation, Norm) and operation.pixels and spatial > 0
                self.own1[i] = v.flatten(1).mean(1).view(-1, *(1,) * spatial) if mean else v
            case Attention(mechanism, scaling, score_std) if scaling == "linear":
                scores = score_std * k.reshape(len(k), -1, math.prod(k.shape[1 : 1 + spatial]))
                self.own1[i] = _MECHANISMS[mechanism](scores)

    def _sides(self, i: int, spatial: int, full: bool) -> tuple[Tensor, Tensor]:
        """Variances of both pixels of a pair, as they broadcast to covariances."""
        left, right = self.own1[i], self.own2[i]
        if full:
            left = left.view(*left.shape, *(1,) * spatial)
            right = right.view(-1, *(1,) * spatial, *right.shape[1:])
        return (left, right) if self.alone else (left[:, None], right[None])

    def _affine(self, i: int, layer: Linear | Conv, k: _Fields, spatial: int, full: bool) -> _Fields:
        weight, bias = layer.weight_std**2, layer.bias_std**2
        near = k.near
        if near is not None:
            near = after_affine(near, k.nngp, *self._sides(i, spatial, full), layer.weight_std, layer.bias_std)
        share = 1.0
        if isinstance(layer, Conv):
            axes, share = axes_of(spatial, full), 1 / math.prod(window.size for window in layer.windows)
            k = k.map(lambda c: sum_over_window(c, layer.windows, layer.circular, axes))
        nngp, ntk = weight * share * k.nngp, None
        nngp = nngp + bias if bias else nngp
        if self.ntk:
            own = nngp if layer.gradient is None else layer.gradient[0] * share * k.nngp + layer.gradient[1]
            ntk = own if k.ntk is None else torch.add(own, k.ntk, alpha=weight * share)
        return _Fields(nngp, ntk, near)

    def _attention(self, i: int, layer: Attention, k: _Fields, spatial: int) -> _Fields:
        """Infinitely many heads: A K A'^T with A of each input alone, or the mean of A K A'^T over a random A."""
        value, bias, asked = layer.value_std**2, layer.bias_std**2, self.ntk
        if layer.scaling == "linear":
            left, right = self.own1[i], self.own2[i]
            left = left if self.alone else left[:, None]
            out = k.map(lambda c: value * attend(c, left, right, spatial))
            ntk = _plus(out.ntk, 2 * out.nngp + bias) if asked else None
        else:
            pixels = tuple(range(-2 * spatial, 0))
            value = value * layer.score_std**2
            square = (k.nngp * k.nngp).sum(pixels, True)
            out = _Fields(value * square * k.nngp)
            ntk = 4 * out.nngp + bias if asked else None
            if k.ntk is not None:
                both = (k.nngp * k.ntk).sum(pixels, True)
                ntk = _plus(ntk, value * (2 * both * k.nngp + square * k.ntk))
        return _Fields(out.nngp + bias, ntk)

    def _dropped(self, k: Tensor, keep: float, spatial: int, full: bool) -> Tensor:
        """Variances over ``keep``: two masks are equal only of one input at one pixel."""
        if not self.same:
            return k
        k = k.clone()
        equal = k if self.alone else k.diagonal().movedim(-1, 0)
        (equal_pixels(equal, spatial) if full else equal).div_(keep)
        return k


def _activated(activation: Activation, k: _Fields, left: Tensor, right: Tensor) -> _Fields:
    """An activation, piece by piece, so that what its formulas hold in between stays in the cache."""
    nngp, ntk = torch.empty_like(k.nngp), None if k.ntk is None else torch.empty_like(k.ntk)
    for piece in _pieces(k.nngp):
        nngp[piece], derivative = dual_activation(activation, k.nngp[piece], _cut(left, piece), _cut(right, piece))
        if ntk is not None and k.ntk is not None:
            torch.mul(k.ntk[piece], derivative, out=ntk[piece])
    return _Fields(nngp, ntk)


def _pieces(k: Tensor) -> Iterator[tuple[slice, ...]]:
    """Parts of a tensor whose entries lie one after another, small enough for the cache."""
    shape, most = k.shape, 2**15 * torch.get_num_threads()  # which PyTorch shares out
    if k.device.type != "cpu":
        most = k.numel()
    split = next(d for d in range(len(shape)) if math.prod(shape[d + 1 :]) <= most)
    step = max(1, most // math.prod(shape[split + 1 :]))
    for lead in itertools.product(*map(range, shape[:split])):
        for start in range(0, shape[split], step):
            yield *(slice(i, i + 1) for i in lead), slice(start, start + step)


def _cut(side: Tensor, piece: tuple[slice, ...]) -> Tensor:
    """The part of a variance that broadcasts to a part of the covariances."""
    parts = zip(piece, side.shape, strict=False)
    return side[tuple(part if n > 1 else slice(None) for part, n in parts)]


def _narrowed(fields: _Fields, size: Size, needed: bool) -> _Fields:
    """Covariances of equal pixels, of those of all pairs of pixels."""
    spatial = len(size.shape or ())
    return fields.map(lambda k: equal_pixels(k, spatial)) if needed and spatial else fields


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _total(covariances: Iterable[Tensor]) -> Tensor:
    return reduce(operator.add, covariances)
