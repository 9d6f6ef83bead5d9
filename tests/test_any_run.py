"""Kernel callbacks in Lightning projects that know nothing of this package: plain loaders, any module and any loss.

Longer than 300 lines, since every part of a run that a user may have otherwise is tried on the same few samples.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger
from test_ddp import start_nodes
from tiny import QUIET
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ntk_lightning.callbacks import (
    AfterKernel,
    ComparisonTable,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.callbacks.find_network import network_name
from ntk_lightning.callbacks.nested_fits import NestedProblem
from ntk_lightning.datamodules import Samples
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.diagnostics import kernel_target_alignment
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import gradient_flow, kernel_sgd, ridge

CLASSES = 3


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three classes of vectors that overlap."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return torch.randn(n, 5, generator=generator) + 1.5 * F.one_hot(y, 5), y


X, Y = blobs(40, 0)
X_VAL, Y_VAL = blobs(30, 1)


def loader(x: Any, y: Tensor, **options: Any) -> DataLoader[Any]:  # noqa: ANN401
    return DataLoader(TensorDataset(x, y), **{"batch_size": 8, **options})


class Classifier(LightningModule):
    """A user's module, which knows nothing of kernels."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, outputs))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        self.seen += batch[0].flatten().tolist()
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        self.model(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Regression(Classifier):
    """One real output, of shape (n,)."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        return F.l1_loss(self.model(batch[0]).reshape(batch[1].shape), batch[1])


def fit(
    module: LightningModule,
    callbacks: list[Callback],
    folder: Path,
    *loaders: Any,  # noqa: ANN401
    datamodule: Any = None,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> Trainer:
    trainer = Trainer(**{"max_epochs": 2, **QUIET, **options}, callbacks=callbacks, default_root_dir=folder)
    trainer.fit(module, *loaders, datamodule=datamodule)
    return trainer


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{name}.csv").open()))


def best_flow(problem: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The least error and loss of gradient flow on a fine grid, by matrix exponentials in float64."""
    gram, targets = (part.double() for part in problem)
    values, vectors = torch.linalg.eigh(gram)
    coordinates, errors, losses = vectors.T @ targets, [], []
    for time in torch.logspace(-8, 8, 4000, dtype=torch.float64, base=10):
        learned = -torch.expm1(-2 * values * time / targets.numel())
        outputs = test[0].double() @ (vectors @ ((learned / values)[:, None] * coordinates))
        errors.append((outputs.argmax(1) != test[1].argmax(1)).double().mean().item())
        losses.append((outputs - test[1]).square().mean().item())
    return min(errors), min(losses)


# --- the first thing a user tries -------------------------------------------------------------------------------------


def test_one_callback_on_plain_loaders_ends_with_table_and_picture(tmp_path: Path) -> None:
    module, dynamics = Classifier(), EmpiricalNTKDynamics()
    fit(module, [dynamics], tmp_path, loader(X, Y, shuffle=True), loader(X_VAL, Y_VAL))
    rows = table(tmp_path, "kernel_dynamics")
    assert (tmp_path / "kernel_dynamics.png").stat().st_size > 10_000
    assert [int(row["step"]) for row in rows] == list(range(11))
    assert {row["fit"] for row in rows} == {"flow"}
    # the last row by hand
    module.eval()
    kernel = EmpiricalNTK(module.model)
    one_hot = F.one_hot(Y_VAL, CLASSES).double()
    test = kernel(X_VAL, X), one_hot
    least, least_loss = best_flow((kernel(X), F.one_hot(Y, CLASSES)), test)
    assert float(rows[-1]["optimal_error"]) == pytest.approx(least, abs=1 / 30 + 1e-9)
    times = torch.tensor(dynamics.rows[-1]["curve"]["steps"])
    by_solver = gradient_flow(kernel(X), F.one_hot(Y, CLASSES).double(), times.tolist(), test=test)
    assert float(rows[-1]["optimal_error"]) == by_solver.optimal_error
    assert min(dynamics.rows[-1]["curve"]["losses"]) == pytest.approx(least_loss, rel=1e-3)
    assert float(rows[-1]["optimal_step"]) == pytest.approx(by_solver.optimal_step)
    outputs = module.model(X_VAL)
    assert float(rows[-1]["network_error"]) == pytest.approx((outputs.argmax(1) != Y_VAL).double().mean().item())
    assert float(rows[-1]["network_loss"]) == pytest.approx((outputs - one_hot).square().mean().item(), rel=1e-5)


def test_all_callbacks_share_one_run_of_plain_loaders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, after = Classifier(), AfterKernel([20, 40], fit="ridge")
    callbacks = [EmpiricalNTKDynamics(), after, KernelDiagnostics(leading=2), ComparisonTable()]
    trainer = fit(module, callbacks, tmp_path, loader(X, Y), loader(X_VAL, Y_VAL))
    names = [row["name"] for row in table(tmp_path, "comparison")]
    assert names == [
        "empirical NTK at initialization, gradient flow",
        "after-kernel, ridge regression",
        "after-kernel, ridge regression",
    ]
    assert "after-kernel, ridge" in capsys.readouterr().out
    assert {"empirical_ntk/test_error", "after_kernel/test_error_40", "kernel/effective_rank"} <= set(
        trainer.callback_metrics
    )
    kernel = EmpiricalNTK(module.eval().model)
    test = kernel(X_VAL, X), F.one_hot(Y_VAL, CLASSES).double()
    curve = after.model_errors()[1].curve
    by_hand = [ridge(kernel(X), F.one_hot(Y, CLASSES).double(), each, test=test).test_loss for each in curve["steps"]]
    assert curve["losses"] == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("callback", [EmpiricalNTKDynamics, AfterKernel, KernelDiagnostics])
def test_pytorch_lightning_gets_the_same(callback: Any, tmp_path: Path) -> None:  # noqa: ANN401
    other = pytest.importorskip("pytorch_lightning")
    methods = {name: value for name, value in vars(Classifier).items() if callable(value) and name != "__init__"}
    found = {}
    for name, package in (("lightning", None), ("pytorch_lightning", other)):
        base = LightningModule if package is None else package.LightningModule

        def build(self: Any, base: Any = base) -> None:  # noqa: ANN401
            base.__init__(self)
            torch.manual_seed(0)
            self.model, self.seen = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES)), []

        module, watching = type("Module", (base,), {**methods, "__init__": build})(), callback()
        options = {"max_epochs": 1, **QUIET, "default_root_dir": tmp_path / name, "callbacks": [watching]}
        trainer = (Trainer if package is None else package.Trainer)(**options)
        trainer.fit(module, loader(X, Y), loader(X_VAL, Y_VAL))
        found[name] = watching.model_errors() if callback is AfterKernel else watching.rows
        assert list((tmp_path / name).glob("*.csv"))
    assert found["lightning"] == found["pytorch_lightning"]


# --- what is trained stays as it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_and_order_of_batches_are_bit_identical(accumulate: int, tmp_path: Path) -> None:
    def run(callbacks: list[Callback]) -> tuple[list[float], list[Any]]:
        seed_everything(3, verbose=False)
        module, train = Classifier(), loader(X, Y, shuffle=True, num_workers=2)
        torch.manual_seed(4)
        fit(module, callbacks, tmp_path, train, loader(X_VAL, Y_VAL), accumulate_grad_batches=accumulate)
        return module.seen, [weights.tolist() for weights in module.parameters()]

    callbacks = [EmpiricalNTKDynamics(every_n_batches=3), KernelDiagnostics(every_n_batches=2), AfterKernel()]
    assert run([]) == run(callbacks)  # type: ignore[arg-type]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_numbers_of_samples_are_said_once_and_can_be_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    x, y = blobs(300, 2)
    caplog.set_level("INFO")
    dynamics, after, few = EmpiricalNTKDynamics(at=[1]), AfterKernel(), AfterKernel(n_train=9, n_test=4, name="few")
    module = Classifier()
    callbacks = [dynamics, after, few]
    fit(module, callbacks, tmp_path, loader(x, y, shuffle=True), loader(X_VAL, Y_VAL), max_steps=2)
    said = [record.message for record in caplog.records if record.message.startswith("Kernels take")]
    assert said[0] == "Kernels take the first 256 of 300 training samples: n_train=... takes another number."
    assert len(said) == 3  # and the few
    assert (dynamics.rows[-1]["n"], after.model_errors()[0].n, few.model_errors()[0].n) == (256, 256, 9)
    kernel = EmpiricalNTK(module.eval().model)
    test = kernel(X_VAL[:4], x[:9]), F.one_hot(Y_VAL[:4], CLASSES).double()
    times = few.model_errors()[0].curve["steps"]
    by_hand = gradient_flow(kernel(x[:9]), F.one_hot(y[:9], CLASSES).double(), times, test=test)
    assert few.model_errors()[0].curve["losses"] == pytest.approx(by_hand.curves["test"].losses.tolist(), rel=1e-4)


def test_a_data_set_of_whole_batches_is_counted_in_samples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    batches = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]
    after = AfterKernel()
    fit(Classifier(), [after], tmp_path, DataLoader(batches, batch_size=None), loader(X_VAL, Y_VAL), max_epochs=1)  # type: ignore[arg-type]
    said = [record.message for record in caplog.records if record.message.startswith("Kernels take")]
    assert said == ["Kernels take the first 40 training samples: n_train=... takes another number."]
    assert after.model_errors()[0].n == 40


@pytest.mark.parametrize(("which", "chosen"), [(None, 0), (1, 1), ("noisy", 1), ("clean", 0)])
def test_one_of_several_validation_loaders(which: Any, chosen: int, tmp_path: Path) -> None:  # noqa: ANN401
    module, sets = Classifier(), [(X_VAL, Y_VAL), blobs(20, 5)]
    after = AfterKernel(test_loader=which)
    loaders = {name: loader(*pair) for name, pair in zip(("clean", "noisy"), sets, strict=True)}
    fit(module, [after], tmp_path, loader(X, Y), loaders)
    kernel, (x, y) = EmpiricalNTK(module.eval().model), sets[chosen]
    curve = after.model_errors()[0].curve
    test = kernel(x, X), F.one_hot(y, CLASSES).double()
    by_hand = gradient_flow(kernel(X), F.one_hot(Y, CLASSES).double(), curve["steps"], test=test)
    assert curve["losses"] == pytest.approx(by_hand.curves["test"].losses.tolist(), rel=1e-4)


class AnyData(LightningDataModule):
    """A data module of somebody's own, with a test set."""

    def setup(self, stage: str) -> None:
        self.sets = {"train": (X, Y), "val": blobs(9, 8), "test": (X_VAL, Y_VAL)}

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(*self.sets["train"], shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(*self.sets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(*self.sets["test"])


def test_any_data_module_is_measured_on_its_test_loader(tmp_path: Path) -> None:
    module, dynamics = Classifier(), EmpiricalNTKDynamics(at=[1])
    fit(module, [dynamics], tmp_path, datamodule=AnyData())
    outputs = module.eval().model(X_VAL)
    assert dynamics.rows[-1]["network_error"] == pytest.approx((outputs.argmax(1) != Y_VAL).double().mean().item())


def test_samples_are_a_function_of_the_batch(tmp_path: Path) -> None:
    class Nested(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
            return super().training_step((batch[0]["pixels"], batch[0]["class"]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
            pass

    def nested(x: Tensor, y: Tensor) -> DataLoader[Any]:
        return DataLoader([({"pixels": a, "class": b},) for a, b in zip(x, y, strict=True)], batch_size=8)  # type: ignore[arg-type]

    dynamics = EmpiricalNTKDynamics(at=[1], samples=lambda batch: (batch[0]["pixels"], batch[0]["class"]))
    fit(Nested(), [dynamics], tmp_path, nested(X, Y), nested(X_VAL, Y_VAL))
    assert dynamics.rows[-1]["n"] == 40


# --- inputs and networks ----------------------------------------------------------------------------------------------


class Sentences(nn.Module):
    """Classifies token ids with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(11, 6), nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> SimpleNamespace:
        assert not tokens.is_floating_point()
        embedded = (self.embed(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.read(embedded.tanh()))


class Mapped(Classifier):
    """Trains on mappings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        return F.cross_entropy(self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        pass


def sentences(n: int, seed: int, tokens: str, mask: str) -> tuple[DataLoader[Any], dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 11, (n, 4), generator=generator)
    keep = (torch.arange(4) < torch.randint(2, 5, (n, 1), generator=generator)).long()
    y = (x[:, 0] + x[:, 1]) % CLASSES
    rows = [{tokens: a, mask: b, "labels": c} for a, b, c in zip(x, keep, y, strict=True)]
    return DataLoader(rows, batch_size=8), {tokens: x, mask: keep}, y  # type: ignore[arg-type]


def check_mapping(model: nn.Module, tokens: str, mask: str, tolerance: float, folder: Path) -> None:
    (train, x, y), (val, x_val, y_val) = (sentences(n, n, tokens, mask) for n in (24, 16))
    module = Mapped(model)
    dynamics = EmpiricalNTKDynamics(at=[2], output=lambda out: out.logits)
    diagnostics = KernelDiagnostics(at=[2], output=dynamics.measured.output, per_layer=True)
    fit(module, [dynamics, diagnostics], folder, train, val, max_epochs=1)
    assert (folder / "kernel_dynamics.png").exists()
    module.eval()
    kernel = EmpiricalNTK(module.model, output=lambda out: out.logits)
    test, curve = (kernel(x_val, x), F.one_hot(y_val, CLASSES).double()), dynamics.rows[-1]["curve"]
    by_hand = gradient_flow(kernel(x), F.one_hot(y, CLASSES).double(), curve["steps"], test=test)
    losses = by_hand.curves["test"].losses
    assert curve["losses"][:100] == pytest.approx(losses[:100].tolist(), rel=tolerance)  # later times amplify rounding
    error = (module.model(**x_val).logits.argmax(1) != y_val).double().mean().item()
    assert dynamics.rows[-1]["network_error"] == pytest.approx(error)
    assert sum(row["trace_share"] for row in diagnostics.layers if row["step"] == 0) == pytest.approx(1)


def test_a_mapping_batch_of_token_ids(tmp_path: Path) -> None:
    torch.manual_seed(1)
    check_mapping(Sentences(), "tokens", "mask", 1e-4, tmp_path)


@pytest.mark.ci
def test_a_classifier_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=11, max_position_embeddings=8, num_labels=CLASSES, **sizes)
    model = transformers.BertForSequenceClassification(config)
    check_mapping(model, "input_ids", "attention_mask", 1e-3, tmp_path)


class NoForward(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)


class Layers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x


class WithNet(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)


class OwnScale(Classifier):
    """A parameter beside the only child: the module itself is the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_network_is_found() -> None:
    assert [network_name(module()) for module in (Classifier, Layers, WithNet, OwnScale)] == ["model", "", "net", ""]
    assert network_name(NoForward(), "model.0") == "model.0"
    with_teacher = NoForward()
    with_teacher.head.requires_grad_(False)
    assert network_name(with_teacher) == "model"
    with pytest.raises(AttributeError, match=r"not known: the submodules \['model', 'head'\] are trained.*network="):
        network_name(NoForward())
    holder = LightningModule()
    holder.model = nn.Module()
    holder.model.backbone = nn.Linear(2, 2)
    assert network_name(holder) == "model.backbone"
    holder.model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(AttributeError, match=r"'model' has no forward, and the parts \['body', 'head'\].*network="):
        network_name(holder)
    with pytest.raises(AttributeError, match="nothing in it is trained"):
        network_name(LightningModule())


def test_a_network_built_in_configure_model_and_in_float64(tmp_path: Path) -> None:
    class Late(Classifier):
        def __init__(self) -> None:
            LightningModule.__init__(self)
            self.seen: list[float] = []

        def configure_model(self) -> None:
            if not hasattr(self, "model"):
                self.model = nn.Sequential(nn.Linear(5, 3))

    module, dynamics = Late(), EmpiricalNTKDynamics(at=[1])
    fit(module, [dynamics], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), precision="64-true")
    kernel, x, x_val = EmpiricalNTK(module.model), X.double(), X_VAL.double()
    curve = dynamics.rows[-1]["curve"]
    test = kernel(x_val, x), F.one_hot(Y_VAL, CLASSES).double()
    by_hand = gradient_flow(kernel(x), F.one_hot(Y, CLASSES).double(), curve["steps"], test=test)
    assert curve["losses"][:100] == pytest.approx(by_hand.curves["test"].losses[:100].tolist(), rel=1e-8)


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["fractions", "whole numbers", "a column", "two columns"])
def test_real_targets_have_losses(targets: str, tmp_path: Path) -> None:
    def make(x: Tensor) -> Tensor:
        y = x[:, 0].sin() + x[:, 1]
        made = {"whole numbers": y.round(), "a column": y[:, None], "two columns": x[:, :2].sin()}
        return made.get(targets, y)

    y, y_val = make(X), make(X_VAL)
    module = Regression(2 if targets == "two columns" else 1)
    dynamics, after = EmpiricalNTKDynamics(at=[1]), AfterKernel()
    diagnostics = KernelDiagnostics(at=[1])
    module.validation_step = lambda batch, batch_idx: module.log("err", 0.5)  # type: ignore[method-assign]
    callbacks = [dynamics, after, diagnostics, OptimalEarlyStopping("err"), ComparisonTable()]
    trainer = fit(module, callbacks, tmp_path, loader(X, y), loader(X_VAL, y_val))
    assert (tmp_path / "kernel_dynamics.png").exists()
    row = table(tmp_path, "kernel_dynamics")[-1]
    assert "optimal_error" not in row
    assert row["network_error"] == ""
    module.eval()
    kernel = EmpiricalNTK(module.model)
    columns = y.reshape(40, -1), y_val.reshape(30, -1)
    gram, cross = kernel(X).double(), kernel(X_VAL, X).double()
    values, vectors = torch.linalg.eigh(gram)
    losses = []
    for time in dynamics.rows[-1]["curve"]["steps"][:100]:
        learned = -torch.expm1(-2 * values * time / columns[0].numel()) / values
        outputs = cross @ vectors @ (learned[:, None] * (vectors.T @ columns[0].double()))
        losses.append((outputs - columns[1]).square().mean().item())
    assert dynamics.rows[-1]["curve"]["losses"][:100] == pytest.approx(losses, rel=1e-4)
    assert float(row["optimal_loss"]) == min(dynamics.rows[-1]["curve"]["losses"])
    network_loss = (module.model(X_VAL) - columns[1]).square().mean().item()
    assert float(row["network_loss"]) == pytest.approx(network_loss, rel=1e-5)
    assert float(trainer.callback_metrics["empirical_ntk/network_test_loss"]) == pytest.approx(network_loss, rel=1e-5)
    assert after.model_errors()[0].optimal_error is None
    kernel_row, _, network_row = table(tmp_path, "comparison")  # of different columns
    assert (float(kernel_row["optimal_loss"]) > 0, kernel_row["optimal_error"]) == (True, "")
    assert (network_row["optimal_loss"], network_row["optimal_error"]) == ("", "0.5")


@pytest.mark.parametrize("labels", ["zero and one", "signs", "one-hot", "class numbers"])
def test_every_spelling_of_two_classes_has_one_result(labels: str, tmp_path: Path) -> None:
    spell: dict[str, Callable[[Tensor], Tensor]] = {
        "zero and one": lambda y: y.float(),
        "signs": lambda y: 2.0 * y - 1,
        "one-hot": lambda y: F.one_hot(y, 2).float(),
        "class numbers": lambda y: y,
    }
    y, y_val = (Y == 0).long(), (Y_VAL == 0).long()
    several = labels in ("one-hot", "class numbers")
    module = Regression(2 if several else 1)
    module.training_step = lambda batch, batch_idx: module.model(batch[0]).square().mean()  # type: ignore[method-assign]
    dynamics = EmpiricalNTKDynamics(at=[1])
    fit(module, [dynamics], tmp_path, loader(X, spell[labels](y)), loader(X_VAL, spell[labels](y_val)))
    outputs = module.eval().model(X_VAL)
    found = outputs.argmax(1) if several else (outputs[:, 0] > 0).long()
    assert dynamics.rows[-1]["network_error"] == pytest.approx((found != y_val).double().mean().item())
    kernel, targets = EmpiricalNTK(module.model), F.one_hot(y, 2).double() if several else 2.0 * y - 1
    test = kernel(X_VAL, X), F.one_hot(y_val, 2).double() if several else 2.0 * y_val - 1
    by_hand = gradient_flow(kernel(X), targets, dynamics.rows[-1]["curve"]["steps"], test=test)
    assert dynamics.rows[-1]["optimal_error"] == by_hand.optimal_error


def test_probabilities_are_warned_about(tmp_path: Path) -> None:
    module = Regression()
    module.model.append(nn.Sigmoid())
    y, y_val = (Y == 0).float(), (Y_VAL == 0).float()
    with pytest.warns(UserWarning, match="All outputs lie between 0 and 1"):
        fit(module, [AfterKernel()], tmp_path, loader(X, y), loader(X_VAL, y_val))
    after = AfterKernel(output=lambda out: out - 0.5)
    fit(module, [after], tmp_path, loader(X, y), loader(X_VAL, y_val))
    assert after.model_errors()[0].optimal_error is not None


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_kernel_sgd_on_request(tmp_path: Path) -> None:
    module, config = Classifier(), OptimizerConfig(lr=0.02, batch_size=8, epochs=5)
    dynamics = EmpiricalNTKDynamics(at=[1], optimizer=config)
    fit(module, [dynamics], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL))
    kernel = EmpiricalNTK(module.eval().model)
    test = kernel(X_VAL, X), F.one_hot(Y_VAL, CLASSES).double()
    by_hand = kernel_sgd(kernel(X), F.one_hot(Y, CLASSES).double(), config, test=test)
    assert (dynamics.rows[-1]["fit"], dynamics.rows[-1]["optimal_error"]) == ("sgd", by_hand.optimal_error)
    for fit_asked, message in (("sgd", 'has no optimizer_config.*fit="flow"'), ("other", "fit must be None or one of")):
        with pytest.raises((TypeError, ValueError), match=message):
            fit(module, [AfterKernel(fit=fit_asked)], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL))  # type: ignore[arg-type]


def test_other_steps_than_the_config_s_are_refused_with_advice(tmp_path: Path) -> None:
    module = Classifier()
    module.optimizer_config = OptimizerConfig(lr=0.1)
    loaders = loader(X, Y), loader(X_VAL, Y_VAL)
    with pytest.raises(ValueError, match=r'the optimizer is Adam.*or fit="flow"'):
        fit(module, [AfterKernel()], tmp_path, *loaders)
    after = AfterKernel(fit="flow")
    fit(module, [after], tmp_path, *loaders)
    assert after.model_errors()[0].name == "after-kernel, gradient flow"


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_times_of_gradient_flow_contain_the_best(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 200, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, 200)
    gram = scale * features @ features.T
    y = F.one_hot(torch.randint(3, (60,), generator=generator), 3).double()
    train, test = slice(0, 40), slice(40, 60)
    problem = NestedProblem(gram[train, train], y[train], {"test": (gram[test, train], y[test])})
    _, least = best_flow((gram[train, train] / scale, y[train]), (gram[test, train] / scale, y[test]))
    assert problem.flow(40).optimal_loss == pytest.approx(least, rel=1e-3)
    single = NestedProblem(gram[train, train].float(), y[train], {"test": (gram[test, train].float(), y[test])})
    assert single.flow(40).optimal_loss == pytest.approx(least, rel=1e-3)
    # ridge regression with the best regularization, at the same scale
    assert problem.ridge(40).optimal_loss == pytest.approx(least, rel=0.1)


def test_the_infinite_kernel_and_early_stopping_take_plain_loaders_too(tmp_path: Path) -> None:
    class Logs(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
            self.log("val_err", (self.model(batch[0]).argmax(1) != batch[1]).float().mean())

    module = Logs()
    module.model = MLP(8, 1, 5, num_outputs=CLASSES)
    infinite, curve = InfiniteNTKFit(backend="reference"), OptimalEarlyStopping("val_err")
    callbacks = [infinite, curve, EmpiricalNTKDynamics(at=[1]), EarlyStopping("empirical_ntk/test_error")]
    fit(module, callbacks, tmp_path, loader(X, Y), loader(X_VAL, Y_VAL))
    assert [(each.name, each.n) for each in infinite.model_errors()] == [("infinite NTK, gradient flow", 40)]
    assert curve.model_errors()[0].n == 40
    with pytest.raises(TypeError, match=r"StopAtTrainError (works with|evaluates the whole)"):
        fit(module, [StopAtTrainError()], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL))


# --- layers and loggers -----------------------------------------------------------------------------------------------


def test_layers_are_measured_and_drawn(tmp_path: Path) -> None:
    module, diagnostics = Classifier(), KernelDiagnostics(at=[3], per_layer=True)
    trainer = fit(module, [diagnostics], tmp_path, loader(X, Y))  # no evaluation set is needed
    rows = table(tmp_path, "kernel_layers")
    assert (tmp_path / "kernel_layers.png").exists()
    assert [(row["step"], row["layer"]) for row in rows] == [
        (t, layer) for t in ("0", "3", "10") for layer in ("0", "3")
    ]
    weights = dict(module.eval().model.named_parameters())
    for layer, row in zip(("0", "3"), rows[-2:], strict=True):
        kernels = {}
        for name in ("0", "3"):  # the definition, output by output and sample by sample
            jacobian = []
            for x in X:
                of = [weights[f"{name}.weight"], weights[f"{name}.bias"]]
                gradients = [torch.autograd.grad(out, of, retain_graph=True) for out in module.model(x[None])[0]]
                jacobian.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients]))
            j = torch.stack(jacobian)
            kernels[name] = torch.einsum("icp,jcp->ij", j, j) / CLASSES
        share = kernels[layer].trace() / (kernels["0"].trace() + kernels["3"].trace())
        assert float(row["trace_share"]) == pytest.approx(float(share), rel=1e-5)
        alignment = kernel_target_alignment(kernels[layer], F.one_hot(Y, CLASSES).float())
        assert float(row["target_alignment"]) == pytest.approx(alignment, rel=1e-5)
        metric = trainer.callback_metrics[f"kernel_layers/{layer}/trace_share"]
        assert float(metric) == pytest.approx(float(share), rel=1e-5)


class Recording(Logger):
    """A logger whose tracker has the methods of one of the trackers."""

    name, version = "recording", 0

    def __init__(self, kind: str, folder: Path) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.save_folder = str(folder)
        methods = {"tensorboard": ("add_text", "add_figure"), "mlflow": ("log_artifact",), "wandb": (), "csv": ()}[kind]
        self.experiment_ = SimpleNamespace(**{name: self._recorder(name) for name in methods})
        if kind == "mlflow":
            self.run_id = "run"
        if kind == "wandb":
            self.log_table, self.log_image = self._recorder("log_table"), self._recorder("log_image")

    @property
    def save_dir(self) -> str:
        return self.save_folder

    @property
    def experiment(self) -> Any:  # noqa: ANN401
        return self.experiment_

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        pass

    def _recorder(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, *args))


@pytest.mark.parametrize(
    ("kind", "methods"),
    [
        ("tensorboard", ["add_text", "add_figure"]),
        ("mlflow", ["log_artifact", "log_artifact"]),
        ("wandb", ["log_table", "log_image"]),
        ("csv", []),
    ],
)
def test_tables_and_pictures_reach_loggers_by_what_each_offers(kind: str, methods: list[str], tmp_path: Path) -> None:
    logger = Recording(kind, tmp_path)
    fit(Classifier(), [EmpiricalNTKDynamics(at=[1])], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), logger=logger)
    folder = tmp_path / "recording" / "version_0"
    assert (folder / "kernel_dynamics.csv").exists()
    assert (folder / "kernel_dynamics.png").exists()
    assert [call[0] for call in logger.calls] == methods
    if kind == "tensorboard":
        assert logger.calls[0][2].splitlines()[0].startswith("| step | n |")
        assert len(logger.calls[0][2].splitlines()) == 2 + 3
    if kind == "mlflow":
        assert [Path(call[2]).name for call in logger.calls] == ["kernel_dynamics.csv", "kernel_dynamics.png"]


def test_the_csv_logger_has_the_metrics_beside_table_and_picture(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "runs", "a")
    fit(Classifier(), [EmpiricalNTKDynamics(at=[1])], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), logger=logger)
    assert {"metrics.csv", "kernel_dynamics.csv", "kernel_dynamics.png"} <= {
        f.name for f in (tmp_path / "runs/a").iterdir()
    }
    assert float(table(tmp_path / "runs/a", "metrics")[0]["empirical_ntk/test_error"]) >= 0


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    fit(Classifier(), [EmpiricalNTKDynamics(at=[1])], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), logger=logger)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "kernel_dynamics_figure" in events["images"]


# --- what is wrong is said before the training ------------------------------------------------------------------------


class Ends(IterableDataset[Any]):
    """A stream of ten samples."""

    def __iter__(self) -> Any:  # noqa: ANN401
        yield from zip(X[:10], Y[:10], strict=True)


def test_a_schedule_on_a_stream_needs_the_number_of_its_batches(tmp_path: Path) -> None:
    stream, val, dynamics = DataLoader(Ends(), batch_size=5), loader(X_VAL, Y_VAL), EmpiricalNTKDynamics()
    with pytest.raises(ValueError, match=r"iterable data set.*max_steps or limit_train_batches"):
        fit(Classifier(), [dynamics], tmp_path, stream, val, max_epochs=1)
    fit(Classifier(), [dynamics], tmp_path, stream, val, max_epochs=1, limit_train_batches=2)
    assert [row["step"] for row in dynamics.rows] == [0, 1, 2]


def unequal(batch: Any) -> Any:  # noqa: ANN401
    x, y = torch.utils.data.default_collate(batch)
    return x, y[:-1]


class Shards:
    """Stands for a strategy that keeps a part of the weights on each process."""


BAD: dict[str, tuple[Any, Any, str]] = {
    "labels missing": (DataLoader(list(X), batch_size=8), {}, "neither .x, y, .... nor a mapping"),  # type: ignore[arg-type]
    "no key of labels": (DataLoader([{"x": x} for x in X]), {}, "has no targets"),  # type: ignore[arg-type]
    "sizes differ": (DataLoader(TensorDataset(X, Y), collate_fn=unequal), {}, "inputs and .* targets"),
    "empty": (DataLoader([]), {}, "has no samples"),  # type: ignore[var-annotated]
    "a stream that ends": (DataLoader(Ends(), batch_size=4), {"n_train": 11}, "has 10 samples, fewer than the 11"),
    "class of no output": (loader(X, Y + 1), {}, "class numbers 0 to 2"),
    "nan": (loader(X, torch.full((40, 3), float("nan"))), {}, "NaN or infinite"),
    "inputs of another width": (loader(X[:, :4], Y), {}, "shapes cannot be multiplied"),
    "several training loaders": ([loader(X, Y), loader(X, Y)], {}, "one training loader"),
    "no such loader": (loader(X, Y), {"test_loader": "noisy"}, "There is no loader 'noisy'"),
    "no tensor": (loader(X, Y), {"output": lambda out: {"logits": out}}, "must map what the network returns"),
    "network of other outputs": (loader(X, Y), {"output": 0}, "Whole-number targets of a network with one output"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_one_clear_error_before_the_sanity_check(case: str, tmp_path: Path) -> None:
    train, options, message = BAD[case]

    class Sane(Classifier):
        checked = False

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
            self.checked = True

    module = Sane()
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        fit(module, [EmpiricalNTKDynamics(**options)], tmp_path, train, loader(X_VAL, Y_VAL))
    assert not module.seen
    assert not module.checked
    if case == "inputs of another width":
        assert any("network 'model' of Sane" in note for note in raised.value.__notes__)


def test_no_evaluation_loader_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("fit(model, train_loader, val_loader)")):
        fit(Classifier(), [AfterKernel()], tmp_path, loader(X, Y))


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy"])
def test_sharded_weights_are_refused_in_a_sentence(name: str, tmp_path: Path) -> None:
    from lightning.pytorch.strategies import SingleDeviceStrategy

    strategy = type(name, (SingleDeviceStrategy,), {})(device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"{name} keeps a part of the weights"):
        fit(Classifier(), [AfterKernel()], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), strategy=strategy)


# --- several processes ------------------------------------------------------------------------------------------------


def test_the_first_samples_are_those_of_a_data_set_kept_as_a_whole(tmp_path: Path) -> None:
    class Kept(AnyData):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.train_set, self.test_set = Samples(X, Y), Samples(X_VAL, Y_VAL)

    found = []
    for module in (Kept(), AnyData()):
        dynamics = EmpiricalNTKDynamics(at=[1], n_train=12, n_test=9)
        fit(Classifier(), [dynamics], tmp_path, datamodule=module)
        found.append(dynamics.rows)
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="The train set has 40 samples, fewer than n_train=41"):
        fit(Classifier(), [EmpiricalNTKDynamics(n_train=41)], tmp_path, datamodule=Kept())


def test_two_processes_change_nothing(tmp_path: Path) -> None:
    import ddp_any_run

    expected = ddp_any_run.run(tmp_path / "one")
    assert start_nodes(2, Path(ddp_any_run.__file__), tmp_path / "two") == [0, 0]
    found = torch.load(tmp_path / "two" / "found.pt", weights_only=True)
    assert found["told"] == ["Processes differ in their train inputs", "Processes differ in their train inputs"]
    assert len(found["rows"]) == len(expected["rows"]) > 2
    for name in ("rows", "layers"):
        for row, wanted in zip(found[name], expected[name], strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_plugins(precision: str, tmp_path: Path) -> None:
    module, dynamics = Classifier(), EmpiricalNTKDynamics(at=[1])
    fit(module, [dynamics], tmp_path, loader(X, Y), loader(X_VAL, Y_VAL), precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    kernel = EmpiricalNTK(module.eval().model)
    train, val = X.to(dtype), X_VAL.to(dtype)
    test = kernel(val, train), F.one_hot(Y_VAL, CLASSES).double()
    curve = dynamics.rows[-1]["curve"]
    by_hand = gradient_flow(kernel(train), F.one_hot(Y, CLASSES).double(), curve["steps"], test=test)
    assert curve["losses"][:100] == pytest.approx(by_hand.curves["test"].losses[:100].tolist(), rel=1e-4)
    error = (module.model(val).argmax(1) != Y_VAL).double().mean().item()
    assert dynamics.rows[-1]["network_error"] == pytest.approx(error)
