"""The three models share one step, one data order and one optimizer, and mean what their formulas say."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from tiny import OPTIMIZER, QUIET, data, fit, net, test_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.modules.kernel_readout import FunctionalGradient
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import kernel_sgd


@pytest.mark.parametrize("seed", [0, 1])
def test_linearized_network_equals_readout_of_its_empirical_ntk(seed: int) -> None:
    optimizer = OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12, seed=seed)
    linearized, readout = LinearizedNetwork(net(), optimizer), KernelReadout(EmpiricalNTK(net()), optimizer)
    for module in (linearized, readout):
        datamodule = data()
        fit(module, datamodule)
    with torch.no_grad():
        outputs = [module(test_images(datamodule)) for module in (linearized, readout)]
    assert outputs[0].shape == (30, 1)
    assert outputs[0].abs().max() > 0.01
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-8)


def test_readout_under_trainer_equals_kernel_sgd() -> None:
    kernel = EmpiricalNTK(net().double())
    readout, datamodule = KernelReadout(kernel, OPTIMIZER), data()
    fit(readout, datamodule)
    assert datamodule.train_set is not None
    gram = kernel(datamodule.train_set.x.double())
    config = OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12, epochs=3)
    expected = kernel_sgd(gram, datamodule.train_set.y, config).coefficients
    torch.testing.assert_close(readout.coefficients[:, 0].detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1])
def test_linearized_network_under_trainer_equals_kernel_sgd(seed: int) -> None:
    optimizer = OptimizerConfig(lr=2.0, momentum=0.9, batch_size=12, seed=seed, epochs=3)
    linearized, datamodule, kernel = LinearizedNetwork(net(), optimizer), data(), EmpiricalNTK(net().double())
    fit(linearized, datamodule)
    assert datamodule.train_set is not None
    x = datamodule.train_set.x.double()
    solution = kernel_sgd(kernel(x), datamodule.train_set.y, optimizer)
    with torch.no_grad():
        outputs = linearized(test_images(datamodule))[:, 0]
    expected = solution.predict(kernel(test_images(datamodule), x))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-8)


def test_linearized_network_is_the_tangent_of_the_network() -> None:
    network = net().double()
    model = LinearizedNetwork(network, include_f0=True).double()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x), network(x))
    torch.manual_seed(1)
    for displacement in model.displacement:
        nn.init.normal_(displacement)
    moved = net().double()
    with torch.no_grad():
        for parameter, displacement in zip(moved.parameters(), model.displacement, strict=True):
            parameter += 1e-6 * displacement
        finite_difference = (moved(x) - network(x)) / 1e-6
        tangent = model(x) - network(x)
    torch.testing.assert_close(tangent, finite_difference, rtol=1e-3, atol=1e-3)


def test_finite_network_matches_a_plain_training_loop() -> None:
    module, datamodule = FiniteNetwork(net(), OPTIMIZER), data()
    fit(module, datamodule)
    plain = net().double()
    sgd = torch.optim.SGD(plain.parameters(), lr=2.0, momentum=0.9)
    assert datamodule.train_set is not None
    x, y = datamodule.train_set.x.double(), datamodule.train_set.y.double()
    for epoch in range(3):
        for batch in OPTIMIZER.batches(40, epoch):
            sgd.zero_grad()
            (plain(x[batch])[:, 0] - y[batch]).square().mean().backward()
            sgd.step()
    for actual, expected in zip(module.net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_metrics_weigh_samples_not_batches() -> None:
    module, datamodule = FiniteNetwork(net(), OptimizerConfig(lr=1e-12, batch_size=12)), data(eval_batch_size=7)
    trainer = fit(module, datamodule, epochs=1)
    assert datamodule.train_set is not None
    assert datamodule.test_set is not None
    for split, samples in (("train", datamodule.train_set), ("test", datamodule.test_set)):
        with torch.no_grad():
            outputs = module(samples.x.double())[:, 0]
        error = (outputs * samples.y <= 0).double().mean()
        loss = (outputs - samples.y).square().mean()
        assert trainer.callback_metrics[f"{split}/error"].item() == pytest.approx(error.item(), abs=1e-6)
        assert trainer.callback_metrics[f"{split}/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


MODULES = {
    "finite": lambda seed: FiniteNetwork(net(seed), OPTIMIZER),
    "linearized": lambda seed: LinearizedNetwork(net(seed), OPTIMIZER),
    "quadratic": lambda seed: LinearizedNetwork(net(seed), OPTIMIZER, order=2),
    "empirical readout": lambda seed: KernelReadout(EmpiricalNTK(net(seed)), OPTIMIZER),
    "infinite readout": lambda seed: InfiniteNTKReadout(net(seed), OPTIMIZER),
}


@pytest.mark.parametrize("name", MODULES)
def test_checkpoint_loads_back_to_the_same_predictions(name: str, tmp_path: Path) -> None:
    module, datamodule = MODULES[name](0), data()
    trainer = fit(module, datamodule, epochs=1, precision="32-true")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    other = MODULES[name](1)
    other.on_load_checkpoint(torch.load(tmp_path / "last.ckpt", weights_only=True))
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    x = test_images(datamodule).float()
    with torch.no_grad():
        assert module(x).abs().max() > 0
        torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


def test_load_from_checkpoint_takes_the_network_again(tmp_path: Path) -> None:
    module, datamodule = KernelReadout(EmpiricalNTK(net(0)), OPTIMIZER), data()
    trainer = fit(module, datamodule, epochs=1, precision="32-true")
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = KernelReadout.load_from_checkpoint(tmp_path / "last.ckpt", kernel=EmpiricalNTK(net(1)))
    x = test_images(datamodule).float()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0)


def test_several_outputs_train_on_one_hot_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 3
    module = FiniteNetwork(net(num_outputs=3), OPTIMIZER)
    outputs = module(x)
    loss = (outputs - nn.functional.one_hot(y, 3)).square().mean()
    loader = DataLoader(TensorDataset(x, y), batch_size=24)
    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(module, loader)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-5)


def test_functional_gradient_scatters_into_the_batch() -> None:
    rows, index = torch.randn(2, 5), torch.tensor([3, 1])
    coefficients = torch.randn(5, 1, requires_grad=True)
    outputs = FunctionalGradient.apply(coefficients, rows, index)
    torch.testing.assert_close(outputs, rows @ coefficients)
    outputs.backward(torch.tensor([[2.0], [-1.0]]))
    assert coefficients.grad is not None
    assert coefficients.grad[:, 0].tolist() == [0, -1, 0, 2, 0]


def test_plain_tuples_train_the_networks_and_are_explained_to_the_kernels() -> None:
    x, y = torch.randn(20, 4), torch.tensor([-1.0, 1.0]).repeat(10)
    loader = DataLoader(TensorDataset(x, y), batch_size=10)
    for module in (FiniteNetwork(MLP(4, 1, 4)), LinearizedNetwork(MLP(4, 1, 4))):
        trainer = Trainer(max_epochs=1, **QUIET)
        trainer.fit(module, loader, loader)
        assert "val/error" in trainer.callback_metrics
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(TypeError, match="TensorData takes your own tensors"):
        trainer.fit(KernelReadout(EmpiricalNTK(MLP(4, 1, 4))), loader)


def test_wrong_labels_are_refused_at_the_first_batch() -> None:
    x, y = torch.randn(20, 4), torch.tensor([0.0, 1.0]).repeat(10)
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match=r"must be -1 or \+1"):
        trainer.fit(FiniteNetwork(MLP(4, 1, 4)), DataLoader(TensorDataset(x, y), batch_size=10))


def test_a_wrong_label_of_a_later_batch_is_refused_too() -> None:
    y = torch.cat([torch.ones(10), torch.zeros(10)])
    trainer = Trainer(max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match=r"must be -1 or \+1"):
        trainer.fit(FiniteNetwork(MLP(4, 1, 4)), DataLoader(TensorDataset(torch.randn(20, 4), y), batch_size=10))


def test_validation_loaders_without_names_are_explained() -> None:
    loader = DataLoader(TensorDataset(torch.randn(8, 4), torch.ones(8)), batch_size=4)
    with pytest.raises(ValueError, match="give the data module evaluation_splits"):
        Trainer(max_epochs=1, **QUIET).fit(FiniteNetwork(MLP(4, 1, 4)), loader, [loader, loader])


def test_a_kernel_model_begins_anew_on_other_data_of_the_same_size() -> None:
    module, fresh = (KernelReadout(EmpiricalNTK(net()), OPTIMIZER) for _ in range(2))
    fit(module, data(30))
    fit(module, data(30, subset_seed=1))
    fit(fresh, data(30, subset_seed=1))
    torch.testing.assert_close(module.coefficients, fresh.coefficients, rtol=0, atol=0)


def test_a_kernel_model_is_tested_on_the_set_it_is_given() -> None:
    module = KernelReadout(EmpiricalNTK(net()), OPTIMIZER)
    trainer, other = fit(module, data(n_test=20)), data(subset_seed=3, n_test=10)
    (measured,) = trainer.test(module, datamodule=other, verbose=False)
    assert other.test_set is not None
    outputs = module(other.test_set.x.double())[:, 0]
    assert measured["test/loss"] == pytest.approx((outputs - other.test_set.y).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_kernel_in_float64_trains_in_any_precision(precision: str) -> None:
    module = KernelReadout(EmpiricalNTK(net(), dtype=torch.float64), OptimizerConfig(lr=0.5, batch_size=12))
    trainer = fit(module, data(), precision=precision)
    assert trainer.callback_metrics["train/loss"] < 1


def test_mixed_precision_leaves_kernel_models_their_own() -> None:
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = fit(KernelReadout(EmpiricalNTK(net()), OPTIMIZER), data(), precision=precision)
        losses.append([trainer.callback_metrics[f"{split}/loss"].item() for split in ("train", "test")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_training_set_is_not_sent_at_every_step_of_ddp() -> None:
    module = KernelReadout(EmpiricalNTK(net()))
    assert module._ddp_params_and_buffers_to_ignore == [name for name, _ in module.named_buffers(recurse=False)]


def test_an_infinite_readout_finds_its_stored_gram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    for store in (None, str(tmp_path), str(tmp_path)):
        module = InfiniteNTKReadout(net(), OPTIMIZER, store=store)
        fit(module, data())
        fits.append(module.coefficients.detach())
        if store:
            monkeypatch.setattr(InfiniteNTK, "__call__", None)
    torch.testing.assert_close(fits[0], fits[1], rtol=1e-6, atol=1e-8)
    assert torch.equal(fits[1], fits[2])


def test_a_linearized_network_warns_above_the_critical_learning_rate() -> None:
    datamodule = data()
    datamodule.setup()
    assert datamodule.train_set is not None
    critical = critical_learning_rate(EmpiricalNTK(net())(datamodule.train_set.x), momentum=0.9)
    for lr, warned in ((0.5 * critical, False), (1.5 * critical, True)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(LinearizedNetwork(net(), OptimizerConfig(lr=lr, momentum=0.9, batch_size=12)), data(), epochs=1)
        assert any("times the critical learning rate" in str(warning.message) for warning in caught) == warned


def test_kernel_models_refuse_transforms() -> None:
    module: NTKModule = KernelReadout(EmpiricalNTK(net()))
    with pytest.raises(ValueError, match="transformed images"):
        fit(module, data(transform=lambda x: x.flip(-1)))


def test_an_unfitted_kernel_model_says_so() -> None:
    with pytest.raises(RuntimeError, match="fit it or load a checkpoint"):
        KernelReadout(EmpiricalNTK(net()))(torch.zeros(1, 3, 8, 8))


def test_frozen_parameters_stay_at_w0() -> None:
    network = net()
    network[0].weight.requires_grad_(False)
    model = LinearizedNetwork(network)
    assert len(model.displacement) == len(list(network.parameters())) - 1
    with pytest.raises(ValueError, match="no trainable parameter"):
        LinearizedNetwork(network.requires_grad_(False))
