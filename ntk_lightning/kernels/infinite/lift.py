"""From a module to the layers of its infinite-width kernel.

Its forward is recorded (:mod:`~ntk_lightning.kernels.infinite.tracing`), and what is recorded is translated, operation
by operation, into a graph (:mod:`~ntk_lightning.kernels.infinite.independence`). An error names the line of the forward
that it is about.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import fx, nn

from ntk_lightning.kernels.infinite.architecture import Graph, Layer
from ntk_lightning.kernels.infinite.graphs import to_layers
from ntk_lightning.kernels.infinite.independence import Builder, Value
from ntk_lightning.kernels.infinite.read_functions import FUNCTIONS, METHODS, NotSupported, apply_module
from ntk_lightning.kernels.infinite.read_modules import supported
from ntk_lightning.kernels.infinite.tracing import Recorded, Refused, at, no_kernel, record

__all__ = ["parse"]

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_VIEWS = {"view", "reshape", "flatten", "squeeze", "contiguous", "dropout"}  # what may return the memory of its input
_VIEW_MODULES = nn.Identity, nn.Flatten, nn.Dropout


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
        raise TypeError(f"The infinite-width kernel is that of an nn.Module, got {net!r}. Supported: {supported()}.")
    try:
        return to_layers(_translate(record(net)))
    except Refused as refused:
        raise TypeError(str(refused)) from None


def _translate(recorded: Recorded) -> Graph:
    """Build the graph of everything that the output needs."""
    builder, graph = Builder(), recorded.graph
    output = next(node for node in graph.nodes if node.op == "output")
    needed = {output}
    for node in reversed(graph.nodes):
        if node in needed:
            needed |= set(node.all_input_nodes)
    _check_in_place(recorded)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = builder.input
        elif node in needed and node is not output:
            values[node] = _value(node, values, builder, recorded)
    result = fx.node.map_arg(output.args[0], values.__getitem__)
    if not isinstance(result, Value):
        raise Refused(f"The network must return one tensor, not {type(result).__name__}: take its kernel without.")
    builder.where = ""
    return builder.graph(result)


def _value(node: fx.Node, values: dict[fx.Node, Any], builder: Builder, recorded: Recorded) -> Any:  # noqa: ANN401
    """What one recorded operation gives."""
    place = recorded.lines[node]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    builder.where = place
    reason = ""
    try:
        match node.op, node.target:
            case "call_module", str(path):
                if len(args) == 1 and not kwargs and isinstance(args[0], Value):
                    builder.where = f"{path}{at(place)}"
                    return apply_module(builder, recorded.modules[path], args[0], path)
            case "call_function", function if function in FUNCTIONS:
                return FUNCTIONS[function](builder, *args, **kwargs)
            case "call_method", str(name) if name in METHODS:
                return METHODS[name](builder, *args, **kwargs)
    except NotSupported as unsupported:
        reason = str(unsupported)
    except TypeError as error:
        if node.op == "call_module":
            raise
        reason = str(error)  # of arguments that the entry does not take
    what = {"call_method": f"Tensor.{node.target}", "get_attr": f"{node.target}, a tensor outside of a layer,"}
    if node.op == "call_module":
        subject = f"{node.target} is {recorded.modules[str(node.target)]}"
    else:
        subject = what.get(node.op, getattr(node.target, "__name__", str(node.target)))
    raise Refused(no_kernel(subject, place, reason))


def _check_in_place(recorded: Recorded) -> None:
    """Refuse to write into what is used again: the later use would see what was written."""
    memory: dict[fx.Node, fx.Node] = {}  # of each value, the first that lies where it does
    order = {node: i for i, node in enumerate(recorded.graph.nodes)}
    for node in recorded.graph.nodes:
        module = recorded.modules.get(str(node.target)) if node.op == "call_module" else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        place = recorded.lines[node]
        if node.op != "call_module" and ((name.endswith("_") and name[:1] != "_") or "out" in node.kwargs):
            raise Refused(no_kernel(f"{name}, which writes in place,", place))
        if node.target is operator.setitem:
            raise Refused(no_kernel("An assignment to a part of a value, which writes in place,", place))
        first = next(iter(node.args), None)
        first = first if isinstance(first, fx.Node) else None
        writes = node.target in _IN_PLACE or bool(getattr(module, "inplace", False)) or _asked_in_place(node)
        if first is not None and (writes or name in _VIEWS or isinstance(module, _VIEW_MODULES)):
            memory[node] = memory.get(first, first)
        if first is None or not writes:
            continue
        names = [
            other for other in recorded.graph.nodes if memory.get(other, other) is memory[node] and other is not node
        ]
        if any(order[user] > order[node] for other in names if order[other] < order[node] for user in other.users):
            raise Refused(
                f"{place or node.target} writes in place into a value that is used again: leave inplace out, and write "
                "x = x + y."
            )


def _asked_in_place(node: fx.Node) -> bool:
    """Whether a function is called with inplace=True."""
    try:
        arguments = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):  # no function, or written in C
        return False
    return bool(arguments.get("inplace", False))
