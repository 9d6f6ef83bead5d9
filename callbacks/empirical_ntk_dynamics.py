"""The empirical NTK during training: extracted, fitted and measured at chosen steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor

from ntk_lightning.callbacks.extraction import KernelNeed, shared_extraction
from ntk_lightning.callbacks.figures import draw_dynamics
from ntk_lightning.callbacks.find_network import error_and_loss_of
from ntk_lightning.callbacks.from_trainer import run_config
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.nested_fits import FitKind, check_sizes
from ntk_lightning.callbacks.run_output import log_figure, log_metrics, log_table
from ntk_lightning.callbacks.same_steps import SameSteps
from ntk_lightning.callbacks.scheduled import ScheduledCallback
from ntk_lightning.datamodules.unpack import Unpack
from ntk_lightning.optim import OptimizerConfig

__all__ = ["EmpiricalNTKDynamics"]


class EmpiricalNTKDynamics(SameSteps, ScheduledCallback):
    """Extract K^t, the empirical NTK after t optimizer steps, fit it, and log its test error.

    At every step of the schedule (always with 0 and the last): K^t of the training and test sets, in evaluation mode;
    kernel SGD with the network's optimizer config, or gradient flow where there is none, and optimal early stopping.
    Beside it stand the test errors of the network, measured here, and, as "initial", of K^0 after t steps of the same
    SGD, which is the linearized network. Real targets have losses in place of errors. Network and kernel
    of a row have the same weights; those of the last row are the weights that the run ends with. At the end a table
    ``kernel_dynamics.csv`` and the log-log figure ``kernel_dynamics.png``. See Fort et al. (2020, arXiv 2010.15110) and
    figure 1C of arXiv 2206.10012. The training is not disturbed.

    Args:
        every_n_batches: Extract every so many steps.
        log_spaced: Extract at about this many logarithmically spaced steps instead (30 if neither is given).
        at: Extract at these steps instead.
        fit_sizes: Sizes of nested training sets to fit K^t on; by default the whole training set.
        optimizer: Optimizer config of fits by SGD; by default the module's, for as long as the run, which then must
            take the plain SGD steps of that config.
        network: Attribute path of the submodule that maps inputs to outputs; "" is the module itself, by its forward.
            By default the submodule ``net``, else the only child with parameters, else the module itself if it has a
            forward.
        memory: Budget of an extraction, such as "4GB"; the largest counts where callbacks share an extraction.
        fit: "sgd"; or "flow", gradient flow, which needs no learning rate; or "ridge", ridge regression by the best of
            several regularizations. By default "sgd" where there is an optimizer config, else "flow".
        n_train: The first samples of the training set, by index. By default all of a data module that keeps its sets,
            and 256 of a loader.
        n_test: The same of the test set, 512 by default.
        samples: Function of a collated batch to (inputs, targets), where it is neither (x, y, ...) nor a mapping with
            "labels", "label", "targets", "target" or "y".
        output: Function of what the network returns to (n,) or (n, C), or the number of one output.
        test_loader: Name or number of the validation loader to measure on, or "test" or "val"; by default the test
            loader, else the first validation loader.
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
        network: str | None = None,
        memory: str = "4GB",
        fit: FitKind | None = None,
        n_train: int | None = None,
        n_test: int | None = None,
        samples: Unpack | None = None,
        output: int | Callable[[Any], Tensor] | None = None,
        test_loader: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            every_n_batches,
            log_spaced,
            at,
            measured=Measured(network, output, n_train, n_test, samples, test_loader),
            name=name,
        )
        self.sizes, self.optimizer, self.fit, self.memory = fit_sizes, optimizer, fit, memory
        self._initial: dict[int, dict[int, tuple[float | None, float]]] = {}  # K^0's error and loss by size and step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before anything is trained, that everything is there."""
        super().on_fit_start(trainer, pl_module)
        self._sizes(trainer)

    def kernel_need(self, trainer: Trainer, step: int, moved: bool, ended: bool) -> KernelNeed | None:
        """Need K^t of the largest training set, and the evaluation sets, at the steps of the schedule."""
        return KernelNeed(self._sizes(trainer)[-1], True, self.memory) if self.due(step, moved, ended) else None

    def measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Extract and fit K^t, and measure the network beside it."""
        extraction = shared_extraction(trainer).extract(trainer, pl_module, self, step)
        problem = extraction.problem
        error: float | None
        error, loss = error_and_loss_of(extraction.kernel.net, extraction.evaluation["test"], self.measured.output)
        error = None if problem.real else error
        kind = self.fit_kind(pl_module)
        for n in self._sizes(trainer):
            fit = self.fit_kernel(trainer, pl_module, problem, n)
            if step == 0 and kind == "sgd":  # K^0 again, after each step of the schedule: the linearized network
                optimizer = run_config(trainer, pl_module, self.optimizer)
                watched = {*fit.steps.tolist(), *(t for t in self._steps if t <= optimizer.total_steps(n))}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # divergence, which the fit above has told
                    followed = self.fit_kernel(trainer, pl_module, problem, n, sorted(watched))
                curve = ModelErrors.of_fit("", n, followed).curve
                values = zip(curve.get("errors", [None] * len(followed.steps)), curve["losses"], strict=True)
                self._initial[n] = dict(zip(followed.steps.tolist(), values, strict=True))
            pair = self._initial.get(n, {}).get(step, (None, None))
            initial_error, initial_loss = (None, None) if self.departed(trainer) else pair  # steps of another kind
            model = ModelErrors.of_fit("empirical NTK at initialization", n, fit)
            initial = {"initial_error": initial_error, "initial_loss": initial_loss}
            measured = {
                "curve": model.curve,
                "critical_lr": model.critical_lr,
                "network_error": error,
                "network_loss": loss,
                **initial,
                "fit": kind,
            }
            self.rows.append({"step": step, **model.row(), **measured})
        if error is None:
            metrics = {"test_loss": model.optimal_loss, "last_test_loss": model.last_loss, "network_test_loss": loss}
        else:
            metrics = {"test_error": model.optimal_error, "last_test_error": model.last_error}
            metrics["network_test_error"] = error
        group = self.named("empirical_ntk")
        log_metrics(
            trainer, {f"{group}/{metric}": value for metric, value in metrics.items() if value is not None}, step
        )

    def finish(self, trainer: Trainer) -> None:
        """Keep the table and the figure."""
        for row in self.rows:
            row["name"] = self.compared_name(trainer, "empirical NTK at initialization")
        left_out = ("name", "curve", "critical_lr")
        columns = [{k: cell for k, cell in row.items() if k not in left_out} for row in self.rows]
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
        return check_sizes(self.sizes, self.measured.size(trainer), "training")
