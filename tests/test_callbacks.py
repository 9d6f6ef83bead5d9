"""Callbacks measure what they say and leave the training bit-identical.

Longer than 300 lines, since all callbacks are tried on one run.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from tiny import OPTIMIZER, QUIET, data, fit, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.callbacks import (
    AfterKernel,
    ComparisonTable,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.callbacks.scheduled import steps_to_measure
from ntk_lightning.datamodules import Batch, Samples
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.kernels.diagnostics import kernel_target_alignment
from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import kernel_sgd


class Recorder(Logger):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, list[tuple[int | None, float]]] = {}

    name = property(lambda self: "recorder")
    version = property(lambda self: "0")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        """Ignore."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append((step, value))


class NoisyDropout(nn.Module):
    """Draws from the global random state in training: shows whether a callback moved it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn(x.shape, dtype=x.dtype) if self.training else x


def all_callbacks() -> list[Callback]:
    return [
        OptimalEarlyStopping(),
        EmpiricalNTKDynamics(every_n_batches=3),
        KernelDiagnostics(log_spaced=4, probe_size=20),
        AfterKernel([10, 20], fresh=True),
        InfiniteNTKFit(),
        StopAtTrainError(0.0),
        ComparisonTable(),
    ]


def weights(module: LightningModule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_training_with_and_without_callbacks_ends_in_bit_identical_weights(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], all_callbacks()):
        module = FiniteNetwork(net(), OPTIMIZER)
        torch.manual_seed(5)
        fit(module, data(fresh=20), callbacks=callbacks, precision="32-true", min_epochs=3, default_root_dir=tmp_path)
        ends.append((weights(module), torch.get_rng_state(), module.training))
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]


def test_a_network_that_draws_random_numbers_is_not_disturbed_either(tmp_path: Path) -> None:
    ends = []
    for callbacks in ([], [OptimalEarlyStopping(), StopAtTrainError(0.0), AfterKernel()]):
        network = nn.Sequential(NoisyDropout(), *net())
        module = FiniteNetwork(network, OPTIMIZER)
        torch.manual_seed(5)
        fit(module, data(), callbacks=callbacks, precision="32-true", min_epochs=3, default_root_dir=tmp_path)
        ends.append(weights(module))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_dynamics_fit_the_kernel_of_that_moment(tmp_path: Path) -> None:
    dynamics, logger = EmpiricalNTKDynamics(every_n_batches=4), Recorder()
    module, datamodule = FiniteNetwork(net(), OPTIMIZER), data()
    fit(module, datamodule, callbacks=[dynamics], logger=logger, default_root_dir=tmp_path)
    assert [row["step"] for row in dynamics.rows] == [0, 4, 8, 12]
    assert datamodule.train_set is not None
    assert datamodule.test_set is not None
    x, x_test = datamodule.train_set.x.double(), datamodule.test_set.x.double()
    config = OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12, epochs=3)
    for row, network in ((dynamics.rows[0], net().double()), (dynamics.rows[-1], module.net)):
        kernel = EmpiricalNTK(network)
        expected = kernel_sgd(
            kernel(x), datamodule.train_set.y, config, test=(kernel(x_test, x), datamodule.test_set.y)
        )
        assert row["optimal_error"] == expected.optimal_error
        assert row["last_error"] == expected.last_error
        with torch.no_grad():
            wrong = network(x_test)[:, 0] * datamodule.test_set.y <= 0
        assert row["network_error"] == pytest.approx(wrong.double().mean().item())
    assert [step for step, _ in logger.metrics["empirical_ntk/test_error"]] == [0, 4, 8, 12]
    with (tmp_path / "recorder" / "0" / "kernel_dynamics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, 4, 8, 12]
    assert (tmp_path / "recorder" / "0" / "kernel_dynamics.png").stat().st_size > 10_000


def test_diagnostics_follow_the_kernel_of_the_probe_set(tmp_path: Path) -> None:
    diagnostics, logger = KernelDiagnostics(every_n_batches=4, probe_size=16, leading=3), Recorder()
    module, datamodule = FiniteNetwork(net(), OPTIMIZER), data()
    fit(module, datamodule, callbacks=[diagnostics], logger=logger, default_root_dir=tmp_path)
    assert [row["step"] for row in diagnostics.rows] == [0, 4, 8, 12]
    first, last = diagnostics.rows[0], diagnostics.rows[-1]
    assert first["alignment_with_initial"] == pytest.approx(1)
    assert first["distance_to_initial"] == pytest.approx(0, abs=1e-12)
    assert first["velocity"] is None
    assert datamodule.train_set is not None
    x, y = datamodule.train_set.x[:16].double(), datamodule.train_set.y[:16].double()
    initial, final = EmpiricalNTK(net().double())(x), EmpiricalNTK(module.net)(x)
    cosine = (initial * final).sum() / (initial.norm() * final.norm())
    assert last["distance_to_initial"] == pytest.approx(1 - cosine.item(), abs=1e-9)
    assert last["target_alignment"] == pytest.approx((y @ final @ y / (final.norm() * y.dot(y))).item())
    assert last["eigenvalue_1"] == pytest.approx(torch.linalg.eigvalsh(final)[-1].item())
    assert [step for step, _ in logger.metrics["kernel/velocity"]] == [4, 8, 12]
    assert (tmp_path / "recorder" / "0" / "kernel_diagnostics.png").stat().st_size > 10_000


def test_schedules_hold_both_ends() -> None:
    assert sorted(steps_to_measure(10, 4, 30)) == [0, 4, 8, 10]
    spaced = sorted(steps_to_measure(1000, None, 30))
    assert spaced[:3] == [0, 1, 2]
    assert spaced[-1] == 1000
    assert 20 < len(spaced) <= 31


def test_callbacks_start_afresh_in_a_second_fit(tmp_path: Path) -> None:
    callbacks = [OptimalEarlyStopping(), EmpiricalNTKDynamics(every_n_batches=4), KernelDiagnostics(every_n_batches=4)]
    rows = []
    for _ in range(2):
        fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=list(callbacks), default_root_dir=tmp_path)
        rows.append([callback.rows for callback in callbacks])  # type: ignore[attr-defined]  # all three have rows
    assert rows[0] == rows[1]
    assert [len(part) for part in rows[1]] == [3, 4, 4]


def test_after_kernel_measures_seen_and_fresh_samples(tmp_path: Path) -> None:
    after, datamodule = AfterKernel([10, 20], fresh=True), data(fresh=20)
    module = FiniteNetwork(net(), OPTIMIZER)
    fit(module, datamodule, callbacks=[after], default_root_dir=tmp_path)
    assert [(arm.name, arm.n) for arm in after.model_errors()] == [
        ("after-kernel", 10),
        ("after-kernel", 20),
        ("after-kernel, fresh samples", 10),
        ("after-kernel, fresh samples", 20),
    ]
    assert datamodule.fresh_set is not None
    assert datamodule.test_set is not None
    kernel, x, y = EmpiricalNTK(module.net), datamodule.fresh_set.x.double()[:10], datamodule.fresh_set.y[:10]
    expected = kernel_sgd(
        kernel(x),
        y,
        OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12, epochs=3),
        test=(kernel(datamodule.test_set.x.double(), x), datamodule.test_set.y),
    )
    assert after.model_errors()[2].optimal_error == expected.optimal_error


def test_infinite_fit_equals_the_infinite_readout_and_reuses_its_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = OptimalEarlyStopping()
    fit(InfiniteNTKReadout(net(), OPTIMIZER), data(), callbacks=[stopping], default_root_dir=tmp_path)
    for _ in range(2):
        arm = InfiniteNTKFit(store=str(tmp_path / "grams"))
        fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=[arm], default_root_dir=tmp_path)
        assert arm.model_errors()[0].optimal_error == pytest.approx(stopping.model_errors()[0].optimal_error)
        assert arm.model_errors()[0].last_error == pytest.approx(stopping.model_errors()[0].last_error)

        def refuse(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 - any call
            raise AssertionError("the second run computes kernel entries again")

        monkeypatch.setattr(InfiniteNTK, "__call__", refuse)


def test_optimal_early_stopping_reports_least_last_and_validated_error(tmp_path: Path) -> None:
    stopping, logger = OptimalEarlyStopping(), Recorder()
    module = FiniteNetwork(net(), OPTIMIZER)
    fit(module, data(n_val=10), epochs=6, callbacks=[stopping], logger=logger, default_root_dir=tmp_path)
    errors = [row["test_error"] for row in stopping.rows]
    assert [row["step"] for row in stopping.rows] == [4, 8, 12, 16, 20, 24]
    arm = stopping.model_errors()[0]
    best_validation = min(range(6), key=lambda i: stopping.rows[i]["val_error"])
    assert (arm.optimal_error, arm.last_error, arm.validated_error) == (
        min(errors),
        errors[-1],
        errors[best_validation],
    )
    assert arm.name == "finite network"
    assert arm.n == 40
    assert logger.metrics["test/optimal_error"] == [(24, min(errors))]


def test_training_stops_at_the_exact_training_error(tmp_path: Path) -> None:
    module, datamodule = FiniteNetwork(net(), OPTIMIZER), data()
    trainer = fit(module, datamodule, epochs=200, callbacks=[StopAtTrainError(0.05)], default_root_dir=tmp_path)
    assert 1 < trainer.current_epoch < 200
    assert datamodule.train_set is not None
    with torch.no_grad():
        outputs = module(datamodule.train_set.x.double())[:, 0]
    error = (outputs * datamodule.train_set.y <= 0).double().mean().item()
    assert error <= 0.05
    assert trainer.callback_metrics["train/exact_error"].item() == pytest.approx(error)


def test_table_names_every_arm_with_its_n(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(FiniteNetwork(net(), OPTIMIZER), data(fresh=20), callbacks=all_callbacks(), default_root_dir=tmp_path)
    with (tmp_path / "comparison.csv").open() as file:
        arms = {(row["name"], int(row["n"])) for row in csv.DictReader(file)}
    assert arms == {
        ("finite network", 40),
        ("empirical NTK at initialization", 40),
        ("infinite NTK", 40),
        ("after-kernel", 10),
        ("after-kernel", 20),
        ("after-kernel, fresh samples", 10),
        ("after-kernel, fresh samples", 20),
    }
    printed = capsys.readouterr().out
    for name in ("finite network", "empirical NTK at initialization", "infinite NTK", "after-kernel", str(tmp_path)):
        assert name in printed.replace("\n", "")


def test_early_stop_still_extracts_the_last_kernel(tmp_path: Path) -> None:
    dynamics = EmpiricalNTKDynamics(every_n_batches=1000)
    module = FiniteNetwork(net(), OPTIMIZER)
    trainer = fit(module, data(), 200, callbacks=[dynamics, StopAtTrainError(0.4)], default_root_dir=tmp_path)
    assert [row["step"] for row in dynamics.rows] == [0, trainer.global_step]


@pytest.mark.parametrize(
    ("callback", "module", "kwargs", "error", "message"),
    [
        (AfterKernel(fresh=True), FiniteNetwork(net()), {}, TypeError, "needs the whole fresh set"),
        (AfterKernel([41]), FiniteNetwork(net()), {}, ValueError, "between 1 and the 40 samples"),
        (EmpiricalNTKDynamics(network="model"), FiniteNetwork(net()), {}, AttributeError, "has no network 'model'"),
        (InfiniteNTKFit(), FiniteNetwork(MLP(2, 1, 192, nn.PReLU)), {}, TypeError, "no infinite-width kernel"),
        (EmpiricalNTKDynamics(), FiniteNetwork(net()), {"max_epochs": -1}, ValueError, "The Trainer never ends"),
    ],
)
def test_what_is_missing_is_said_before_training(
    callback: Callback, module: LightningModule, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = weights(module)
    trainer = Trainer(callbacks=[callback], **{"max_epochs": 1, **QUIET, **kwargs})
    with pytest.raises(error, match=message):
        trainer.fit(module, datamodule=data())
    assert all(torch.equal(a, b) for a, b in zip(before, weights(module), strict=True))


class Classes(LightningDataModule):
    """Three classes by number, for a network with three outputs."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(40, 4, generator=generator), torch.arange(40) % 3
        x[:, :3] += 2 * nn.functional.one_hot(y, 3)
        self.train_set, self.test_set = Samples(x[:24], y[:24]), Samples(x[24:], y[24:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(self.train_set.x, self.train_set.y), batch_size=12)


def test_kernels_of_several_outputs_are_fitted_to_classes(tmp_path: Path) -> None:
    dynamics, after, diagnostics = EmpiricalNTKDynamics(2), AfterKernel(), KernelDiagnostics(2, probe_size=24)
    module, datamodule = FiniteNetwork(MLP(16, 1, 4, num_outputs=3), OptimizerConfig(lr=0.5, batch_size=12)), Classes()
    callbacks = [dynamics, after, InfiniteNTKFit(), diagnostics]
    fit(module, datamodule, 30, callbacks=callbacks, default_root_dir=tmp_path, precision="32-true")
    kernel, x = EmpiricalNTK(module.net), datamodule.train_set.x
    targets = nn.functional.one_hot(datamodule.train_set.y, 3).float()
    config = OptimizerConfig(lr=0.5, batch_size=12, epochs=30)
    test = kernel(datamodule.test_set.x, x), nn.functional.one_hot(datamodule.test_set.y, 3).float()
    assert (
        after.model_errors()[0].optimal_error == kernel_sgd(kernel(x), targets, config, test=test).optimal_error < 0.5
    )
    assert dynamics.rows[-1]["network_error"] < 0.5
    assert diagnostics.rows[-1]["target_alignment"] == pytest.approx(kernel_target_alignment(kernel(x), targets))


def test_a_network_with_outputs_of_shape_n_is_watched(tmp_path: Path) -> None:
    class Flat(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = super().forward(x)
            return outputs.squeeze(1)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Flat(nn.Flatten(), nn.Linear(192, 1))

        def training_step(self, batch: Batch) -> Tensor:
            loss: Tensor = (self.net(batch.x) - batch.y).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    dynamics = EmpiricalNTKDynamics(every_n_batches=2, optimizer=OptimizerConfig(lr=0.01, epochs=2))
    fit(Module(), data(batch_size=20), callbacks=[dynamics], default_root_dir=tmp_path)
    assert all(0 <= row["network_error"] <= 1 for row in dynamics.rows)


def test_dynamics_follow_the_linearized_network_step_by_step(tmp_path: Path) -> None:
    dynamics, linearized = EmpiricalNTKDynamics(every_n_batches=3), LinearizedNetwork(net(), OPTIMIZER)
    fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=[dynamics], default_root_dir=tmp_path)

    class Follow(Callback):
        def __init__(self) -> None:
            self.losses: dict[int, float] = {}

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            test = trainer.datamodule.test_set  # type: ignore[attr-defined]  # TensorData
            with torch.no_grad():
                loss = (pl_module(test.x.double())[:, 0] - test.y).square().mean().item()
            self.losses[trainer.global_step] = loss

    follow = Follow()
    fit(linearized, data(), callbacks=[follow], default_root_dir=tmp_path)
    steps = [row["step"] for row in dynamics.rows]
    assert steps == [0, 3, 6, 9, 12]
    assert [row["initial_loss"] for row in dynamics.rows[1:]] == pytest.approx([follow.losses[t] for t in steps[1:]])
    assert dynamics.rows[0]["initial_error"] == dynamics.rows[0]["initial_loss"] == 1  # of a model that says 0


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 2}, {"limit_train_batches": 1}, {"gradient_clip_val": 1.0}]
)
def test_steps_that_kernel_fits_do_not_take_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the Trainer has {next(iter(options))}"):
        fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=[AfterKernel()], **options)


def test_kernel_fits_are_measured_as_often_as_the_network(tmp_path: Path) -> None:
    stopping, after = OptimalEarlyStopping(), AfterKernel()
    options = {"check_val_every_n_epoch": 3, "callbacks": [stopping, after], "default_root_dir": tmp_path}
    fit(FiniteNetwork(net(), OPTIMIZER), data(), 9, **options)
    assert after.model_errors()[0].curve["steps"] == [row["step"] for row in stopping.rows] == [12, 24, 36]


def test_the_training_error_is_measured_in_evaluation_mode(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), NoisyDropout(), nn.Linear(192, 1))
    module = FiniteNetwork(network, OptimizerConfig(lr=0.01, batch_size=20))
    callback = StopAtTrainError(0.0)
    fit(module, data(), 2, min_epochs=2, callbacks=[callback], default_root_dir=tmp_path)
    assert network[1].num_batches_tracked == 4
    assert network.training


def test_constructor_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="only one of"):
        EmpiricalNTKDynamics(every_n_batches=1, log_spaced=2)
    with pytest.raises(ValueError, match="at least 1"):
        EmpiricalNTKDynamics(every_n_batches=0)
    with pytest.raises(ValueError, match="at most probe_size"):
        KernelDiagnostics(probe_size=3)
    with pytest.raises(ValueError, match="fraction in"):
        StopAtTrainError(1.5)


def test_kernel_readouts_can_be_stopped_and_reported_too(tmp_path: Path) -> None:
    stopping = OptimalEarlyStopping()
    module = KernelReadout(EmpiricalNTK(net()), OPTIMIZER)
    trainer = fit(module, data(), 50, callbacks=[stopping, StopAtTrainError(0.3)], default_root_dir=tmp_path)
    assert trainer.current_epoch < 50
    assert stopping.model_errors()[0].name == "kernel readout"
