"""How fast this machine is at each kind of a study's work, measured on small cells."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.modules import FiniteNetwork, LinearizedNetwork
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import kernel_sgd
from ntk_lightning.studies.build import LoadedData, compute_device, set_up
from ntk_lightning.studies.cell import train
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.shared_gram import infinite_kernel

__all__ = ["Rates"]

_ROWS_BYTES = 2**27  # of the gradients that are formed to measure with
_FITTED = 128  # images that a network is trained to fit
_FULL_BATCH = 128  # samples of a step that stands for one of the whole training set


@dataclass(frozen=True)
class Training:
    """Seconds of a training run.

    Args:
        start: Before and after the steps.
        sample: To train on one sample, in the batches of the cell.
        forward: To evaluate the network at one sample.
    """

    start: float
    sample: float
    forward: float


@dataclass(frozen=True)
class Gradients:
    """Seconds of an empirical NTK: of a gradient, and of a product of two; and the bytes of a gradient."""

    gradient: float
    product: float
    row_bytes: int


class Rates:
    """Measures what is asked for, once a kind.

    Args:
        loaded: The data of the study.
        memory: Budget of an extraction, such as "4GB".
    """

    def __init__(self, loaded: LoadedData, memory: str) -> None:
        self.loaded, self.memory = loaded, memory
        self._training: dict[str, Training] = {}
        self._gradients: dict[str, Gradients] = {}
        self._to_fit: dict[str, int] = {}
        self._pairs: dict[str, float] = {}
        self._eigenvectors: dict[int, float] = {}
        self._epochs: dict[tuple[int, int, int], float] = {}

    def training(self, cell: Cell) -> Training:
        """Measure a short training run of a network like the cell's.

        Args:
            cell: A cell of a trained model.

        Returns:
            The seconds.
        """
        optimizer = cell.optimizer
        batch = _FULL_BATCH if optimizer.full_batch else optimizer.batch_size
        key = json.dumps([cell.model, dict(cell.net), batch], sort_keys=True)
        if key not in self._training:
            tested = cell.n_test
            n, m, many = min(4 * batch, max(cell.n, self.loaded.pool // 2)), min(64, tested), min(500, tested)
            small = replace(
                _of_size(cell, n, m),
                after=(),
                after_fresh=(),
                kernels_at=None,
                log_spaced=None,
                until_train_error=None,
                evaluate_every=1,
                optimizer=replace(optimizer, batch_size=batch, full_batch=False),
            )
            data, net = set_up(_of_size(cell, 1, many), self.loaded)
            assert data.test_set is not None
            x = data.test_set.x
            with torch.no_grad():
                forward = _best(lambda: net(x)) / many

            def run(epochs: int) -> float:
                config = replace(small.optimizer, epochs=epochs)
                data, net = set_up(small, self.loaded)
                order = int(cell.model.split()[1]) if cell.model != "network" else None
                module = LinearizedNetwork(net, config, order) if order else FiniteNetwork(net, config)
                started = time.perf_counter()
                train(replace(small, optimizer=config), module, data, self.memory)
                return time.perf_counter() - started

            run(1)
            short, long = (min(run(epochs) for _ in range(2)) for epochs in (1, 5))
            epoch = max(long - short, 1e-6) / 4
            evaluated = forward * (5 if cell.model != "network" else 1)  # an expansion is dearer than its network
            sample = max(epoch - m * evaluated, epoch / 2) / n
            self._training[key] = Training(max(short - epoch, 0.0), sample, evaluated)
        return self._training[key]

    def epochs_to_fit(self, cell: Cell) -> int:
        """Train a network like the cell's on at most 128 images, until it fits them.

        Args:
            cell: A cell that trains a network until it fits its training set.

        Returns:
            The epochs, which other sizes are taken to need too.
        """
        n = min(_FITTED, self.loaded.pool)
        key = json.dumps(
            [dict(cell.net), repr(replace(cell.optimizer, seed=0)), cell.until_train_error, n], sort_keys=True
        )
        if key not in self._to_fit:
            kernels: dict[str, Any] = {"after": (), "after_fresh": (), "kernels_at": None, "log_spaced": None}
            small = replace(_of_size(cell, n, 1), **kernels)
            data, net = set_up(small, self.loaded)
            trained, _ = train(small, FiniteNetwork(net, small.optimizer), data, self.memory)
            self._to_fit[key] = round(trained.steps / small.optimizer.steps_per_epoch(n))
        return self._to_fit[key]

    def gradients(self, cell: Cell) -> Gradients:
        """Measure the empirical NTK of a network like the cell's at two sizes.

        Args:
            cell: A cell with a network.

        Returns:
            The seconds and bytes.
        """
        key = json.dumps(dict(cell.net), sort_keys=True)
        if key not in self._gradients:
            _, net = set_up(_of_size(cell, 1, 1), self.loaded)
            row_bytes = 4 * sum(parameter.numel() for parameter in net.parameters())
            large = max(16, min(384, self.loaded.pool, _ROWS_BYTES // row_bytes))
            small = large // 4
            data, net = set_up(_of_size(cell, large, 1), self.loaded)
            assert data.train_set is not None
            x, kernel = data.train_set.x.to(compute_device()), evaluation_ntk(net.to(compute_device()), self.memory)
            kernel(x[:small])
            times = [_best(partial(kernel, x[:count])) for count in (small, large)]
            # count * gradient + count (count + 1) / 2 * product
            matrix = np.array([(count, count * (count + 1) / 2) for count in (small, large)])
            gradient, product = np.linalg.solve(matrix, times)
            if product <= 0 or gradient <= 0:  # noise: all of it is the larger run's
                gradient, product = times[1] / large, 0.0
            self._gradients[key] = Gradients(float(gradient), float(product), row_bytes)
        return self._gradients[key]

    def pair(self, cell: Cell) -> float:
        """Measure the infinite-width kernel of a cell.

        Args:
            cell: A cell of infinite width.

        Returns:
            Seconds a pair.
        """
        key = json.dumps([cell.model, dict(cell.net)], sort_keys=True)
        if key not in self._pairs:
            data, _ = set_up(_of_size(cell, min(96, self.loaded.pool), 1), self.loaded)
            assert data.train_set is not None
            x, kernel = data.train_set.x.to(compute_device()), infinite_kernel(cell)
            kernel(x[:8])
            self._pairs[key] = _best(lambda: kernel(x)) / (len(x) * (len(x) + 1) / 2)
        return self._pairs[key]

    def fit_epoch(self, n: int, m: int, optimizer: OptimizerConfig) -> float:
        """Measure an epoch of kernel SGD and its evaluation.

        Args:
            n: Training samples.
            m: Test samples.
            optimizer: Batch size.

        Returns:
            Seconds; above 4096 samples they are taken to grow with n^2, as the entries that are read.
        """
        measured = min(n, 4096)
        batch = measured if optimizer.full_batch else optimizer.batch_size
        key = (measured, m, batch)
        if key not in self._epochs:
            gram, cross = torch.eye(measured), torch.zeros(m, measured)
            labels, truth = torch.ones(measured), torch.ones(m)
            labels[::2] = -1

            def fit(epochs: int) -> float:
                config = OptimizerConfig(lr=0.01, momentum=0.0, batch_size=batch, epochs=epochs)
                return _best(lambda: kernel_sgd(gram, labels, config, test=(cross, truth)))

            self._epochs[key] = max(fit(5) - fit(1), 1e-6) / 4
        return self._epochs[key] * (n / measured) ** 2

    def eigenvectors(self, n: int) -> float:
        """Measure the eigenvectors of a Gram, which a predicted learning curve takes.

        Args:
            n: Samples.

        Returns:
            Seconds; above 768 samples they are taken to grow with n^3.
        """
        measured = min(n, 768)
        if measured not in self._eigenvectors:
            gram = torch.rand(measured, measured, dtype=torch.float64)
            self._eigenvectors[measured] = _best(lambda: torch.linalg.eigh(gram + gram.T))
        return self._eigenvectors[measured] * (n / measured) ** 3


def _of_size(cell: Cell, n: int, m: int) -> Cell:
    arguments = {**cell.data.get("init_args", {}), "n_train": n, "n_test": m, "fresh": 0}
    return replace(cell, n=n, data={**cell.data, "init_args": arguments})


def _best(call: Callable[[], object], rounds: int = 2) -> float:
    """The least seconds of some calls."""
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
