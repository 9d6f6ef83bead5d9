"""Networks from the JSON that describes a reference case, as a user would write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks import ChannelNorm, Erf, NTKConv1d, NTKConv2d, NTKLinear, Pointwise, SelfAttention

Options = dict[str, Any]


def sigmoid_like(x: Tensor) -> Tensor:
    return torch.erf(x / 2.4020563531719796) / 2 + 0.5


def numerical(options: Options) -> nn.Module:
    """An activation that has no spelling but a function."""
    a, b = options.get("a", 1.0), options.get("b", 1.0)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "abrelu": lambda x: a * x.clamp_max(0) + b * x.clamp_min(0),
        "gaussian": lambda x: a * torch.exp(b * x**2),
        "rbf": lambda x: math.sqrt(2) * torch.sin(math.sqrt(2 * options["gamma"]) * x + math.pi / 4),
        "monomial": lambda x: x ** options["degree"],
        "polynomial": lambda x: torch.stack([c * x**i for i, c in enumerate(options["coef"])]).sum(0),
        "sigmoid_like": sigmoid_like,
    }
    return Pointwise(functions[options["type"]])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "abs": lambda: Pointwise(torch.abs),
    "sin": lambda: Pointwise(torch.sin),
    "cos": lambda: Pointwise(torch.cos),
    "exp": lambda: Pointwise(torch.exp),
    "sign": lambda: Pointwise(torch.sign),
    "erf": Erf,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
    "flatten": nn.Flatten,
}


class Branches(nn.Module):
    """Branches that are fed with the same input and merged in forward."""

    def __init__(self, branches: list[nn.Module], merge: str) -> None:
        super().__init__()
        self.branches, self.merge = nn.ModuleList(branches), merge

    def forward(self, x: Tensor) -> Tensor:
        outs = [branch(x) for branch in self.branches]
        if self.merge == "concat":
            return torch.cat(outs, 1)
        out: Tensor = outs[0] + outs[1] if self.merge == "sum" else outs[0] * outs[1]
        return out


class Pool(nn.Module):
    """Pooling as a function of torch.nn.functional, with zeros around."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.divisor = 1 if options["type"] == "sum_pool" else None
        self.window, self.stride = options["window"], options["stride"]
        self.pad = tuple(low for low, _ in options["pads"])

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.window, self.stride, self.pad, divisor_override=self.divisor)


class GlobalPool(nn.Module):
    """Mean or sum over all pixels of images or sequences, as a method."""

    def __init__(self, total: bool, axes: int) -> None:
        super().__init__()
        self.total, self.axes = total, (2,) if axes == 1 else (2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.axes) if self.total else x.mean(self.axes)


def build(layers: list[Options], x: Tensor) -> nn.Sequential:
    """The network, whose sizes fit inputs like x."""
    modules: list[nn.Module] = []
    for options in layers:
        modules.append(layer(options, x))
        x = modules[-1](x)
    return nn.Sequential(*modules)


def layer(options: Options, x: Tensor) -> nn.Module:
    channels, axes = x.shape[1], x.dim() - 2
    match options["type"]:
        case "dense":
            return NTKLinear(channels, options["width"], **scales(options))
        case "conv":
            pads = tuple(high for _, high in options["pads"]) if "pads" in options else options["padding"]
            return (NTKConv1d, NTKConv2d)[axes - 1](
                channels,
                options["width"],
                tuple(options.get("kernel_size", (3,) * axes)),
                padding=pads,
                stride=tuple(options.get("stride", (1,) * axes)),
                padding_mode="circular" if options["padding"] == "circular" else "zeros",
                **scales(options),
            )
        case "branches":
            return Branches([build(branch, x) for branch in options["branches"]], options["merge"])
        case "avg_pool" | "sum_pool":
            return Pool(options)
        case "global_avg_pool" | "global_sum_pool" as kind:
            return GlobalPool(kind == "global_sum_pool", axes)
        case "layer_norm" if axes == 0:
            return nn.LayerNorm(channels, options["eps"], elementwise_affine=False)
        case "layer_norm" if options["axes"] == [1]:
            return ChannelNorm(options["eps"])
        case "layer_norm":
            return nn.GroupNorm(1, channels, options["eps"], affine=False)
        case "dropout":
            return nn.Dropout(1 - options["keep_rate"]).train(options["mode"] == "train")
        case "attention":
            return SelfAttention(
                channels,
                options["width"],
                mechanism=options["mechanism"].lower(),
                scaling="linear" if options["linear_scaling"] else "sqrt",
                **{name: options[name] for name in ("query_std", "key_std", "value_std", "out_std")},
                bias_std=options["bias_std"] or 0.0,
            )
        case "leaky_relu":
            return nn.LeakyReLU(options["alpha"])
        case name if name in MODULES:
            assert (options.get("a", 1), options.get("b", 1), options.get("c", 0)) == (1, 1, 0)
            return MODULES[name]()
    return numerical(options)


def scales(options: Options) -> Options:
    """Standard deviations and parameterization of an affine layer."""
    bias = options["bias_std"]
    found: Options = {"weight_std": options["weight_std"], "bias_std": bias or 0.0}
    if options.get("parameterization") == "standard":
        found |= {"parameterization": "standard", "bias": bias is not None}
    return found
