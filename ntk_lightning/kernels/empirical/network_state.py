"""Copies of networks, and networks that are left as they were found."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["ModuleAttributes", "Weights", "copy_network", "functional_call", "preserved", "usable"]

Weights = dict[str, Tensor]  # parameters or directions among them, by name


def copy_network(net: nn.Module) -> nn.Module:
    """Copy a network deeply, whatever tensors its modules keep.

    ``copy.deepcopy`` refuses tensors that an operation has made and that require gradients, such as the weight of a
    pruned or weight-normed layer, or an activation kept as an attribute. Here they are copied as plain values.

    Args:
        net: Any network.

    Returns:
        The copy; its parameters can be differentiated, wherever this is called.
    """
    with torch.inference_mode(False), torch.no_grad(), _DetachedCopies():
        return copy.deepcopy(net)


class _DetachedCopies(TorchFunctionMode):
    """While active, a deep copy of what an operation has made is detached from the operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Copy such a tensor; do anything else as always."""
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


class ModuleAttributes:
    """The attributes of a network's modules, to be put back: kept activations, counters, lists.

    Values of parameters and buffers that are written in place are not put back.

    Args:
        net: The network, as it is now.
    """

    def __init__(self, net: nn.Module) -> None:
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._contents: list[tuple[dict[Any, Any] | list[Any] | set[Any], Any]] = []
        for module in net.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                attributes = vars(module)
                self._before.append((attributes, attributes.copy()))
                containers = (v for v in attributes.values() if isinstance(v, dict | list | set))
                self._contents += [(container, container.copy()) for container in containers]

    def restore(self) -> None:
        """Put them back."""
        for attributes, before in self._before:
            attributes.clear()
            attributes.update(before)
        for container, content in self._contents:
            if container or content:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def preserved(net: nn.Module) -> Iterator[None]:
    """Undo what the body changes in the attributes of a network's modules.

    Args:
        net: The network.

    Yields:
        Nothing.
    """
    attributes = ModuleAttributes(net)
    try:
        yield
    finally:
        attributes.restore()


def functional_call(net: nn.Module, tensors: Weights, args: Any, kwargs: Any = None) -> Any:  # noqa: ANN401 - torch's
    """Call a network with other parameters and buffers, and leave it as it was.

    ``torch.func.functional_call`` puts the tensors of a module that stands at two places back in the wrong order, so
    that it keeps the other ones, and is no longer tied to other modules.

    Args:
        net: The network.
        tensors: Other tensors by name; what is tied to one of them gets it too.
        args: Positional arguments, in a tuple.
        kwargs: Keyword arguments.

    Returns:
        What the network returns.
    """
    named = {**dict(net.named_parameters(remove_duplicate=False)), **dict(net.named_buffers(remove_duplicate=False))}
    given = {id(named[name]): tensor for name, tensor in tensors.items() if name in named}
    places = {
        f"{prefix}.{key}" if prefix else key: given[id(tensor)]
        for prefix, module in net.named_modules()  # each module once
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and id(tensor) in given
    }
    return torch.func.functional_call(net, places, args, kwargs, tie_weights=False)


def usable(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Prepare a parameter or buffer for differentiation.

    Args:
        tensor: Of a network.
        dtype: Precision to compute in, or None for its own; complex numbers get that of their parts.

    Returns:
        The detached tensor in that precision, a copy where it is an inference tensor, which autograd refuses.
    """
    tensor = tensor.clone() if tensor.is_inference() else tensor
    if dtype is not None and tensor.is_complex():
        return tensor.detach().to(torch.promote_types(dtype, torch.complex32))
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.detach().to(dtype)
