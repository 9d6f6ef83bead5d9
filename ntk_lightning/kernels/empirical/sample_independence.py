"""Networks without a kernel are refused: those whose outputs depend on other samples or on random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.slow_path import PlainNetwork

__all__ = ["agree", "check_modes", "check_samples_apart", "no_random_numbers", "outputs_of"]

_RANDOM = (
    "The network draws random numbers in its forward pass (dropout, for example, or RReLU), so that its gradient is "
    "another one at every call: make the kernel of net.eval(), and let functional calls follow self.training."
)
_MIXES = (
    "The network's output for a sample depends on the other samples of its batch (batch normalization by statistics of "
    "the batch, for example), so that a sample has no gradient of its own: make the kernel of net.eval(), with running "
    "statistics."
)


def check_modes(net: nn.Module, dropout: bool = True) -> None:
    """Refuse layers that mix samples or draw random numbers.

    Args:
        net: The network.
        dropout: Refuse dropout layers in training mode too.

    Raises:
        ValueError: There is such a layer.
    """
    for name, module in net.named_modules():
        what = f"{type(module).__name__} {name!r}"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{what} normalizes by statistics of the batch, so that a sample has no gradient of its own: "
                "make the kernel of net.eval(), with running statistics."
            )
        if getattr(module, "scale_grad_by_freq", False):
            raise ValueError(
                f"{what} divides gradients by how often a token is in the batch, so that a sample has no gradient of "
                "its own: set scale_grad_by_freq=False."
            )
        if dropout and isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError(f"{what} draws random numbers: make the kernel of net.eval().")


@contextmanager
def no_random_numbers(device: torch.device) -> Iterator[None]:
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


def outputs_of(plain: PlainNetwork, x: Inputs) -> Tensor:
    """Outputs (n, C) of n samples in one call."""
    with plain.outputs(x) as outputs:
        return outputs.detach().reshape(len(x), -1)


def check_samples_apart(plain: PlainNetwork, samples: Inputs, again: Tensor, alone: list[Tensor]) -> None:
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
        again, *alone = (outputs_of(exact, sample) for sample in (samples[:1], *samples.split(1)))
        found = _dependence(exact, samples, again, alone)
    if found is not None:
        raise ValueError(found)


def _dependence(plain: PlainNetwork, samples: Inputs, again: Tensor, alone: list[Tensor]) -> str | None:
    """What else than the sample the outputs depend on, in words, or None."""
    if not agree(again, alone[0], 1e-8, 3e-4):
        return _RANDOM
    if len(samples) == 1:
        return None
    try:
        together = outputs_of(plain, samples)
    except (RuntimeError, ValueError, IndexError):
        return None  # made for one sample a call: then it mixes none
    if agree(together, torch.cat(alone), 1e-8, 3e-4) or _branches_alone_differ(plain, samples):
        return None
    return _MIXES


def _branches_alone_differ(plain: PlainNetwork, samples: Inputs) -> bool:
    """Whether two samples together only take another branch than alone: then the kernel is that of samples alone."""
    # The network turns tensors into numbers of Python's, with other values together than alone, and the first output
    # has no gradient in the second sample. Of inputs without gradients that is believed.
    answers = []
    for x in (*samples.split(1), samples):
        with _Answers() as questions:
            outputs_of(plain, x)
        answers.append(questions.answers)
    if answers[0] == answers[1] == answers[2]:
        return False
    leaves = [leaf.clone().requires_grad_() if leaf.is_floating_point() else leaf for leaf in samples.leaves]
    with plain.outputs(samples.with_leaves(tuple(leaves))) as outputs:
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        first = outputs[:1].sum()
        gradients = torch.autograd.grad(first, inputs, allow_unused=True) if inputs and first.requires_grad else ()
    return not any(g is not None and bool(g[1].any()) for g in gradients)


class _Answers(TorchFunctionMode):
    """While active, note the values of tensors that become numbers of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Do anything as always."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) and func in _QUESTIONS:
            self.answers.append(result)
        return result


_QUESTIONS = {Tensor.__bool__, Tensor.__int__, Tensor.__index__, Tensor.__float__, Tensor.item, Tensor.tolist}


def agree(found: Tensor, expected: Tensor, double: float, single: float) -> bool:
    """Whether results agree to a tolerance for their precision, over the largest; all do where infinity is expected."""
    if found.shape != expected.shape or (torch.isfinite(expected) & ~torch.isfinite(found)).any():
        return False
    finite = torch.isfinite(found) & torch.isfinite(expected)
    difference = torch.where(finite, found - expected, 0).abs().max()
    size = torch.where(finite, expected, 0).abs().max()
    return bool(difference <= (double if expected.dtype == torch.float64 else single) * size)
