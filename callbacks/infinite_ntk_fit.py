"""The infinite-width NTK of the network being trained, fitted on the same data."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from ntk_lightning.callbacks.from_trainer import (
    count_outputs,
    epochs_between_validations,
    evaluation_sets,
    network,
    run_config,
    samples,
)
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.nested_fits import check_sizes, fit_nested
from ntk_lightning.callbacks.run_output import check_folder, log_metrics, log_table
from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Backend, Kind
from ntk_lightning.optim import OptimizerConfig

__all__ = ["InfiniteNTKFit"]


class InfiniteNTKFit(Callback):
    """Fit the infinite-width NTK of the trained network's architecture, as one more model of the comparison.

    Fitted by kernel SGD with the network's optimizer config and optimal early stopping; kept in the table
    ``infinite_ntk.csv``.

    Args:
        fit_sizes: Sizes of nested training sets; by default the whole training set.
        store: Folder that keeps the Gram, so that another run on the same images need not compute it and a killed run
            goes on where it was; None keeps nothing.
        kind: "ntk" or "nngp".
        backend: See :class:`~ntk_lightning.kernels.InfiniteNTK`.
        optimizer: Of the fits; by default the module's, for as long as the run.
        network: Attribute of the Lightning module that holds the network.
    """

    def __init__(
        self,
        fit_sizes: list[int] | None = None,
        store: str | None = None,
        kind: Kind = "ntk",
        backend: Backend = "auto",
        optimizer: OptimizerConfig | None = None,
        network: str = "net",
    ) -> None:
        self.sizes, self.store = fit_sizes, None if store is None else Path(store)
        self.kind, self.backend, self.optimizer, self.network = kind, backend, optimizer, network
        self._models: list[ModelErrors] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check, before anything is trained, that the network has an infinite-width kernel for these images."""
        if stage == "fit":
            check_folder(trainer)
            train = samples(trainer, "train")
            check_sizes(self.sizes, len(train), "training")
            evaluation_sets(trainer)
            run_config(trainer, pl_module, self.optimizer)
            self._kernel(pl_module).check(train.x)
            if self.store is not None:
                KernelStore(self.store, self._kernel(pl_module), train.x).check_folder()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the labels fit the network's outputs."""
        evaluation_sets(trainer, count_outputs(trainer, pl_module, self.network))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the Gram, fit it, and keep the table."""
        outputs, between = count_outputs(trainer, pl_module, self.network), epochs_between_validations(trainer)
        train = samples(trainer, "train", outputs)
        grams = stored_gram_and_cross(self._kernel(pl_module), self.store)
        sizes = check_sizes(self.sizes, len(train), "training")
        optimizer = run_config(trainer, pl_module, self.optimizer)
        fits = fit_nested(grams, train, evaluation_sets(trainer, outputs), optimizer, sizes, between)
        name = "infinite NTK" if self.kind == "ntk" else "NNGP"
        self._models = [ModelErrors.of_fit(name, n, fit) for n, fit in fits.items()]
        log_table(trainer, f"infinite_{self.kind}", [model.row() for model in self._models])
        for model in self._models:
            log_metrics(
                trainer, {f"infinite_{self.kind}/test_error_{model.n}": model.optimal_error}, trainer.global_step
            )

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _kernel(self, pl_module: LightningModule) -> InfiniteNTK:
        return InfiniteNTK(network(pl_module, self.network), self.kind, self.backend)
