"""The empirical NTK during training: extracted, fitted and measured at chosen steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer

from ntk_lightning.callbacks.extraction import KernelNeed, shared_extraction
from ntk_lightning.callbacks.figures import draw_dynamics
from ntk_lightning.callbacks.from_trainer import (
    epochs_between_validations,
    error_and_loss_of,
    evaluation_sets,
    run_config,
)
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.nested_fits import check_sizes
from ntk_lightning.callbacks.run_output import log_figure, log_metrics, log_table
from ntk_lightning.callbacks.same_steps import SameSteps
from ntk_lightning.callbacks.scheduled import ScheduledCallback
from ntk_lightning.datamodules.base import samples_of
from ntk_lightning.optim import OptimizerConfig

__all__ = ["EmpiricalNTKDynamics"]


class EmpiricalNTKDynamics(SameSteps, ScheduledCallback):
    """Extract K^t, the empirical NTK after t optimizer steps, fit it, and log its test error.

    At every step of the schedule (always with 0 and the last): K^t of the training and test sets, in evaluation mode;
    kernel SGD with the network's optimizer config and optimal early stopping. Beside it stand the test errors of the
    network and, as "initial", of K^0 after t steps of the same SGD, which is the linearized network. Network and kernel
    of a row have the same weights; those of the last row are the weights that the run ends with. At the end a table
    ``kernel_dynamics.csv`` and the log-log figure ``kernel_dynamics.png``. See Fort et al. (2020, arXiv 2010.15110) and
    figure 1C of arXiv 2206.10012. The training is not disturbed.

    Args:
        every_n_batches: Extract every so many steps.
        log_spaced: Extract at about this many logarithmically spaced steps instead (30 if neither is given).
        at: Extract at these steps instead.
        fit_sizes: Sizes of nested training sets to fit K^t on; by default the whole training set.
        optimizer: Optimizer config of the kernel fits; by default the module's, for as long as the run, which then must
            take the plain SGD steps of that config.
        network: Attribute of the Lightning module that holds the network; "" is the module itself.
        memory: Budget of an extraction, such as "4GB"; the largest counts where callbacks share an extraction.
        name: Tells several callbacks of this class apart: in files, metrics and checkpoints.

    Raises:
        ValueError: More than one schedule is given, or a number is below 1.
    """

    table = "kernel_dynamics"

    def __init__(
        self,
        every_n_batches: int | None = None,
        log_spaced: int | None = None,
        at: Sequence[int] | None = None,
        fit_sizes: Sequence[int] | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_batches, log_spaced, at, network=network, name=name)
        self.sizes, self.optimizer, self.memory = fit_sizes, optimizer, memory
        self._initial: dict[int, dict[int, tuple[float, float]]] = {}  # K^0's error and loss by size and step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._sizes(trainer)
            evaluation_sets(trainer)

    def kernel_need(self, trainer: Trainer, step: int, moved: bool, ended: bool) -> KernelNeed | None:
        """Need K^t of the largest training set, and the evaluation sets, at the steps of the schedule."""
        return KernelNeed(self._sizes(trainer)[-1], True, self.memory) if self.due(step, moved, ended) else None

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Extract and fit K^t, and measure the network beside it."""
        between, optimizer = epochs_between_validations(trainer), run_config(trainer, pl_module, self.optimizer)
        extraction = shared_extraction(trainer).extract(trainer, pl_module, self, step)
        problem = extraction.problem
        error, loss = error_and_loss_of(extraction.kernel.net, extraction.evaluation["test"])
        for n in self._sizes(trainer):
            fit = problem.sgd(n, optimizer, epochs_between=between)
            if step == 0:  # K^0 again, measured after each step of the schedule: the linearized network
                watched = {*fit.steps.tolist(), *(t for t in self._steps if t <= optimizer.total_steps(n))}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # divergence, which the fit above has told
                    followed = problem.sgd(n, optimizer, steps=sorted(watched))
                curve = ModelErrors.of_fit("", n, followed).curve
                values = zip(curve["errors"], curve["losses"], strict=True)
                self._initial[n] = dict(zip(followed.steps.tolist(), values, strict=True))
            pair = self._initial.get(n, {}).get(step, (None, None))
            initial_error, initial_loss = (None, None) if self.departed(trainer) else pair  # steps of another kind
            model = ModelErrors.of_fit("empirical NTK at initialization", n, fit)
            initial = {"initial_error": initial_error, "initial_loss": initial_loss}
            self.rows.append({"step": step, **vars(model), "network_error": error, "network_loss": loss, **initial})
        metrics = {"test_error": model.optimal_error, "last_test_error": model.last_error, "network_test_error": error}
        group = self.named("empirical_ntk")
        log_metrics(trainer, {f"{group}/{metric}": value for metric, value in metrics.items()}, step)

    def finish(self, trainer: Trainer) -> None:
        """Keep the table and the figure."""
        for row in self.rows:
            row["name"] = self.compared_name(trainer, "empirical NTK at initialization")
        columns = [{k: cell for k, cell in row.items() if k not in ("name", "curve")} for row in self.rows]
        log_table(trainer, self.named(self.table), columns)
        largest = [row for row in self.rows if row["n"] == self.rows[-1]["n"]]
        log_figure(trainer, self.named(self.table), draw_dynamics(largest))

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the kernel at initialization."""
        return [ModelErrors.of_row(row) for row in self.rows if row["step"] == 0]

    def state_dict(self) -> dict[str, Any]:
        """Return the rows so far and the curves of K^0, for the checkpoint."""
        return {**super().state_dict(), "initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the rows and curves of a checkpoint."""
        super().load_state_dict(state_dict)
        self._initial = state_dict.get("initial", {})

    def _sizes(self, trainer: Trainer) -> list[int]:
        return check_sizes(self.sizes, len(samples_of(trainer, "train")), "training")
