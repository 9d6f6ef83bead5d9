"""Images averaged to a smaller side: values, statistics, keys, the command line and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import DTypeLike

from ntk_lightning.cli import main
from ntk_lightning.datamodules import CIFAR5mBinary, FashionMNISTBinary, SVHNParity, SyntheticTeacher, TensorData
from ntk_lightning.datamodules.image_size import average_pool
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.kernels.grams.stored import stored_gram_and_cross
from ntk_lightning.networks import MyrtleCNN
from ntk_lightning.studies.config import Arm, Grid, StudyConfig

RNG = np.random.default_rng(0)


def pool(n: int, dtype: DTypeLike = np.uint8, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x = RNG.integers(0, 256, (n, 3, side, side)).astype(dtype)
    return torch.from_numpy(x), torch.tensor([-1.0, 1.0]).repeat(n // 2)


def means_over_squares(x: np.ndarray, side: int) -> np.ndarray:
    """The definition, in loops."""
    k = x.shape[-1] // side
    out = np.zeros((*x.shape[:2], side, side))
    for i in range(side):
        for j in range(side):
            out[:, :, i, j] = x[:, :, i * k : (i + 1) * k, j * k : (j + 1) * k].astype(np.float64).mean((2, 3))
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("side", [1, 2, 4, 6, 12])
def test_pooled_images_are_means_over_squares_normalized_by_their_own_statistics(side: int, dtype: DTypeLike) -> None:
    train, test = pool(40, dtype), pool(10, dtype)
    data = TensorData(train, test, n_train=24, n_val=4, fresh=6, n_statistics=30, image_size=side)
    data.setup()
    small, small_test = (torch.from_numpy(means_over_squares(x.numpy(), side)) for x, _ in (train, test))
    expected = TensorData((small, train[1]), (small_test, test[1]), n_train=24, n_val=4, fresh=6, n_statistics=30)
    expected.setup()
    for split in ("train", "test", "val", "fresh"):
        have, want = (getattr(module, f"{split}_set") for module in (data, expected))
        assert have.x.shape[1:] == (3, side, side)
        assert have.x.dtype == torch.float32
        torch.testing.assert_close(have.x, want.x, rtol=0, atol=3e-6)
        assert torch.equal(have.y, want.y)


def test_without_normalization_pooled_images_are_means_of_pixels() -> None:
    train, test = pool(8), pool(8)
    data = TensorData(train, test, normalize=False, image_size=6)
    data.setup()
    assert data.test_set is not None
    have = {tuple(image.flatten().tolist()) for image in data.test_set.x}
    assert have == {tuple(image.flatten().tolist()) for image in means_over_squares(test[0].numpy(), 6)}


def test_pooling_many_images_takes_them_a_chunk_at_a_time() -> None:
    x = torch.from_numpy(RNG.standard_normal((2050, 1, 4, 4)).astype(np.float32))
    expected = means_over_squares(x.numpy(), 2)
    torch.testing.assert_close(average_pool(x, 2).double(), torch.from_numpy(expected), rtol=0, atol=1e-7)


def test_the_side_of_the_images_leaves_their_values() -> None:
    plain, same = (FashionMNISTBinary(n_train=8, n_test=8, image_size=size) for size in (None, 32))
    for data in (plain, same):
        data.setup()
    assert plain.train_set is not None
    assert same.train_set is not None
    assert torch.equal(plain.train_set.x, same.train_set.x)


def test_a_teacher_labels_the_images_before_they_are_pooled() -> None:
    kwargs: dict[str, Any] = {"shape": (1, 8, 8), "pool_size": 64, "n_train": 32, "n_test": 16}
    plain, small = SyntheticTeacher(**kwargs), SyntheticTeacher(**kwargs, image_size=4)
    for data in (plain, small):
        data.setup()
    assert plain.train_set is not None
    assert small.train_set is not None
    assert small.train_set.x.shape == (32, 1, 4, 4)
    assert torch.equal(plain.train_set.y, small.train_set.y)


def test_a_side_that_does_not_divide_is_refused_before_anything_is_downloaded() -> None:
    for kind in (FashionMNISTBinary, CIFAR5mBinary, SVHNParity):
        with pytest.raises(ValueError, match=r"image_size = 12 does not divide .* 32 pixels: give one of 1, 2, 4, 8"):
            kind(image_size=12)
    with pytest.raises(ValueError, match="image_size must be at least 1"):
        FashionMNISTBinary(image_size=0)
    with pytest.raises(TypeError, match="image_size must be a whole number"):
        FashionMNISTBinary(image_size=8.0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((12, 12), "image_size = 8 does not divide the images' side of 12 pixels: give one of 1, 2, 3, 4, 6, 12"),
        ((4, 4), "does not divide the images' side of 4"),
        ((12, 8), r"needs square images \(C, H, W\), got samples of shape \(1, 12, 8\)"),
    ],
)
def test_images_that_cannot_be_pooled_are_refused(shape: tuple[int, int], message: str) -> None:
    train = torch.zeros(8, 1, *shape), torch.tensor([-1.0, 1.0]).repeat(4)
    with pytest.raises(ValueError, match=message):
        TensorData(train, train, image_size=8).setup()
    vectors = torch.zeros(8, 16), train[1]
    with pytest.raises(ValueError, match=r"needs square images"):
        TensorData(vectors, vectors, image_size=8).setup()


def test_a_cells_key_knows_the_side_and_stays_without_one() -> None:
    def key(**arguments: object) -> str:
        data = {"class_path": "ntk_lightning.datamodules.FashionMNISTBinary", "init_args": arguments}
        net = {"class_path": "ntk_lightning.networks.MyrtleCNN", "init_args": {"in_channels": 1}}
        (cell,) = StudyConfig("a", "a", data, net, [Arm("a")], Grid(n=[8], width=[2], seed=[0])).cells()["a"]
        return cell.key

    assert len({key(), key(image_size=16), key(image_size=8)}) == 3
    assert key() == "cc9d9fe4a6b4147d36ff77c4"  # of the versions before there was a side


def test_a_store_holds_the_grams_of_several_sides_apart(tmp_path: Path) -> None:
    kernel = InfiniteNTK(MyrtleCNN(depth=5, width=1, in_channels=1), backend="reference")
    stored = stored_gram_and_cross(kernel, tmp_path, progress=False)
    train, test = pool(6, side=16), pool(4, side=16)
    for side in (8, 4):
        data = TensorData((train[0][:, :1], train[1]), (test[0][:, :1], test[1]), image_size=side)
        data.setup()
        assert data.train_set is not None
        assert data.test_set is not None
        gram, cross = stored(data.train_set.x, data.test_set.x)
        torch.testing.assert_close(gram, kernel(data.train_set.x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cross, kernel(data.test_set.x, data.train_set.x), rtol=1e-5, atol=1e-6)


def test_the_command_line_and_yaml_take_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "model": {
            "class_path": "ntk_lightning.modules.FiniteNetwork",
            "init_args": {
                "net": {"class_path": "ntk_lightning.networks.MyrtleCNN", "init_args": {"width": 2, "in_channels": 1}}
            },
        },
        "data": {
            "class_path": "ntk_lightning.datamodules.FashionMNISTBinary",
            "init_args": {"n_train": 8, "n_test": 8, "image_size": 16},
        },
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    for extra, side in ([], 16), (["--data.image_size=8"], 8), (["--data.image_size=null"], 32):
        cli = main(["fit", "--config=small.yaml", *extra])
        assert cli is not None
        assert cli.datamodule.train_set.x.shape == (8, 1, side, side)
