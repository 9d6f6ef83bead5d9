"""One optimizer configuration, shared by every model of a comparison."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor, nn

from ntk_lightning.spectrum import critical_learning_rate
from ntk_lightning.whole_number import is_whole

__all__ = ["OptimizerConfig", "critical_learning_rate"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent with momentum on the mean squared error, shared by networks and kernels.

    The defaults are this project's choice; the source paper's appendix with its values was not available.

    Args:
        lr: Learning rate for the loss mean_b (f(x_b) - y_b)^2.
        momentum: PyTorch's heavy-ball momentum mu: v <- mu v + g, w <- w - lr v.
        batch_size: Samples a step; the last batch of an epoch may be smaller.
        epochs: Passes over the training set; ignored where ``steps`` is given.
        steps: Total optimizer steps, instead of ``epochs``.
        full_batch: Use the whole training set in every step, whatever ``batch_size`` says.
        seed: Seed of the order of the samples; epoch e of any model visits the same batches in the same order.

    Raises:
        TypeError: A value is not a number, or not a whole one where it must be.
        ValueError: A value is out of range.

    Example:
        >>> config = OptimizerConfig(batch_size=2)
        >>> [batch.tolist() for batch in config.batches(5, epoch=0)]
        [[1, 3], [0, 4], [2]]
    """

    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 200
    epochs: int = 20
    steps: int | None = None
    full_batch: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        values = vars(self)
        if not isinstance(values["full_batch"], bool | np.bool_):
            raise TypeError(f"full_batch must be True or False, got {self.full_batch!r}.")
        for name in ("lr", "momentum"):
            if not isinstance(values[name], Real) or isinstance(values[name], bool):
                raise TypeError(f"{name} must be a number, got {values[name]!r}.")
        for name in ("batch_size", "epochs", "steps", "seed"):
            if not is_whole(values[name]) and not (name == "steps" and values[name] is None):
                raise TypeError(f"{name} must be a whole number, got {values[name]!r}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def configure(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """Make the optimizer of a module's trainable parameters.

        Args:
            parameters: The parameters to train; frozen ones are left out.

        Returns:
            Plain SGD with this learning rate and momentum.
        """
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        return torch.optim.SGD(trainable, lr=self.lr, momentum=self.momentum)

    def steps_per_epoch(self, n: int) -> int:
        """Count the batches of one epoch.

        Args:
            n: Size of the training set.

        Returns:
            ceil(n / batch size).
        """
        return 1 if self.full_batch else -(-n // self.batch_size)

    def total_steps(self, n: int) -> int:
        """Count the optimizer steps of a whole run.

        Args:
            n: Size of the training set.

        Returns:
            ``steps`` where given, else ``epochs`` times the batches of an epoch.
        """
        return self.steps if self.steps is not None else self.epochs * self.steps_per_epoch(n)

    def batches(self, n: int, epoch: int) -> tuple[Tensor, ...]:
        """Give the index batches of one epoch: a random permutation of the training set, cut into batches.

        Args:
            n: Size of the training set.
            epoch: Number of the epoch, from 0. With the seed it fixes the permutation.

        Returns:
            int64 index tensors on the CPU, (batch_size,) each; the last may be shorter.
        """
        entropy = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        return torch.split(torch.randperm(n, generator=generator), n if self.full_batch else self.batch_size)

    def run_batches(self, n: int) -> Iterator[Tensor]:
        """Iterate over the index batches of a whole run, one a step.

        Args:
            n: Size of the training set.

        Yields:
            The batches of epoch 0, 1, ... up to the total number of steps.
        """
        remaining, epoch = self.total_steps(n), 0
        while remaining:
            for batch in self.batches(n, epoch)[:remaining]:
                yield batch
                remaining -= 1
            epoch += 1

    def schedule(self, n: int) -> Iterator[Tensor]:
        """Old name of :meth:`run_batches`.

        Args:
            n: Size of the training set.

        Returns:
            The same batches.
        """
        warnings.warn("OptimizerConfig.schedule is now called run_batches.", DeprecationWarning, stacklevel=2)
        return self.run_batches(n)
