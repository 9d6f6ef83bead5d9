"""Which layers of a network rules apply to, and which of them reach the outputs through the readout alone.

Both are seen by running one sample: what depends on the values of a sample is no network that vmap takes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer, Ruled
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights, functional_call
from ntk_lightning.networks import NTKConv1d, NTKConv2d, NTKLinear

__all__ = ["candidates", "hooked", "join", "layers_with_rules"]


def join(prefix: str, name: str) -> str:
    """Name of a parameter of a module; the network itself has an empty name."""
    return f"{prefix}.{name}" if prefix else name


@contextmanager
def hooked(
    layers: dict[str, AffineLayer],
    replace: Callable[[str, Tensor, Tensor], Tensor],
    before: Callable[[str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Let ``replace(name, input, output)`` give the layers' outputs in the body, after ``before(name, input)``."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda module, inputs, z: replace(name, inputs[0], z)

    def pre_hook(name: str, before: Callable[[str, Tensor], None]) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, inputs: before(name, inputs[0])

    handles = [layer.module.register_forward_hook(hook(name)) for name, layer in layers.items()]
    if before is not None:
        handles += [layer.module.register_forward_pre_hook(pre_hook(name, before)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_with_rules(function: NetworkFunction, tensors: Weights, sample: Inputs) -> Ruled:
    """Find the layers to which rules apply, by running one sample.

    Args:
        function: The network and its trainable parameters.
        tensors: All parameters and buffers.
        sample: One sample.

    Returns:
        The layers that are called once, on one sample, and whose parameters nothing else reads.
    """
    layers = candidates(function)
    calls: Counter[str] = Counter()
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def without_parameters(name: str, a: Tensor, z: Tensor) -> Tensor:
        # The output keeps its value and its dependence on the input a, but not that on the layer's own weight and bias.
        # A gradient that still reaches those comes from another use of them: a tied layer, F.linear(h, layer.weight).
        calls[name] += 1
        axes = layers[name].module.weight.dim() if layers[name].convolves else z.dim()
        if len(z) == 1 and z.dim() == axes and len(a) == 1:
            shapes[name] = tuple(a.shape), tuple(z.shape)
        return z.detach() + 0 * a.sum() if a.is_floating_point() else z.detach()

    leaves = {name: tensors[name].clone().requires_grad_() for name in function.trainable}
    buffers = {name: tensors[name].clone() for name, _ in function.net.named_buffers()}  # it may write into them
    with torch.enable_grad(), hooked(layers, without_parameters):
        outputs = function.select(functional_call(function.net, {**tensors, **leaves, **buffers}, *sample.arguments()))
        summed = outputs.sum()
    used = set()
    if summed.requires_grad:
        gradients = torch.autograd.grad(summed, list(leaves.values()), allow_unused=True)
        used = {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}

    def alone(name: str) -> bool:
        return calls[name] == 1 and used.isdisjoint(join(name, key) for key in ("weight", "bias"))

    shapes = {name: both for name, both in shapes.items() if alone(name)}
    found = {name: layer for name, layer in layers.items() if name in shapes}
    readout, last = None, frozenset[str]()
    if outputs.numel() > 1 and not isinstance(function.output, int):
        buffers = {name: tensors[name].clone() for name in buffers}
        trace = _ChannelTrace(found)
        with torch.enable_grad(), trace.following():
            returned = functional_call(function.net, {**tensors, **leaves, **buffers}, *sample.arguments())
            outputs = function.select(returned)
        readout, last = trace.last_layers(outputs)
    return Ruled(shapes, readout, last, outputs.numel())


def candidates(function: NetworkFunction) -> dict[str, AffineLayer]:
    """Find affine layers and embeddings without hooks that own plain, real, untied parameters.

    Args:
        function: The network and its trainable parameters.

    Returns:
        The layers by name, without shapes.
    """
    net = function.net
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    layers = {}
    for name, module in net.named_modules():
        if not _has_rule(module) or module._forward_hooks or module._forward_pre_hooks:
            continue
        own = dict(module.named_parameters())
        plain = all(uses[id(p)] == 1 and p.is_floating_point() for p in own.values())
        if "weight" in own and own.keys() <= {"weight", "bias"} and plain:
            ntk = isinstance(module, NTKLinear | NTKConv1d | NTKConv2d)
            scales = {"weight": module.weight_scale if ntk else 1.0, "bias": module.bias_scale if ntk else 1.0}
            trained = (scales[key] if join(name, key) in function.trainable else None for key in ("weight", "bias"))
            weight, bias = trained
            if weight is not None or bias is not None:
                layers[name] = AffineLayer(module, weight, bias)
    return layers


def _has_rule(module: nn.Module) -> bool:
    """Whether it is affine at every position, by its type."""
    if type(module) is nn.Embedding:
        scaled: bool = module.scale_grad_by_freq
        return not scaled and module.max_norm is None  # else its forward pass changes the weight, or mixes samples
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return bool(module.groups == 1)
    return type(module) in (nn.Linear, NTKLinear, NTKConv1d, NTKConv2d)


# Operations by name that act on every channel by itself, the same for all pixels or not: (1, channels, ...) to the like
_POINTWISE = {
    *("relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid", "softplus", "erf", "sin", "cos", "abs", "exp"),
    *(
        "hardtanh",
        "threshold",
        "clamp",
        "clamp_min",
        "mish",
        "hardswish",
        "hardsigmoid",
        "neg",
        "square",
        "pow",
        "sign",
    ),
    *("add", "sub", "mul", "div", "clone", "detach", "alias", "native_dropout", "_to_copy", "where", "gt"),
    *("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "miopen_batch_norm"),
    *("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d"),
}
_RESHAPES = {"view", "_reshape_alias", "_unsafe_view", "reshape", "squeeze", "unsqueeze"}
_SUMS = {"mean", "sum", "amax"}  # over pixels
_SAME = {*_RESHAPES, "clone", "detach", "alias", "_to_copy"}  # keep all values in their order


class _ChannelTrace(TorchDispatchMode):
    """Follows the outputs of layers through a forward pass, as long as every channel stays by itself.

    Args:
        layers: To be followed.
    """

    def __init__(self, layers: dict[str, AffineLayer]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no signature
        self._layers = layers
        self._inside: str | None = None  # the layer that computes
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._channels: dict[int, frozenset[str]] = {}  # layers of which a tensor is a function channel by channel
        self._same: dict[int, str] = {}  # the layer whose output a tensor is, but for its shape
        self._readers: defaultdict[str, set[str | None]] = defaultdict(set)  # layers that read that; None: all else

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the layers of a network that is called in the body."""

        def enter(name: str, a: Tensor) -> None:
            for source in self._channels.get(id(a), ()):
                self._readers[source].add(name if a.dim() == 2 else None)
            self._inside = name

        def leave(name: str, a: Tensor, z: Tensor) -> Tensor:
            self._inside = None
            if z.dim() == 2 or self._layers[name].convolves:
                self._alive.append(z)
                self._channels[id(z)], self._same[id(z)] = frozenset([name]), name
            return z

        with ExitStack() as stack:
            stack.enter_context(self)
            stack.enter_context(hooked(self._layers, leave, enter))
            yield

    def last_layers(self, outputs: Tensor) -> tuple[str | None, frozenset[str]]:
        """The readout, whose output the network's outputs are, and the layers that only it reads."""
        readout = self._same.get(id(outputs))
        if readout is None or self._layers[readout].convolves or self._readers[readout]:
            return None, frozenset()
        channels = self._layers[readout].d_in
        last = {name for name, readers in self._readers.items() if readers == {readout}}
        return readout, frozenset(name for name in last if self._layers[name].d_out == channels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation, and note which layers' channels it keeps apart."""
        out = func(*args, **(kwargs or {}))
        if self._inside is not None:
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        sources = frozenset[str]().union(*(self._channels.get(id(t), ()) for t in read))
        if not sources:
            return out
        name, made = func._opname.rstrip("_"), out[0] if isinstance(out, tuple) else out
        followed = [t for t in read if id(t) in self._channels]
        apart = isinstance(made, Tensor) and all(_keeps_channels(name, t, made, args) for t in followed)
        if func._schema.is_mutable:  # what it writes into must be followed, under one name only
            storage = made.untyped_storage().data_ptr()
            sharing = {id(t) for t in self._alive if t.untyped_storage().data_ptr() == storage}
            apart = apart and sharing == {id(made)}
        if apart:
            self._alive.append(made)
            self._channels[id(made)] = sources
            if name in _SAME and id(read[0]) in self._same:
                self._same[id(made)] = self._same[id(read[0])]
            else:  # another value, perhaps written in the place of the former
                self._same.pop(id(made), None)
        else:
            for source in sources:
                self._readers[source].add(None)
        return out


def _keeps_channels(name: str, t: Tensor, made: Tensor, args: Sequence[Any]) -> bool:
    """Whether an operation that reads t (1, channels, ...) keeps its channels apart and in their places."""
    if made.dim() < 2 or made.shape[:2] != t.shape[:2]:
        return False
    if name in _RESHAPES:
        return made.numel() == t.numel()
    if name in _SUMS:
        axes = args[1] if len(args) > 1 else None
        return isinstance(axes, list | tuple) and all(axis % t.dim() >= 2 for axis in axes)
    return name in _POINTWISE and made.dim() == t.dim()
