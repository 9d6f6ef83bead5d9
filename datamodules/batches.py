"""Loaders of data that lie on the device: a batch is an index, and the order of batches is the optimizer config's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ntk_lightning.datamodules.samples import Batch, Samples
from ntk_lightning.optim import OptimizerConfig

__all__ = ["BatchLoader", "Shuffled"]


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
