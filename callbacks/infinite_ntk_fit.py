"""The infinite-width NTK of the network being trained, fitted on the same data."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from torch import Tensor

from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.model_errors import ModelErrors, best_metrics
from ntk_lightning.callbacks.nested_fits import FitKind, NestedProblem, check_sizes
from ntk_lightning.callbacks.run_output import log_metrics, log_table
from ntk_lightning.callbacks.same_steps import SameSteps
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.datamodules.unpack import Unpack
from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.kernels.infinite.infinite_ntk import Backend, Kind
from ntk_lightning.optim import OptimizerConfig

__all__ = ["InfiniteNTKFit"]


class InfiniteNTKFit(SameSteps):
    """Fit the infinite-width NTK of the trained network's architecture, as one more model of the comparison.

    Fitted by kernel SGD with the network's optimizer config, or by gradient flow where there is none, and optimal early
    stopping; kept in the table ``infinite_ntk.csv``.

    Args:
        fit_sizes: Sizes of nested training sets; by default the whole training set.
        store: Folder that keeps the Gram, so that another run on the same images need not compute it and a killed run
            goes on where it was; None keeps nothing.
        kind: "ntk" or "nngp".
        backend: See :class:`~ntk_lightning.kernels.InfiniteNTK`.
        optimizer: Optimizer config of fits by SGD; by default the module's, for as long as the run, which then must
            take the plain SGD steps of that config.
        network: Attribute path of the submodule that maps inputs to outputs; "" is the module itself, by its forward.
            By default the submodule ``net``, else the only child with parameters, else the module itself if it has a
            forward.
        fit: "sgd"; or "flow", gradient flow, which needs no learning rate; or "ridge", ridge regression by the best of
            several regularizations. By default "sgd" where there is an optimizer config, else "flow".
        n_train: The first samples of the training set, by index. By default all of a data module that keeps its sets,
            and 256 of a loader.
        n_test: The same of the test set, 512 by default.
        samples: Function of a collated batch to (inputs, targets), where it is neither (x, y, ...) nor a mapping with
            "labels", "label", "targets", "target" or "y".
        test_loader: Name or number of the validation loader to measure on, or "test" or "val"; by default the test
            loader, else the first validation loader.
        name: Tells several callbacks of this class and kind apart: in files and metrics.
    """

    def __init__(
        self,
        fit_sizes: list[int] | None = None,
        store: str | None = None,
        kind: Kind = "ntk",
        backend: Backend = "auto",
        optimizer: OptimizerConfig | None = None,
        network: str | None = None,
        fit: FitKind | None = None,
        n_train: int | None = None,
        n_test: int | None = None,
        samples: Unpack | None = None,
        test_loader: int | str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        self.sizes, self.store = fit_sizes, None if store is None else Path(store)
        self.kind, self.backend, self.optimizer, self.fit = kind, backend, optimizer, fit
        self.measured = Measured(network, None, n_train, n_test, samples, test_loader)
        self._models: list[ModelErrors] = []

    @property
    def table(self) -> str:  # type: ignore[override]  # it depends on the kind
        """Name of the table, without the callback's."""
        return f"infinite_{self.kind}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check, before anything is trained, that data and network are there, and have an infinite-width kernel."""
        self.measured.check(trainer, pl_module)
        check_sizes(self.sizes, self.measured.size(trainer), "training")
        x = self.measured.take(trainer, "train").x
        if not isinstance(x, Tensor):
            raise TypeError(
                "An infinite-width kernel is of one tensor of real inputs, and the batches of this run have several "
                "or none: give samples=, a function of a batch to (tensor, targets), or leave InfiniteNTKFit out."
            )
        kernel, store = self._kernel(pl_module), self._store(trainer)
        kernel.check(x)
        if store is not None:
            KernelStore(store, kernel, x).check_folder()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the Gram, which depends on no weights, fit it, and keep the table."""
        outputs = self.measured.count_outputs(trainer, self.measured.net(pl_module))
        train, evaluation = (
            self.measured.take(trainer, "train", outputs),
            self.measured.evaluation_sets(trainer, outputs),
        )
        grams = stored_gram_and_cross(self._kernel(pl_module), self._store(trainer))
        sizes = check_sizes(self.sizes, len(train), "training")
        problem = NestedProblem.compute(grams, train, evaluation, sizes[-1], self.measured.real(trainer, outputs))
        fits = {n: self.fit_kernel(trainer, pl_module, problem, n) for n in sizes}
        model = self.compared_name(trainer, "infinite NTK" if self.kind == "ntk" else "NNGP")
        self._models = [ModelErrors.of_fit(model, n, fit) for n, fit in fits.items()]
        table = self.named(self.table)
        log_table(trainer, table, [each.row() for each in self._models])
        log_metrics(trainer, best_metrics(table, self._models), steps_of(trainer).taken(trainer))

    def model_errors(self) -> list[ModelErrors]:
        """Summarize the fits."""
        return self._models

    def _store(self, trainer: Trainer) -> Path | None:
        return None if trainer.fast_dev_run else self.store  # type: ignore[attr-defined]  # set outside the class

    def _kernel(self, pl_module: LightningModule) -> InfiniteNTK:
        return InfiniteNTK(self.measured.net(pl_module), self.kind, self.backend)
