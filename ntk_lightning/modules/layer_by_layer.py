"""Networks that are a chain of standard layers, run one layer at a time with other weights in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.networks import NTKConv2d, NTKLinear, Residual

__all__ = ["BILINEAR", "LINEAR_IN_WEIGHTS", "LayerWeights", "is_chain", "walk"]

# z = w a + b: linear in the weights and, but for constants, in the input (batch normalization in evaluation)
BILINEAR = {NTKLinear, NTKConv2d, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d}
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
    """The weights w0 of every layer, and the direction d in which they move.

    Args:
        net: The network.
        w0: Weights by name; those of the network itself where names are missing.
        direction: d by name; a missing name does not move.
    """

    def __init__(self, net: nn.Module, w0: Weights, direction: Weights) -> None:
        names = {id(parameter): name for name, parameter in net.named_parameters()}  # tied ones have one name
        self._w0, self._direction = w0, direction
        self._names = {module: {key: names[id(p)] for key, p in module.named_parameters()} for module in net.modules()}

    def moves(self, module: nn.Module) -> bool:
        """Tell whether a layer's weights move."""
        return any(name in self._direction for name in self._names[module].values())

    def at_w0(self, module: nn.Module, x: Tensor, linear: bool = False) -> Tensor:
        """Run a layer at w0.

        Args:
            module: The layer.
            x: Its input.
            linear: Leave out what does not depend on the input: of affine layers and batch normalization in evaluation.

        Returns:
            Its output.
        """
        weights = {key: self._w0[name] for key, name in self._names[module].items() if name in self._w0}
        return _call(module, weights, x, linear)

    def along_d(self, module: nn.Module, x: Tensor, linear: bool = False) -> Tensor:
        """Run a layer with d in place of its weights: the derivative of its output along d, where that is linear in w.

        Args:
            module: The layer, which moves.
            x: Its input.
            linear: As of :meth:`at_w0`.

        Returns:
            Its output.
        """
        weights = {
            key: self._direction[name] if name in self._direction else torch.zeros_like(module.get_parameter(key))
            for key, name in self._names[module].items()
        }
        return _call(module, weights, x, linear)

    def at(self, module: nn.Module, t: Tensor, x: Tensor) -> Tensor:
        """Run a layer at w0 + t d.

        Args:
            module: The layer.
            t: A number.
            x: Its input.

        Returns:
            Its output.
        """
        weights = {key: self._w0[name] for key, name in self._names[module].items() if name in self._w0}
        for key, name in self._names[module].items():
            if name in self._direction:
                weights[key] = weights[key] + t * self._direction[name]
        return _call(module, weights, x)


def _call(module: nn.Module, weights: Weights, x: Tensor, linear: bool = False) -> Tensor:
    """Run a layer with other weights, and without its constants where only the linear part is wanted."""
    if not linear:
        output: Tensor = functional_call(module, weights, (x,)) if weights else module(x)
        return output
    tensors = {**module._parameters, **module._buffers}
    constants = {key: torch.zeros_like(t) for key in ("bias", "running_mean") if (t := tensors.get(key)) is not None}
    output = functional_call(module, {**weights, **constants}, (x,))
    return output
