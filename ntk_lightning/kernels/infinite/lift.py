"""From a module to the layers of its infinite-width kernel, by tracing its forward with torch.fx.

The forward runs once on a symbol instead of data. Supported modules are recorded as they are, all others are entered,
and so is what they call in turn; what is recorded is translated, operation by operation, into a graph
(:mod:`~ntk_lightning.kernels.infinite.independence`). An error names the line of the forward that it is about.
"""

from __future__ import annotations

import linecache
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ntk_lightning.kernels.infinite.architecture import Layer, to_layers
from ntk_lightning.kernels.infinite.independence import Builder, Value
from ntk_lightning.kernels.infinite.read_functions import FUNCTIONS, METHODS, NotSupported, apply_module
from ntk_lightning.kernels.infinite.read_modules import known_class, supported

__all__ = ["parse"]

_FOREIGN = tuple(f"{Path(module.__file__ or '').parent}/" for module in (torch, sys.modules["ntk_lightning"]))
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}


class _Refused(Exception):
    """A network cannot be lifted; the message is complete."""


def parse(net: nn.Module) -> tuple[Layer, ...]:
    """Translate a network into its layers, or say why it has no infinite-width kernel here.

    Args:
        net: Any module whose forward maps one tensor to one by supported operations. Layers without parameters may
            occur repeatedly.

    Returns:
        The layers in order, identities left out; a single graph where they are no chain with sums.

    Raises:
        TypeError: An operation has no closed form; the message names it and its line, and lists what is supported. Or
            what a module computes is changed by a subclass, a hook or a parametrization, or weights are used twice.
        ValueError: The order of the operations has no closed form (an activation of something that is not Gaussian,
            say), or the network has no affine layer.

    Example:
        >>> from ntk_lightning.networks import NTKLinear
        >>> parse(nn.Sequential(NTKLinear(3, 5, weight_std=1.0), nn.ReLU(), NTKLinear(5, 1, weight_std=1.0)))
        (Linear(weight_std=1.0, bias_std=0.0), Activation(name='relu', negative_slope=0.0), Linear(weight_std=1.0, \
bias_std=0.0))
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"The infinite-width kernel is that of an nn.Module, got {net!r}.")
    tracer = _Tracer()
    try:
        return to_layers(_translate(_trace(net, tracer), tracer))
    except _Refused as refused:
        raise TypeError(str(refused)) from None


def _trace(net: nn.Module, tracer: _Tracer) -> fx.Graph:
    """Record the forward."""
    try:
        return tracer.trace(_Root(net))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        frames = reversed(list(traceback.walk_tb(error.__traceback__)))  # from the innermost on, as in _until_root
        place = _place(_last(frames))
        raise _Refused(
            f"{place or 'The forward of the network'} cannot be followed without data ({str(error).splitlines()[0]}): "
            "forward must map one tensor to one, without decisions that depend on its values or sizes. "
            f"Supported: {supported()}."
        ) from error


class _Root(nn.Module):
    """Holds the network, so that every module of it has a path that starts with "net"."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> Any:  # noqa: ANN401 - what the network returns
        return self.net(x)


class _Symbol(fx.Proxy):
    """A value in a traced forward; torch.fx takes x += y for x = x + y, which is something else."""

    def __iadd__(self, other: Any) -> fx.Proxy:  # noqa: ANN401
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:  # noqa: ANN401
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:  # noqa: ANN401
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:  # noqa: ANN401
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[..., Any], other: Any) -> fx.Proxy:  # noqa: ANN401
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    """Records a forward, and the line of every operation; ``modules`` are the supported ones by their path."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: dict[str, nn.Module] = {}
        self.lines: dict[fx.Node, str] = {}
        self._owners: dict[int, str] = {}  # paths of the parameters found so far, by id

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401
        node = super().create_node(*args, **kwargs)
        self.lines[node] = _place(_last(_until_root(sys._getframe(1))))
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        path = self.path_of_module(m)
        place = _place(_last(_until_root(sys._getframe(1))))
        dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded before something is compiled
        compiled = dynamo is not None and isinstance(m, dynamo.OptimizedModule)
        known = known_class(m)
        _check_hooks(m, path, "compiled module" if compiled else (known or type(m)).__name__)
        if compiled:
            return self.call_module(m._orig_mod, m._orig_mod.forward, args, kwargs)  # type: ignore[union-attr, arg-type]
        if known is None and not super().is_leaf_module(m, path):
            return m.forward(*args, **kwargs)
        if known is None or isinstance(m.forward, nn.Module):
            raise _Refused(_no_kernel(f"{path} is {m}", place))
        if getattr(m.forward, "__func__", None) is not known.forward:
            raise _Refused(
                f"{path} is a {type(m).__name__} with a forward of its own, not that of {known.__name__}: its "
                f"infinite-width kernel is unknown. Build it of supported layers: {supported()}."
            )
        for parameter in m.parameters(recurse=False):
            owner = self._owners.get(id(parameter))
            if owner is not None:
                what = f"{path} is used twice" if owner == path else f"{path} and {owner} share a parameter"
                raise _Refused(
                    f"{what}{_at(place)}: the infinite-width limit with tied weights is not supported. Give each layer "
                    "its own."
                )
            self._owners[id(parameter)] = path
        self.modules[path] = m
        return self.create_proxy("call_module", path, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).replace("._orig_mod", "")


def _translate(graph: fx.Graph, tracer: _Tracer) -> Any:  # noqa: ANN401
    """Build the graph of everything that the output needs."""
    builder = Builder()
    output = next(node for node in graph.nodes if node.op == "output")
    needed = {output}
    for node in reversed(graph.nodes):
        if node in needed:
            needed |= set(node.all_input_nodes)
    _check_in_place(graph, tracer)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = builder.input
        elif node in needed and node is not output:
            values[node] = _value(node, values, builder, tracer)
    result = fx.node.map_arg(output.args[0], values.__getitem__)
    if not isinstance(result, Value):
        raise _Refused(f"The network must return one tensor, not {type(result).__name__}: take its kernel without.")
    builder.where = ""
    return builder.graph(result)


def _value(node: fx.Node, values: dict[fx.Node, Any], builder: Builder, tracer: _Tracer) -> Any:  # noqa: ANN401
    """What one recorded operation gives."""
    place = tracer.lines[node]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    builder.where = place
    reason = ""
    try:
        match node.op, node.target:
            case "call_module", str(path):
                if len(args) == 1 and not kwargs and isinstance(args[0], Value):
                    builder.where = f"{path}{_at(place)}"
                    return apply_module(builder, tracer.modules[path], args[0], path)
            case "call_function", function if function in FUNCTIONS:
                return FUNCTIONS[function](builder, *args, **kwargs)
            case "call_method", str(name) if name in METHODS:
                return METHODS[name](builder, *args, **kwargs)
    except NotSupported as unsupported:
        reason = str(unsupported)
    what = {"call_method": f"Tensor.{node.target}", "get_attr": f"{node.target}, a tensor outside of a layer,"}
    if node.op == "call_module":
        subject = f"{node.target} is {tracer.modules[str(node.target)]}"
    else:
        subject = what.get(node.op, getattr(node.target, "__name__", str(node.target)))
    raise _Refused(_no_kernel(subject, place, reason))


def _check_in_place(graph: fx.Graph, tracer: _Tracer) -> None:
    """Refuse to write into what is used again: the later use would see what was written."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        module = tracer.modules.get(str(node.target)) if node.op == "call_module" else None
        writes = node.target in _IN_PLACE or bool(getattr(module, "inplace", False) or node.kwargs.get("inplace"))
        if (str(node.target).endswith("_") and node.op == "call_method") or node.target is operator.setitem:
            raise _Refused(_no_kernel(f"{node.target}, which writes in place,", tracer.lines[node]))
        if not writes or not isinstance(node.args[0], fx.Node):
            continue
        written = {node.args[0]}
        for other in graph.nodes:  # names of the same memory
            module = tracer.modules.get(str(other.target)) if other.op == "call_module" else None
            alias = other.target in ("view", "reshape", "flatten", "contiguous") or other.target is torch.flatten
            if (alias or isinstance(module, nn.Identity | nn.Flatten | nn.Dropout)) and other.args[0] in written:
                written.add(other)
        if any(order[user] > order[node] for value in written for user in value.users):
            raise _Refused(
                f"{tracer.lines[node] or node.target} writes in place into a value that is used again: leave inplace "
                "out, and write x = x + y."
            )


def _check_hooks(module: nn.Module, path: str, kind: str) -> None:
    if module._forward_hooks or module._forward_pre_hooks or is_parametrized(module):
        raise _Refused(
            f"{path} has forward hooks or parametrizations, which can change what a {kind} computes: remove "
            "them, or make the kernel of a network without."
        )


def _no_kernel(subject: str, place: str, reason: str = "") -> str:
    return (
        f"{subject}{_at(place)}{',' if ' is ' in subject else ''} has no infinite-width kernel here"
        f"{': ' if reason else ''}{reason}. Supported: {supported()}."
    ).replace(", has no", ", which has no")


def _at(place: str) -> str:
    return f" ({place})" if place else ""


def _until_root(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    """Frames from the innermost to that of the holder of the network, with their lines."""
    while frame is not None and frame.f_code is not _Root.forward.__code__:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _last(frames: Iterator[tuple[FrameType, int]]) -> tuple[CodeType, int] | None:
    """Of frames from the innermost on, the first that is the user's own."""
    own = ((frame.f_code, line) for frame, line in frames if not frame.f_code.co_filename.startswith(_FOREIGN))
    return next(own, None)


def _place(found: tuple[CodeType, int] | None) -> str:
    """A line of code in words."""
    if found is None:
        return ""
    code, line = found
    text = linecache.getline(code.co_filename, line).strip()
    return f"{code.co_filename}:{line}{f', `{text}`' if text else ''}"
