"""The forward of a module, recorded by torch.fx: every operation and the line of code that it stands in.

The forward runs once on a symbol instead of data. Supported modules are recorded as they are, all others are entered,
and so is what they call in turn.
"""

from __future__ import annotations

import linecache
import operator
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ntk_lightning.kernels.infinite.read_modules import known_class, supported

__all__ = ["Recorded", "Refused", "at", "no_kernel", "record"]

_FOREIGN = tuple(f"{Path(module.__file__ or '').parent}/" for module in (torch, sys.modules["ntk_lightning"]))
# What a forward may raise where it asks a symbol for data
_RAISED = TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, NameError, AssertionError


class Refused(Exception):
    """A network has no kernel; the message is complete."""


class Recorded(NamedTuple):
    """A recorded forward.

    Args:
        graph: Its operations.
        modules: The supported modules that it calls, by their paths.
        lines: Of every operation, where it stands: the file, the line and its code; empty where no user wrote it.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    lines: dict[fx.Node, str]


def record(net: nn.Module) -> Recorded:
    """Record the forward of a network.

    Args:
        net: Its forward maps one tensor to one.

    Returns:
        What it does.

    Raises:
        Refused: It calls what has no closed form, depends on data, draws random numbers, uses weights twice, or what a
            module computes is changed by a subclass, a hook or a parametrization.
    """
    tracer = _Tracer()
    states = torch.get_rng_state(), random.getstate()
    try:
        with torch.enable_grad():
            graph = tracer.trace(_Root(net))
    except _RAISED as error:
        frames = reversed(list(traceback.walk_tb(error.__traceback__)))  # from the innermost on, as in _until_root
        place = _place(_last(frames))
        raise Refused(
            f"{place or 'The forward of the network'} cannot be followed without data ({str(error).splitlines()[0]}): "
            "forward must map one tensor to one, without decisions that depend on its values or sizes. "
            f"Supported: {supported()}."
        ) from error
    if not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate():
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        raise Refused(
            "The forward of the network draws random numbers outside of nn.Dropout: its infinite-width kernel is "
            "unknown. Take them out, or call .eval() if they are for training."
        )
    return Recorded(graph, tracer.modules, tracer.lines)


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

    def __setitem__(self, index: Any, value: Any) -> None:  # noqa: ANN401
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

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
        place = self.lines[node] = _place(_last(_until_root(sys._getframe(1))))
        if not torch.is_grad_enabled():
            raise Refused(f"{place or node.target} runs without gradients, so it has no NTK: take it out of no_grad.")
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:  # noqa: ANN401
        place = _place(_last(_until_root(sys._getframe(1))))
        try:
            path = self.path_of_module(m)
        except NameError:  # no part of the network
            path = f"a {type(m).__name__} that forward makes"
            if next(m.parameters(), None) is not None:
                raise Refused(f"{path}{at(place)} has weights, which nothing trains: make it in __init__.") from None
            path = f"{path}, number {len(self.modules)}"
        dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded before something is compiled
        compiled = dynamo is not None and isinstance(m, dynamo.OptimizedModule)
        known = known_class(m)
        _check_module(m, path, "compiled module" if compiled else (known or type(m)).__name__)
        if compiled:
            return self.call_module(m._orig_mod, m._orig_mod.forward, args, kwargs)  # type: ignore[union-attr, arg-type]
        if known is None and not super().is_leaf_module(m, path):
            return m.forward(*args, **kwargs)
        if known is None:
            raise Refused(no_kernel(f"{path} is {m}", place))
        if getattr(m.forward, "__func__", None) is not known.forward:
            raise Refused(
                f"{path} is a {type(m).__name__} with a forward of its own, not that of {known.__name__}: its "
                f"infinite-width kernel is unknown. Build it of supported layers: {supported()}."
            )
        for parameter in m.parameters(recurse=False):
            owner = self._owners.get(id(parameter))
            if owner is not None:
                what = f"{path} is used twice" if owner == path else f"{path} and {owner} share a parameter"
                raise Refused(
                    f"{what}{at(place)}: the infinite-width limit with tied weights is not supported. Give each layer "
                    "its own."
                )
            self._owners[id(parameter)] = path
        self.modules[path] = m
        return self.create_proxy("call_module", path, args, kwargs)

    def path_of_module(self, mod: nn.Module) -> str:
        return super().path_of_module(mod).replace("._orig_mod", "")


def _check_module(module: nn.Module, path: str, kind: str) -> None:
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise Refused(f"{path} has no sizes yet: run the network on data once.")
    if module._forward_hooks or module._forward_pre_hooks or is_parametrized(module):
        raise Refused(
            f"{path} has forward hooks or parametrizations, which can change what a {kind} computes: remove "
            "them, or make the kernel of a network without."
        )


def no_kernel(subject: str, place: str, reason: str = "") -> str:
    """Say that something has no closed form.

    Args:
        subject: What it is.
        place: Where it stands.
        reason: Why.

    Returns:
        The message, with what is supported.
    """
    return (
        f"{subject}{at(place)}{',' if ' is ' in subject else ''} has no infinite-width kernel here"
        f"{': ' if reason else ''}{reason}. Supported: {supported()}."
    ).replace(", has no", ", which has no")


def at(place: str) -> str:
    """Put a place behind what stands there.

    Args:
        place: From ``lines``.

    Returns:
        The place in parentheses, nothing where there is none.
    """
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
