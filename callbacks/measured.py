"""What of a run a callback measures: the network, its outputs, and the samples of the run's data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ntk_lightning.callbacks.find_network import count_outputs, evaluating, network, network_name, predict
from ntk_lightning.callbacks.loaders import evaluation_loader, train_loader
from ntk_lightning.datamodules.from_loaders import first_samples
from ntk_lightning.datamodules.samples import Samples, has_set, samples_of
from ntk_lightning.datamodules.unpack import Unpack
from ntk_lightning.kernels.empirical.network_function import Output
from ntk_lightning.kernels.grams.agreement import agree_on_tensors
from ntk_lightning.kernels.grams.distributed import gather_or_raise
from ntk_lightning.precision import at_least_float32
from ntk_lightning.pytrees import named_tensors
from ntk_lightning.targets import TargetKind, describe_targets, targets_for
from ntk_lightning.whole_number import check_size

__all__ = ["DEFAULT_TEST", "DEFAULT_TRAIN", "Measured", "check_sets", "forget_samples"]

DEFAULT_TRAIN, DEFAULT_TEST = 256, 512  # samples of plain loaders: a kernel takes seconds
_PROBE = 16  # samples that tell probabilities from outputs with a sign
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")


@dataclass(frozen=True)
class Measured:
    """The network and the samples that a callback measures kernels on; two callbacks that agree in it share them.

    A data module of this package, or any that keeps :class:`~ntk_lightning.datamodules.Samples` as ``train_set`` and so
    on, gives whole sets. Otherwise the samples are the first ones of the loaders' data sets.

    Args:
        network: As of :func:`~ntk_lightning.callbacks.find_network.network_name`.
        output: As of :class:`~ntk_lightning.kernels.EmpiricalNTK`.
        n_train: The first samples of the training set to take.
        n_test: The first samples of the test set to take.
        samples: Function of a collated batch to (inputs, targets).
        test_loader: Which loader to measure on, as of :func:`~ntk_lightning.callbacks.loaders.evaluation_loader`.

    Raises:
        ValueError: A size is below 1.
    """

    network: str | None = None
    output: Output = None
    n_train: int | None = None
    n_test: int | None = None
    samples: Unpack | None = None
    test_loader: int | str | None = None

    def __post_init__(self) -> None:
        for name in ("n_train", "n_test"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name), 1)

    def net(self, module: LightningModule) -> nn.Module:
        """Find the network.

        Args:
            module: Module that holds it.

        Returns:
            The network.
        """
        return network(module, self.network)

    def size(self, trainer: Trainer, split: str = "train") -> int:
        """Count the samples of a set.

        Args:
            trainer: Trainer of the run, from ``on_fit_start`` on.
            split: As of :meth:`take`.

        Returns:
            Their number.
        """
        return len(self._find(trainer, split))

    def take(self, trainer: Trainer, split: str, num_outputs: int | None = None) -> Samples:
        """Take a set of samples, on the device and in the precision of the training; whole numbers stay whole.

        Args:
            trainer: Trainer of the run, from ``on_fit_start`` on.
            split: "train", "test", "val" or "fresh".
            num_outputs: Outputs of the network, to bring the targets to what a kernel is fitted to.

        Returns:
            Inputs and targets: (n,) for one output, (n, num_outputs) for several; as they are without ``num_outputs``.

        Raises:
            TypeError: The run has no such set.
            ValueError: The samples cannot be read, or the targets do not fit the number of outputs.
        """
        dtype = cast(torch.dtype, trainer.lightning_module.dtype)
        found = self._find(trainer, split).to(trainer.strategy.root_device, dtype)
        if num_outputs is None:
            return found
        kind = self._kind(trainer, num_outputs)
        return replace(found, y=targets_for(found.y, num_outputs, at_least_float32(dtype), kind))

    def evaluation_sets(self, trainer: Trainer, num_outputs: int | None = None) -> dict[str, Samples]:
        """Take the sets that kernel fits are measured on.

        Args:
            trainer: As of :meth:`take`.
            num_outputs: As of :meth:`take`.

        Returns:
            The "test" set, and the "val" set if the data module keeps one.
        """
        splits = ("test", "val") if has_set(trainer, "val") and self.test_loader is None else ("test",)
        return {split: self.take(trainer, split, num_outputs) for split in splits}

    def count_outputs(self, trainer: Trainer, net: nn.Module) -> int:
        """Count the outputs of the network on a training sample.

        Args:
            trainer: As of :meth:`take`.
            net: The network, on the device of the training.

        Returns:
            The number.
        """
        return count_outputs(net, self.take(trainer, "train").x, self.output)

    def real(self, trainer: Trainer, num_outputs: int) -> bool:
        """Tell whether the targets are real values, which have losses and no error rate.

        Args:
            trainer: As of :meth:`take`.
            num_outputs: Outputs of the network.

        Returns:
            True for real values; several columns of a data module's own set stand for classes, the largest entry's.
        """
        own = self._is_own(trainer, "train") and num_outputs > 1
        return not own and self._kind(trainer, num_outputs) == "real"

    def check(self, trainer: Trainer, module: LightningModule, *, evaluation: bool = True) -> None:
        """Check, in ``on_fit_start`` and so before any batch, that network, samples and targets are there and fit.

        Args:
            trainer: Trainer of the run.
            module: Its module, built.
            evaluation: The evaluation sets are needed too.

        Raises:
            ValueError: Something does not fit; the message says what.
        """
        if type(trainer.strategy).__name__ in _SHARDED:
            raise ValueError(
                f"{type(trainer.strategy).__name__} keeps a part of the weights on each process, and a kernel needs "
                'all: train with strategy="ddp", or compute the EmpiricalNTK of a checkpoint.'
            )
        net = self.net(module)
        if trainer.world_size > 1:  # none waits for one whose loader fails
            gather_or_raise(lambda: self._read_all(trainer, evaluation))
        train, *others = self._read_all(trainer, evaluation)
        check_sets(trainer, {"train": train, **dict(zip(("test", "val"), others, strict=False))})
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            try:
                outputs = self.count_outputs(trainer, net)
            except Exception as error:
                error.add_note(
                    f"Kernels are of the network {network_name(module, self.network)!r} of {type(module).__name__}, "
                    "called as net(x), net(*x) or net(**x) with the inputs x of a batch: choose by network=, samples= "
                    "and output=."
                )
                raise
            for split in ("train", *(("test", "val")[: len(others)])):
                self.take(trainer, split, outputs)
            self._warn_of_probabilities(trainer, net, outputs)

    def _warn_of_probabilities(self, trainer: Trainer, net: nn.Module, num_outputs: int) -> None:
        train = self.take(trainer, "train").take(slice(_PROBE))
        if self._kind(trainer, num_outputs) != "binary" or not bool((self._find(trainer, "train").y == 0).any()):
            return
        with evaluating(net):
            values = predict(net, train.x, self.output)
        if bool(((values >= 0) & (values <= 1)).all()):
            rank_zero_warn(
                "All outputs lie between 0 and 1, as probabilities do, but kernels and errors take the sign for the "
                "class: give output=, a function to logits, such as output=lambda out: out - 0.5."
            )

    def _read_all(self, trainer: Trainer, evaluation: bool) -> list[Samples]:
        splits = ["train"]
        if evaluation:
            splits += ["test", *(["val"] if has_set(trainer, "val") and self.test_loader is None else [])]
        return [self._find(trainer, split) for split in splits]

    def _kind(self, trainer: Trainer, num_outputs: int) -> TargetKind:
        return describe_targets(self._find(trainer, "train").y, num_outputs)

    def _is_own(self, trainer: Trainer, split: str) -> bool:
        """Tell whether the set is one that the data module keeps."""
        return has_set(trainer, split) and not (split == "test" and self.test_loader is not None)

    def _find(self, trainer: Trainer, split: str) -> Samples:
        count = self.n_train if split == "train" else self.n_test if split == "test" else None
        if not self._is_own(trainer, split) and split in ("train", "test"):
            return self._read(trainer, split, count)
        found = samples_of(trainer, split)
        if count is not None and count > len(found):
            raise ValueError(f"The {split} set has {len(found)} samples, fewer than n_{split}={count}: ask for fewer.")
        return found if count is None else found.take(slice(count))

    def _read(self, trainer: Trainer, split: str, count: int | None) -> Samples:
        """Read the first samples of a loader once, and again where Lightning then iterates over another loader."""
        kept = _READ.setdefault(trainer, {})
        key = (split, count, self.samples, self.test_loader if split == "test" else None)
        begun = trainer.train_dataloader is not None
        if key in kept and (kept[key].final or not begun):
            return kept[key].samples
        of, loader = (
            ("train", train_loader(trainer)) if split == "train" else evaluation_loader(trainer, self.test_loader)
        )
        default = DEFAULT_TRAIN if split == "train" else DEFAULT_TEST
        if key in kept and kept[key].loader is loader:
            found = kept[key].samples
        else:
            found = first_samples(loader, count or default, self.samples, fewer=count is None)
            if key not in kept:
                _say_how_many({"train": "training", "val": "validation"}.get(of, of), len(found), loader, split)
        # a test loader, which the run itself does not iterate over, is asked for on a copy: another is no better
        kept[key] = _Read(loader, found, final=begun or of == "test")
        return found


@dataclass(frozen=True)
class _Read:
    """What has been read of a loader; final once the loader is the run's own."""

    loader: object
    samples: Samples
    final: bool


_READ: WeakKeyDictionary[Trainer, dict[object, _Read]] = WeakKeyDictionary()


def forget_samples(trainer: Trainer) -> None:
    """Forget the samples of an earlier run of a Trainer.

    Args:
        trainer: Trainer that sets up a run.
    """
    _READ.pop(trainer, None)


def check_sets(trainer: Trainer, read: dict[str, Samples] | None = None) -> None:
    """Raise on every process where they hold different data sets: their kernels would be pieces of several.

    Args:
        trainer: Trainer whose data module is set up.
        read: Sets by name that have been read, beside all that the data module keeps.

    Raises:
        ValueError: The sets of two processes differ in sizes, inputs or labels.
    """
    if trainer.world_size == 1:
        return
    splits = ("train", "test", "val", "fresh")
    own = {split: samples_of(trainer, split) for split in splits if has_set(trainer, split)}
    tensors: dict[str, Tensor] = {}
    for split, samples in (own | (read or {})).items():
        found = samples.to(trainer.strategy.root_device)  # where processes can exchange them
        tensors |= dict(named_tensors(found.x, f"{split} inputs")) | {f"{split} labels": found.y}
    agree_on_tensors(
        tensors,
        "every process must hold the same sets, so give random_split and the like one seed, and let a stream of one's "
        "own share begin alike.",
    )


def _say_how_many(name: str, taken: int, loader: object, split: str) -> None:
    data = getattr(loader, "dataset", getattr(loader, "samples", None))
    try:
        batched = getattr(loader, "batch_sampler", ()) is None  # then the data set's length is the number of batches
        total: int | None = None if batched else len(data)  # type: ignore[arg-type]  # what has none raises
    except (TypeError, NotImplementedError):
        total = None
    if total != taken:
        whole = "" if total is None else f" of {total}"
        rank_zero_info(f"Kernels take the first {taken}{whole} {name} samples: n_{split}=... takes another number.")
