"""Which way a network's gradients are made, chosen by trying it on two samples.

Plain autograd is the reference. A network that draws random numbers or mixes samples has no kernel, and is refused.
What vmap makes of two samples must equal plain autograd, or the rows are made one by one.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.empirical.derivatives import ForwardModeWatch, is_adjoint
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.layer_rules import Ruled
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import Weights
from ntk_lightning.kernels.empirical.rows import AllocationMeter, Rows, real_flat
from ntk_lightning.kernels.empirical.sample_independence import (
    agree,
    check_samples_apart,
    no_random_numbers,
    outputs_of,
)
from ntk_lightning.kernels.empirical.slow_path import OneByOneRows, PlainNetwork
from ntk_lightning.kernels.empirical.standard_layers import is_standard

__all__ = ["choose_products", "choose_rows", "share_findings"]

_Way = Literal["at once", "by branch", "one by one", "forward", "reverse"]

_log = logging.getLogger(__name__)


@dataclass
class _Found:
    """How the gradients of a network are made; what one pass of plain autograd gives and allocates."""

    way: _Way
    products: _Way | None = None  # how J d is computed, once that was asked
    several: bool | None = None  # whether products take several vectors at once, likewise
    batched: bool = False  # whether one pass pulls back all cotangents
    num_outputs: int = 0
    nbytes: int = 0
    ruled: Ruled | None = None  # of GradientRows, once it was asked
    measured: dict[Hashable, dict[Hashable, int]] = field(default_factory=dict)  # likewise, by its options


_known: WeakKeyDictionary[nn.Module, dict[Hashable, _Found]] = WeakKeyDictionary()
_of_runs: WeakKeyDictionary[nn.Module, dict[Hashable, dict[Hashable, _Found]]] = WeakKeyDictionary()


def share_findings(copy: nn.Module, trainable: tuple[str, ...], network: nn.Module) -> None:
    """Let all copies of one network that is trained share what the first of them is found to be.

    Args:
        copy: A copy of the network at some step.
        trainable: Names of the copy's parameters that are differentiated.
        network: The network in training; its weights change, and what it is made of seldom does.
    """
    made_of = trainable, tuple((name, type(module)) for name, module in copy.named_modules())
    _known[copy] = _of_runs.setdefault(network, {}).setdefault(made_of, {})


def choose_rows(function: NetworkFunction, inputs: list[Inputs], per_layer: bool = False, dense: bool = False) -> Rows:
    """Choose how the rows of some inputs are made, once for each network and kind of inputs.

    Args:
        function: What is differentiated.
        inputs: All inputs, already cast.
        per_layer: Keep the kernels of modules apart.
        dense: Keep no layer in factors.

    Returns:
        The rows.

    Raises:
        ValueError: The network mixes samples, draws random numbers, or gives no outputs that can be differentiated.
    """
    known, key, plain = _known.setdefault(function.net, {}), _key(function, inputs), None
    numbers = all(leaf.is_floating_point() for leaf in inputs[0].leaves)
    if key not in known and numbers and not callable(function.output) and is_standard(function.net):
        known[key] = _Found("at once", "forward", batched=True)
    elif key not in known:
        plain = PlainNetwork(function)
        known[key] = _try(plain, _two(inputs))
    found = known[key]
    if found.way == "one by one":
        return OneByOneRows(plain or PlainNetwork(function), found.num_outputs, found.nbytes, per_layer)
    by_branch = found.way == "by branch"
    partners = max(1, sum(map(len, inputs)) // 2)  # half of a Gram, of two sets about as many
    rows = GradientRows(
        function, inputs[0][:1], per_layer, by_branch, dense, found.batched, found.ruled, partners=partners
    )
    found.ruled = rows.ruled
    if not by_branch:  # what another branch allocates is not known
        rows.measured = found.measured.setdefault((function.full, per_layer, dense), {})
    return rows


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
    if found.products != "forward":
        plain = OneByOneRows(PlainNetwork(rows.function), found.num_outputs, found.nbytes)
        found.products = found.products or _try_products(rows, plain, _two(inputs))
        if found.products == "one by one":
            return plain
    rows.forward_mode = found.products == "forward"
    if found.several is None:
        found.several = _take_several(rows, _two(inputs))
    rows.together = 2**31 if found.several else 1
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
    with no_random_numbers(function.device), _dtype_advice(samples):
        again = outputs_of(plain, singles[0])
    u, alone, gradients = _random(again[0]), [], []
    meter = AllocationMeter()
    for i, sample in enumerate(singles):
        with meter if i == 0 else nullcontext(), plain.outputs(sample) as outputs:
            alone.append(outputs.detach().reshape(1, -1))
            gradients.append(torch.cat(real_flat(plain.gradient(outputs, u).values())))
    check_samples_apart(plain, samples, again, alone)

    def mixed(returned: Any) -> Tensor:  # noqa: ANN401 - whatever the network returns
        return function.select(returned).reshape(1, -1) @ u[:, None]

    mix, refused = replace(function, output=mixed, full=False), "it changes the gradients"
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    ways: tuple[_Way, ...] = ("at once", "by branch")
    rounded = meter.rounded(function.dtype)
    if function.dtype == torch.float64 and rounded:  # in float64 all digits are wanted: rounding depends on the batch
        ways, refused = (), f"it computes in {', '.join(map(str, rounded))} within, which vmap rounds otherwise"
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
            if agree(rows.contract(made, made)[0], expected, 1e-12, 1e-3):
                batched = again.numel() > 1 and _pulls_at_once(function, samples, way == "by branch", u, expected)
                return _Found(way, batched=batched, num_outputs=again.numel(), nbytes=meter.nbytes)
            break
    _log.info(
        "Gradients of %s are made one sample at a time by plain autograd, which torch.func.vmap cannot replace: %s",
        type(function.net).__name__,
        refused,
    )
    return _Found("one by one", num_outputs=again.numel(), nbytes=meter.nbytes)


def _pulls_at_once(function: NetworkFunction, samples: Inputs, by_branch: bool, u: Tensor, expected: Tensor) -> bool:
    """Whether one pass for several cotangents gives the kernel of u^T f, which is expected, as one of two outputs."""

    def mixed(returned: Any) -> Tensor:  # noqa: ANN401 - whatever the network returns
        return function.select(returned).reshape(1, -1) @ torch.stack([u, u.flip(0)], 1)

    try:
        with warnings.catch_warnings(action="ignore"):  # of an operation that has no rule for vmap
            rows = GradientRows(
                replace(function, output=mixed, full=True), samples[:1], by_branch=by_branch, batched=True
            )
            made = u.new_empty(len(samples), rows.width)
            rows.fill(made, samples)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever torch.func cannot transform twice, in whatever way it says so
        _log.info("The outputs of %s are differentiated one after another: %s", type(function.net).__name__, error)
        return False
    return agree(rows.contract(made, made)[0][..., 0, 0], expected, 1e-12, 1e-3)


def _try_products(rows: GradientRows, plain: OneByOneRows, samples: Inputs) -> _Way:
    """Compare J^T u and J d with J^T u of plain autograd, on random u and d."""
    direction = {name: _random(weight) for name, weight in rows.trainable.items()}
    cotangent = _random(rows.cotangents.new_empty(len(samples), rows.num_outputs))
    gradient = _first(plain.vjp(samples, cotangent[None]))
    ways: tuple[_Way, ...] = ("forward", "reverse")
    for way in ways:
        rows.forward_mode, watch = way == "forward", ForwardModeWatch()
        try:
            pulled = _first(rows.vjp(samples, cotangent[None]))
            with watch if way == "forward" else nullcontext():
                product = rows.jvp(samples, _several(direction, [1.0]), None)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # an operation without this derivative, in whatever way it says so
            _log.info("%s has no products by %s mode: %s", type(rows.function.net).__name__, way, error)
            continue
        same = all(agree(pulled[name], expected, 1e-12, 1e-3) for name, expected in gradient.items())
        if same and watch.found is None and is_adjoint(direction, product, cotangent, gradient):
            return way
    return "one by one"


def _take_several(rows: GradientRows, samples: Inputs) -> bool:
    """Whether products with several vectors at once are those with each."""
    direction = {name: _random(weight) for name, weight in rows.trainable.items()}
    cotangent = _random(rows.cotangents.new_empty(len(samples), rows.num_outputs))
    scales = [1.0, -2.0]
    try:
        pulled = rows.vjp(samples, torch.stack([s * cotangent for s in scales]))
        product = rows.jvp(samples, _several(direction, scales), None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever torch.func cannot transform twice, in whatever way it says so
        _log.info("Products of %s take one vector at a time: %s", type(rows.function.net).__name__, error)
        return False
    single = rows.vjp(samples, cotangent[None]), rows.jvp(samples, _several(direction, [1.0]), None)
    expected = {name: torch.cat([s * g for s in scales]) for name, g in single[0].items()}
    same = all(agree(pulled[name], expected[name], 1e-12, 1e-3) for name in expected)
    return same and agree(product, torch.cat([s * single[1] for s in scales]), 1e-12, 1e-3)


def _several(direction: Weights, scales: list[float]) -> Weights:
    """Multiples of a direction, (k, ...)."""
    return {name: torch.stack([s * d for s in scales]) for name, d in direction.items()}


def _first(weights: Weights) -> Weights:
    """The first of several directions."""
    return {name: several[0] for name, several in weights.items()}


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


def _random(like: Tensor) -> Tensor:
    """Normal numbers of a tensor's shape and kind, the same at every call, without touching the global state."""
    generator = torch.Generator().manual_seed(like.numel())
    real = torch.view_as_real(like) if like.is_complex() else like
    values = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real)
    return torch.view_as_complex(values) if like.is_complex() else values
