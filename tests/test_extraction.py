"""K^t is extracted once a step, whatever callbacks measure it, and gives what each would have extracted alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tiny import OPTIMIZER, data, fit, net
from torch import Tensor, nn

from ntk_lightning.callbacks import AfterKernel, EmpiricalNTKDynamics, KernelDiagnostics, StopAtTrainError
from ntk_lightning.callbacks.extraction import shared_extraction
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical import trial
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import NTKLinear


@pytest.fixture
def grams(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Sizes of the sets of every empirical Gram that is computed: training samples, then the others'."""
    computed: list[tuple[int, ...]] = []
    for method in ("forward", "gram_and_cross"):
        original = getattr(EmpiricalNTK, method)

        def counted(kernel: EmpiricalNTK, *inputs: Tensor, original: Any = original, **options: Any) -> Any:  # noqa: ANN401
            computed.append(tuple(len(x) for x in inputs))
            return original(kernel, *inputs, **options)

        monkeypatch.setattr(EmpiricalNTK, method, counted)
    return computed


def three(memory: str = "4GB") -> dict[str, Any]:
    return {
        "dynamics": EmpiricalNTKDynamics(every_n_batches=3, fit_sizes=[20, 30], memory=memory),
        "diagnostics": KernelDiagnostics(every_n_batches=2, probe_size=40),
        "after": AfterKernel([40]),
    }


def results(callbacks: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = {}
    for name, callback in callbacks.items():
        rows = [vars(row) for row in callback.model_errors()] if name == "after" else callback.rows
        found[name] = [tuple(value for value in row.values() if isinstance(value, (int, float))) for row in rows]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Any, ...]]]:
    """What each callback measures in a run of its own, in small pieces."""
    callbacks = three("64MB")
    for callback in callbacks.values():
        root = tmp_path_factory.mktemp("alone")
        fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=[callback], default_root_dir=root)
    return results(callbacks)


ORDERS = [
    ("dynamics", "diagnostics", "after"),
    ("after", "dynamics", "diagnostics"),
    ("diagnostics", "after", "dynamics"),
]


@pytest.mark.parametrize("order", ORDERS)
def test_each_kernel_is_extracted_once_and_the_results_are_those_of_each_alone(
    order: tuple[str, ...], tmp_path: Path, grams: list[tuple[int, ...]], alone: dict[str, list[tuple[Any, ...]]]
) -> None:
    together = three()
    fit(
        FiniteNetwork(net(), OPTIMIZER), data(), callbacks=[together[name] for name in order], default_root_dir=tmp_path
    )
    all_of_it, probe, dynamics = (40, 30), (40,), (30, 30)  # training samples, test samples
    steps = {
        0: all_of_it,
        2: probe,
        3: dynamics,
        4: probe,
        6: all_of_it,
        8: probe,
        9: dynamics,
        10: probe,
        12: all_of_it,
    }
    assert grams == list(steps.values())
    for name, rows in alone.items():
        assert len(rows) == len(results(together)[name]) > 0
        for row, expected in zip(results(together)[name], rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_run_that_stops_early_extracts_its_last_kernel_once_too(tmp_path: Path, grams: list[tuple[int, ...]]) -> None:
    callbacks: list[Callback] = [EmpiricalNTKDynamics(every_n_batches=4), AfterKernel(), StopAtTrainError(0.4)]
    trainer = fit(FiniteNetwork(net(), OPTIMIZER), data(), 200, callbacks=callbacks, default_root_dir=tmp_path)
    assert trainer.current_epoch < 200
    assert grams == [(40, 30)] * (trainer.global_step // 4 + 1)


class Two(FiniteNetwork):
    """Trains one network, and has another."""

    def __init__(self) -> None:
        super().__init__(net(), OPTIMIZER)
        self.other = net(1)


def test_kernels_of_different_networks_are_extracted_apart(tmp_path: Path, grams: list[tuple[int, ...]]) -> None:
    callbacks = [
        KernelDiagnostics(every_n_batches=12, network=network, probe_size=20, name=network)
        for network in ("net", "other")
    ]
    fit(Two(), data(), callbacks=list(callbacks), default_root_dir=tmp_path)
    assert grams == [(20,)] * 4
    assert callbacks[0].rows != callbacks[1].rows
    assert callbacks[1].rows[-1]["distance_to_initial"] == pytest.approx(0, abs=1e-12)


class Holding(Callback):
    """Looks, when a batch begins, whether Grams are still held."""

    held = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self.held |= any(
            kept.extraction is not None
            for of_net in shared_extraction(trainer)._kept.values()
            for kept in of_net.values()
        )


def test_no_gram_outlives_its_step(tmp_path: Path) -> None:
    holding = Holding()
    callbacks = [*three().values(), holding]
    trainer = fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=callbacks, default_root_dir=tmp_path)
    holding.on_train_batch_start(trainer, trainer.lightning_module, None, 0)
    assert not holding.held


def test_a_sample_that_overflows_spoils_only_the_kernels_that_need_it(tmp_path: Path) -> None:
    datamodule = data()
    datamodule.setup()
    assert datamodule.test_set is not None
    datamodule.test_set.x[0] = 3e38
    diagnostics, dynamics = KernelDiagnostics(every_n_batches=6, probe_size=20), EmpiricalNTKDynamics(every_n_batches=6)
    module = FiniteNetwork(net(), OPTIMIZER)
    with pytest.warns(UserWarning, match="EmpiricalNTKDynamics leaves out"):
        fit(module, datamodule, precision="32-true", callbacks=[dynamics, diagnostics], default_root_dir=tmp_path)
    assert [row["step"] for row in diagnostics.rows] == [0, 6, 12]
    assert not dynamics.rows


class Squared(nn.Module):
    """A network that has to be tried, since it is no chain of known layers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = NTKLinear(192, 6), NTKLinear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x.flatten(1)).square())


def test_a_network_is_tried_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, ...]] = []
    original = trial._try

    def counted(plain: Any, samples: Any) -> Any:  # noqa: ANN401
        tried.append(plain.function.trainable)
        return original(plain, samples)

    monkeypatch.setattr(trial, "_try", counted)
    torch.manual_seed(0)
    module = FiniteNetwork(Squared(), replace(OPTIMIZER, lr=1e-4))
    dynamics = EmpiricalNTKDynamics(every_n_batches=2)
    fit(module, data(), callbacks=[dynamics], default_root_dir=tmp_path)
    assert len(dynamics.rows) > 3
    assert len(tried) == 1
    kernel = evaluation_ntk(module.net)
    trial.share_findings(kernel.net, kernel.trainable, module.net)
    x = torch.randn(4, 192, dtype=torch.float64)
    gradients = []
    for sample in x:
        module.net.zero_grad()
        module.net(sample[None]).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.net.parameters() if p.grad is not None]))
    expected = torch.stack(gradients) @ torch.stack(gradients).T
    torch.testing.assert_close(kernel(x), expected, rtol=1e-12, atol=1e-12)
    module.net.hidden.requires_grad_(False)  # another kernel: it is tried again, and is that of the readout
    frozen = evaluation_ntk(module.net)
    trial.share_findings(frozen.net, frozen.trainable, module.net)
    a = module.net.hidden(x).square().detach() * (2 / 6) ** 0.5
    torch.testing.assert_close(frozen(x), a @ a.T, rtol=1e-12, atol=1e-12)
    assert tried[-1] == ("out.weight",)
    assert len(tried) > 2


def test_the_evaluation_mode_of_a_kernel_is_that_of_no_other_module() -> None:
    network = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Linear(3, 1)).train()
    x = torch.randn(4, 3)
    torch.testing.assert_close(evaluation_ntk(network)(x), x @ x.T + 1)
    assert network[0].training
