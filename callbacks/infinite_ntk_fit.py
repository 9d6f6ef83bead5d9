"""The infinite-width NTK of the network being trained, fitted on the same data."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer

from ntk_lightning.callbacks.from_trainer import (
    check_sets,
    count_outputs,
    epochs_between_validations,
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
from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Backend, Kind
from ntk_lightning.optim import OptimizerConfig

__all__ = ["InfiniteNTKFit"]


class InfiniteNTKFit(SameSteps):
    """Fit the infinite-width NTK of the trained network's architecture, as one more model of the comparison.

    Fitted by kernel SGD with the network's optimizer config and optimal early stopping; kept in the table
    ``infinite_ntk.csv``.

    Args:
        fit_sizes: Sizes of nested training sets; by default the whole training set.
        store: Folder that keeps the Gram, so that another run on the same images need not compute it and a killed run
            goes on where it was; None keeps nothing.
        kind: "ntk" or "nngp".
        backend: See :class:`~ntk_lightning.kernels.InfiniteNTK`.
        optimizer: Optimizer config of the fits; by default the module's, for as long as the run, which then must take
            the plain SGD steps of that config.
        network: Attribute of the Lightning module that holds the network; "" is the module itself.
        name: Tells several callbacks of this class and kind apart: in files and metrics.
    """

    def __init__(
        self,
        fit_sizes: list[int] | None = None,
        store: str | None = None,
        kind: Kind = "ntk",
        backend: Backend = "auto",
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.sizes, self.store = fit_sizes, None if store is None else Path(store)
        self.kind, self.backend, self.optimizer, self.network = kind, backend, optimizer, network
        self._models: list[ModelErrors] = []

    @property
    def table(self) -> str:  # type: ignore[override]  # it depends on the kind
        """Name of the table, without the callback's."""
        return f"infinite_{self.kind}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that everything is there."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_sets(trainer)
            check_sizes(self.sizes, len(samples(trainer, "train")), "training")
            evaluation_sets(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the network, whoever built it and when, has an infinite-width kernel for these images."""
        x = samples(trainer, "train").x
        kernel, store = self._kernel(pl_module), self._store(trainer)
        kernel.check(x)
        if store is not None:
            KernelStore(store, kernel, x).check_folder()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the labels fit the network's outputs."""
        super().on_train_start(trainer, pl_module)
        evaluation_sets(trainer, count_outputs(trainer, network(pl_module, self.network)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the Gram, which depends on no weights, fit it, and keep the table."""
        outputs = count_outputs(trainer, network(pl_module, self.network))
        between = epochs_between_validations(trainer)
        train = samples(trainer, "train", outputs)
        grams = stored_gram_and_cross(self._kernel(pl_module), self._store(trainer))
        sizes = check_sizes(self.sizes, len(train), "training")
        optimizer = run_config(trainer, pl_module, self.optimizer)
        fits = fit_nested(grams, train, evaluation_sets(trainer, outputs), optimizer, sizes, between)
        model = self.compared_name(trainer, "infinite NTK" if self.kind == "ntk" else "NNGP")
        self._models = [ModelErrors.of_fit(model, n, fit) for n, fit in fits.items()]
        table = self.named(self.table)
        log_table(trainer, table, [each.row() for each in self._models])
        metrics = {f"{table}/test_error_{each.n}": each.optimal_error for each in self._models}
        log_metrics(trainer, metrics, steps_of(trainer).taken(trainer))

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _store(self, trainer: Trainer) -> Path | None:
        return None if trainer.fast_dev_run else self.store  # type: ignore[attr-defined]  # set outside the class

    def _kernel(self, pl_module: LightningModule) -> InfiniteNTK:
        return InfiniteNTK(network(pl_module, self.network), self.kind, self.backend)
