"""K^t, the empirical NTK after t steps, extracted once for all callbacks that measure it at that step.

The callback that measures first computes one Gram for all: the first training samples that any of them needs, and the
evaluation sets by them. The others take their corner of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

from lightning import LightningModule, Trainer
from torch import nn

from ntk_lightning.callbacks.find_network import evaluation_kernel
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.nested_fits import NestedProblem
from ntk_lightning.datamodules.base import Samples
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.memory_plan import parse_bytes
from ntk_lightning.kernels.grams.agreement import checksum, on_all_ranks
from ntk_lightning.kernels.grams.distributed import distributed_gram_and_cross
from ntk_lightning.kernels.grams.gram_and_cross import gram_and_cross

__all__ = ["Extraction", "KernelCallback", "KernelNeed", "SharedExtraction", "shared_extraction"]


@dataclass(frozen=True)
class KernelNeed:
    """What a callback needs of K^t: the Gram of the first ``train`` samples, and whether the evaluation sets' rows."""

    train: int
    evaluation: bool
    memory: str

    def covers(self, other: KernelNeed) -> bool:
        """Tell whether a Gram for this need serves another."""
        return self.train >= other.train and self.evaluation >= other.evaluation


@runtime_checkable
class KernelCallback(Protocol):
    """A callback that measures kernels of what it calls ``measured``."""

    measured: Measured

    def kernel_need(self, trainer: Trainer, step: int, moved: bool, ended: bool) -> KernelNeed | None:
        """Say what it needs of the kernel after ``step`` steps, None for nothing.

        Args:
            trainer: Trainer of the run.
            step: Steps that have been taken.
            moved: The weights are not those of the last extraction.
            ended: The training has ended.
        """


@dataclass(frozen=True)
class Extraction:
    """K^t on a run's samples."""

    kernel: EmpiricalNTK  # with a copy of the network, in evaluation mode
    problem: (
        NestedProblem  # Grams of the first N training samples, and of the evaluation sets if any callback needs them
    )
    train: Samples  # the first N
    evaluation: dict[str, Samples]


@dataclass
class _Kept:
    """The last extraction of one network on some samples; the Grams go when all have measured, the checksum stays."""

    weights: int
    need: KernelNeed
    extraction: Extraction | None
    waiting: set[int] = field(default_factory=set)  # ids of callbacks that have yet to measure it


class SharedExtraction:
    """The extractions of one run."""

    def __init__(self) -> None:
        self.ended = False
        self._kept: WeakKeyDictionary[nn.Module, dict[Measured, _Kept]] = WeakKeyDictionary()

    def extract(self, trainer: Trainer, module: LightningModule, asking: KernelCallback, step: int) -> Extraction:
        """Give a callback K^t at the network's current weights, computed now or for an earlier callback.

        Args:
            trainer: Trainer of the run.
            module: Module that holds the network.
            asking: The callback that measures.
            step: Steps that have been taken.

        Returns:
            The kernel, on at least the samples that the callback needs.

        Raises:
            FloatingPointError: The kernel is not finite.
        """
        net = asking.measured.net(module)
        of_net = self._kept.setdefault(net, {})
        key = replace(asking.measured, network=None)
        weights, kept = weights_of(net), of_net.get(key)
        moved = not on_all_ranks(kept is not None and kept.weights == weights)
        need = asking.kernel_need(trainer, step, True, self.ended)
        assert need is not None, "a callback that measures needs something"
        if kept is None or moved or kept.extraction is None or not kept.need.covers(need):
            kept = of_net[key] = self._extract_for_all(trainer, module, asking, need, weights, step, moved)
        assert kept.extraction is not None, "extracted or kept"
        extraction = kept.extraction
        kept.waiting.discard(id(asking))
        if not kept.waiting:
            kept.extraction = None
        return extraction

    def release(self) -> None:
        """Free all Grams: the next batch begins, or the run is over."""
        for of_net in self._kept.values():
            for kept in of_net.values():
                kept.extraction = None

    def _extract_for_all(
        self,
        trainer: Trainer,
        module: LightningModule,
        asking: KernelCallback,
        need: KernelNeed,
        weights: int,
        step: int,
        moved: bool,
    ) -> _Kept:
        """Extract what the asking callback and all others that will ask for the same kernel need."""
        measured, needs, waiting = asking.measured, [need], {id(asking)}
        for other in trainer.callbacks:  # type: ignore[attr-defined]  # callbacks exists
            if other is asking or not isinstance(other, KernelCallback) or not alike(module, other.measured, measured):
                continue
            now = other.kernel_need(trainer, step, moved, self.ended)
            if now is not None:
                needs.append(now)
            if (
                now is not None or other.kernel_need(trainer, step, moved, True) is not None
            ):  # this step may be the last
                waiting.add(id(other))
        union = KernelNeed(
            max(each.train for each in needs),
            any(each.evaluation for each in needs),
            max((each.memory for each in needs), key=parse_bytes),
        )
        try:
            return _Kept(weights, union, _extract(trainer, module, measured, union), waiting)
        except FloatingPointError:  # maybe at a sample that only others need: each extracts its own
            if need.covers(union):
                raise
            return _Kept(weights, need, _extract(trainer, module, measured, need), {id(asking)})


def alike(module: LightningModule, first: Measured, second: Measured) -> bool:
    """Tell whether two callbacks measure the same network on the same samples.

    Args:
        module: Of the run.
        first: What one measures.
        second: What the other measures.

    Returns:
        True if they can share an extraction.
    """
    named = replace(first, network=None) == replace(second, network=None)
    return named and first.net(module) is second.net(module)


def shared_extraction(trainer: Trainer) -> SharedExtraction:
    """Look up the extractions that all callbacks of a run share.

    Args:
        trainer: Trainer of the run.

    Returns:
        Its extractions.
    """
    return _SHARED.setdefault(trainer, SharedExtraction())


_SHARED: WeakKeyDictionary[Trainer, SharedExtraction] = WeakKeyDictionary()


def weights_of(net: nn.Module) -> int:
    """Sum up the parameters and buffers of a network in one number, which tells whether they have changed.

    Args:
        net: The network.

    Returns:
        A checksum.
    """
    return checksum([*net.parameters(), *net.buffers()])


def _extract(trainer: Trainer, module: LightningModule, measured: Measured, need: KernelNeed) -> Extraction:
    kernel = evaluation_kernel(trainer, module, measured.network, need.memory, measured.output)
    outputs = measured.count_outputs(trainer, kernel.net)
    train = measured.take(trainer, "train", outputs).take(slice(need.train))
    evaluation = measured.evaluation_sets(trainer, outputs) if need.evaluation else {}
    grams = distributed_gram_and_cross(gram_and_cross(kernel))
    real = measured.real(trainer, outputs)
    return Extraction(kernel, NestedProblem.compute(grams, train, evaluation, need.train, real), train, evaluation)
