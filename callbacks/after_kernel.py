"""The empirical NTK at the end of training, fitted on seen and on fresh samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.callbacks.kernel_fit import Arm, check_sizes, fit_nested
from ntk_lightning.callbacks.run import (
    evaluation_kernel,
    evaluation_sets,
    log_metrics,
    log_table,
    network,
    run_config,
    samples,
)
from ntk_lightning.optim import OptimizerConfig

__all__ = ["AfterKernel"]


class AfterKernel(Callback):
    """Extract the after-kernel K_m, the empirical NTK after training on m samples, and measure how well it fits.

    K_m(n) is its test error when fitted on the first n of those m samples; K_m^F(n) on n fresh samples, which the
    network has not seen (arXiv 2206.10012; Long, 2021, arXiv 2105.10585). Fitted by kernel SGD with the network's
    optimizer config and optimal early stopping; kept in the table ``after_kernel.csv``.

    Args:
        fit_sizes: The sizes n; by default m, or all fresh samples where they are fewer.
        fresh: Fit on fresh samples too; the data module must have them (its ``fresh``). By default, if it has them.
        optimizer: Of the kernel fits; by default the module's, for as long as the run.
        network: Attribute of the Lightning module that holds the network.
        memory: Budget of the extraction, such as "4GB".
    """

    def __init__(
        self,
        fit_sizes: Sequence[int] | None = None,
        fresh: bool | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
    ) -> None:
        self.sizes, self.fresh, self.optimizer = fit_sizes, fresh, optimizer
        self.network, self.memory = network, memory
        self._arms: list[Arm] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        if stage == "fit":
            for split in self._splits(trainer):
                check_sizes(self.sizes, len(samples(trainer, split)), split)
            evaluation_sets(trainer)
            run_config(trainer, pl_module, self.optimizer)
            network(pl_module, self.network)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the kernel, fit it, and keep the table."""
        optimizer = run_config(trainer, pl_module, self.optimizer)
        self._arms.clear()
        with isolate_rng():
            kernel = evaluation_kernel(pl_module, self.network, self.memory)
            for split in self._splits(trainer):
                train = samples(trainer, split)
                sizes = check_sizes(self.sizes, len(train), split)
                fits = fit_nested(kernel.gram_and_cross, train, evaluation_sets(trainer), optimizer, sizes)
                name = "after-kernel, fresh samples" if split == "fresh" else "after-kernel"
                self._arms += [Arm.of_fit(name, n, fit) for n, fit in fits.items()]
        log_table(trainer, "after_kernel", [vars(arm) for arm in self._arms])
        for arm in self._arms:
            key = "after_kernel_fresh" if arm.name.endswith("fresh samples") else "after_kernel"
            log_metrics(trainer, {f"{key}/test_error_{arm.n}": arm.optimal_error}, trainer.global_step)

    def arms(self) -> list[Arm]:
        """Summarize the fits."""
        return self._arms

    def _splits(self, trainer: Trainer) -> list[str]:
        has_fresh = getattr(getattr(trainer, "datamodule", None), "fresh_set", None) is not None
        use_fresh: Any = has_fresh if self.fresh is None else self.fresh
        return ["train", "fresh"] if use_fresh else ["train"]
