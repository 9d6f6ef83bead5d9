"""The empirical NTK at the end of training, fitted on seen and on fresh samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from ntk_lightning.callbacks.extraction import KernelCallback, KernelNeed, alike, shared_extraction
from ntk_lightning.callbacks.find_network import evaluation_kernel
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.model_errors import ModelErrors, best_metrics
from ntk_lightning.callbacks.nested_fits import FitKind, NestedProblem, check_sizes
from ntk_lightning.callbacks.run_output import log_metrics, log_table
from ntk_lightning.callbacks.same_steps import SameSteps
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.datamodules.base import has_set
from ntk_lightning.datamodules.unpack import Unpack
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
    optimizer config, or by gradient flow where there is none, and optimal early stopping; kept in the table
    ``after_kernel.csv``.

    Args:
        fit_sizes: The sizes n; by default m. An empty list fits no seen samples.
        fresh: Sizes n to fit on fresh samples, of which the data module must have enough (its ``fresh``). True takes
            ``fit_sizes``, or all fresh samples. By default, True if it has any.
        optimizer: Optimizer config of fits by SGD; by default the module's, for as long as the run, which then must
            take the plain SGD steps of that config.
        network: Attribute path of the submodule that maps inputs to outputs; "" is the module itself, by its forward.
            By default the submodule ``net``, else the only child with parameters, else the module itself if it has a
            forward.
        memory: Budget of the extraction, such as "4GB"; the largest counts where callbacks share an extraction.
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
    """

    table = "after_kernel"

    def __init__(
        self,
        fit_sizes: Sequence[int] | None = None,
        fresh: bool | Sequence[int] | None = None,
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
        super().__init__(name)
        self.sizes, self.fresh, self.optimizer, self.fit, self.memory = fit_sizes, fresh, optimizer, fit, memory
        self.measured = Measured(network, output, n_train, n_test, samples, test_loader)
        self._models: list[ModelErrors] = []
        self._total: float | None = None  # steps of the run; None while nothing is trained

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before anything is trained, that everything is there."""
        self.measured.check(trainer, pl_module)
        self._sizes(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Extract one entry, so that labels, network or budget which do not fit are told before the training."""
        super().on_train_start(trainer, pl_module)
        self._total = trainer.estimated_stepping_batches
        shared_extraction(trainer).ended = False
        others = [other for other in trainer.callbacks if isinstance(other, KernelCallback) and other is not self]  # type: ignore[attr-defined]  # callbacks exists
        if any(alike(pl_module, other.measured, self.measured) for other in others):
            return  # they extract K^0 on the same samples
        with isolate_rng():
            kernel = evaluation_kernel(trainer, pl_module, self.measured.network, self.memory, self.measured.output)
            self.measured.evaluation_sets(trainer, self.measured.count_outputs(trainer, kernel.net))
            kernel.diag(self.measured.take(trainer, "train").take(slice(1)).x)

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
                metrics |= best_metrics(self.named(keys[split]), models)
                self._models += models
        log_table(trainer, self.named(self.table), [each.row() for each in self._models])
        log_metrics(trainer, metrics, step)

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _fit(self, trainer: Trainer, pl_module: LightningModule, split: str, sizes: list[int]) -> dict[int, KernelFit]:
        if split == "train":
            step = steps_of(trainer).taken(trainer)
            problem = shared_extraction(trainer).extract(trainer, pl_module, self, step).problem
        else:
            measured = self.measured
            kernel = evaluation_kernel(trainer, pl_module, measured.network, self.memory, measured.output)
            outputs = measured.count_outputs(trainer, kernel.net)
            fresh, evaluation = measured.take(trainer, split, outputs), measured.evaluation_sets(trainer, outputs)
            grams, real = distributed_gram_and_cross(gram_and_cross(kernel)), measured.real(trainer, outputs)
            problem = NestedProblem.compute(grams, fresh, evaluation, sizes[-1], real)
        return {n: self.fit_kernel(trainer, pl_module, problem, n) for n in sizes}

    def _sizes(self, trainer: Trainer) -> dict[str, list[int]]:
        """Sizes to fit on, by set."""
        fresh = has_set(trainer, "fresh") if self.fresh is None else self.fresh
        asked = {"train": self.sizes, "fresh": self.sizes if fresh is True else fresh or []}
        return {
            split: check_sizes(sizes, self.measured.size(trainer, split), split)
            for split, sizes in asked.items()
            if sizes is None or len(sizes)
        }
