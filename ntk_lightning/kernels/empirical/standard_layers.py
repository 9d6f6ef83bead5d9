"""Networks of nothing but standard layers, whose derivatives need no trial."""

from __future__ import annotations

from torch import nn

from ntk_lightning.networks import ChannelNorm, Erf, NTKConv1d, NTKConv2d, NTKLinear, Residual, SelfAttention

__all__ = ["is_standard"]

# Layers that neither mix samples (check_modes refuses batch norm in training) nor draw random numbers, and that vmap
# and both modes of differentiation are known to take. A network of nothing else is not tried.
_STANDARD = {
    *(nn.Sequential, Residual, nn.Identity, nn.Flatten, nn.Dropout),
    *(NTKLinear, NTKConv1d, NTKConv2d, ChannelNorm, SelfAttention, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, Erf),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.MaxPool2d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_standard(net: nn.Module) -> bool:
    """Tell whether a network consists of layers that have all derivatives, by all ways the same.

    Args:
        net: The network.

    Returns:
        Whether all its modules are such layers, without hooks.

    Example:
        >>> is_standard(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), is_standard(nn.GRU(2, 2))
        (True, False)
    """
    return all(
        type(module) in _STANDARD and not any(getattr(module, name) for name in _HOOKS) for module in net.modules()
    )
