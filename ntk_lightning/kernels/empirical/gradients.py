"""Per-sample parameter gradients of any network as flat rows, and the inner products of such rows.

A fully connected layer z = s W a + t b of one vector a per sample has the gradient (s g a^T, t g) with g = df/dz, so

    <grad f(x), grad f(x')> = <g, g'> <(s a, t), (s a', t)>:

its row holds both factors and never their product. All other parameters are differentiated as they are.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.networks import NTKLinear

__all__ = ["GradientRows"]

_Weights = dict[str, Tensor]


@dataclass(frozen=True)
class _Affine:
    """A layer kept in factors, with the scales s and t of its weight and bias; None where not trained."""

    module: nn.Linear | NTKLinear
    weight: float | None
    bias: float | None

    @property
    def num_inputs(self) -> int:
        """Entries of (s a, t)."""
        return (self.weight is not None) * self.module.in_features + (self.bias is not None)


class GradientRows:
    """The rows of a network's gradients: how wide they are, how to make them, how to multiply them.

    Args:
        net: Maps (n, ...) to (n,) or (n, C).
        trainable: Names of the parameters to differentiate.
        sample: One input (1, ...); its dtype and device are those of the computation.
        output: Index of the one output to differentiate, or None for all.
        full: Keep products of different outputs apart, instead of the mean of those of equal ones.

    Raises:
        ValueError: The network cannot be differentiated sample by sample, or has no such output.
    """

    def __init__(
        self, net: nn.Module, trainable: tuple[str, ...], sample: Tensor, output: int | None, full: bool
    ) -> None:
        _check_modes(net)
        tensors = {name: _usable(t, sample.dtype) for name, t in (*net.named_parameters(), *net.named_buffers())}
        self.net, self.trainable = net, {name: tensors[name] for name in trainable}
        self.affine, num_outputs = _probe(net, tensors, trainable, sample)
        if output is not None and not 0 <= output < num_outputs:
            raise ValueError(
                f"output must be one of the network's {num_outputs}, 0 to {num_outputs - 1}; got {output}."
            )
        inside = {_join(layer, name) for layer in self.affine for name in ("weight", "bias")}
        self.weights = {name: tensor for name, tensor in self.trainable.items() if name not in inside}
        self.fixed = {name: tensor for name, tensor in tensors.items() if name not in self.weights}
        self.taps = {name: sample.new_zeros(1, layer.module.out_features) for name, layer in self.affine.items()}
        one_hot = torch.eye(num_outputs, dtype=sample.dtype, device=sample.device)
        self.cotangents = one_hot if output is None else one_hot[output : output + 1]
        self.full, self.groups = full, len(self.cotangents) if full else 1
        self.cotangents = self.cotangents / (len(self.cotangents) / self.groups) ** 0.5

        self.width, self._dense = self._groups(0, sum(weight.numel() for weight in self.weights.values()))
        self._factors = []
        for layer in self.affine.values():
            inputs = slice(self.width, self.width + layer.num_inputs)
            self.width, gradients = self._groups(inputs.stop, layer.module.out_features)
            self._factors.append((inputs, gradients))

    def fill(self, out: Tensor, x: Tensor) -> None:
        """Write the rows of inputs (n, ...) into ``out`` (n, width)."""
        torch.cat([piece.flatten(1) for piece in vmap(self._row)(x)], 1, out=out)

    def contract(self, a: Tensor, b: Tensor, inner: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Inner products of rows, of the shape that ``inner`` gives, (..., C, C) where outputs are kept apart."""

        def block(r: int, s: int) -> Tensor:
            total = inner(a[:, self._dense[r]], b[:, self._dense[s]])
            for inputs, gradients in self._factors:
                total += inner(a[:, gradients[r]], b[:, gradients[s]]).mul_(inner(a[:, inputs], b[:, inputs]))
            return total

        if not self.full:
            return block(0, 0)
        rows = [torch.stack([block(r, s) for s in range(self.groups)], -1) for r in range(self.groups)]
        return torch.stack(rows, -2)

    def workspace(self, x: Tensor) -> int:
        """Bytes that operations allocate while the rows of x are made, as if none were freed before the end."""
        meter = _Meter()
        with meter:
            self.fill(x.new_empty(len(x), self.width), x)
        return meter.nbytes

    def predict(self, weights: _Weights, x: Tensor) -> Tensor:
        """Outputs (n, C) as a function of the trainable weights, one sample at a time as in the rows."""

        def single(sample: Tensor) -> Tensor:
            out: Tensor = functional_call(self.net, {**self.fixed, **weights}, (sample[None],))
            return out.reshape(-1)

        outputs: Tensor = vmap(single)(x)
        return outputs

    def _groups(self, start: int, width: int) -> tuple[int, list[slice]]:
        """Where the outputs' parts of a row lie, next to each other where their products are summed; and the end."""
        width *= len(self.cotangents) // self.groups
        edges = [start + group * width for group in range(self.groups + 1)]
        return edges[-1], [slice(*pair) for pair in itertools.pairwise(edges)]

    def _row(self, sample: Tensor) -> list[Tensor]:
        """Pieces of one row, in the order in which the constructor lays them out."""

        def f(weights: _Weights, taps: _Weights) -> tuple[Tensor, dict[str, Tensor]]:
            inputs: dict[str, Tensor] = {}

            def tap(name: str, a: Tensor, z: Tensor) -> Tensor:
                inputs[name] = a.clone()
                return z + taps[name].reshape(z.shape)

            with _hooked(self.affine, tap):
                out = functional_call(self.net, {**self.fixed, **weights}, (sample[None],))
            return out.reshape(-1), inputs

        linearized: Any = vjp(f, self.weights, self.taps, has_aux=True)
        _, pull, inputs = linearized
        pulled = [pull(cotangent) for cotangent in self.cotangents]
        pieces = [gradient.flatten() for weights, _ in pulled for gradient in weights.values()]
        for name, layer in self.affine.items():
            pieces += [] if layer.weight is None else [layer.weight * inputs[name].flatten()]
            pieces += [] if layer.bias is None else [sample.new_full((1,), layer.bias)]
            pieces += [taps[name].flatten() for _, taps in pulled]
        return pieces


class _Meter(TorchDispatchMode):
    """Adds up the storage of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no signature
        self.nbytes: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation, whatever its arguments, and count what it made."""
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {t.untyped_storage().data_ptr(): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.nbytes += sum(t.untyped_storage().nbytes() for pointer, t in made.items() if pointer not in known)
        return out


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _usable(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to the precision of the inputs; copy inference tensors, which autograd refuses."""
    tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    return tensor.clone() if tensor.is_inference() else tensor


def _check_modes(net: nn.Module) -> None:
    """Refuse layers that mix samples or draw random numbers."""
    for name, module in net.named_modules():
        what = f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{what} normalizes by statistics of the batch, so that a sample has no gradient of its own: "
                "make the kernel of net.eval(), with running statistics."
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{what} draws random numbers: make the kernel of net.eval().")


@contextmanager
def _hooked(layers: dict[str, _Affine], replace: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let ``replace(name, input, output)`` give the layers' outputs while the body runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda module, inputs, z: replace(name, inputs[0], z)

    handles = [layer.module.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _candidates(net: nn.Module, trainable: tuple[str, ...]) -> dict[str, _Affine]:
    """Fully connected layers that own plain, untied parameters."""
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    layers = {}
    for name, module in net.named_modules():
        if type(module) not in (nn.Linear, NTKLinear) or module._forward_hooks or module._forward_pre_hooks:
            continue
        own = dict(module.named_parameters())
        if "weight" in own and own.keys() <= {"weight", "bias"} and all(uses[id(p)] == 1 for p in own.values()):
            ntk = isinstance(module, NTKLinear)
            scales = {
                "weight": module.weight_std / module.fan_in**0.5 if ntk else 1.0,
                "bias": module.bias_std if ntk else 1.0,
            }
            weight, bias = (scales[key] if _join(name, key) in trainable else None for key in ("weight", "bias"))
            if weight is not None or bias is not None:
                layers[name] = _Affine(module, weight, bias)
    return layers


def _probe(
    net: nn.Module, tensors: _Weights, trainable: tuple[str, ...], sample: Tensor
) -> tuple[dict[str, _Affine], int]:
    """Run one sample to count the outputs and to find the layers whose gradients have two factors."""
    layers = _candidates(net, trainable)
    vectors: Counter[str] = Counter()

    def cut(name: str, a: Tensor, z: Tensor) -> Tensor:
        vectors[name] += a.numel() // layers[name].module.in_features
        return z.detach() + 0 * a.sum()  # reaches its input, not its parameters

    leaves = {name: tensors[name].clone().requires_grad_() for name in trainable}
    with torch.enable_grad(), _hooked(layers, cut):
        out = functional_call(net, {**tensors, **leaves}, (sample,))
        summed = out.sum() if isinstance(out, Tensor) else torch.zeros(())
    if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != 1 or out.numel() == 0:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"The network must map (n, ...) to (n,) or (n, outputs); one sample gave {got}.")
    used = set()
    if summed.requires_grad:
        gradients = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
        used = {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def alone(name: str) -> bool:
        return vectors[name] == 1 and used.isdisjoint(_join(name, key) for key in ("weight", "bias"))

    return {name: layer for name, layer in layers.items() if alone(name)}, out.numel()
