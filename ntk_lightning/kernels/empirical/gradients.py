"""Per-sample gradients of many samples at once, by torch.func.vmap of a vector-Jacobian product."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ntk_lightning.kernels.empirical.derivatives import jvp_by_reverse
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_gradients import cotangents_of, factors_of, write_gradients
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer, Ruled
from ntk_lightning.kernels.empirical.layer_search import candidates, hooked, join, layers_with_rules
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights, functional_call, usable
from ntk_lightning.kernels.empirical.rows import Rows

__all__ = ["GradientRows"]

_Leaves = tuple[Tensor, ...]  # of one sample, without its dimension


class GradientRows(Rows):
    """Rows made by vmap, with affine layers by the rules of ``layer_rules`` where that is possible.

    Args:
        function: What is differentiated.
        sample: One sample.
        per_layer: Keep the kernels of modules apart.
        by_branch: Let the network ask for the truth of a tensor: samples that answer alike are taken together.
        dense: Make all gradients by vmap, no layer by a rule.
        batched: Pull the cotangents of all outputs back in one pass instead of one after another.
        ruled: The layers to which rules apply, and the number of outputs, where known.
        keep: Keep layers' inputs and cotangents, where that is less than their gradients.
        partners: Samples that a sample is multiplied with.
    """

    one_by_one = False

    def __init__(
        self,
        function: NetworkFunction,
        sample: Inputs,
        per_layer: bool = False,
        by_branch: bool = False,
        dense: bool = False,
        batched: bool = False,
        ruled: Ruled | None = None,
        keep: bool = False,
        partners: int = 128,
    ) -> None:
        net, self.by_branch, self.batched, self.forward_mode = function.net, by_branch, batched, True
        tensors = {name: usable(t, function.dtype) for name, t in (*net.named_parameters(), *net.named_buffers())}
        self.ruled = layers_with_rules(function, tensors, sample) if ruled is None else ruled
        self._make: Callable[..., GradientRows] = partial(
            GradientRows, function, sample, per_layer, by_branch, dense, batched, self.ruled, partners=partners
        )
        layers = {} if by_branch or dense else candidates(function)  # a branch may leave one out
        layers = {name: self._completed(function, layer, name, tensors) for name, layer in layers.items()}
        count = 1 if isinstance(function.output, int) else self.ruled.num_outputs
        layers = {
            name: layer
            for name, layer in layers.items()
            if layer.shape and layer.way(count, function.full, keep, partners) != "vmap"
        }
        inside = {join(layer, name) for layer in layers for name in ("weight", "bias")}
        self.trainable = {name: tensors[name] for name in function.trainable}
        weights = {name: tensor for name, tensor in self.trainable.items() if name not in inside}
        super().__init__(function, self.ruled.num_outputs, weights, layers, per_layer, keep, partners)
        self.fixed = {name: tensor for name, tensor in tensors.items() if name not in weights}
        # Zeros that are added to the output z of a layer with a rule: the gradient in them is the cotangent g = df/dz.
        self.shifts = {name: tensors[join(name, "weight")].new_zeros(layer.shape) for name, layer in layers.items()}

    def _completed(self, function: NetworkFunction, layer: AffineLayer, name: str, tensors: Weights) -> AffineLayer:
        """The layer with its shapes where rules apply to it, and for the trace with what weighs its channels."""
        if name not in self.ruled.shapes:
            return layer
        input_shape, shape = self.ruled.shapes[name]
        unit = None
        if self.ruled.readout is not None and not function.full:
            if name == self.ruled.readout:  # its cotangents are one-hot
                unit = torch.eye(self.ruled.num_outputs, dtype=function.dtype, device=function.device)
            elif name in self.ruled.last:
                rows = tensors[join(self.ruled.readout, "weight")]  # r_co; a channel that no output reads has none
                unit = rows / torch.where((norms := rows.norm(dim=0)) > 0, norms, 1)
        return replace(layer, input_shape=input_shape, shape=shape, unit=unit)

    def layer_by_layer(self) -> Rows | None:
        """Rows of the same gradients that keep layers' inputs and cotangents, if there are any that hold less so."""
        rows = self._make(keep=True)
        rows.measured, rows.kept = self.measured, self.kept
        return rows if rows.keeps else None

    def fill(self, out: Tensor, x: Inputs) -> None:
        """Write the rows of n samples into ``out`` (n, width)."""
        count = len(self.cotangents)
        made = iter(self._vmap(partial(self._pull, x), x))
        inputs = {name: next(made) for name in self.layers}  # a, (n, ...)
        cotangents = {name: next(made) for name in self.layers}  # g, (n, C, ...)
        gradients = {name: next(made) for name in self.weights}  # (n, C, ...)
        for part in self.parts:
            own, start = out[:, part.own].unflatten(1, (count, -1)) if part.weights else out, 0
            for name in part.weights:
                g = gradients[name]
                flat = (torch.view_as_real(g) if g.is_complex() else g).flatten(2)
                own[:, :, start : start + flat.shape[2]] = flat
                start += flat.shape[2]
            for name, (blocks, bias) in part.products.items():
                layer = self.layers[name]
                g = cotangents_of(layer, cotangents[name]).flatten(1, 2)  # (n, C d_out, T)
                weight = None
                if layer.weight is not None:
                    weight = [out[:, block].unflatten(1, (g.shape[1], -1)) for block in blocks]
                write_gradients(layer, inputs[name], g, weight, None if layer.bias is None else out[:, bias])
            for name, (columns, others) in part.factors.items():
                layer = self.layers[name]
                a, g = factors_of(layer, inputs[name], cotangents_of(layer, cotangents[name]), self.full)
                out[:, columns] = a.flatten(1)
                out[:, others] = g.flatten(1)
            for name, (columns, others) in part.kept.items():
                out[:, columns] = inputs[name].flatten(1)
                out[:, others] = cotangents_of(self.layers[name], cotangents[name]).flatten(1)

    def vjp(self, x: Inputs, cotangents: Tensor) -> Weights:
        """J(x)^T u for cotangents u (k, n, C) of all outputs, summed over the samples: (k, ...)."""
        pull = vjp(lambda weights: self._predict(weights, x), self.trainable)[1]
        pulled: Weights = _each(lambda u: pull(u)[0], cotangents)
        return pulled

    def jvp(self, x: Inputs, directions: Weights, cotangent: Tensor | None) -> Tensor:
        """J(x) d for directions d (k, ...), (k, n, C); or their inner products with a cotangent (C,), (k, n)."""

        def f(weights: Weights) -> Tensor:
            return self._predict(weights, x)

        if self.forward_mode:
            with torch.enable_grad():  # else torch.no_grad() of the network could not be told from that of the kernel
                product: Tensor = _each(lambda d: jvp(f, (self.trainable,), (d,))[1], directions)
        else:
            push = jvp_by_reverse(f, self.trainable, self.cotangents.new_empty(len(x), self.num_outputs))
            product = _each(push, directions)
        return product if cotangent is None else product @ cotangent

    def _predict(self, weights: Weights, x: Inputs) -> Tensor:
        """Outputs (n, C) as a function of the trainable weights, one sample at a time as in the rows."""

        def single(*leaves: Tensor) -> tuple[Tensor]:
            return (self._outputs({**self.fixed, **weights}, x, leaves),)

        outputs: Tensor = self._vmap(single, x)[0]
        return outputs

    def _outputs(self, tensors: Weights, x: Inputs, leaves: _Leaves) -> Tensor:
        """Outputs (C,) of one sample of x."""
        arguments = x.arguments(tuple(leaf[None] for leaf in leaves))
        returned: Any = functional_call(self.function.net, tensors, *arguments)
        outputs: Tensor = self.function.select(returned).reshape(-1)
        return outputs

    def _pull(self, x: Inputs, *leaves: Tensor) -> list[Tensor]:
        """For one sample of x the inputs and cotangents of layers with a rule, and gradients of the other weights."""

        def f(weights: Weights, shifts: Weights) -> tuple[Tensor, Weights]:
            inputs: Weights = {}  # a of every layer with a rule

            def shifted(name: str, a: Tensor, z: Tensor) -> Tensor:
                inputs[name] = a.clone()
                return z + shifts[name]

            with hooked(self.layers, shifted):
                return self._outputs({**self.fixed, **weights}, x, leaves), inputs

        differentiated: Any = vjp(f, self.weights, self.shifts, has_aux=True)
        _, vector_jacobian, inputs = differentiated
        # u^T J for every cotangent u: the gradients of u^T f in the weights, and g of the layers with a rule
        if self.batched:
            pulled = vmap(vector_jacobian)(self.cotangents)
        else:
            passes = [vector_jacobian(cotangent) for cotangent in self.cotangents]
            pulled = [{name: torch.stack([p[i][name] for p in passes]) for name in passes[0][i]} for i in range(2)]
        gradients, cotangents = pulled
        return [
            *(inputs[name] for name in self.layers),
            *(cotangents[name] for name in self.layers),
            *(gradients[name] for name in self.weights),
        ]

    def _vmap(self, f: Callable[..., Any], x: Inputs) -> Any:  # noqa: ANN401 - a tuple or list of tensors
        """Apply f to every sample; where samples take different branches, to each group that goes together."""
        leaves = [leaf.contiguous() for leaf in x.leaves]  # not all operations have a rule for others
        if not self.by_branch:
            with _without_advice():
                return vmap(f)(*leaves)
        try:
            with _CommonBranch(), _without_advice():
                return vmap(f)(*leaves)
        except _BranchesDiffer as differ:
            groups = [(differ.answers == answer).nonzero()[:, 0] for answer in differ.answers.unique()]
        results = [self._vmap(f, x[group]) for group in groups]
        order = torch.cat(groups).argsort()
        return [torch.cat(pieces)[order] for pieces in zip(*results, strict=True)]


def _each(f: Callable[[Any], Any], vectors: Any) -> Any:  # noqa: ANN401 - a tensor, or weights
    """Apply a function to k vectors at once; to a single one without vmap, which not every operation goes through."""
    if len(tree_leaves(vectors)[0]) == 1:
        return tree_map(lambda t: t[None], f(tree_map(lambda t: t[0], vectors)))
    with _without_advice():
        return vmap(f)(vectors)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep back torch's words on operations without a rule for vmap, which are right all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


class _BranchesDiffer(Exception):
    """Samples of one call of vmap answer a question of the network differently.

    Args:
        answers: One a sample, (n,).
    """

    def __init__(self, answers: Tensor) -> None:
        super().__init__("Samples take different branches.")
        self.answers = answers


class _CommonBranch(TorchFunctionMode):
    """While active, a network within vmap may turn a bool or an integer into Python's if it is equal for all samples.

    An example is the question ``padding_mask.all()`` of transformers.
    """

    _QUESTIONS = (Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.item)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Answer such a question for all samples; do anything else as always."""
        if func in self._QUESTIONS and not args[0].is_floating_point():
            functorch, answers, batched = torch._C._functorch, args[0], False
            while functorch.is_functorch_wrapped_tensor(answers):
                batched |= functorch.is_batchedtensor(answers)
                answers = functorch.get_unwrapped(answers)
            if batched and answers.dim() == 1:
                if (answers != answers[0]).any():
                    raise _BranchesDiffer(answers)
                return func(answers[0])
        return func(*args, **(kwargs or {}))
