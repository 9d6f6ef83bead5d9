"""Subsets are nested and disjoint, normalized and reproducible; bad sizes and data are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning import Trainer
from PIL import Image

from ntk_lightning.datamodules import CIFAR10Binary, FashionMNISTBinary, Samples, SyntheticTeacher, TensorData
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig


def tensors(n: int = 60, **kwargs: Any) -> TensorData:  # noqa: ANN401 - passed on
    """Image i has the constant i plus a checkerboard, so that images can be told apart."""
    x = torch.arange(n).float()[:, None, None, None] + torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    y = torch.where(torch.arange(n) % 2 == 0, -1.0, 1.0)
    data = TensorData((x, y), (x + 1000, y), **{"n_test": 20, **kwargs})
    data.setup()
    return data


def rows(samples: Samples | None) -> set[float]:
    assert samples is not None
    return {round(value, 4) for value in samples.x[:, 0, 0, 0].tolist()}


def cifar_folder(folder: Path, n: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        pictures = []
        for _ in range(n):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": pictures, "label": [5, 7, 3] * (n // 3)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_embedded_images_are_padded_normalized_and_balanced() -> None:
    data = FashionMNISTBinary(n_train=1000, n_test=500)
    data.setup()
    assert data.train_set is not None
    assert data.test_set is not None
    assert data.train_set.x.shape == (1000, 1, 32, 32)
    assert data.train_set.x.dtype == torch.float32
    assert data.test_set.y.shape == (500,)
    assert set(data.train_set.y.tolist()) == {-1.0, 1.0}
    assert abs(data.train_set.y.mean().item()) < 0.1
    assert abs(data.train_set.x.mean().item()) < 1e-4
    assert abs(data.train_set.x.std().item() - 1) < 1e-3
    border = data.train_set.x[:, :, :2]
    assert (border == border[0, 0, 0, 0]).all()


def test_smaller_training_subsets_are_nested_and_the_test_set_stays() -> None:
    small, large = tensors(n_train=10), tensors(n_train=40)
    assert small.train_set is not None
    assert large.train_set is not None
    torch.testing.assert_close(small.train_set.y, large.train_set.y[:10])
    other = tensors(n_train=10, subset_seed=1)
    assert other.train_set is not None
    assert not torch.equal(other.train_set.y, small.train_set.y)
    assert other.test_set is not None
    assert small.test_set is not None
    torch.testing.assert_close(other.test_set.y, small.test_set.y)


def test_train_fresh_and_validation_subsets_are_disjoint() -> None:
    data = tensors(n_train=30, fresh=20, n_val=10)
    parts = [rows(data.train_set), rows(data.fresh_set), rows(data.val_set)]
    assert [len(part) for part in parts] == [30, 20, 10]
    assert len(set.union(*parts)) == 60
    assert data.evaluation_splits == ("test", "val")
    assert tensors(n_train=20, fresh=True).n_fresh == 20


def test_channels_are_normalized_by_the_training_subset() -> None:
    data = tensors(n_train=30)
    assert data.train_set is not None
    assert abs(data.train_set.x.double().mean().item()) < 1e-6
    assert abs(data.train_set.x.double().std(correction=0).item() - 1) < 1e-6
    assert data.test_set is not None
    assert data.test_set.x.mean().item() > 10


def test_cifar_reads_two_classes_from_local_parquet(tmp_path: Path) -> None:
    data = CIFAR10Binary(path=str(cifar_folder(tmp_path)), n_train=8, n_test=8)
    data.prepare_data()
    data.setup()
    assert data.train_set is not None
    assert data.train_set.x.shape == (8, 3, 32, 32)
    assert sorted(data.train_set.y.tolist()) == [-1.0] * 4 + [1.0] * 4


def test_cifar_without_files_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the folder that holds CIFAR-10"):
        CIFAR10Binary(path=str(tmp_path))


@pytest.mark.parametrize("distribution", ["gaussian", "sphere"])
def test_teacher_labels_are_balanced_and_reproducible(distribution: Any) -> None:  # noqa: ANN401 - a Literal
    kwargs = {"shape": (1, 8, 8), "pool_size": 256, "n_train": 200, "n_test": 100, "teacher": None}
    first, second = (SyntheticTeacher(distribution, **kwargs) for _ in range(2))
    for data in (first, second):
        data.setup()
    assert first.train_set is not None
    assert second.train_set is not None
    torch.testing.assert_close(first.train_set.x, second.train_set.x, rtol=0, atol=0)
    assert abs(first.train_set.y.mean().item()) < 0.15
    raw = first.load(train=True).x.flatten(1)
    if distribution == "sphere":
        torch.testing.assert_close(raw.norm(dim=1), torch.full((256,), 8.0))


def test_building_a_teacher_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    SyntheticTeacher(shape=(1, 8, 8), pool_size=16)
    assert torch.rand(1) == expected


def test_batches_cover_an_epoch_once_and_follow_the_optimizer_config() -> None:
    data = tensors(n_train=30)
    data.batch_size = 8
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(30))
    expected = OptimizerConfig(batch_size=8).batches(30, epoch=0)
    assert all(torch.equal(batch.indices, index) for batch, index in zip(batches, expected, strict=True))
    assert data.train_set is not None
    assert torch.equal(batches[0].x, data.train_set.x[batches[0].indices])


def test_processes_share_a_batch_without_overlap() -> None:
    from ntk_lightning.datamodules import BatchLoader

    data = tensors(n_train=30)
    assert data.train_set is not None
    whole = torch.split(torch.arange(30), 7)
    shares = [list(BatchLoader(data.train_set, whole, rank=rank, world_size=3)) for rank in range(3)]
    for parts, index in zip(zip(*shares, strict=True), whole, strict=True):
        assert sorted(torch.cat([part.indices for part in parts]).tolist()) == index.tolist()
        assert {part.size for part in parts} == {len(index)}


def test_transform_acts_on_training_images_only() -> None:
    data = tensors(n_train=10, transform=lambda x: x * 0)
    assert next(iter(data.train_dataloader())).x.abs().max() == 0
    assert next(iter(data.val_dataloader()[0])).x.abs().max() > 0


def test_a_batch_size_that_differs_from_the_optimizer_config_is_refused() -> None:
    data = tensors(n_train=10, batch_size=5)
    module = FiniteNetwork(MLP(2, 1, 4), OptimizerConfig(batch_size=4))
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match="give it to the optimizer config only"):
        trainer.fit(module, datamodule=data)


X, Y = torch.randn(10, 1, 2, 2), torch.tensor([-1.0, 1.0]).repeat(5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorData((X, Y), (X, Y), n_train=11), "ask for fewer"),
        (lambda: TensorData((X, Y), (X, Y), n_test=11), "n_test = 11"),
        (lambda: TensorData((X, Y), (X, Y), n_train=8, fresh=3), r"n_train \+ n_val \+ fresh = 11"),
        (lambda: TensorData((X, Y), (X, Y), n_train=0), "n_train must be at least 1"),
        (lambda: TensorData((X, Y[:5]), (X, Y)), "need as many labels"),
        (lambda: TensorData((X, (Y + 1) / 2), (X, Y)), r"Labels must be -1 or \+1"),
        (lambda: TensorData((X * torch.nan, Y), (X, Y)), "NaN or infinite"),
        (lambda: TensorData((X * 0, Y), (X, Y)), "constant"),
        (lambda: SyntheticTeacher("uniform"), "distribution must be"),  # type: ignore[arg-type]  # on purpose
    ],
)
def test_bad_data_are_refused_with_advice(make: Any, message: str) -> None:  # noqa: ANN401 - a table of lambdas
    with pytest.raises(ValueError, match=message):
        make().setup()


def test_sets_of_different_sizes_share_their_images_under_one_normalization() -> None:
    small, large = (FashionMNISTBinary(n_train=n, n_test=8, n_statistics=24) for n in (8, 24))
    for data in (small, large):
        data.setup()
    assert small.train_set is not None
    assert large.train_set is not None
    torch.testing.assert_close(small.train_set.x, large.train_set.x[:8], rtol=0, atol=0)
    other = FashionMNISTBinary(n_train=8, n_test=8)
    other.setup()
    assert other.train_set is not None
    assert not torch.equal(other.train_set.x, small.train_set.x)
