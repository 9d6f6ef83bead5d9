"""The empirical NTK at the end of training, fitted on seen and on fresh samples."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.callbacks.from_trainer import (
    count_outputs,
    epochs_between_validations,
    evaluation_kernel,
    evaluation_sets,
    network,
    run_config,
    samples,
)
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.nested_fits import check_sizes, fit_nested
from ntk_lightning.callbacks.run_output import check_folder, log_metrics, log_table
from ntk_lightning.datamodules.base import has_set
from ntk_lightning.kernels.grams.distributed import distributed_gram_and_cross
from ntk_lightning.kernels.grams.gram_and_cross import gram_and_cross
from ntk_lightning.optim import OptimizerConfig

__all__ = ["AfterKernel"]


class AfterKernel(Callback):
    """Extract the after-kernel K_m, the empirical NTK after training on m samples, and measure how well it fits.

    K_m(n) is its test error when fitted on the first n of those m samples; K_m^F(n) on n fresh samples, which the
    network has not seen (arXiv 2206.10012; Long, 2021, arXiv 2105.10585). Fitted by kernel SGD with the network's
    optimizer config and optimal early stopping; kept in the table ``after_kernel.csv``.

    Args:
        fit_sizes: The sizes n; by default m. An empty list fits no seen samples.
        fresh: Sizes n to fit on fresh samples, of which the data module must have enough (its ``fresh``). True takes
            ``fit_sizes``, or all fresh samples. By default, True if it has any.
        optimizer: Of the kernel fits; by default the module's, for as long as the run.
        network: Attribute of the Lightning module that holds the network.
        memory: Budget of the extraction, such as "4GB".
    """

    def __init__(
        self,
        fit_sizes: Sequence[int] | None = None,
        fresh: bool | Sequence[int] | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
    ) -> None:
        self.sizes, self.fresh, self.optimizer = fit_sizes, fresh, optimizer
        self.network, self.memory = network, memory
        self._models: list[ModelErrors] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        if stage == "fit":
            check_folder(trainer)
            self._sizes(trainer)
            evaluation_sets(trainer)
            run_config(trainer, pl_module, self.optimizer)
            network(pl_module, self.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract one entry, so that labels, network or budget which do not fit are told before the training."""
        with isolate_rng():
            evaluation_sets(trainer, count_outputs(trainer, pl_module, self.network))
            evaluation_kernel(pl_module, self.network, self.memory).diag(samples(trainer, "train").x[:1])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the kernel, fit it, and keep the table."""
        optimizer = run_config(trainer, pl_module, self.optimizer)
        self._models.clear()
        outputs, between = count_outputs(trainer, pl_module, self.network), epochs_between_validations(trainer)
        evaluation = evaluation_sets(trainer, outputs)
        with isolate_rng():
            kernel = evaluation_kernel(pl_module, self.network, self.memory)
            grams = distributed_gram_and_cross(gram_and_cross(kernel))
            for split, sizes in self._sizes(trainer).items():
                train = samples(trainer, split, outputs)
                try:
                    fits = fit_nested(grams, train, evaluation, optimizer, sizes, between)
                except FloatingPointError as error:
                    rank_zero_warn(f"There is no after-kernel. {error}")
                    continue
                name = "after-kernel, fresh samples" if split == "fresh" else "after-kernel"
                self._models += [ModelErrors.of_fit(name, n, fit) for n, fit in fits.items()]
        log_table(trainer, "after_kernel", [model.row() for model in self._models])
        for model in self._models:
            key = "after_kernel_fresh" if model.name.endswith("fresh samples") else "after_kernel"
            log_metrics(trainer, {f"{key}/test_error_{model.n}": model.optimal_error}, trainer.global_step)

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _sizes(self, trainer: Trainer) -> dict[str, list[int]]:
        """Sizes to fit on, by set."""
        fresh = has_set(trainer, "fresh") if self.fresh is None else self.fresh
        asked = {"train": self.sizes, "fresh": self.sizes if fresh is True else fresh or []}
        return {
            split: check_sizes(sizes, len(samples(trainer, split)), split)
            for split, sizes in asked.items()
            if sizes is None or len(sizes)
        }
