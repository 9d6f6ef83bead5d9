"""Wider and freshly drawn copies of a network, to see where its random function goes as its width grows."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ntk_lightning.networks.affine import NTKLayer
from ntk_lightning.networks.attention import SelfAttention

__all__ = ["redraw", "widened"]

_AFFINE = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, NTKLayer, SelfAttention
_NORMALIZATIONS: dict[type[nn.Module], str] = {  # and the attribute that holds their size
    nn.LayerNorm: "normalized_shape",
    nn.RMSNorm: "normalized_shape",
    nn.GroupNorm: "num_channels",
    nn.modules.batchnorm._NormBase: "num_features",
    nn.PReLU: "num_parameters",
}
_SIZED = (*_AFFINE, *_NORMALIZATIONS)


def redraw(net: nn.Module, seed: int) -> None:
    """Draw every parameter anew, in place, by its own layer's law.

    The law is the ``reset_parameters`` of the module that owns the parameter, or of one that contains it: those of
    inner modules are called first, as where a network is made. The state of torch's generator is put back.

    Args:
        net: Any network on the CPU; modes, buffers and frozen parameters included.
        seed: Of torch's generator.

    Raises:
        ValueError: A parameter is drawn by no ``reset_parameters``.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> redraw(net, 0)
        >>> first = net.weight.clone()
        >>> redraw(net, 1); redraw(net, 0)
        >>> torch.equal(net.weight, first)
        True
    """
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(math.nan)  # what no law draws is seen by it
            for module in reversed(list(net.modules())):
                # the attention of torch.nn has the second name
                draw = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
                if draw is not None:
                    draw()
    finally:
        torch.set_rng_state(state)
    for path, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.isnan().any():
                raise ValueError(
                    f"How {name} of {path or 'the network'}, a {type(module).__name__}, is initialized is not known: "
                    "give its class a method reset_parameters() that draws it."
                )


def widened(net: nn.Module, sample: Tensor, factor: int) -> nn.Module:
    """Copy a network with more channels in all its hidden layers.

    The outputs of every affine layer are multiplied, but of those that the network's outputs consist of; what a layer
    or a normalization takes in follows from running the network, so that any ``forward`` will do that does not count
    channels itself. New weights are drawn by ``reset_parameters``, and are not those of ``net``.

    Args:
        net: Any network.
        sample: An input (1, ...).
        factor: At least 1; with 1 the copy is as it is.

    Returns:
        The copy.

    Raises:
        ValueError: It cannot be told which sizes are widths: of layers that are no affine ones or normalizations, of
            grouped convolutions, of shared parameters, or of a ``forward`` that counts channels.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(4, 2))
        >>> widened(net, torch.ones(1, 3, 3, 3), 8)
        Sequential(
          (0): Conv2d(3, 32, kernel_size=(3, 3), stride=(1, 1))
          (1): PReLU(num_parameters=32)
          (2): Flatten(start_dim=1, end_dim=-1)
          (3): Linear(in_features=32, out_features=2, bias=True)
        )
    """
    net = copy.deepcopy(net)
    if factor == 1:
        return net
    _check_widths(net)
    shape, last = _last_layers(net, sample)
    asked: dict[nn.Module, tuple[int, ...]] = {}

    def fit(module: nn.Module, args: tuple[Any, ...]) -> None:
        """Give a module the size of what reaches it, before it runs."""
        width = _width_of_input(module, args[0])
        if asked.get(module, width) != width:
            raise ValueError(f"a {type(module).__name__} is used for {asked[module]} channels and again for {width}")
        if module in asked:
            return
        asked[module] = width
        if isinstance(module, _AFFINE):
            _resize_affine(module, width[0], factor, last=module in last)
        else:
            _resize_normalization(module, width)

    hooks = [m.register_forward_pre_hook(fit) for m in net.modules() if isinstance(m, _SIZED)]
    try:
        with torch.no_grad():
            wide = net(sample)
    except Exception as error:  # whatever a forward that counts channels runs into
        raise ValueError(f"The network does not run with {factor} times as many hidden channels: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if wide.shape != shape:
        raise ValueError(
            f"With {factor} times as many hidden channels the network gives {tuple(wide.shape)} instead of "
            f"{tuple(shape)}: which of its layers give the outputs cannot be told."
        )
    return net


def _check_widths(net: nn.Module) -> None:
    """Refuse modules of which it is not known how their sizes follow a width."""
    owners: dict[int, str] = {}
    for path, module in net.named_modules():
        name = f"{path or 'The network'}, a {type(module).__name__},"
        own = [p for p in module.parameters(recurse=False) if p.numel() > 1]
        for parameter in own:
            if owners.setdefault(id(parameter), path) != path:
                raise ValueError(f"{name} shares a parameter with {owners[id(parameter)]}: give each its own.")
        parametrized = is_parametrized(module)
        if (own and (parametrized or not isinstance(module, _SIZED))) or getattr(module, "groups", 1) != 1:
            raise ValueError(
                f"{name} has sizes of which it cannot be told whether they are widths: only affine layers without "
                "groups and normalizations can be widened. Give networks of several widths instead of width_factor."
            )


def _last_layers(net: nn.Module, sample: Tensor) -> tuple[torch.Size, set[nn.Module]]:
    """The shape of the outputs, and the affine layers that they consist of, with no other affine layer between."""
    ends: list[tuple[nn.Module, Tensor]] = []

    def cut(module: nn.Module, args: tuple[Any, ...], z: Tensor) -> Tensor:
        leaf = z.detach().requires_grad_()  # what comes before is cut off
        ends.append((module, leaf))
        return leaf.clone()  # which an activation may overwrite

    hooks = [module.register_forward_hook(cut) for module in net.modules() if isinstance(module, _AFFINE)]
    try:
        with torch.enable_grad():
            outputs = net(sample)
            total = outputs.sum() if isinstance(outputs, Tensor) else None
    finally:
        for hook in hooks:
            hook.remove()
    leaves = [leaf for _, leaf in ends]
    if total is None or not total.requires_grad:
        raise ValueError("The network's outputs do not follow from affine layers: nothing can be widened.")
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return outputs.shape, {module for (module, _), g in zip(ends, gradients, strict=True) if g is not None}


def _width_of_input(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Channels or features of what reaches a module; all sizes that a layer normalization normalizes over."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return tuple(x.shape[-len(module.normalized_shape) :])
    if isinstance(module, (SelfAttention, *_NORMALIZATIONS)):
        return (x.shape[1],)
    assert isinstance(module.weight, Tensor)
    return (x.shape[1 - module.weight.dim()],)  # the last for a linear layer, before the pixels for a convolution


def _resize_affine(module: nn.Module, width_in: int, factor: int, last: bool) -> None:
    """Change the sizes of an affine layer, and draw its parameters."""
    kind = "features" if hasattr(module, "in_features") else "channels"
    width_out = getattr(module, f"out_{kind}") * (1 if last else factor)
    setattr(module, f"in_{kind}", width_in)
    setattr(module, f"out_{kind}", width_out)
    if isinstance(module, SelfAttention):
        # what grows in its limit: the channels of a head where scores are divided by their number, else the heads
        if module.scaling == "linear":
            module.head_channels *= factor
        else:
            module.num_heads *= factor
        inner = module.num_heads * module.head_channels
        shapes = dict.fromkeys(("query", "key", "value"), (inner, width_in))
        _replace(module, **shapes, out=(width_out, inner), bias=(width_out,))
        return
    assert isinstance(module.weight, Tensor)
    shape = width_out, width_in, *module.weight.shape[2:]
    if isinstance(module, NTKLayer):
        module.fan_in = math.prod(shape[1:])
    _replace(module, weight=shape, bias=(width_out,))


def _resize_normalization(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Change the sizes of a normalization, or of an activation with a slope for each channel."""
    if isinstance(module, nn.PReLU) and module.num_parameters == 1:
        return
    name = next(name for kind, name in _NORMALIZATIONS.items() if isinstance(module, kind))
    setattr(module, name, shape if name == "normalized_shape" else shape[0])
    _replace(module, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), shape))


def _replace(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Give parameters and buffers, where the module has them, other shapes, and draw them."""
    for name, shape in shapes.items():
        old = getattr(module, name, None)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(old.new_empty(shape), old.requires_grad))
        elif isinstance(old, Tensor):
            setattr(module, name, old.new_empty(shape))
    module.reset_parameters()  # type: ignore[operator]  # all of _SIZED have it
