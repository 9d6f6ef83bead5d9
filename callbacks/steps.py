"""Steps of a run: training batches in which an optimizer has stepped, however the module optimizes."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ntk_lightning.kernels.grams.agreement import checksum

__all__ = ["StepCounter", "reset_steps", "steps_of"]


class StepCounter:
    """Counts the steps of one run, for all its callbacks.

    In automatic optimization that is Lightning's ``global_step``. In manual optimization ``global_step`` adds up the
    steps of all optimizers, and misses those of optimizers that Lightning does not wrap; here a batch counts once.
    """

    def __init__(self) -> None:
        self._count = 0  # in manual optimization
        self._batch = -1  # number of the batch that was counted last
        self._global_step = 0
        self._versions = 0  # of the weights: every write in place raises them
        self._checksum: int | None = None  # of the weights, while no cheaper sign of a step has been seen
        self._told = False
        self._started = False

    def start(self, trainer: Trainer, module: LightningModule, resumed: int | None) -> None:
        """Begin to count; every callback of the run may call it.

        Args:
            trainer: Trainer whose training starts.
            module: Module that is trained.
            resumed: The count that a checkpoint holds, None without one.
        """
        automatic = module.automatic_optimization
        if resumed is not None:
            self._count = resumed
        elif not self._started:
            self._count = trainer.global_step
        self._started = True
        self._batch, self._global_step = trainer.fit_loop.total_batch_idx, trainer.global_step
        self._versions = _versions(module)
        self._checksum = None if automatic else _checksum(module)

    def taken(self, trainer: Trainer) -> int:
        """Count the steps so far.

        Args:
            trainer: Trainer of the run.

        Returns:
            Training batches with a step.
        """
        return trainer.global_step if trainer.lightning_module.automatic_optimization else self._count

    def end_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Count the batch that has ended; every callback of the run may call it, the first call counts.

        Args:
            trainer: Trainer in training.
            module: Module that is trained.
        """
        if module.automatic_optimization or self._batch == trainer.fit_loop.total_batch_idx:
            return
        self._batch = trainer.fit_loop.total_batch_idx
        versions = _versions(module)
        stepped = trainer.global_step != self._global_step or versions != self._versions
        if stepped:
            self._checksum = None  # what is cheap shows the steps of this module
        elif self._checksum is not None:  # an optimizer may write through ``.data``, which raises no version
            before, self._checksum = self._checksum, _checksum(module)
            stepped = self._checksum != before
        self._global_step, self._versions = trainer.global_step, versions
        self._count += stepped
        if stepped and trainer.global_step != self._count and not self._told:
            self._told = True
            rank_zero_warn(
                f"Lightning counts {trainer.global_step} optimizer steps after {self._count} training batches with "
                "one, by manual optimization: the steps of kernel callbacks are those batches, and the kernel fits "
                "beside them take one step a batch."
            )


def steps_of(trainer: Trainer) -> StepCounter:
    """Look up the step counter that all callbacks of a run share.

    Args:
        trainer: Trainer of the run.

    Returns:
        Its counter.
    """
    return _COUNTERS.setdefault(trainer, StepCounter())


def reset_steps(trainer: Trainer) -> None:
    """Forget the steps of an earlier run of a Trainer; before any callback starts to count those of the next.

    Args:
        trainer: Trainer that sets up a run.
    """
    _COUNTERS.pop(trainer, None)


_COUNTERS: WeakKeyDictionary[Trainer, StepCounter] = WeakKeyDictionary()


def _versions(module: LightningModule) -> int:
    return sum(parameter._version for parameter in module.parameters() if parameter.requires_grad)


def _checksum(module: LightningModule) -> int:
    return checksum(parameter for parameter in module.parameters() if parameter.requires_grad)
