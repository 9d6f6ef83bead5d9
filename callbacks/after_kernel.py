"""The empirical NTK at the end of training, fitted on seen and on fresh samples."""

from __future__ import annotations

from collections.abc import Sequence

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from ntk_lightning.callbacks.extraction import KernelCallback, KernelNeed, shared_extraction
from ntk_lightning.callbacks.from_trainer import (
    check_sets,
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
from ntk_lightning.callbacks.run_output import log_metrics, log_table
from ntk_lightning.callbacks.same_steps import SameSteps
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.datamodules.base import has_set, samples_of
from ntk_lightning.kernels.grams.distributed import distributed_gram_and_cross
from ntk_lightning.kernels.grams.gram_and_cross import gram_and_cross
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit

__all__ = ["AfterKernel"]


class AfterKernel(SameSteps):
    """Extract the after-kernel K_m, the empirical NTK after training on m samples, and measure how well it fits.

    K_m(n) is its test error when fitted on the first n of those m samples; K_m^F(n) on n fresh samples, which the
    network has not seen (arXiv 2206.10012; Long, 2021, arXiv 2105.10585). The weights are those that the run ends with,
    after every hook that changes them at the end, such as weight averaging. Fitted by kernel SGD with the network's
    optimizer config and optimal early stopping; kept in the table ``after_kernel.csv``.

    Args:
        fit_sizes: The sizes n; by default m. An empty list fits no seen samples.
        fresh: Sizes n to fit on fresh samples, of which the data module must have enough (its ``fresh``). True takes
            ``fit_sizes``, or all fresh samples. By default, True if it has any.
        optimizer: Optimizer config of the kernel fits; by default the module's, for as long as the run, which then must
            take the plain SGD steps of that config.
        network: Attribute of the Lightning module that holds the network; "" is the module itself.
        memory: Budget of the extraction, such as "4GB"; the largest counts where callbacks share an extraction.
        name: Tells several callbacks of this class apart: in files, metrics and checkpoints.
    """

    table = "after_kernel"

    def __init__(
        self,
        fit_sizes: Sequence[int] | None = None,
        fresh: bool | Sequence[int] | None = None,
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        memory: str = "4GB",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.sizes, self.fresh, self.optimizer = fit_sizes, fresh, optimizer
        self.network, self.memory = network, memory
        self._models: list[ModelErrors] = []
        self._total: float | None = None  # steps of the run; None while nothing is trained

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_sets(trainer)
            self._sizes(trainer)
            evaluation_sets(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for the network, which a module may have built only in its own setup or configure_model."""
        network(pl_module, self.network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract one entry, so that labels, network or budget which do not fit are told before the training."""
        super().on_train_start(trainer, pl_module)
        self._total = trainer.estimated_stepping_batches
        shared_extraction(trainer).ended = False
        others = [other for other in trainer.callbacks if isinstance(other, KernelCallback) and other is not self]  # type: ignore[attr-defined]  # callbacks exists
        if any(other.network == self.network for other in others):
            return  # they extract K^0 on the same samples
        with isolate_rng():
            kernel = evaluation_kernel(trainer, pl_module, self.network, self.memory)
            evaluation_sets(trainer, count_outputs(trainer, kernel.net))
            kernel.diag(samples(trainer, "train").x[:1])

    def kernel_need(self, trainer: Trainer, step: int, moved: bool, ended: bool) -> KernelNeed | None:
        """Need the kernel of the largest set of seen samples, and the evaluation sets, after the last step."""
        sizes = self._sizes(trainer).get("train")
        return KernelNeed(sizes[-1], True, self.memory) if sizes and (ended or step == self._total) else None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract the kernel, fit it, and keep the table; every hook that changes the weights at the end has run."""
        if self._total is None:  # nothing has been trained
            return
        self._total = None
        shared_extraction(trainer).ended = True
        self._models.clear()
        step, keys = steps_of(trainer).taken(trainer), {"train": "after_kernel", "fresh": "after_kernel_fresh"}
        metrics: dict[str, float] = {}
        with isolate_rng():
            for split, sizes in self._sizes(trainer).items():
                try:
                    fits = self._fit(trainer, pl_module, split, sizes)
                except FloatingPointError as error:
                    rank_zero_warn(f"There is no after-kernel. {error}")
                    continue
                model = "after-kernel, fresh samples" if split == "fresh" else "after-kernel"
                models = [ModelErrors.of_fit(self.compared_name(trainer, model), n, fit) for n, fit in fits.items()]
                metrics |= {f"{self.named(keys[split])}/test_error_{each.n}": each.optimal_error for each in models}
                self._models += models
        log_table(trainer, self.named(self.table), [each.row() for each in self._models])
        log_metrics(trainer, metrics, step)

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _fit(self, trainer: Trainer, pl_module: LightningModule, split: str, sizes: list[int]) -> dict[int, KernelFit]:
        optimizer, between = run_config(trainer, pl_module, self.optimizer), epochs_between_validations(trainer)
        if split == "train":
            step = steps_of(trainer).taken(trainer)
            problem = shared_extraction(trainer).extract(trainer, pl_module, self, step).problem
            return {n: problem.sgd(n, optimizer, epochs_between=between) for n in sizes}
        kernel = evaluation_kernel(trainer, pl_module, self.network, self.memory)
        outputs = count_outputs(trainer, kernel.net)
        fresh, evaluation = samples(trainer, split, outputs), evaluation_sets(trainer, outputs)
        grams = distributed_gram_and_cross(gram_and_cross(kernel))
        return fit_nested(grams, fresh, evaluation, optimizer, sizes, between)

    def _sizes(self, trainer: Trainer) -> dict[str, list[int]]:
        """Sizes to fit on, by set."""
        fresh = has_set(trainer, "fresh") if self.fresh is None else self.fresh
        asked = {"train": self.sizes, "fresh": self.sizes if fresh is True else fresh or []}
        return {
            split: check_sizes(sizes, len(samples_of(trainer, split)), split)
            for split, sizes in asked.items()
            if sizes is None or len(sizes)
        }
