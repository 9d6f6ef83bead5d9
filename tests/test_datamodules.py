"""Subsets are nested and disjoint, normalized and reproducible; bad sizes and data are refused.

Longer than 300 lines, since all data sets share one base and one table of bad data.
"""

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
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ntk_lightning.datamodules import (
    BatchLoader,
    CIFAR10Binary,
    FashionMNISTBinary,
    Samples,
    SyntheticTeacher,
    TensorData,
)
from ntk_lightning.datamodules.batches import Shuffled
from ntk_lightning.datamodules.samples import has_set, samples_of
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP, FiveLayerCNN
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


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cifar").mkdir()
    cifar_folder(tmp_path / "cifar")
    assert len(CIFAR10Binary(path="~/cifar").load(train=True)) == 8


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
GREY = png(NOISE[..., 0])


def rewrite(file: Path, **columns: object) -> None:
    table = pq.read_table(file)
    pq.write_table(pa.table({**table.to_pydict(), **columns}), file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"<html>", "cannot be read", id="junk"),
        pytest.param(png(NOISE)[:1500], "cannot be read", id="cut off"),
        pytest.param(None, "cannot be read", id="missing"),
        pytest.param(png(NOISE[:, :30]), "has 30x32 pixels: resize it to 32x32", id="another size"),
    ],
)
def test_a_broken_picture_is_named_by_file_and_row(content: bytes | None, message: str, tmp_path: Path) -> None:
    (file,) = cifar_folder(tmp_path).glob("train*")
    pictures = pq.read_table(file)["img"].to_pylist()
    pictures[7]["bytes"] = content  # rows 2, 5, 8, ... are of a third class
    rewrite(file, img=pictures)
    with pytest.raises(ValueError, match=rf"{file}: the picture in row 7 {message}") as raised:
        CIFAR10Binary(path=str(tmp_path), n_train=4, n_test=4).setup()
    assert "\n" not in str(raised.value)


def test_a_grey_picture_among_coloured_ones_has_three_equal_channels(tmp_path: Path) -> None:
    (file,) = cifar_folder(tmp_path).glob("train*")
    pictures = pq.read_table(file)["img"].to_pylist()
    pictures[0]["bytes"] = GREY
    rewrite(file, img=pictures)
    x = CIFAR10Binary(path=str(tmp_path)).load(train=True).x
    assert torch.equal(x[0], torch.from_numpy(NOISE[..., 0]).expand(3, 32, 32))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        pytest.param({"img": [GREY] * 12}, "column img is binary instead of struct<bytes", id="no struct"),
        pytest.param({"img": [{"path": "a"}] * 12}, "column img is struct<path: string> instead of", id="no bytes"),
        pytest.param({"label": ["dog", "horse"] * 6}, "column label is string instead of an integer", id="words"),
        pytest.param({"label": [3] * 12}, r"No image of the classes \(5, 7\)", id="other classes"),
        pytest.param({"label": [5, 3] * 6}, "of the training pool of CIFAR10Binary have the label -1", id="one class"),
    ],
)
def test_columns_of_another_kind_are_refused(columns: dict[str, object], message: str, tmp_path: Path) -> None:
    (file,) = cifar_folder(tmp_path).glob("train*")
    rewrite(file, **columns)
    with pytest.raises(ValueError, match=message):
        CIFAR10Binary(path=str(tmp_path), n_train=4, n_test=4).setup()


def test_a_parquet_file_that_is_damaged_in_the_middle_is_named(tmp_path: Path) -> None:
    (file,) = cifar_folder(tmp_path).glob("train*")
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is not a whole parquet file .*: download it again"):
        CIFAR10Binary(path=str(tmp_path)).load(train=True)


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


@pytest.mark.parametrize("transform", [None, torch.neg])
def test_an_epoch_is_copied_to_the_device_once(transform: Any) -> None:  # noqa: ANN401 - a function or None
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            self.count += func is torch.ops.aten._to_copy.default
            return func(*args, **(kwargs or {}))

    elsewhere = Samples(torch.empty(30, 1, 2, 2, device="meta"), torch.empty(30, device="meta"))
    loader = BatchLoader(elsewhere, Shuffled(30, OptimizerConfig(batch_size=8)), transform)
    with Copies() as copies:
        assert [len(batch.y) for batch in loader] == [8, 8, 8, 6]
    assert copies.count == 1


def test_processes_share_a_batch_without_overlap() -> None:
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


def test_a_run_without_a_set_is_told_from_one_with_it() -> None:
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert not has_set(trainer, "train")
    trainer.datamodule = tensors(n_train=10, fresh=5)  # type: ignore[attr-defined]  # what fit does
    assert [split for split in ("train", "test", "val", "fresh") if has_set(trainer, split)] == [
        "train",
        "test",
        "fresh",
    ]
    assert len(samples_of(trainer, "fresh")) == 5
    with pytest.raises(TypeError, match="needs the whole val set"):
        samples_of(trainer, "val")


def test_a_fresh_subset_halves_the_pool() -> None:
    data = TensorData((X, Y), (X, Y), fresh=True, n_val=1)
    assert (data.n_train, data.n_fresh) == (4, 4)
    data.setup()
    assert TensorData((X, Y), (X, Y), fresh=3, n_val=1).n_train == 6


def test_the_teacher_is_copied() -> None:
    teacher = MLP(4, 1, 64)
    data = SyntheticTeacher(shape=(1, 8, 8), teacher=nn.Sequential(nn.Flatten(), teacher), pool_size=64, n_train=32)
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert teacher.training
    before = data.load(train=True).y
    for parameter in teacher.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(data.load(train=True).y, before)


def test_a_subset_may_be_of_one_class_where_the_pool_is_not() -> None:
    data = TensorData((X, Y), (X, Y), n_train=1)
    data.setup()
    assert data.train_set is not None
    assert len(data.train_set) == 1


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
        (lambda: TensorData((X, Y.abs()), (X, Y), n_train=4), "All 10 samples of the training pool .* label 1: give"),
        (lambda: TensorData((Y, Y), (X, Y)), r"train: images must be \(N, C, H, W\), got \(10,\)"),
        (lambda: TensorData((X, Y), (X[0, 0, 0, 0], Y)), r"test: images must be \(N, C, H, W\), got \(\)"),
        (lambda: TensorData((X, Y), (X, Y[0])), "need as many labels"),
        (lambda: TensorData((X, Y), (X[..., :1], Y)), r"\(1, 2, 2\) and test images of shape \(1, 2, 1\): both"),
        (lambda: TensorData((X, Y), (X, Y), fresh=-1), "fresh must be at least 0"),
        (lambda: SyntheticTeacher("uniform"), "distribution must be"),  # type: ignore[arg-type]  # on purpose
        (lambda: SyntheticTeacher(teacher=FiveLayerCNN(2, num_outputs=2)), "must have one output an image"),
        (lambda: SyntheticTeacher(teacher=nn.Linear(5, 1)), r"does not take float32 images \(n, 3, 32, 32\)"),
        (lambda: SyntheticTeacher(teacher=FiveLayerCNN(2).double()), "does not take float32 images"),
        (lambda: CIFAR10Binary(classes=(5, 12)), "two different class numbers from 0 to 9"),
    ],
)
def test_bad_data_are_refused_with_advice(make: Any, message: str) -> None:  # noqa: ANN401 - a table of lambdas
    with pytest.raises(ValueError, match=message):
        make().setup()


@pytest.mark.parametrize("sizes", [{"fresh": 2.5}, {"fresh": "a"}, {"n_val": "a"}, {"n_val": True}, {"n_test": True}])
@pytest.mark.parametrize("kind", [FashionMNISTBinary, lambda **sizes: TensorData((X, Y), (X, Y), **sizes)])
def test_sizes_that_are_no_whole_numbers_are_refused(kind: Any, sizes: dict[str, object]) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=f"{next(iter(sizes))} must be a whole number"):
        kind(**sizes)


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
