"""The empirical NTK during training: extracted, fitted and measured at chosen steps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning import LightningModule, Trainer

from ntk_lightning.callbacks.figures import draw_dynamics
from ntk_lightning.callbacks.from_trainer import (
    count_outputs,
    epochs_between_validations,
    error_and_loss_of,
    evaluation_kernel,
    evaluation_sets,
    network,
    run_config,
    samples,
)
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.nested_fits import NestedProblem, check_sizes
from ntk_lightning.callbacks.run_output import check_folder, log_figure, log_metrics, log_table
from ntk_lightning.callbacks.scheduled import ScheduledCallback
from ntk_lightning.kernels.grams.distributed import distributed_gram_and_cross
from ntk_lightning.kernels.grams.gram_and_cross import gram_and_cross
from ntk_lightning.optim import OptimizerConfig

__all__ = ["EmpiricalNTKDynamics"]


class EmpiricalNTKDynamics(ScheduledCallback):
    """Extract K^t, the empirical NTK after t optimizer steps, fit it, and log its test error.

    At every step of the schedule (always with 0 and the last): K^t of the training and test sets, in evaluation mode;
    kernel SGD with the network's optimizer config and optimal early stopping. Beside it stand the test errors of the
    network and, as "initial", of K^0 after t steps of the same SGD, which is the linearized network. At the end a table
    ``kernel_dynamics.csv`` and the log-log figure ``kernel_dynamics.png``. See Fort et al. (2020, arXiv 2010.15110) and
    figure 1C of arXiv 2206.10012. The training is not disturbed.

    Args:
        every_n_batches: Extract every so many steps.
        log_spaced: Extract at about this many logarithmically spaced steps instead (30 if neither is given).
        at: Extract at these steps instead.
        fit_sizes: Sizes of nested training sets to fit K^t on; by default the whole training set.
        optimizer: Of the kernel fits; by default the module's, for as long as the run.
        network: Attribute of the Lightning module that holds the network.
        memory: Budget of an extraction, such as "4GB".

    Raises:
        ValueError: More than one schedule is given, or a number is below 1.
    """

    def __init__(
        self,
        every_n_batches: int | None = None,
        log_spaced: int | None = None,
        at: Sequence[int] | None = None,
        fit_sizes: Sequence[int] | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
    ) -> None:
        super().__init__(every_n_batches, log_spaced, at)
        self.sizes, self.optimizer, self.network, self.memory = fit_sizes, optimizer, network, memory
        self._initial: dict[int, dict[int, tuple[float, float]]] = {}  # of K^0: error and loss by size and step

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        if stage == "fit":
            check_folder(trainer)
            check_sizes(self.sizes, len(samples(trainer, "train")), "training")
            evaluation_sets(trainer)
            run_config(trainer, pl_module, self.optimizer)
            network(pl_module, self.network)

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Extract and fit K^t, and measure the network beside it."""
        outputs, between = count_outputs(trainer, pl_module, self.network), epochs_between_validations(trainer)
        train, evaluation = samples(trainer, "train", outputs), evaluation_sets(trainer, outputs)
        sizes = check_sizes(self.sizes, len(train), "training")
        kernel = evaluation_kernel(pl_module, self.network, self.memory)
        optimizer = run_config(trainer, pl_module, self.optimizer)
        grams = distributed_gram_and_cross(gram_and_cross(kernel))
        problem = NestedProblem.compute(grams, train, evaluation, sizes[-1])
        error, loss = error_and_loss_of(kernel.net, evaluation["test"])
        for n in sizes:
            fit = problem.sgd(n, optimizer, epochs_between=between)
            if step == 0:
                watched = {*fit.steps.tolist(), *(t for t in self._steps if t <= optimizer.total_steps(n))}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of divergence: those of the fit above, again
                    followed = problem.sgd(n, optimizer, steps=sorted(watched))
                curve = ModelErrors.of_fit("", n, followed).curve
                values = zip(curve["errors"], curve["losses"], strict=True)
                self._initial[n] = dict(zip(followed.steps.tolist(), values, strict=True))
            initial_error, initial_loss = self._initial.get(n, {}).get(step, (None, None))
            model = ModelErrors.of_fit("empirical NTK at initialization", n, fit)
            initial = {"initial_error": initial_error, "initial_loss": initial_loss}
            self.rows.append({"step": step, **vars(model), "network_error": error, "network_loss": loss, **initial})
        metrics = {"empirical_ntk/test_error": model.optimal_error, "empirical_ntk/last_test_error": model.last_error}
        log_metrics(trainer, {**metrics, "empirical_ntk/network_test_error": error}, step)

    def finish(self, trainer: Trainer) -> None:
        """Keep the table and the figure."""
        columns = [{k: cell for k, cell in row.items() if k not in ("name", "curve")} for row in self.rows]
        log_table(trainer, "kernel_dynamics", columns)
        largest = [row for row in self.rows if row["n"] == self.rows[-1]["n"]]
        log_figure(trainer, "kernel_dynamics", draw_dynamics(largest))

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the kernel at initialization."""
        return [ModelErrors.of_row(row) for row in self.rows if row["step"] == 0]

    def state_dict(self) -> dict[str, Any]:
        """Give the rows so far, and the curves of K^0, for the checkpoint."""
        return {**super().state_dict(), "initial": self._initial}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up those of a checkpoint."""
        super().load_state_dict(state_dict)
        self._initial = state_dict.get("initial", {})
