"""Networks that are a chain of standard layers, run one layer at a time with other weights in them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_state import Weights, functional_call
from ntk_lightning.networks import NTKConv1d, NTKConv2d, NTKLinear, Residual

__all__ = ["BILINEAR", "LINEAR_IN_WEIGHTS", "LayerWeights", "is_chain", "walk"]

# z = w a + b: linear in the weights and, but for constants, in the input (batch normalization in evaluation)
BILINEAR = {
    *(NTKLinear, NTKConv1d, NTKConv2d, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d),
}
LINEAR_IN_WEIGHTS = {*BILINEAR, nn.LayerNorm, nn.GroupNorm}

_Value = TypeVar("_Value")
_MIXING = (nn.Dropout, nn.modules.batchnorm._BatchNorm)  # in training: random numbers, statistics of the batch


def is_chain(net: nn.Module, inputs: Inputs) -> bool:
    """Tell whether a standard network can be run layer by layer.

    Args:
        net: A network of standard layers, whose only containers are ``nn.Sequential`` and ``Residual``.
        inputs: Its inputs.

    Returns:
        Whether it takes one tensor, and every layer is a function of its input and its weights alone: none is in a
        training mode that matters, writes into its input or has a forward of its own.
    """
    args, kwargs = inputs.arguments(tuple(leaf[:0] for leaf in inputs.leaves))
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    return not any(
        getattr(module, "inplace", False)
        or "forward" in vars(module)
        or (isinstance(module, _MIXING) and (module.training or getattr(module, "running_mean", module) is None))
        for module in net.modules()
    )


def walk(
    module: nn.Module,
    value: _Value,
    layer: Callable[[nn.Module, _Value], _Value],
    add: Callable[[_Value, _Value], _Value],
) -> _Value:
    """Run a chain on values of any kind.

    Args:
        module: The network or a part of it.
        value: What goes in.
        layer: Runs one layer.
        add: Adds the two branches of a ``Residual``.

    Returns:
        What comes out.
    """
    if type(module) is nn.Sequential:
        for child in module:
            value = walk(child, value, layer, add)
        return value
    if type(module) is Residual:
        return add(walk(module.body, value, layer, add), walk(module.shortcut, value, layer, add))
    return layer(module, value)


class LayerWeights:
    """Runs the layers of a chain with given weights, or with a direction in their place.

    Args:
        net: The network.
        w0: Weights, and maybe buffers, by name; those of the network itself where names are missing.
    """

    def __init__(self, net: nn.Module, w0: Weights) -> None:
        tensors = [*net.named_parameters(), *net.named_buffers()]
        names = {id(tensor): name for name, tensor in tensors}  # tied ones have one name
        self._given: dict[nn.Module, Weights] = {}  # of each module, by its own names
        self._names: dict[nn.Module, dict[str, str]] = {}  # of its parameters, in the network
        for module in net.modules():
            self._names[module] = {key: names[id(p)] for key, p in module.named_parameters()}
            own = {key: names[id(t)] for key, t in (*module.named_parameters(), *module.named_buffers())}
            self._given[module] = {key: w0[name] for key, name in own.items() if name in w0}

    def names(self, module: nn.Module) -> Iterable[str]:
        """Names of a layer's parameters in the network."""
        return self._names[module].values()

    def moves(self, module: nn.Module, direction: Container[str]) -> bool:
        """Tell whether a layer's weights move along a direction, of which the names suffice."""
        return any(name in direction for name in self._names[module].values())

    def at_w0(self, module: nn.Module, x: Tensor, linear: bool = False) -> Tensor:
        """Run a layer at w0.

        Args:
            module: The layer.
            x: Its input.
            linear: Leave out what does not depend on the input: of affine layers and batch normalization in evaluation.

        Returns:
            Its output.
        """
        return self._call(module, {}, x, linear)

    def with_weights(self, module: nn.Module, weights: Weights, x: Tensor) -> Tensor:
        """Run a layer with some other weights, by their names in the network."""
        own = {key: weights[name] for key, name in self._names[module].items() if name in weights}
        return self._call(module, own, x, False)

    def along(self, module: nn.Module, direction: Weights, x: Tensor, linear: bool = False) -> Tensor:
        """Run a layer with d in place of its weights: the derivative of its output along d, where that is linear in w.

        Args:
            module: The layer.
            direction: d; a missing name does not move.
            x: Its input.
            linear: As of :meth:`at_w0`.

        Returns:
            Its output.
        """
        own, names = self._given[module], self._names[module]
        still = {key: own.get(key, p) for key, p in module.named_parameters() if names[key] not in direction}
        moving = {key: direction[name] for key, name in names.items() if name in direction}
        return self._call(module, {key: torch.zeros_like(p) for key, p in still.items()} | moving, x, linear)

    def at(self, module: nn.Module, direction: Weights, t: Tensor, x: Tensor) -> Tensor:
        """Run a layer at w0 + t d.

        Args:
            module: The layer.
            direction: d; its names are among those of w0.
            t: A number.
            x: Its input.

        Returns:
            Its output.
        """
        own, names = self._given[module], self._names[module].items()
        moved = {name: own[key] + t * direction[name] for key, name in names if name in direction}
        return self.with_weights(module, moved, x)

    def _call(self, module: nn.Module, other: Weights, x: Tensor, linear: bool = False) -> Tensor:
        """Run a layer with some other weights, and without its constants where only the linear part is wanted."""
        tensors = {**self._given[module], **other}
        if linear:
            own = {**module._parameters, **module._buffers, **tensors}
            constants = {key: own.get(key) for key in ("bias", "running_mean")}
            tensors |= {key: torch.zeros_like(t) for key, t in constants.items() if t is not None}
        output: Tensor = functional_call(module, tensors, (x,)) if tensors else module(x)
        return output
