"""The empirical NTK during training: extracted, fitted and measured at chosen steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.callbacks.kernel_fit import Arm, check_sizes, fit_nested
from ntk_lightning.callbacks.run import (
    evaluation_kernel,
    evaluation_sets,
    log_figure,
    log_metrics,
    log_table,
    network,
    network_error,
    run_config,
    samples,
)
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.scaling.figures import draw_dynamics

__all__ = ["EmpiricalNTKDynamics"]


class EmpiricalNTKDynamics(Callback):
    """Extract K^t, the empirical NTK after t optimizer steps, fit it, and log its test error.

    At every step of the schedule (always with 0 and the last): K^t of the training and test sets, in evaluation mode;
    kernel SGD with the network's optimizer config and optimal early stopping; the network's own test error beside it.
    At the end a table ``kernel_dynamics.csv`` and the log-log figure ``kernel_dynamics.png``. See Fort et al. (2020,
    arXiv 2010.15110) and figure 1C of arXiv 2206.10012. The training is not disturbed.

    Args:
        every_n_batches: Extract every so many steps.
        log_spaced: Extract at about this many logarithmically spaced steps instead (30 if neither is given).
        fit_sizes: Sizes of nested training sets to fit K^t on; by default the whole training set.
        optimizer: Of the kernel fits; by default the module's, for as long as the run.
        network: Attribute of the Lightning module that holds the network.
        memory: Budget of an extraction, such as "4GB".

    Raises:
        ValueError: Both schedules are given, or a number is below 1.
    """

    def __init__(
        self,
        every_n_batches: int | None = None,
        log_spaced: int | None = None,
        fit_sizes: Sequence[int] | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
    ) -> None:
        if every_n_batches is not None and log_spaced is not None:
            raise ValueError("Give every_n_batches or log_spaced, not both.")
        if any(number is not None and number < 1 for number in (every_n_batches, log_spaced)):
            raise ValueError("every_n_batches and log_spaced must be at least 1.")
        self.every_n_batches, self.log_spaced = every_n_batches, log_spaced or 30
        self.sizes, self.optimizer, self.network, self.memory = fit_sizes, optimizer, network, memory
        self.rows: list[dict[str, Any]] = []
        self._arms: list[Arm] = []
        self._steps: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        if stage == "fit":
            check_sizes(self.sizes, len(samples(trainer, "train")), "training")
            evaluation_sets(trainer)
            run_config(trainer, pl_module, self.optimizer)
            network(pl_module, self.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the schedule and extract K^0."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("The schedule needs the length of the run: set the Trainer's max_epochs or max_steps.")
        self._steps = schedule(int(total), self.every_n_batches, self.log_spaced)
        if trainer.global_step == 0:
            self._extract(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Extract K^t where the schedule says so."""
        if trainer.global_step in self._steps and trainer.global_step > self.rows[-1]["step"]:
            self._extract(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the last kernel where the run stopped early; keep the table and the figure."""
        if self.rows and trainer.global_step > self.rows[-1]["step"]:
            self._extract(trainer, pl_module)
        log_table(trainer, "kernel_dynamics", self.rows)
        if trainer.is_global_zero and self.rows:
            largest = [row for row in self.rows if row["n"] == self.rows[-1]["n"]]
            log_figure(trainer, "kernel_dynamics", draw_dynamics(largest))

    def arms(self) -> list[Arm]:
        """Summarize the kernel at initialization."""
        return self._arms

    def state_dict(self) -> dict[str, Any]:
        """Give the curve so far, for the checkpoint."""
        return {"rows": self.rows, "arms": [vars(arm) for arm in self._arms]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the curve of a checkpoint."""
        self.rows = state_dict["rows"]
        self._arms = [Arm(**arm) for arm in state_dict["arms"]]

    def _extract(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        train, evaluation = samples(trainer, "train"), evaluation_sets(trainer)
        sizes = check_sizes(self.sizes, len(train), "training")
        with isolate_rng():
            kernel = evaluation_kernel(pl_module, self.network, self.memory)
            optimizer = run_config(trainer, pl_module, self.optimizer)
            fits = fit_nested(kernel.gram_and_cross, train, evaluation, optimizer, sizes)
            error = network_error(kernel.net, evaluation["test"])
        for n, fit in fits.items():
            arm = Arm.of_fit("empirical NTK at initialization", n, fit)
            if step == 0:
                self._arms.append(arm)
            self.rows.append(
                {
                    "step": step,
                    "n": n,
                    "optimal_error": arm.optimal_error,
                    "optimal_step": arm.optimal_step,
                    "last_error": arm.last_error,
                    "validated_error": arm.validated_error,
                    "network_error": error,
                }
            )
        metrics = {"empirical_ntk/test_error": arm.optimal_error, "empirical_ntk/last_test_error": arm.last_error}
        log_metrics(trainer, {**metrics, "empirical_ntk/network_test_error": error}, step)


def schedule(total: int, every: int | None, log_spaced: int) -> set[int]:
    """Choose the steps of extraction.

    Args:
        total: Steps of the run.
        every: Distance of two steps, or None for logarithmic spacing.
        log_spaced: Number of logarithmically spaced steps from 1 to ``total``; fewer where rounding makes them equal.

    Returns:
        The steps, with 0 and the last.

    Example:
        >>> sorted(schedule(100, None, 5))
        [0, 1, 3, 10, 32, 100]
    """
    spaced = range(0, total, every) if every else np.geomspace(1, total, log_spaced).round().astype(int).tolist()
    return {0, *spaced, total}
