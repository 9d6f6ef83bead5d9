"""Per-sample gradients by plain autograd, one sample at a time: for networks that torch.func cannot transform.

Recurrent layers, checkpointing, writes into buffers or into fresh tensors, branches on values, functions of the old
form, scripted modules: all that can be trained can be differentiated this way, exactly as it is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ntk_lightning.kernels.empirical.derivatives import at_size_one, dot
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import ModuleAttributes, Weights, copy_network, usable
from ntk_lightning.kernels.empirical.rows import Rows, real_flat

__all__ = ["OneByOneRows"]


class PlainNetwork:
    """A copy of a network in the precision of the computation, with parameters of its own to be differentiated.

    Not every network can be called with other tensors in the places of its parameters. Every call finds the buffers and
    attributes as they were.

    Args:
        function: What is differentiated.
    """

    def __init__(self, function: NetworkFunction) -> None:
        self.function, self.net = function, copy_network(function.net)
        for tensor in (*self.net.parameters(), *self.net.buffers()):
            tensor.data = usable(tensor.data, function.dtype)
        parameters = dict(self.net.named_parameters())
        self.trainable = {name: parameters[name].requires_grad_() for name in function.trainable}
        self._attributes = ModuleAttributes(self.net)
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in self.net.buffers()]
        self._versions = [buffer._version for buffer, _ in self._buffers]

    @contextmanager
    def outputs(self, x: Inputs) -> Iterator[Tensor]:
        """Outputs (n,) or (n, C) of n samples, as part of a graph; the network's state is restored afterwards."""
        try:
            with torch.enable_grad():
                yield self.function.select(x.call(self.net), len(x))
        finally:
            self._attributes.restore()
            for i, (buffer, value) in enumerate(self._buffers):
                if buffer._version != self._versions[i]:  # it was written in place
                    with torch.no_grad():
                        buffer.copy_(value)
                    self._versions[i] = buffer._version

    def gradient(self, outputs: Tensor, cotangent: Tensor, again: bool = False) -> Weights:
        """The gradient of u^T f for one sample.

        Args:
            outputs: f, as part of a graph.
            cotangent: u, (C,).
            again: Keep the graph for another gradient.

        Returns:
            The gradients of all trainable parameters, zero where the outputs do not depend on one.
        """
        for weight in self.trainable.values():
            weight.grad = None
        unit, size = at_size_one(cotangent.reshape(outputs.shape))
        if outputs.requires_grad:  # backward, not torch.autograd.grad, which reentrant checkpointing refuses
            outputs.backward(unit, retain_graph=again)
        gradients: Weights = {}
        for name, weight in self.trainable.items():
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad.detach()
            gradients[name], weight.grad = (gradient.to_dense() if gradient.is_sparse else gradient) * size, None
        return gradients


class OneByOneRows(Rows):
    """Rows made by one forward pass a sample and one backward pass for each of its cotangents.

    Args:
        plain: The network, ready to be differentiated.
        num_outputs: Of the network.
        nbytes: What one forward and backward pass allocates.
        per_layer: Keep the kernels of modules apart.
    """

    one_by_one = True

    def __init__(self, plain: PlainNetwork, num_outputs: int, nbytes: int, per_layer: bool = False) -> None:
        self.plain, self.trainable, self._nbytes = plain, plain.trainable, nbytes
        super().__init__(plain.function, num_outputs, dict(plain.trainable), {}, per_layer)

    def fill(self, out: Tensor, x: Inputs) -> None:
        """Write the rows of n samples into ``out`` (n, width)."""
        last = len(self.cotangents) - 1
        for i in range(len(x)):
            with self.plain.outputs(x[i : i + 1]) as outputs:
                pulled = [self.plain.gradient(outputs, u, again=k < last) for k, u in enumerate(self.cotangents)]
            pieces = []
            for part in self.parts:
                for gradients in pulled:
                    pieces += real_flat(gradients[name] for name in part.weights)
            torch.cat(pieces, out=out[i])

    def vjp(self, x: Inputs, cotangents: Tensor) -> Weights:
        """J(x)^T u for cotangents u (k, n, C) of all outputs, summed over the samples: (k, ...)."""
        total = {name: weight.new_zeros(len(cotangents), *weight.shape) for name, weight in self.trainable.items()}
        for i in range(len(x)):
            with self.plain.outputs(x[i : i + 1]) as outputs:
                for k, u in enumerate(cotangents[:, i]):
                    gradient = self.plain.gradient(outputs, u, again=k + 1 < len(cotangents))
                    for name, value in gradient.items():
                        total[name][k] += value
        return total

    def jvp(self, x: Inputs, directions: Weights, cotangent: Tensor | None) -> Tensor:
        """J(x) d for directions d (k, ...), (k, n, C); or their inner products with a cotangent (C,), (k, n)."""
        # <grad u^T f, d> for every cotangent u: first derivatives only, which every trained network has
        cotangents = torch.eye(self.num_outputs).to(self.cotangents) if cotangent is None else cotangent[None]
        count = len(next(iter(directions.values())))
        product = self.cotangents.new_empty(count, len(x), len(cotangents))
        for i in range(len(x)):
            with self.plain.outputs(x[i : i + 1]) as outputs:
                for c, u in enumerate(cotangents):
                    gradient = self.plain.gradient(outputs, u, again=c + 1 < len(cotangents))
                    for k in range(count):
                        product[k, i, c] = dot(gradient, {name: d[k] for name, d in directions.items()})
        return product if cotangent is None else product[:, :, 0]

    def workspace(self, x: Inputs) -> int:
        """Bytes that operations allocate while one row is made: a pass, and the gradients of all cotangents."""
        return self._nbytes + self.width * self.cotangents.element_size()
