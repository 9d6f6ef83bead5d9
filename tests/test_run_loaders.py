"""Kernels find the loaders of any run, before and during training, and leave the run as it would be without them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ntk_lightning.callbacks.loaders import evaluation_loader, train_loader
from ntk_lightning.datamodules import TensorData
from ntk_lightning.datamodules.from_loaders import first_samples


def data(start: float, n: int = 8) -> TensorDataset:
    """Sample i has the inputs start + i, so that data sets can be told apart."""
    return TensorDataset(start + torch.arange(float(n))[:, None], torch.arange(n) % 2)


class Regression(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401
        x, y = batch[:2]
        self.seen += x.flatten().tolist()
        return ((self.net(x / 100)[:, 0] - y) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ANN401
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class WithData(Regression):
    """Keeps data and loaders in the module, set up for a stage as in Lightning's first tutorial."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.parts = random_split(data(0), [6, 2])
        if stage == "test":
            self.test_part = data(200)
            self.extra = nn.Linear(1, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.parts[0], batch_size=2, shuffle=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.test_part)


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.sets: dict[str, Any] = {}
        self.asked = 0

    def setup(self, stage: str) -> None:
        for split, start in {"fit": {"train": 0.0, "val": 100.0}, "test": {"test": 200.0}}[stage].items():
            self.sets[split] = data(start)

    def train_dataloader(self) -> DataLoader[Any]:
        self.asked += 1
        return DataLoader(self.sets["train"], batch_size=4, shuffle=True)

    def val_dataloader(self) -> dict[str, DataLoader[Any]]:
        return {"clean": DataLoader(self.sets["val"]), "noisy": DataLoader(data(150))}


class WithTest(Data):
    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.sets["test"])


class Look(Callback):
    """Reads the run's samples before and during the training."""

    def __init__(self, which: int | str | None = None) -> None:
        self.which, self.found, self.loaders = which, [], []

    def _look(self, trainer: Trainer) -> None:
        train = train_loader(trainer)
        split, test = evaluation_loader(trainer, self.which)
        self.loaders.append(train)
        self.found.append((first_samples(train, 2).x[:, 0].tolist(), split, first_samples(test, 1).x.item()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:  # noqa: ANN401
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)


def fit(*args: Any, look: Callback | None = None, model: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401
    torch.manual_seed(0)
    model = model() if model else Regression()
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(
        **options,
        callbacks=[look] if look else [],
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs.pop("trainer", {}),
    )
    trainer.fit(model, *args, **kwargs)
    return model


def loader(start: float, **kwargs: Any) -> DataLoader[Any]:  # noqa: ANN401
    return DataLoader(data(start), batch_size=4, **kwargs)


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize(
    ("which", "wanted"),
    [(None, ("val", 100.0)), (0, ("val", 100.0)), ("val", ("val", 100.0)), (1, ("val", 150.0)), ("1", ("val", 150.0))],
)
def test_plain_loaders(which: Any, wanted: tuple[str, float], sanity: int) -> None:  # noqa: ANN401
    look = Look(which)
    fit(loader(0, shuffle=True), [loader(100), loader(150)], look=look, trainer={"num_sanity_val_steps": sanity})
    assert len(look.found) == 7
    assert all(found == ([0.0, 1.0], *wanted) for found in look.found)


@pytest.mark.parametrize(
    ("made", "which", "wanted"),
    [
        (Data, None, ("val", 100.0)),
        (Data, "noisy", ("val", 150.0)),
        (WithTest, None, ("test", 200.0)),
        (WithTest, "test", ("test", 200.0)),
        (WithTest, "val", ("val", 100.0)),
        (WithTest, "clean", ("val", 100.0)),
        (WithTest, 1, ("val", 150.0)),
    ],
)
def test_data_modules(made: type[Data], which: Any, wanted: tuple[str, float]) -> None:  # noqa: ANN401
    look, module = Look(which), made()
    fit(datamodule=module, look=look)
    assert all(found == ([0.0, 1.0], *wanted) for found in look.found)
    assert module.asked == 1  # by Lightning
    assert sorted(module.sets) == ["train", "val"]  # the test set was made in a copy


def test_a_module_with_its_own_loaders() -> None:
    look = Look()
    model = fit(model=WithData, look=look)
    assert all(found[1:] == ("test", 200.0) for found in look.found)
    assert "extra" not in dict(model.named_children())
    assert not hasattr(model, "test_part")
    assert look.found[1][0] == first_samples(model.train_dataloader(), 2).x[:, 0].tolist()


def test_during_training_it_is_the_run_s_own_loader() -> None:
    look, given = Look(), loader(0, shuffle=True)
    fit(given, loader(100), look=look)
    assert all(found is given for found in look.loaders)


@pytest.mark.parametrize(
    ("n_val", "which", "wanted"),
    [(0, None, "test"), (3, None, "test"), (3, "test", "test"), (3, "val", "val"), (3, 1, "val")],
)
def test_the_package_s_own_data_modules(n_val: int, which: Any, wanted: str) -> None:  # noqa: ANN401
    class Named(Look):
        def _look(self, trainer: Trainer) -> None:
            split, found = evaluation_loader(trainer, which)
            own = {"test": module.test_set, "val": module.val_set}[split]
            assert own is not None
            assert torch.equal(first_samples(found, 2).x, own.x[:2])
            self.found.append(split)

    x, y = torch.randn(9, 1, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2 * 2.0 - 1
    module = TensorData((x, y), (x, y), n_train=5, n_test=4, n_val=n_val)
    look = Named()
    fit(datamodule=module, look=look, trainer={"limit_train_batches": 1})
    assert set(look.found) == {wanted}


ERRORS: dict[str, tuple[Any, Any, str]] = {
    "no evaluation": ((loader(0),), None, "this run has neither"),
    "several training loaders": (([loader(0), loader(50)], loader(100)), None, "one training loader, and this run has"),
    "no such number": ((loader(0), loader(100)), 1, "There is no loader 1"),
    "no such name": ((loader(0), {"a": loader(100)}), "b", "There is no loader 'b': choose one of 'a'"),
    "no test loader": ((loader(0), loader(100)), "test", "no test loader"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_run_without_the_loaders_is_refused_before_training(case: str) -> None:
    loaders, which, message = ERRORS[case]
    model = Regression()
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(*loaders, look=Look(which), model=lambda: model)
    assert not model.seen


def test_the_package_s_data_module_without_a_validation_set_has_none() -> None:
    x, y = torch.arange(6.0)[:, None], torch.arange(6) % 2 * 2.0 - 1
    with pytest.raises(ValueError, match="There is no loader 'val': choose one of 'test'"):
        fit(datamodule=TensorData((x, y), (x, y), n_train=5, n_test=4), look=Look("val"))


@pytest.mark.parametrize("case", ["plain, 2 workers", "plain, no sanity check", "data module", "module with data"])
def test_the_training_is_bit_identical_with_and_without(case: str) -> None:
    def run(look: Callback | None) -> tuple[list[float], list[list[float]]]:
        if case == "data module":
            model = fit(datamodule=WithTest(), look=look)
        elif case == "module with data":
            model = fit(model=WithData, look=look)
        else:
            workers = 2 if "2 workers" in case else 0
            options = {"num_sanity_val_steps": 2 if workers else 0}
            train = loader(0, shuffle=True, num_workers=workers)
            model = fit(train, loader(100), look=look, trainer=options)
        return model.seen, [weights.tolist() for weights in model.parameters()]

    assert run(None) == run(Look())
