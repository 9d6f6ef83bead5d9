"""Pointwise functions without a closed form: what they compute, their kinks, and a name that any process gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.networks import Pointwise

__all__ = ["MODULES", "Function", "read_function"]


def _softplus(u: Tensor, beta: float) -> Tensor:
    """nn.Softplus without its threshold, above which it takes log(1 + exp) for its argument, to 2e-9."""
    return torch.logaddexp(beta * u, torch.zeros_like(u)) / beta


def _hardsigmoid(u: Tensor) -> Tensor:
    """F.hardsigmoid, whose derivative in torch has a factor 1/6 in float32 only."""
    return (u + 3).clamp(0, 6) / 6


def _gelu_tanh(u: Tensor) -> Tensor:
    return F.gelu(u, approximate="tanh")


@dataclass(frozen=True)
class Function:
    """A function of one number.

    ``name`` is what names it in keys of stored Grams; that of a function which has none contains "<".
    """

    name: str
    arguments: tuple[float, ...] = ()  # after the number
    kinks: tuple[float, ...] = ()
    body: Callable[..., Tensor] = field(default=torch.tanh, repr=False)

    def __call__(self, u: Tensor) -> Tensor:
        """Apply it to every entry."""
        out: Tensor = self.body(u, *self.arguments)
        return out


_Options = Callable[[Any], tuple[tuple[float, ...], tuple[float, ...]]]  # arguments and kinks of a module


def _none(_: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (), ()


# What each module applies; 0 is always taken for a kink.
_HARDTANH: _Options = lambda m: ((m.min_val, m.max_val), (m.min_val, m.max_val))  # noqa: E731
MODULES: dict[type[nn.Module], tuple[Callable[..., Tensor], _Options]] = {
    nn.Tanh: (torch.tanh, _none),
    nn.Sigmoid: (torch.sigmoid, _none),
    nn.SiLU: (F.silu, _none),
    nn.Mish: (F.mish, _none),
    nn.Softplus: (_softplus, lambda m: ((float(m.beta),), ())),
    nn.LogSigmoid: (F.logsigmoid, _none),
    nn.Softsign: (F.softsign, _none),
    nn.Tanhshrink: (F.tanhshrink, _none),
    nn.ELU: (F.elu, lambda m: ((m.alpha,), ())),
    nn.CELU: (F.celu, lambda m: ((m.alpha,), ())),
    nn.SELU: (F.selu, _none),
    nn.Hardtanh: (F.hardtanh, _HARDTANH),
    nn.ReLU6: (F.hardtanh, _HARDTANH),
    nn.Hardsigmoid: (_hardsigmoid, lambda _: ((), (-3.0, 3.0))),
    nn.Hardswish: (F.hardswish, lambda _: ((), (-3.0, 3.0))),
    nn.Softshrink: (F.softshrink, lambda m: ((m.lambd,), (-m.lambd, m.lambd))),
}


def read_function(module: nn.Module) -> Function:
    """Find what a module applies to every entry.

    Args:
        module: Of a class in :data:`MODULES`, an ``nn.GELU`` with ``approximate="tanh"``, or a ``Pointwise``.

    Returns:
        The function.

    Raises:
        TypeError: The function of a ``Pointwise`` is not pointwise, or random.

    Example:
        >>> read_function(nn.ELU(0.5))
        Function(name='torch.nn.functional.elu', arguments=(0.5,), kinks=())
    """
    if isinstance(module, Pointwise):
        for known, (body, options) in MODULES.items():
            if body is module.function and options is _none:
                return read_function(known())
        _check_pointwise(module.function)
        return Function(_name(module.function), (), module.kinks, module.function)
    if isinstance(module, nn.GELU):
        return Function("gelu_tanh", body=_gelu_tanh)
    body, options = next(entry for kind, entry in MODULES.items() if isinstance(module, kind))
    arguments, kinks = options(module)
    return Function(_name(body), tuple(map(float, arguments)), tuple(map(float, kinks)), body)


def _check_pointwise(function: Callable[[Tensor], Tensor]) -> None:
    """Check on a few numbers that every entry of the output depends on its own entry of the input only."""
    probe = torch.linspace(-2, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        whole, parts = function(probe.clone()), [function(part.clone()) for part in probe.split(1)]
    if not isinstance(whole, Tensor) or whole.shape != probe.shape or whole.dtype != probe.dtype:
        raise TypeError(f"Pointwise({function}) does not map a tensor to one of its shape and dtype.")
    if not torch.allclose(whole, torch.cat(parts), rtol=1e-6, atol=1e-12):
        raise TypeError(
            f"Pointwise({function}) is no function of one number: it is random, not finite near 0, or mixes entries."
        )


def _name(function: Callable[..., Tensor]) -> str:
    """Name a function by where it is defined and, if it is written in Python outside of torch, what it does."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", f"<{type(function)}>")
    code: CodeType | None = getattr(function, "__code__", None)
    if module is not None and module.split(".")[0] in ("torch", "ntk_lightning"):
        return f"{module}.{name.removeprefix('_VariableFunctionsClass.')}"
    if code is None or function.__closure__:  # what it holds has no name
        return f"<{module}.{name}>"
    defaults = getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)
    return f"{module}.{name}:{hashlib.blake2b(repr((_program(code), defaults)).encode(), digest_size=8).hexdigest()}"


def _program(code: CodeType) -> tuple[object, ...]:
    """What a function does, without where its file lies."""
    constants = tuple(_program(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.co_code, code.co_names, constants
