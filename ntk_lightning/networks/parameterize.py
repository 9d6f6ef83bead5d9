"""Plain PyTorch networks in the neural tangent parameterization."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ntk_lightning.networks.affine import NTKLinear, check_scales
from ntk_lightning.networks.convolutions import NTKConv1d, NTKConv2d

__all__ = ["ntk_parameterize"]

_PLAIN = nn.Linear, nn.Conv1d, nn.Conv2d
_KEPT = (  # torch.nn's modules whose parameters start at 1 and 0, and need no scale, and containers of a user's own
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.PReLU),
    *(nn.ParameterList, nn.ParameterDict),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def ntk_parameterize(net: nn.Module, weight_std: float | None = None, bias_std: float | None = None) -> nn.Module:
    """Copy a network with its plain layers in the neural tangent parameterization, ready for all three models.

    Every ``nn.Linear``, ``nn.Conv1d`` and ``nn.Conv2d`` becomes an ``NTKLinear``, ``NTKConv1d`` or ``NTKConv2d`` of the
    same name, sizes, dtype and device, with new weights of N(0, 1). By default its scales are those that PyTorch draws
    with: uniform with variance 1 / (3 fan_in), weights and biases alike, hence

        weight_std = 1 / sqrt(3),    bias_std = 1 / sqrt(3 fan_in),

    so that the copy at initialization is, at large width, the same random function as a fresh plain network; its
    gradients, and with them its training, are those of the new parameterization (Jacot et al., 2018, arXiv 1806.07572).

    Everything else is copied as it is: modules with a ``forward`` of their own, normalization layers, buffers,
    parameters of a user's own classes, modes, frozen layers. Only layers that are called are converted: a ``forward``
    that reads ``layer.weight`` itself gets the unscaled one.

    Args:
        net: Any module. It is left as it is.
        weight_std: Standard deviation of all converted weights at unit fan-in, instead of PyTorch's.
        bias_std: Standard deviation of all converted biases; 0 leaves them out. Layers without one get none.

    Returns:
        The copy.

    Raises:
        TypeError: A layer has no counterpart (transposed and three-dimensional convolutions, embeddings, recurrent and
            attention layers of torch.nn), is compiled, scripted, parametrized, hooked, a subclass with a ``forward`` of
            its own or not real, or ``net`` is no module.
        ValueError: Groups, dilation, or a padding without counterpart; a layer or parameter that is used twice; sizes
            not known yet; no layer to convert; or a scale out of range.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 1, bias=False))
        >>> ntk_parameterize(net)
        Sequential(
          (0): NTKLinear(12, 64, weight_std=0.5774, bias_std=0.1667)
          (1): ReLU()
          (2): NTKLinear(64, 1, weight_std=0.5774, bias_std=0)
        )
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"ntk_parameterize takes an nn.Module, got {net!r}.")
    given = {"bias_std": bias_std, "weight_std": weight_std}
    check_scales("ntk_parameterize", **{name: 1.0 if std is None else std for name, std in given.items()})
    replacements: dict[int, Any] = {}
    owners: dict[int, str] = {}  # paths of the converted layers and their parameters, by id
    for path, module in net.named_modules(remove_duplicate=False):
        place = f"net.{path}" if path else "net"
        _check_supported(module, place)
        things = [*module._parameters.values(), *([module] if isinstance(module, _PLAIN) else [])]
        for thing in things:
            if thing is None:
                continue
            if id(thing) in owners and not isinstance(module, _KEPT):
                raise ValueError(
                    f"{place} and {owners[id(thing)]} share a layer or a parameter, which has no infinite-width limit "
                    "of independent layers: give each its own."
                )
            owners[id(thing)] = place
        if isinstance(module, _PLAIN):
            replacements[id(module)] = _converted(module, place, weight_std, bias_std)
    if not replacements:
        raise ValueError(f"{type(net).__name__} has no nn.Linear, nn.Conv1d or nn.Conv2d to convert.")
    # deepcopy takes what its memo already has: layers are replaced wherever they are referred to
    result: nn.Module = copy.deepcopy(net, replacements)
    return result


def _check_supported(module: nn.Module, place: str) -> None:
    """Refuse modules whose weights cannot be converted, or that are not what their class says."""
    kind = type(module).__name__
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # not loaded before something is compiled
    if isinstance(module, torch.jit.ScriptModule) or (dynamo and isinstance(module, dynamo.OptimizedModule)):
        raise TypeError(f"{place} is a compiled or scripted module: convert the original, and compile the result.")
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise ValueError(f"{place} is a {kind} whose sizes are not known yet: run the network once on a batch.")
    standard = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
    owns = any(True for _ in module.parameters(recurse=False))
    if owns and standard is not nn.Module and not issubclass(standard, (*_PLAIN, *_KEPT)):
        raise TypeError(
            f"{place} is a {kind}, which has no counterpart in the NTK parameterization: only nn.Linear, nn.Conv1d and "
            "nn.Conv2d are converted. Replace it by such layers."
        )
    if not isinstance(module, _PLAIN):
        return
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d)
    names = ("forward", "_conv_forward") if convolves else ("forward",)
    if any(getattr(getattr(module, name), "__func__", None) is not getattr(standard, name) for name in names):
        raise TypeError(f"{place} is a {kind} with a forward of its own: convert what it computes by hand.")
    if is_parametrized(module) or any(getattr(module, name) for name in _HOOKS):
        raise TypeError(f"{place} has hooks or parametrizations, which would be lost: remove them first.")
    if not module.weight.is_floating_point():
        raise TypeError(f"{place} has weights of {module.weight.dtype}: only real floating-point ones are converted.")


def _converted(
    module: nn.Linear | nn.Conv1d | nn.Conv2d, place: str, weight_std: float | None, bias_std: float | None
) -> nn.Module:
    """The layer's counterpart, in its dtype, on its device, in its mode."""
    fan_in = math.prod(module.weight.shape[1:])
    weight_std = 3**-0.5 if weight_std is None else weight_std
    bias_std = (3 * fan_in) ** -0.5 if bias_std is None else bias_std
    bias_std = 0.0 if module.bias is None else bias_std
    layer: nn.Module
    if isinstance(module, nn.Linear):
        layer = NTKLinear(module.in_features, module.out_features, weight_std, bias_std)
    else:
        kind = NTKConv1d if isinstance(module, nn.Conv1d) else NTKConv2d
        layer = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            _padding(module, place),
            weight_std,
            bias_std,
            module.stride,
            padding_mode="circular" if module.padding_mode == "circular" else "zeros",
        )
    layer.to(module.weight.device, module.weight.dtype).train(module.training)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(module.get_parameter(name).requires_grad)
    return layer


def _padding(conv: nn.Conv1d | nn.Conv2d, place: str) -> tuple[int, ...]:
    """Pixels on each side, where the convolution has a counterpart."""
    if conv.groups > 1 or any(step > 1 for step in conv.dilation):
        raise ValueError(
            f"{place} has groups={conv.groups} and dilation={conv.dilation}: only convolutions without have a "
            "counterpart in the NTK parameterization."
        )
    if conv.padding_mode not in ("zeros", "circular"):
        raise ValueError(f'{place} pads by {conv.padding_mode!r}: only "zeros" and "circular" have a counterpart.')
    if isinstance(conv.padding, tuple):
        return conv.padding
    if conv.padding == "same" and any(size % 2 == 0 for size in conv.kernel_size):
        raise ValueError(
            f'{place} pads an even filter {conv.kernel_size} by "same", more on one side than on the other: use an odd '
            "filter, or a number."
        )
    return tuple((size - 1) // 2 if conv.padding == "same" else 0 for size in conv.kernel_size)
