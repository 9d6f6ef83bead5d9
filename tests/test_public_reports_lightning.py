"""Ways in which users set up Lightning runs that once gave a wrong or no comparison; each test names the kind.

Longer than 300 lines, since every kind of run is tried with the callbacks that it could mislead.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from tiny import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.callbacks import (
    AfterKernel,
    ComparisonTable,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    ResumableCheckpoint,
    StopAtTrainError,
)
from ntk_lightning.datamodules import Samples, TensorData
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig

CONFIG = OptimizerConfig(lr=0.05, momentum=0.9, batch_size=8, epochs=3)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator).float() * 2 - 1
    return torch.randn(n, 6, generator=generator) + 0.5 * y[:, None], y


def data() -> TensorData:
    """24 training samples, 3 batches an epoch."""
    return TensorData(draw(24, 0), draw(16, 1), n_train=24, n_test=16, batch_size=8)


def network() -> nn.Module:
    torch.manual_seed(1)
    return MLP(width=5, depth=1, in_features=6)


def fit(module: LightningModule, callbacks: list[Any], root: Path, **options: Any) -> Trainer:  # noqa: ANN401
    datamodule: LightningDataModule = options.pop("datamodule", None) or data()
    given = {"max_epochs": 3, "precision": "64-true", "default_root_dir": root, **QUIET, **options}
    trainer = Trainer(callbacks=callbacks, **given)
    trainer.fit(module, datamodule=datamodule)
    return trainer


def ntk(net: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Kernel of a network by plain autograd, one sample at a time, in float64."""

    def rows(x: Tensor) -> Tensor:
        gradients = [torch.autograd.grad(net(sample[None]).sum(), list(net.parameters())) for sample in x.double()]
        return torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])

    return rows(x1) @ rows(x2).T


def expected_fit(
    net: nn.Module, trainer: Trainer, n: int = 24, config: OptimizerConfig = CONFIG
) -> tuple[float, float]:
    """Least and last test error of the kernel of a network, fitted on the first n training samples."""
    train, test = (getattr(trainer.datamodule, f"{split}_set") for split in ("train", "test"))  # type: ignore[attr-defined]  # set by fit
    x, y = train.x[:n], train.y[:n].double()
    k, k_test = ntk(net, x, x), ntk(net, test.x, x)
    a = torch.zeros(n, dtype=torch.float64)
    velocity, errors = torch.zeros_like(a), []
    for step, batch in enumerate(config.schedule(n), 1):
        gradient = torch.zeros_like(a)
        gradient[batch] = 2 / len(batch) * (k[batch] @ a - y[batch])
        velocity = config.momentum * velocity + gradient
        a = a - config.lr * velocity
        if step % config.steps_per_epoch(n) == 0:
            errors.append(((k_test @ a) * test.y <= 0).double().mean().item())
    return min(1.0, *errors), errors[-1]


class Own(LightningModule):
    """A module of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401 - a batch
        return F.soft_margin_loss(self.net(batch[0]).squeeze(1), batch[1])

    def training_step(self, batch: Any, index: int) -> Any:  # noqa: ANN401
        return self.loss(batch)

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        return torch.optim.SGD(self.parameters(), lr=0.01)


# --- other optimizers, schedules, hooks ------------------------------------------------------------------------------


class SubclassedSGD(torch.optim.SGD):
    """Might do anything."""


def groups(module: LightningModule) -> list[dict[str, Any]]:
    first, *others = module.parameters()
    return [{"params": [first], "lr": 0.01}, {"params": others}]


def with_schedule(module: LightningModule) -> dict[str, Any]:
    optimizer = CONFIG.configure(module.parameters())
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


def sgd(module: LightningModule, **settings: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - SGD's
    return torch.optim.SGD(module.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})


OPTIMIZERS: dict[str, tuple[Callable[[LightningModule], Any], str]] = {
    "Adam": (lambda module: torch.optim.Adam(module.parameters()), "the optimizer is Adam"),
    "a subclass": (lambda module: SubclassedSGD(module.parameters(), 0.05, 0.9), "the optimizer is SubclassedSGD"),
    "lr": (lambda module: sgd(module, lr=0.1), r"lr=0\.1 instead of 0\.05"),
    "momentum": (lambda module: sgd(module, momentum=0.5), r"momentum=0\.5 instead of 0\.9"),
    "weight decay": (lambda module: sgd(module, weight_decay=0.01), r"weight_decay=0\.01 instead of 0"),
    "nesterov": (lambda module: sgd(module, nesterov=True), "nesterov=1 instead of 0"),
    "dampening": (lambda module: sgd(module, dampening=0.5), r"dampening=0\.5 instead of 0"),
    "maximize": (lambda module: sgd(module, maximize=True), "maximize=1 instead of 0"),
    "a parameter group": (lambda module: torch.optim.SGD(groups(module), 0.05, 0.9), r"lr=0\.01 instead of 0\.05"),
    "weights left out": (
        lambda module: torch.optim.SGD([next(module.parameters())], 0.05, 0.9),
        "leaves out '3.weight'",
    ),
    "a schedule": (with_schedule, "there is a schedule, StepLR"),
    "none": (lambda module: None, "0 optimizers|Mock"),
}


def with_optimizer(name: str) -> LightningModule:
    module = FiniteNetwork(network(), CONFIG)
    module.configure_optimizers = lambda: OPTIMIZERS[name][0](module)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_not_the_configs_is_refused(name: str, tmp_path: Path) -> None:
    callbacks = {"Adam": EmpiricalNTKDynamics(log_spaced=2), "a schedule": InfiniteNTKFit(backend="reference")}
    with pytest.raises(ValueError, match=f"plain SGD steps of the optimizer config, but .*({OPTIMIZERS[name][1]})"):
        fit(with_optimizer(name), [callbacks.get(name, AfterKernel())], tmp_path)
    assert not list(tmp_path.rglob("*.csv"))


def test_an_optimizer_of_the_callback_needs_no_other(tmp_path: Path) -> None:
    after = AfterKernel(optimizer=CONFIG)
    trainer = fit(with_optimizer("Adam"), [after], tmp_path)
    found = after.model_errors()[0]
    assert found.name == "after-kernel"
    assert (found.optimal_error, found.last_error) == expected_fit(trainer.lightning_module.net, trainer)  # type: ignore[arg-type]


class Clips(FiniteNetwork):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class WarmsUp(FiniteNetwork):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        super().optimizer_step(*args, **kwargs)


class Accumulates(FiniteNetwork):
    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        pass


class ScalesLoss(FiniteNetwork):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - Lightning's signature
        super().backward(0.5 * loss, *args, **kwargs)


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        (Clips, "configure_gradient_clipping"),
        (WarmsUp, "optimizer_step"),
        (Accumulates, "optimizer_zero_grad"),
        (ScalesLoss, "backward"),
    ],
)
def test_hooks_that_change_every_step_are_refused(module: type[FiniteNetwork], hook: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{module.__name__} has its own {hook}"):
        fit(module(network(), CONFIG), [AfterKernel()], tmp_path)


class Penalized(FiniteNetwork):
    """Another loss, by a training step of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        return super().training_step(batch, batch_idx) + sum(w.square().sum() for w in self.parameters())


class ScaledGradients(FiniteNetwork):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for weight in self.parameters():
            assert weight.grad is not None
            weight.grad *= 0.1


class Clamps(FiniteNetwork):
    """Keeps weights in bounds after the step, which Lightning calls after the callbacks."""

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401 - Lightning's signature
        for weight in self.parameters():
            weight.data.clamp_(-0.1, 0.1)


class SkipsBatches(FiniteNetwork):
    def training_step(self, batch: Any, batch_idx: int) -> Any:  # noqa: ANN401 - None is no tensor
        return None if batch_idx % 2 == 0 else super().training_step(batch, batch_idx)


class CrossEntropy(Own):
    """Promises the config's steps, with another loss."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer_config = CONFIG

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return CONFIG.configure(self.parameters())


class SquaredError(CrossEntropy):
    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401
        return F.mse_loss(self.net(batch[0]).squeeze(1), batch[1].to(self.dtype))


class LogsMore(FiniteNetwork):
    """A training step of its own that changes nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        loss = super().training_step(batch, batch_idx)
        self.log("again", loss)
        return loss


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Penalized(network(), CONFIG), "the loss of the first batch is"),
        (CrossEntropy, "the loss of the first batch is"),
        (lambda: ScaledGradients(network(), CONFIG), "the first step is not the learning rate times the gradient"),
        (lambda: Clamps(network(), CONFIG), "the weights changed between the first batch and the second"),
        (lambda: SkipsBatches(network(), CONFIG), "training_step gave no loss"),
    ],
)
def test_another_loss_or_gradient_is_told_and_marked(module: Any, message: str, tmp_path: Path) -> None:  # noqa: ANN401
    after, dynamics = AfterKernel(), EmpiricalNTKDynamics(every_n_batches=3)
    with pytest.warns(UserWarning, match=f"At step 1 the run does not take .*{message}"):
        fit(module(), [after, dynamics], tmp_path)
    assert [row.name for row in after.model_errors()] == ["after-kernel, other steps than the network"]
    assert [row.name for row in dynamics.model_errors()] == [
        "empirical NTK at initialization, other steps than the network"
    ]
    assert [row["initial_error"] for row in dynamics.rows] == [1.0, None, None, None]


@pytest.mark.parametrize("module", [SquaredError, lambda: LogsMore(network(), CONFIG)])
def test_steps_of_the_config_are_not_suspected(module: Any, tmp_path: Path) -> None:  # noqa: ANN401
    after = AfterKernel()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain SGD steps")
        fit(module(), [after], tmp_path)
    assert after.model_errors()[0].name == "after-kernel"


class During(Callback):
    """Does something to the first parameter group after so many steps."""

    def __init__(self, step: int, change: Callable[[Trainer, dict[str, Any]], object]) -> None:
        self.step, self.change = step, change

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        if trainer.global_step == self.step:
            self.change(trainer, trainer.optimizers[0].param_groups[0])


CHANGES: dict[str, tuple[Callback, str]] = {
    "the rate": (During(4, lambda _, group: group.update(lr=0.005)), r"lr=0\.005 instead of 0\.05"),
    "the momentum": (During(4, lambda _, group: group.update(momentum=0.0)), "momentum=0 instead"),
    "the weights": (During(4, lambda _, group: group.update(params=group["params"][1:])), "leaves out '1.weight'"),
    "freezing": (
        During(4, lambda _, group: group["params"][0].requires_grad_(False)),
        "has changed for 'net.1.weight'",
    ),
    "accumulation": (GradientAccumulationScheduler({1: 3}), "accumulate_grad_batches=3"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_steps_that_change_in_mid_run_are_told_and_marked(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    dynamics, after = EmpiricalNTKDynamics(every_n_batches=1), AfterKernel()
    with pytest.warns(UserWarning, match=f"At step [3-5] the run does not take .*{message}") as told:
        fit(FiniteNetwork(network(), CONFIG), [change, dynamics, after], tmp_path)
    assert sum("plain SGD steps" in str(warning.message) for warning in told) == 1
    initial = [row["initial_error"] is None for row in dynamics.rows]
    assert initial[:4] == [False] * 4
    assert initial[-1]
    assert after.model_errors()[0].name.endswith("other steps than the network")


# --- steps in manual optimization -------------------------------------------------------------------------------------


class Manual(Own):
    """Two optimizers, each of one layer."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        return [torch.optim.SGD([weight], lr=0.01) for weight in self.parameters()]


class Unwrapped(Manual):
    """Steps of optimizers that Lightning does not count."""

    def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
        optimizers = [optimizer.optimizer for optimizer in self.optimizers()]  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()


class ByHand(Manual):
    """Writes the weights past autograd's version counters, as old optimizers do."""

    def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
        self.zero_grad()
        self.manual_backward(self.loss(batch))
        for weight in self.parameters():
            assert weight.grad is not None
            weight.data.add_(weight.grad, alpha=-0.01)


class SeveralSteps(Manual):
    """One optimizer, two steps a batch."""

    def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
        for _ in range(2):
            super().training_step(batch, index)


class Accumulated(Manual):
    """A step in every third batch."""

    def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
        self.manual_backward(self.loss(batch))
        if index % 3 == 2:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()


class Remember(Callback):
    """Copies the weights after every batch."""

    def __init__(self) -> None:
        self.nets: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        self.nets.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("module", [Manual, Unwrapped, ByHand, SeveralSteps])
def test_a_step_is_a_training_batch_with_an_optimizer_step(module: type[Manual], tmp_path: Path) -> None:
    dynamics, at = (EmpiricalNTKDynamics(optimizer=CONFIG, name=n, **given) for n, given in GIVEN.items())
    diagnostics, remember, curve = KernelDiagnostics(every_n_batches=4), Remember(), OptimalEarlyStopping("err")
    module = type("Validated", (module,), {"validation_step": Validated.validation_step})
    with pytest.warns(UserWarning, match="by manual optimization: the steps of kernel callbacks are those batches"):
        trainer = fit(module(), [dynamics, at, diagnostics, remember, curve], tmp_path)
    assert [row["step"] for row in dynamics.rows] == [0, 3, 6, 9]
    assert [row["step"] for row in at.rows] == [0, 1, 2, 5, 9]
    assert [row["step"] for row in diagnostics.rows] == [0, 4, 8, 9]
    assert [row["step"] for row in curve.rows] == [3, 6, 9]
    x = trainer.datamodule.train_set.x  # type: ignore[attr-defined]
    for row in diagnostics.rows[1:]:
        net = network().double()
        net.load_state_dict(remember.nets[row["step"] - 1])
        assert row["eigenvalue_1"] == pytest.approx(torch.linalg.eigvalsh(ntk(net, x, x))[-1].item(), rel=1e-9)


GIVEN: dict[str, dict[str, Any]] = {"every": {"every_n_batches": 3}, "at": {"at": [1, 2, 5]}}


def test_batches_without_a_step_are_not_counted(tmp_path: Path) -> None:
    dynamics = EmpiricalNTKDynamics(every_n_batches=1, optimizer=CONFIG)
    fit(Accumulated(), [dynamics], tmp_path)
    assert [row["step"] for row in dynamics.rows] == [0, 1, 2, 3]


def test_a_resumed_run_goes_on_counting_its_batches(tmp_path: Path) -> None:
    whole, parts = (EmpiricalNTKDynamics(every_n_batches=2, optimizer=CONFIG) for _ in range(2))
    fit(Manual(), [whole], tmp_path)
    trainer = fit(Manual(), [parts], tmp_path, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = EmpiricalNTKDynamics(every_n_batches=2, optimizer=CONFIG)
    again = Trainer(max_epochs=3, precision="64-true", default_root_dir=tmp_path, callbacks=[resumed], **QUIET)
    again.fit(Manual(), datamodule=data(), ckpt_path=tmp_path / "two.ckpt")
    assert [row["step"] for row in resumed.rows] == [0, 2, 4, 6, 8, 9]
    assert resumed.rows[-1]["network_loss"] == pytest.approx(whole.rows[-1]["network_loss"])


def test_manual_steps_cannot_be_compared_with_the_configs(tmp_path: Path) -> None:
    class Promising(Manual):
        optimizer_config = CONFIG

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return CONFIG.configure(self.parameters())

        def training_step(self, batch: Any, index: int) -> None:  # noqa: ANN401
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(self.loss(batch))
            optimizer.step()  # type: ignore[union-attr]

    with pytest.warns(UserWarning, match="optimizes manually, so that its steps cannot be compared"):
        fit(Promising(), [AfterKernel()], tmp_path)


# --- weights that change at the end -----------------------------------------------------------------------------------


class RestoresAtTheEnd(FiniteNetwork):
    """Ends with the weights it began with."""

    def on_train_start(self) -> None:
        self.kept = {name: value.clone() for name, value in self.net.state_dict().items()}

    def on_train_end(self) -> None:
        self.net.load_state_dict(self.kept)


class Halves(Callback):
    """Ends a run with half the weights."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            for weight in pl_module.parameters():
                weight *= 0.5


ENDS: dict[str, Callable[[], tuple[LightningModule, list[Callback]]]] = {
    "EMA": lambda: (FiniteNetwork(network(), CONFIG), [EMAWeightAveraging(decay=0.9)]),
    "a callback": lambda: (FiniteNetwork(network(), CONFIG), [Halves()]),
    "the module": lambda: (RestoresAtTheEnd(network(), CONFIG), []),
    "nothing": lambda: (FiniteNetwork(network(), CONFIG), []),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_the_last_kernels_are_of_the_weights_the_run_ends_with(name: str, first: bool, tmp_path: Path) -> None:
    module, ending = ENDS[name]()
    after, dynamics = AfterKernel([12, 24]), EmpiricalNTKDynamics(every_n_batches=3)
    diagnostics, table = KernelDiagnostics(every_n_batches=3), ComparisonTable()
    measuring = [table, after, diagnostics, dynamics]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = fit(module, [*ending, *measuring] if first else [*measuring, *ending], tmp_path)
    net = module.net
    assert isinstance(net, nn.Module)
    for row in after.model_errors():
        assert (row.optimal_error, row.last_error) == expected_fit(net, trainer, row.n)
    last, test = dynamics.rows[-1], trainer.datamodule.test_set  # type: ignore[attr-defined]
    assert (last["optimal_error"], last["last_error"]) == expected_fit(net, trainer)
    outputs = net(test.x.double())[:, 0]
    assert last["network_loss"] == pytest.approx((outputs - test.y).square().mean().item())
    assert [row["step"] for row in dynamics.rows] == [row["step"] for row in diagnostics.rows] == [0, 3, 6, 9]
    x = trainer.datamodule.train_set.x  # type: ignore[attr-defined]
    gram = ntk(net, x, x)
    assert diagnostics.rows[-1]["eigenvalue_1"] == pytest.approx(torch.linalg.eigvalsh(gram)[-1].item(), rel=1e-9)
    initial = ntk(network().double(), x, x)
    distance = 1 - (gram * initial).sum() / (gram.norm() * initial.norm())
    assert diagnostics.rows[-1]["distance_to_initial"] == pytest.approx(distance.item(), abs=1e-12)
    changed = [str(warning.message) for warning in told if "weights that the run ends with" in str(warning.message)]
    assert len(changed) == (0 if name == "nothing" else 2)
    with (tmp_path / "comparison.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)][:2] == ["after-kernel", "after-kernel"]


def test_stochastic_weight_averaging_changes_rate_and_weights_and_both_are_told(tmp_path: Path) -> None:
    module, after = FiniteNetwork(network(), CONFIG), AfterKernel()
    with pytest.warns(UserWarning, match="there is a schedule, SWALR"):
        trainer = fit(module, [after, StochasticWeightAveraging(0.01, swa_epoch_start=1)], tmp_path)
    row = after.model_errors()[0]
    assert (row.optimal_error, row.last_error) == expected_fit(module.net, trainer)


# --- how runs are set up ----------------------------------------------------------------------------------------------


class TwoLoaders(LightningDataModule):
    def setup(self, stage: str | None = None) -> None:
        self.train_set, self.test_set = Samples(*draw(24, 0)), Samples(*draw(16, 1))

    def train_dataloader(self) -> Any:  # noqa: ANN401
        return DataLoader(TensorDataset(self.train_set.x, self.train_set.y), batch_size=8)

    def val_dataloader(self) -> Any:  # noqa: ANN401
        return [DataLoader(TensorDataset(self.test_set.x, self.test_set.y), batch_size=4) for _ in range(2)]


class Validated(Own):
    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        wrong = self.net(batch[0]).squeeze(1).sign() != batch[1]
        if not self.trainer.sanity_checking:
            self.log("err", wrong.float().mean())


@pytest.mark.parametrize("sanity", [0, 1, 2])
def test_several_validation_loaders_pass_the_sanity_check(sanity: int, tmp_path: Path) -> None:
    curve = OptimalEarlyStopping(monitor="err/dataloader_idx_1")
    fit(Validated(), [curve], tmp_path, datamodule=TwoLoaders(), num_sanity_val_steps=sanity)
    assert [row["step"] for row in curve.rows] == [3, 6, 9]


def test_a_metric_that_is_never_logged_is_named_after_the_sanity_check(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"No metric 'wrong' is logged in validation; there are .*dataloader_idx_0"):
        fit(Validated(), [OptimalEarlyStopping("wrong")], tmp_path, datamodule=TwoLoaders())


class BuiltInSetup(Own):
    def __init__(self) -> None:
        LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        self.net = network()


class BuiltInConfigureModel(Own):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        self.net = self.net or network()


@pytest.mark.parametrize("module", [BuiltInSetup, BuiltInConfigureModel])
def test_networks_that_lightning_builds_late_are_found(module: type[Own], tmp_path: Path) -> None:
    own = {"optimizer": CONFIG}
    after, dynamics = AfterKernel(**own), EmpiricalNTKDynamics(log_spaced=2, **own)  # type: ignore[arg-type]
    callbacks = [after, dynamics, KernelDiagnostics(log_spaced=2), InfiniteNTKFit(backend="reference", **own)]  # type: ignore[arg-type]
    trainer = fit(module(), callbacks, tmp_path)
    assert [row["step"] for row in dynamics.rows] == [0, 1, 9]
    assert after.model_errors()[0].optimal_error == expected_fit(trainer.lightning_module.net, trainer)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 2])
def test_fast_dev_run_runs_and_leaves_no_files(steps: int, tmp_path: Path) -> None:
    dynamics = EmpiricalNTKDynamics(every_n_batches=1)
    callbacks = [
        dynamics,
        AfterKernel(),
        KernelDiagnostics(),
        InfiniteNTKFit(backend="reference", store=str(tmp_path / "grams")),
        OptimalEarlyStopping(),
        ResumableCheckpoint(tmp_path / "resume", every_n_steps=1),
        StopAtTrainError(0.0),
        ComparisonTable(),
    ]
    options = {"enable_checkpointing": True, "fast_dev_run": steps}
    fit(FiniteNetwork(network(), CONFIG), callbacks, tmp_path, **options)
    assert [row["step"] for row in dynamics.rows] == list(range(steps + 1))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_two_callbacks_of_a_class_have_tables_metrics_and_states_of_their_own(tmp_path: Path) -> None:
    def pair() -> list[Any]:
        return [
            *(KernelDiagnostics(every_n_batches=3, probe_size=n, name=f"probe{n}") for n in (8, 16)),
            *(EmpiricalNTKDynamics(every_n_batches=3, fit_sizes=[n], name=f"n{n}") for n in (8, 16)),
            *(AfterKernel([n], name=f"n{n}") for n in (8, 16)),
            *(InfiniteNTKFit([n], backend="reference", name=f"n{n}") for n in (8, 16)),
            *(OptimalEarlyStopping(name=name) for name in ("a", "b")),
            ComparisonTable(),
        ]

    callbacks = pair()
    trainer = fit(FiniteNetwork(network(), CONFIG), callbacks, tmp_path)
    tables = {path.stem for path in tmp_path.glob("*.csv")}
    assert tables == {
        *("kernel_diagnostics_probe8", "kernel_diagnostics_probe16", "kernel_dynamics_n8", "kernel_dynamics_n16"),
        *("after_kernel_n8", "after_kernel_n16", "infinite_ntk_n8", "infinite_ntk_n16"),
        *("error_curve_a", "error_curve_b", "comparison"),
    }
    metrics = {
        *("kernel_probe8/effective_rank", "kernel_probe16/effective_rank", "empirical_ntk_n8/test_error"),
        *("empirical_ntk_n16/test_error", "after_kernel_n8/test_error_8", "infinite_ntk_n16/test_error_16"),
        *("test_a/optimal_error", "test_b/optimal_error"),
    }
    assert metrics <= set(trainer.callback_metrics)
    with (tmp_path / "comparison.csv").open() as file:
        names = [row["name"] for row in csv.DictReader(file)]
    assert len(set(names)) == len(names) == 8
    assert "after-kernel (n8)" in names
    x = trainer.datamodule.train_set.x[:8]  # type: ignore[attr-defined]
    largest = torch.linalg.eigvalsh(ntk(trainer.lightning_module.net, x, x))[-1].item()  # type: ignore[arg-type]
    assert callbacks[0].rows[-1]["eigenvalue_1"] == pytest.approx(largest, rel=1e-9)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    states = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]
    for callback in callbacks[:4]:
        assert states[callback.state_key]["rows"] == callback.rows


def test_two_callbacks_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"would write after_kernel\.csv: give each its own name"):
        fit(FiniteNetwork(network(), CONFIG), [AfterKernel([8]), AfterKernel([16])], tmp_path)
    with pytest.raises(ValueError, match=r"would write infinite_ntk\.csv"):
        fit(FiniteNetwork(network(), CONFIG), [InfiniteNTKFit([8]), InfiniteNTKFit([16])], tmp_path)
    with pytest.raises(ValueError, match="part of a file's name"):
        AfterKernel(name="a/b")


class Flat(Own):
    """Layers on the module itself."""

    def __init__(self) -> None:
        LightningModule.__init__(self)
        torch.manual_seed(1)
        self.l1, self.l2 = nn.Linear(6, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.l2(self.l1(x).relu())
        return outputs

    def loss(self, batch: Any) -> Tensor:  # noqa: ANN401
        return F.soft_margin_loss(self(batch[0]).squeeze(1), batch[1])


def test_layers_on_the_module_itself_are_watched_by_an_empty_name(tmp_path: Path) -> None:
    module, after = Flat(), AfterKernel(network="", optimizer=CONFIG)
    trainer = fit(module, [after], tmp_path)
    found = after.model_errors()[0]
    assert (found.optimal_error, found.last_error) == expected_fit(module, trainer)
    by_default = AfterKernel(optimizer=CONFIG)
    fit(Flat(), [by_default], tmp_path)
    assert by_default.model_errors() == [found]


class Regression(LightningDataModule):
    """Real targets."""

    def setup(self, stage: str | None = None) -> None:
        self.train_set, self.test_set = (Samples(x, x.mean(1)) for x, _ in (draw(24, 0), draw(16, 1)))

    def train_dataloader(self) -> Any:  # noqa: ANN401
        return DataLoader(TensorDataset(self.train_set.x, self.train_set.y), batch_size=8)


@pytest.mark.parametrize("callback", [EmpiricalNTKDynamics, AfterKernel, InfiniteNTKFit])
def test_real_targets_are_compared_by_losses(callback: Any, tmp_path: Path) -> None:  # noqa: ANN401
    fits, datamodule = callback(optimizer=CONFIG), Regression()
    fit(Own(), [fits], tmp_path, datamodule=datamodule)
    (found,) = fits.model_errors()
    assert (found.optimal_error, found.last_error) == (None, None)
    assert 0 < found.optimal_loss == min(found.curve["losses"]) < float(datamodule.test_set.y.square().mean())


@pytest.mark.parametrize("first", [True, False])
def test_kernel_metrics_can_be_monitored(first: bool, tmp_path: Path) -> None:
    dynamics, diagnostics = EmpiricalNTKDynamics(every_n_batches=3), KernelDiagnostics(every_n_batches=3)
    monitors = [
        EarlyStopping("kernel/effective_rank", mode="max", patience=1, min_delta=1e9, check_on_train_epoch_end=True),
        ModelCheckpoint(tmp_path / "best", monitor="empirical_ntk/test_error", save_top_k=-1, every_n_epochs=1),
    ]
    measuring = [dynamics, diagnostics]
    callbacks = [*measuring, *monitors] if first else [*monitors, *measuring]
    options = {"max_epochs": 9, "enable_checkpointing": True}
    trainer = fit(FiniteNetwork(network(), CONFIG), callbacks, tmp_path, **options)
    assert trainer.current_epoch == 2  # the first value is the best so far, the second is not better by 1e9
    best = sorted(float(value) for value in monitors[1].best_k_models.values())  # type: ignore[attr-defined]
    errors = {row["step"]: row["optimal_error"] for row in dynamics.rows}
    assert best == pytest.approx(sorted([errors[3], errors[6]]))
