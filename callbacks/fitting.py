"""How the callbacks of a run fit kernels: by SGD, gradient flow or ridge regression."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import LightningModule, Trainer

from ntk_lightning.callbacks.from_trainer import epochs_between_validations, run_config
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.named import NamedCallback
from ntk_lightning.callbacks.nested_fits import FIT_NAMES, FitKind, NestedProblem
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit

__all__ = ["FittingCallback"]


class FittingCallback(NamedCallback):
    """Mixin of callbacks that fit kernels, all in one way: what ``fit`` says, else what the run has a config for."""

    optimizer: OptimizerConfig | None
    fit: FitKind | None
    measured: Measured

    def fit_kind(self, module: LightningModule) -> FitKind:
        """Choose how kernels are fitted.

        Args:
            module: Of the run.

        Returns:
            What was asked for; else SGD where there is an optimizer config, gradient flow where there is none.
        """
        known = self.optimizer is not None or isinstance(getattr(module, "optimizer_config", None), OptimizerConfig)
        return self.fit or ("sgd" if known else "flow")

    def fit_kernel(
        self,
        trainer: Trainer,
        module: LightningModule,
        problem: NestedProblem,
        n: int,
        steps: Sequence[int] | None = None,
    ) -> KernelFit:
        """Fit a kernel to the first n samples.

        Args:
            trainer: Trainer of the run.
            module: Its module.
            problem: The kernel's Grams.
            n: How many samples.
            steps: Evaluate after these steps of SGD, instead of as often as the run is validated.

        Returns:
            The fit.
        """
        kind = self.fit_kind(module)
        if kind != "sgd":
            return problem.flow(n) if kind == "flow" else problem.ridge(n)
        optimizer, between = run_config(trainer, module, self.optimizer), epochs_between_validations(trainer)
        return problem.sgd(n, optimizer, epochs_between=between, steps=steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the fit is one of those that there are."""
        super().setup(trainer, pl_module, stage)
        if self.fit not in (None, *FIT_NAMES):
            raise ValueError(f"fit must be None or one of {', '.join(map(repr, FIT_NAMES))}, got {self.fit!r}.")
