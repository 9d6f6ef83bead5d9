"""The infinite-width NTK of the network being trained, fitted on the same data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from ntk_lightning.callbacks.kernel_fit import Arm, check_sizes, fit_nested
from ntk_lightning.callbacks.run import (
    check_folder,
    evaluation_sets,
    log_metrics,
    log_table,
    network,
    run_config,
    samples,
)
from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.kernels.infinite import Backend, Kind
from ntk_lightning.kernels.shards import place, sharded_gram
from ntk_lightning.optim import OptimizerConfig

__all__ = ["InfiniteNTKFit", "infinite_grams"]


class InfiniteNTKFit(Callback):
    """Fit the infinite-width NTK of the trained network's architecture, as one more arm of the comparison.

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
        self._arms: list[Arm] = []

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

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the Gram, fit it, and keep the table."""
        train = samples(trainer, "train")
        grams = infinite_grams(self._kernel(pl_module), self.store)
        sizes = check_sizes(self.sizes, len(train), "training")
        optimizer = run_config(trainer, pl_module, self.optimizer)
        fits = fit_nested(grams, train, evaluation_sets(trainer), optimizer, sizes)
        name = "infinite NTK" if self.kind == "ntk" else "NNGP"
        self._arms = [Arm.of_fit(name, n, fit) for n, fit in fits.items()]
        log_table(trainer, f"infinite_{self.kind}", [arm.row() for arm in self._arms])
        for arm in self._arms:
            log_metrics(trainer, {f"infinite_{self.kind}/test_error_{arm.n}": arm.optimal_error}, trainer.global_step)

    def arms(self) -> list[Arm]:
        """Summarize the fits."""
        return self._arms

    def _kernel(self, pl_module: LightningModule) -> InfiniteNTK:
        return InfiniteNTK(network(pl_module, self.network), self.kind, self.backend)


def infinite_grams(
    kernel: InfiniteNTK, store: Path | None, *, progress: bool = True
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Make the function that fits ask for the two Grams of an infinite-width kernel; processes divide the work.

    Args:
        kernel: The kernel.
        store: Folder to keep them in, where nested training sets with one test set share their blocks; None keeps none.
        progress: Show a progress bar.

    Returns:
        Maps n training inputs and m others to their Grams (n, n) and (m, n).
    """

    def grams(x_train: Tensor, x_other: Tensor) -> tuple[Tensor, Tensor]:
        if store is None:
            gram = sharded_gram(kernel, x_train, progress=progress)
            return gram, sharded_gram(kernel, x_other, x_train, progress=progress)
        stored = KernelStore(store, kernel, torch.cat([x_other, x_train]), block=64)
        train, other = slice(len(x_other), None), slice(0, len(x_other))
        rank, processes = place()
        if processes > 1:
            needed = [(i, j) for i, j in stored.block_ids if (j + 1) * stored.block > len(x_other)]
            stored.compute(needed, rank=rank, world_size=processes, progress=progress)
            distributed.barrier()
        return stored.gram(train, progress=progress), stored.gram(other, train, progress=progress)

    return grams
