"""Which way a network's gradients are made, chosen by trying it on two samples.

Plain autograd is the reference. A network that draws random numbers or mixes samples has no kernel, and is refused.
What vmap makes of two samples must equal plain autograd, or the rows are made one by one.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.derivatives import ForwardModeWatch, is_adjoint
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.rows import Rows
from ntk_lightning.kernels.empirical.slow_path import OneByOneRows

__all__ = ["choose_products", "choose_rows"]

_Way = Literal["at once", "by branch", "one by one", "forward", "reverse"]

_log = logging.getLogger(__name__)
_ways: WeakKeyDictionary[nn.Module, dict[Hashable, _Way]] = WeakKeyDictionary()  # what was found, for each network


def choose_rows(function: NetworkFunction, inputs: list[Inputs], per_layer: bool = False) -> Rows:
    """Choose how the rows of some inputs are made, once for each network and kind of inputs.

    Args:
        function: What is differentiated.
        inputs: All inputs, already cast.
        per_layer: Keep the kernels of modules apart.

    Returns:
        The rows.

    Raises:
        ValueError: The network mixes samples, draws random numbers, or gives no outputs that can be differentiated.
    """
    sample = inputs[0][:1]
    known, key = _ways.setdefault(function.net, {}), _key(function, inputs)
    if key not in known:
        known[key] = _try(function, _two(inputs))
    if known[key] == "one by one":
        return OneByOneRows(function, sample, per_layer)
    return GradientRows(function, sample, per_layer, by_branch=known[key] == "by branch")


def choose_products(rows: Rows, inputs: list[Inputs]) -> Rows:
    """Choose how J d is computed: by forward mode, by reverse mode twice, or one sample at a time.

    Args:
        rows: As chosen for the inputs.
        inputs: All inputs.

    Returns:
        Rows whose products are those of reverse mode.
    """
    if not isinstance(rows, GradientRows):
        return rows
    function, samples = rows.function, _two(inputs)
    known, key = _ways.setdefault(function.net, {}), ("products", *_key(function, inputs))
    if key not in known:
        known[key] = _try_products(rows, samples)
    if known[key] == "one by one":
        return OneByOneRows(function, inputs[0][:1])
    rows.forward_mode = known[key] == "forward"
    return rows


def _key(function: NetworkFunction, inputs: list[Inputs]) -> tuple[Hashable, ...]:
    """What a network can treat differently: modes, precision, structure and shapes of the inputs."""
    modes = tuple(module.training for module in function.net.modules())
    leaves = tuple((leaf.dtype, leaf.shape[1:], leaf.device) for leaf in inputs[0].leaves)
    several = sum(map(len, inputs)) > 1
    return function.output, function.dtype, modes, inputs[0].paths, leaves, several


def _two(inputs: list[Inputs]) -> Inputs:
    """The first and the last of all samples, or the only one."""
    first, last = inputs[0][:1], inputs[-1][slice(len(inputs[-1]) - 1, None)]
    return first.cat(last) if sum(map(len, inputs)) > 1 else first


def _try(function: NetworkFunction, samples: Inputs) -> _Way:
    """Refuse what has no kernel, then compare vmap with plain autograd, on a random mix u^T f of the outputs."""
    with _no_random_numbers(function.device):
        plain = OneByOneRows(function, samples[:1])
    _check_samples_apart(plain, samples)

    u = _random(torch.empty(plain.num_outputs).to(plain.cotangents))

    def mixed(returned: Any) -> Tensor:  # noqa: ANN401 - whatever the network returns
        out = function.select(returned)
        return out.reshape(1, -1) @ u[:, None]

    mix = replace(function, output=mixed, full=False)
    plain.function, plain.cotangents = mix, u.new_ones(1, 1)
    expected = _gram(plain, samples, sum(w.numel() * (1 + w.is_complex()) for w in plain.trainable.values()))
    refused = "it changes the gradients"
    ways: tuple[_Way, ...] = ("at once", "by branch")
    for way in ways:
        try:
            with warnings.catch_warnings(action="ignore"):  # of an operation that has no rule for vmap
                rows = GradientRows(mix, samples[:1], by_branch=way == "by branch")
                found = _gram(rows, samples, rows.width)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever torch.func cannot transform, in whatever way it says so
            refused = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            continue
        if _equal(found, expected, 1e-9, 1e-3):
            return way
    _log.info(
        "Gradients of %s are made one sample at a time by plain autograd, since torch.func.vmap cannot make them: %s",
        type(function.net).__name__,
        refused,
    )
    return "one by one"


def _gram(rows: Rows, samples: Inputs, width: int) -> Tensor:
    """The kernel of the samples with each other, from rows of a known width."""
    made = torch.empty(len(samples), width, dtype=rows.function.dtype, device=samples.device)
    rows.fill(made, samples)
    if isinstance(rows, OneByOneRows):
        return made @ made.T
    return rows.contract(made, made, lambda a, b: a @ b.T)[0]


def _try_products(rows: GradientRows, samples: Inputs) -> _Way:
    """Compare J d with J^T u of reverse mode, on random d and u."""
    direction = {name: _random(weight) for name, weight in rows.trainable.items()}
    cotangent = _random(rows.cotangents.new_empty(len(samples), rows.num_outputs))
    gradient = rows.vjp(samples, cotangent)
    ways: tuple[_Way, ...] = ("forward", "reverse")
    for way in ways:
        rows.forward_mode = way == "forward"
        watch = ForwardModeWatch()
        try:
            with watch if way == "forward" else nullcontext():
                product = rows.jvp(samples, direction, None)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an operation without this derivative, in whatever way it says so
            _log.info("%s has no derivative by %s mode: %s", type(rows.function.net).__name__, way, error)
            continue
        if watch.found is None and is_adjoint(direction, product, cotangent, gradient):
            return way
    return "one by one"


@contextmanager
def _no_random_numbers(device: torch.device) -> Iterator[None]:
    """Raise if the body draws from a global generator, whose state is then put back."""

    def states() -> list[Any]:
        cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
        return [torch.get_rng_state(), random.getstate(), np.random.get_state(), *cuda]

    before = states()
    try:
        yield
    finally:
        pairs = zip(before, states(), strict=True)
        drawn = any(not torch.equal(a, b) if isinstance(a, Tensor) else repr(a) != repr(b) for a, b in pairs)
        if drawn:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
            if device.type == "cuda":
                torch.cuda.set_rng_state(before[-1], device)
    if drawn:
        raise ValueError(_RANDOM)


_RANDOM = (
    "The network draws random numbers in its forward pass (dropout, for example, or RReLU), so that its gradient is "
    "another one at every call: make the kernel of net.eval(), and let functional calls follow self.training."
)


def _check_samples_apart(plain: OneByOneRows, samples: Inputs) -> None:
    """Refuse networks whose output for a sample depends on the other samples, or changes from call to call."""

    def outputs(rows: OneByOneRows, x: Inputs) -> Tensor:
        with rows.outputs(x) as out:
            return out.detach().reshape(len(x), -1)

    def differ(rows: OneByOneRows, x: Inputs) -> str | None:
        alone = [outputs(rows, x[i : i + 1]) for i in range(len(x))]
        if not _equal(outputs(rows, x[:1]), alone[0], 1e-8, 3e-4):
            return _RANDOM
        if len(x) == 1:
            return None
        try:
            together = outputs(rows, x)
        except (RuntimeError, ValueError, IndexError):
            return None  # made for one sample a call: then it mixes none
        return None if _equal(together, torch.cat(alone), 1e-8, 3e-4) else _MIXES

    found = differ(plain, samples)
    if found is not None and plain.function.dtype != torch.float64:  # or float32 was too coarse
        exact = replace(plain.function, dtype=torch.float64)
        samples = samples.cast(torch.float64)
        found = differ(OneByOneRows(exact, samples[:1]), samples)
    if found is not None:
        raise ValueError(found)


_MIXES = (
    "The network's output for a sample depends on the other samples of its batch (batch normalization by statistics of "
    "the batch, for example), so that a sample has no gradient of its own: make the kernel of net.eval(), with running "
    "statistics."
)


def _equal(found: Tensor, expected: Tensor, double: float, single: float) -> bool:
    """Whether two results agree to a tolerance for their precision, over the largest; what is not finite agrees."""
    if found.shape != expected.shape:
        return False
    finite = torch.isfinite(found) & torch.isfinite(expected)
    difference = torch.where(finite, found - expected, 0).abs().max()
    size = torch.where(finite, expected, 0).abs().max()
    return bool(difference <= (double if expected.dtype == torch.float64 else single) * size)


def _random(like: Tensor) -> Tensor:
    """Normal numbers of a tensor's shape and kind, the same at every call, without touching the global state."""
    generator = torch.Generator().manual_seed(like.numel())
    real = torch.view_as_real(like) if like.is_complex() else like
    values = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real)
    return torch.view_as_complex(values) if like.is_complex() else values
