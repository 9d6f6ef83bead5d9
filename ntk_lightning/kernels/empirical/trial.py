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
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.derivatives import ForwardModeWatch, is_adjoint
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.rows import AllocationMeter, Rows, real_flat
from ntk_lightning.kernels.empirical.slow_path import OneByOneRows, PlainNetwork

__all__ = ["choose_products", "choose_rows"]

_Way = Literal["at once", "by branch", "one by one", "forward", "reverse"]

_log = logging.getLogger(__name__)


@dataclass
class _Found:
    """How the gradients of a network are made; what one pass of plain autograd gives and allocates."""

    way: _Way
    num_outputs: int
    nbytes: int
    products: _Way | None = None  # how J d is computed, where that was asked


_known: WeakKeyDictionary[nn.Module, dict[Hashable, _Found]] = WeakKeyDictionary()


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
    known, key, plain = _known.setdefault(function.net, {}), _key(function, inputs), None
    if key not in known:
        plain = PlainNetwork(function)
        known[key] = _try(plain, _two(inputs))
    found = known[key]
    if found.way == "one by one":
        return OneByOneRows(plain or PlainNetwork(function), found.num_outputs, found.nbytes, per_layer)
    return GradientRows(function, inputs[0][:1], per_layer, by_branch=found.way == "by branch")


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
    found = _known[rows.function.net][_key(rows.function, inputs)]
    if found.products is None:
        found.products = _try_products(rows, _two(inputs))
    if found.products == "one by one":
        return OneByOneRows(PlainNetwork(rows.function), found.num_outputs, found.nbytes)
    rows.forward_mode = found.products == "forward"
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


def _try(plain: PlainNetwork, samples: Inputs) -> _Found:
    """Refuse what has no kernel, then compare vmap with plain autograd, on a random mix u^T f of the outputs."""
    function, singles = plain.function, samples.split(1)
    with _no_random_numbers(function.device), _dtype_advice(samples):
        again = _outputs(plain, singles[0])
    u, alone, gradients = _random(again[0]), [], []
    meter = AllocationMeter()
    for i, sample in enumerate(singles):
        with meter if i == 0 else nullcontext(), plain.outputs(sample) as outputs:
            alone.append(outputs.detach().reshape(1, -1))
            gradients.append(torch.cat(real_flat(plain.gradient(outputs, u).values())))
    _check_samples_apart(plain, samples, again, alone)

    def mixed(returned: Any) -> Tensor:  # noqa: ANN401 - whatever the network returns
        return function.select(returned).reshape(1, -1) @ u[:, None]

    mix, refused = replace(function, output=mixed, full=False), "it changes the gradients"
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    ways: tuple[_Way, ...] = ("at once", "by branch")
    for way in ways:
        try:
            with warnings.catch_warnings(action="ignore"):  # of an operation that has no rule for vmap
                rows = GradientRows(mix, samples[:1], by_branch=way == "by branch")
                made = again.new_empty(len(samples), rows.width)
                rows.fill(made, samples)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever torch.func cannot transform, in whatever way it says so
            refused = f"{type(error).__name__}: {error}"
            if "control flow" not in refused and ".item()" not in refused:
                break
        else:
            if _equal(rows.contract(made, made, lambda a, b: a @ b.T)[0], expected, 1e-9, 1e-3):
                return _Found(way, again.numel(), meter.nbytes)
            break
    _log.info(
        "Gradients of %s are made one sample at a time by plain autograd, since torch.func.vmap cannot make them: %s",
        type(function.net).__name__,
        refused,
    )
    return _Found("one by one", again.numel(), meter.nbytes)


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

    def differ(a: Any, b: Any) -> bool:  # noqa: ANN401 - each generator's own kind of state
        if isinstance(a, tuple):
            return len(a) != len(b) or any(map(differ, a, b))
        return not np.array_equal(a, b) if isinstance(a, np.ndarray | Tensor) else bool(a != b)

    before = states()
    try:
        yield
    finally:
        drawn = any(map(differ, before, states()))
        if drawn:
            torch.set_rng_state(before[0])
            random.setstate(before[1])
            np.random.set_state(before[2])
            if device.type == "cuda":
                torch.cuda.set_rng_state(before[-1], device)
    if drawn:
        raise ValueError(_RANDOM)


@contextmanager
def _dtype_advice(x: Inputs) -> Iterator[None]:
    """Say what to do where the network does not take numbers of this kind."""
    try:
        yield
    except RuntimeError as error:
        if "type" in str(error) and not any(leaf.is_floating_point() for leaf in x.leaves):
            kinds = " and ".join(sorted({str(leaf.dtype) for leaf in x.leaves}))
            raise TypeError(
                f"The network does not take {kinds}: call .float() first. Its own words: {error}"
            ) from error
        raise


_RANDOM = (
    "The network draws random numbers in its forward pass (dropout, for example, or RReLU), so that its gradient is "
    "another one at every call: make the kernel of net.eval(), and let functional calls follow self.training."
)


def _outputs(plain: PlainNetwork, x: Inputs) -> Tensor:
    """Outputs (n, C) of n samples in one call."""
    with plain.outputs(x) as outputs:
        return outputs.detach().reshape(len(x), -1)


def _check_samples_apart(plain: PlainNetwork, samples: Inputs, again: Tensor, alone: list[Tensor]) -> None:
    """Refuse networks whose output for a sample depends on the other samples, or changes from call to call.

    Args:
        plain: The network.
        samples: One or two.
        again: Outputs (1, C) of the first, of another call than those in ``alone``.
        alone: Outputs (1, C) of each, called alone.

    Raises:
        ValueError: It does.
    """
    found = _dependence(plain, samples, again, alone)
    if found is not None and plain.function.dtype != torch.float64:  # or float32 was too coarse
        exact, samples = PlainNetwork(replace(plain.function, dtype=torch.float64)), samples.cast(torch.float64)
        again, *alone = (_outputs(exact, sample) for sample in (samples[:1], *samples.split(1)))
        found = _dependence(exact, samples, again, alone)
    if found is not None:
        raise ValueError(found)


def _dependence(plain: PlainNetwork, samples: Inputs, again: Tensor, alone: list[Tensor]) -> str | None:
    """What else than the sample the outputs depend on, in words, or None."""
    if not _equal(again, alone[0], 1e-8, 3e-4):
        return _RANDOM
    if len(samples) == 1:
        return None
    try:
        together = _outputs(plain, samples)
    except (RuntimeError, ValueError, IndexError):
        return None  # made for one sample a call: then it mixes none
    return None if _equal(together, torch.cat(alone), 1e-8, 3e-4) else _MIXES


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
