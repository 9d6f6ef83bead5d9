"""Data that lives on the device: nested subsets of one pool, normalized, served as batches of indices.

Longer than 300 lines for the documentation of what all data sets share; loaders and data module know each other's
state.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ntk_lightning.objective import check_labels
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.pytrees import Inputs, take_samples, to_device

__all__ = ["Batch", "BatchLoader", "ImageDataModule", "Samples", "check_size", "has_set", "samples_of"]


_CHUNK = 1024  # images that are normalized at a time, in float64


class Batch(NamedTuple):
    """One process's share of a batch.

    ``x`` (b, C, H, W), ``y`` (b,), ``indices`` (b,) positions in the data set, ``size`` of the batch over all
    processes.
    """

    x: Tensor
    y: Tensor
    indices: Tensor
    size: int


@dataclass(frozen=True)
class Samples:
    """Inputs ``x``, such as images (n, C, H, W), and labels ``y``, (n,) or (n, C).

    Inputs of the user's own loaders may be tuples, lists and mappings of tensors that each have the n samples first.
    """

    x: Inputs
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Samples:
        """Move all tensors and cast floating-point inputs; the same tensors where nothing changes."""
        return replace(self, x=to_device(self.x, device, dtype), y=self.y.to(device))

    def take(self, index: slice | Tensor) -> Samples:
        """Take some samples: a slice, which gives views, or positions (m,)."""
        return Samples(take_samples(self.x, index), self.y[index])


class Shuffled:
    """Order of the training batches: what the optimizer config gives for the current epoch."""

    def __init__(self, n: int, optimizer: OptimizerConfig) -> None:
        self.n, self.optimizer, self.epoch = n, optimizer, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def seed(self, batch: int) -> int:
        """Give the seed of a batch's random transforms: the same in every run with this optimizer config."""
        entropy = np.random.SeedSequence((self.optimizer.seed, self.epoch, batch))
        return int(entropy.generate_state(1)[0])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.optimizer.batches(self.n, self.epoch))

    def __len__(self) -> int:
        return self.optimizer.steps_per_epoch(self.n)


class BatchLoader:
    """Iterates over batches of samples that lie on the device: a batch is an index.

    Its state, the epoch and the number of batches given, is part of Lightning's checkpoints: a resumed run goes on with
    the next batch of that epoch.

    Args:
        samples: The data set, on the device of the training.
        sampler: Gives index tensors of whole batches; ``set_epoch`` is called on it where it has one.
        transform: Applied to every batch of training images, to the whole batch on every process. Its random numbers
            are seeded for each batch, so that neither the number of processes nor an interruption changes them.
        rank: Number of this process, which gets every ``world_size``-th sample of a batch from ``rank`` on.
        world_size: Number of processes.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: Sequence[Tensor] | Shuffled,
        transform: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.samples, self.sampler, self.transform = samples, sampler, transform
        self.rank, self.world_size = rank, world_size
        self.batch_sampler = None  # Lightning asks every loader with a sampler for one
        self._given, self._resume_at = 0, (0, 0)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        (epoch, given), self._resume_at = self._resume_at, (0, 0)
        start = given if epoch == self._epoch else 0
        batches = tuple(self.sampler)
        order = torch.cat(batches).to(self.samples.x.device)  # once an epoch: a step copies nothing to the device
        wholes = order.split([len(batch) for batch in batches])
        for number, whole in enumerate(wholes[start:], start):
            self._given = number + 1
            index = whole[self.rank :: self.world_size]
            yield Batch(self._images(whole, number), self.samples.y[index], index, len(whole))

    def state_dict(self) -> dict[str, int]:
        """Give the position, for the checkpoint."""
        return {"epoch": self._epoch, "batches": self._given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next iteration, if it is of that epoch, after the batches that were given."""
        self._resume_at = state_dict["epoch"], state_dict["batches"]

    @property
    def _epoch(self) -> int:
        return self.sampler.epoch if isinstance(self.sampler, Shuffled) else 0

    def _images(self, whole: Tensor, number: int) -> Tensor:
        if self.transform is None or not isinstance(self.sampler, Shuffled):
            images: Tensor = self.samples.x[whole[self.rank :: self.world_size]]
            return images
        with isolate_rng():
            seed = self.sampler.seed(number)
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            return self.transform(self.samples.x[whole])[self.rank :: self.world_size]


class ImageDataModule(LightningDataModule, ABC):
    """Base of all data sets: labels in {-1, +1}, float32 images (n, C, H, W), per-channel normalization.

    The pool of training images is put in one random order, fixed by ``subset_seed``. The training subset is its first
    ``n_train`` images, so that smaller subsets are nested in larger ones; validation and fresh samples are counted from
    its end and never meet the training subset. The test subset is the same for every ``subset_seed``. Mean and standard
    deviation of each channel come from the training subset, or from the first ``n_statistics`` images.

    A subclass gives :meth:`load`. After :meth:`setup` the data are in ``train_set``, ``test_set``, ``val_set`` and
    ``fresh_set`` (the last two None where their size is 0).

    Args:
        n_train: Samples to train on.
        n_test: Samples to test on.
        n_val: Held-out samples of the training pool, to stop on without looking at the test set.
        fresh: Size of a second training subset, disjoint from the first; True takes ``n_train``.
        subset_seed: Fixes the order of the pool.
        n_statistics: Images in the order of the pool that the normalization is taken from; ``n_train`` by default. Give
            runs with different ``n_train`` the same number, and their Grams are blocks of one.
        batch_size: Samples a training step. By default that of the trained module's optimizer config, which also fixes
            the order of the batches; a different number is an error.
        eval_batch_size: Samples a validation or test step.
        transform: Any callable on a batch of training images (b, C, H, W), such as a torchvision v2 transform.

    Raises:
        TypeError: A size is not a whole number.
        ValueError: A size is out of range.
    """

    def __init__(
        self,
        n_train: int = 2000,
        n_test: int = 1000,
        n_val: int = 0,
        fresh: int | bool = 0,
        subset_seed: int = 0,
        n_statistics: int | None = None,
        batch_size: int | None = None,
        eval_batch_size: int = 500,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.n_train, self.n_test, self.n_val = n_train, n_test, n_val
        self.n_statistics = n_train if n_statistics is None else n_statistics
        for name, value, least in (
            ("n_train", n_train, 1),
            ("n_test", n_test, 1),
            ("n_val", n_val, 0),
            ("fresh", fresh, 0),
            ("subset_seed", subset_seed, 0),
            ("n_statistics", n_statistics, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            check_size(name, value, least)
        self.n_fresh = n_train if fresh is True else int(fresh)
        self.subset_seed, self.batch_size, self.eval_batch_size = subset_seed, batch_size, eval_batch_size
        self.transform = transform
        self.train_set: Samples | None = None
        self.test_set: Samples | None = None
        self.val_set: Samples | None = None
        self.fresh_set: Samples | None = None

    @abstractmethod
    def load(self, train: bool) -> Samples:
        """Load a whole pool.

        Args:
            train: The training pool, or else the test pool.

        Returns:
            Images (N, C, H, W), float or uint8, and labels (N,) in {-1, +1}, in an order that never changes.
        """

    def setup(self, stage: str | None = None) -> None:
        """Draw the subsets and normalize them; does nothing the second time.

        Args:
            stage: Ignored: every stage needs the training subset's statistics.

        Raises:
            ValueError: More samples are asked for than there are, the training pool has one class only, the two pools
                have images of different shapes, a label is not -1 or +1, an image is not finite, or a channel of the
                images that the normalization is taken from is constant.
        """
        if self.train_set is not None:
            return
        pool, test = self.load(train=True), self.load(train=False)
        shape, other = tuple(pool.x.shape[1:]), tuple(test.x.shape[1:])
        if not shape or shape != other:
            raise ValueError(
                f"Training images of shape {shape} and test images of shape {other}: both must be (C, H, W), the same."
            )
        needed = self.n_train + self.n_val + self.n_fresh
        for name, asked, have in (
            ("n_train + n_val + fresh", needed, len(pool)),
            ("n_statistics", self.n_statistics, len(pool)),
            ("n_test", self.n_test, len(test)),
        ):
            if asked > have:
                raise ValueError(f"{name} = {asked}, but {type(self).__name__} has {have} such samples: ask for fewer.")
        if (pool.y == pool.y[0]).all():
            raise ValueError(
                f"All {len(pool)} samples of the training pool of {type(self).__name__} have the label "
                f"{pool.y[0].item():g}: give samples of both classes."
            )
        order = _permutation(self.subset_seed, len(pool))
        mean, spread = _statistics(_take(pool, order[: self.n_statistics]).x)
        if not (spread > 1e-9 * mean.abs()).all():  # to rounding
            constant = (spread <= 1e-9 * mean.abs()).flatten().nonzero().flatten().tolist()
            raise ValueError(
                f"Channel(s) {constant} of the training images are constant and cannot be normalized: "
                "drop them or take more samples."
            )

        def normalize(samples: Samples) -> Samples:
            x = torch.empty(samples.x.shape)
            for part, normalized in zip(samples.x.split(_CHUNK), x.split(_CHUNK), strict=True):
                normalized.copy_((part - mean) / spread)
            return replace(samples, x=x)

        ends = len(order) - self.n_val
        self.test_set = normalize(_take(test, _permutation(0, len(test))[: self.n_test]))
        self.val_set = normalize(_take(pool, order[ends:].flip(0))) if self.n_val else None
        self.fresh_set = normalize(_take(pool, order[ends - self.n_fresh : ends].flip(0))) if self.n_fresh else None
        self.train_set = normalize(_take(pool, order[: self.n_train]))

    @property
    def evaluation_splits(self) -> tuple[str, ...]:
        """Names of the validation loaders in order: the test set watched by the oracle, then the validation set."""
        return ("test", "val") if self.n_val else ("test",)

    @property
    def optimizer_config(self) -> OptimizerConfig:
        """Batch size and order: the trained module's, or ``batch_size`` outside a Trainer.

        Raises:
            ValueError: ``batch_size`` is given and differs from the trained module's.
        """
        module = getattr(self.trainer, "lightning_module", None)
        config: OptimizerConfig | None = getattr(module, "optimizer_config", None)
        if config is None:
            return OptimizerConfig(batch_size=self.batch_size or OptimizerConfig.batch_size)
        if self.batch_size not in (None, config.batch_size):
            raise ValueError(
                f"batch_size={self.batch_size} of the data and batch_size={config.batch_size} of the optimizer config "
                "differ: give it to the optimizer config only."
            )
        return config

    def train_dataloader(self) -> BatchLoader:
        """Make the loader of shuffled training batches."""
        samples = _present(self.train_set)
        return self._loader(samples, Shuffled(len(samples), self.optimizer_config), self.transform)

    def val_dataloader(self) -> list[BatchLoader]:
        """Make one loader for each of :attr:`evaluation_splits`."""
        sets = (self.test_set, self.val_set) if self.n_val else (self.test_set,)
        return [self._in_order(_present(samples)) for samples in sets]

    def test_dataloader(self) -> BatchLoader:
        """Make the loader of the test set."""
        return self._in_order(_present(self.test_set))

    def predict_dataloader(self) -> BatchLoader:
        """Make the loader of the test set, for predictions."""
        return self.test_dataloader()

    def _in_order(self, samples: Samples) -> BatchLoader:
        return self._loader(samples, torch.split(torch.arange(len(samples)), self.eval_batch_size))

    def _loader(
        self,
        samples: Samples,
        sampler: Sequence[Tensor] | Shuffled,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> BatchLoader:
        if self.trainer is None:
            return BatchLoader(samples, sampler, transform)
        on_device = samples.to(self.trainer.strategy.root_device)
        return BatchLoader(on_device, sampler, transform, self.trainer.global_rank, self.trainer.world_size)


def samples_of(trainer: Trainer, split: str) -> Samples:
    """Take a whole data set from a run's data module.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".

    Returns:
        Inputs (n, ...) and labels (n,), where the data module keeps them.

    Raises:
        TypeError: The data module has no such set.
    """
    found = _find_set(trainer, split)
    if found is None:
        raise TypeError(
            f"A kernel needs the whole {split} set: fit with a data module of ntk_lightning.datamodules that has one "
            "(TensorData takes your own tensors; n_val and fresh make the val and fresh sets)."
        )
    return found


def has_set(trainer: Trainer, split: str) -> bool:
    """Tell whether :func:`samples_of` finds a data set.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".

    Returns:
        True if the run's data module keeps one.
    """
    return _find_set(trainer, split) is not None


def check_size(name: str, value: object, least: int) -> None:
    """Check an argument that counts something; None is what is chosen by default.

    Args:
        name: Of the argument.
        value: What was given.
        least: The smallest size allowed.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is too small.
    """
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}.")
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _find_set(trainer: Trainer, split: str) -> Samples | None:
    found = getattr(getattr(trainer, "datamodule", None), f"{split}_set", None)
    return found if isinstance(found, Samples) else None


def _present(samples: Samples | None) -> Samples:
    if samples is None:
        raise RuntimeError("The data are not set up: call setup() first.")
    return samples


def _permutation(seed: int, n: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(np.random.SeedSequence((seed, 0x5EED))).permutation(n))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of (n, C, ...), in float64 and bounded memory."""
    dims, count = (0, *range(2, x.dim())), x.numel() // x.shape[1]
    mean = sum(part.double().sum(dims, keepdim=True) for part in x.split(_CHUNK)) / count
    variance = sum((part - mean).square().sum(dims, keepdim=True) for part in x.split(_CHUNK)) / count
    return torch.as_tensor(mean), torch.as_tensor(variance).sqrt()


def _take(pool: Samples, index: Tensor) -> Samples:
    samples = Samples(pool.x[index], pool.y[index].float())
    check_labels(samples.y)
    if samples.x.is_floating_point() and not torch.isfinite(samples.x).all():
        raise ValueError("An image has a NaN or infinite pixel: clean the data.")
    return samples
