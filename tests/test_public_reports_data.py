"""Kinds of data that users reported: constant columns, single samples, other dtypes, data sets without a part."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from test_svhn import FILES, parquet_folder, split
from tiny import QUIET
from torch import Tensor

from ntk_lightning.datamodules import FashionMNISTBinary, Samples, SVHNParity, TensorData
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig

Y = torch.tensor([-1.0, 1.0]).repeat(10)
MANY = r"1 of 4 channels \(2\) are constant in the 20 samples.*normalize=False"


def vectors(column: float = 3.0) -> Tensor:
    """Twenty vectors of four columns, of which the third is constant."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2] = column
    return x


def ready(x: Tensor, test: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - passed on
    """Training and test inputs of TensorData."""
    test = x if test is None else test
    data = TensorData((x, Y[: len(x)]), (test, Y[: len(test)]), **kwargs)
    data.setup()
    assert data.train_set is not None
    assert data.test_set is not None
    return data.train_set.x, data.test_set.x


@pytest.mark.parametrize("column", [0.0, 3.0, 0.1, -1e30, 1e-30])
def test_a_constant_column_is_zero_and_the_others_are_normalized(column: float) -> None:
    x = vectors(column)
    with pytest.warns(UserWarning, match=MANY):
        train, test = ready(x)
    others = x[:, [0, 1, 3]].numpy()
    expected = (others - others.mean(0)) / others.std(0)
    assert (train[:, 2] == 0).all()
    for found in (train, test):
        ordered = found[:, [0, 1, 3]].double().numpy()
        np.testing.assert_allclose(np.sort(ordered, 0), np.sort(expected, 0), rtol=1e-6, atol=1e-6)


def test_a_test_sample_off_a_constant_column_keeps_its_distance() -> None:
    test = vectors()
    test[0, 2] = 5.0
    with pytest.warns(UserWarning, match=MANY):
        _, found = ready(vectors(), test)
    assert sorted(found[:, 2].tolist()) == [0.0] * 19 + [2.0]


def test_a_constant_channel_of_images_is_zero() -> None:
    x = torch.randn(20, 3, 4, 4)
    x[:, 1] = 0.7
    with pytest.warns(UserWarning, match=r"1 of 3 channels \(1\)"):
        train, _ = ready(x)
    assert (train[:, 1] == 0).all()
    assert train[:, [0, 2]].std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_constant_columns_are_named_up_to_eight() -> None:
    with pytest.warns(UserWarning, match=r"12 of 12 channels \(0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\)"):
        train, _ = ready(torch.ones(20, 12))
    assert (train == 0).all()


def test_a_single_training_sample_has_constant_columns() -> None:
    with pytest.warns(UserWarning, match=r"4 of 4 channels .* in the 1 samples"):
        train, test = ready(vectors(), n_train=1)
    assert (train == 0).all()
    assert torch.isfinite(test).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of an image, every channel has many pixels
        train, _ = ready(torch.randn(20, 1, 4, 4), n_train=1)
    assert train.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_networks_train_and_kernels_are_finite_on_a_constant_column() -> None:
    data = TensorData((vectors(), Y), (vectors(), Y))
    module = FiniteNetwork(MLP(8, 1, 4), OptimizerConfig(lr=0.1, batch_size=5))
    with pytest.warns(UserWarning, match=MANY):
        Trainer(max_epochs=1, **QUIET).fit(module, datamodule=data)
    assert data.train_set is not None
    for kernel in (EmpiricalNTK(module.net), InfiniteNTK(MLP(1, 1, 4))):
        assert torch.isfinite(kernel(data.train_set.x)).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8]
)
def test_inputs_of_every_dtype_are_normalized_in_float64(dtype: torch.dtype) -> None:
    x = torch.randint(0, 9, (20, 3), generator=torch.Generator().manual_seed(1)).to(dtype)
    train, _ = ready(x)
    exact = x.double().numpy()
    expected = (exact - exact.mean(0)) / exact.std(0)
    assert train.dtype == torch.float32
    np.testing.assert_allclose(np.sort(train.numpy(), 0), np.sort(expected, 0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        *((dtype, torch.float32) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool)),
        *((dtype, dtype) for dtype in (torch.int64, torch.int32)),
    ],
)
def test_without_normalization_the_values_stay(dtype: torch.dtype, expected: torch.dtype) -> None:
    x = (torch.arange(40).reshape(20, 2) % 7).to(dtype)
    train, test = ready(x, normalize=False)
    assert (train.dtype, test.dtype) == (expected, expected)
    rows = sorted(x.double().tolist())
    assert sorted(train.double().tolist()) == sorted(test.double().tolist()) == rows


def test_without_normalization_nothing_is_said_of_constant_columns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, _ = ready(vectors(), normalize=False)
    assert (train[:, 2] == 3).all()


def test_values_that_float32_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="float32 cannot hold: scale the data"):
        ready(vectors(1e300), normalize=False)


def test_shipped_images_come_as_they_are_on_request() -> None:
    data = FashionMNISTBinary(n_train=16, n_test=4, normalize=False)
    data.setup()
    assert data.train_set is not None
    assert data.train_set.x.min() == 0
    assert data.train_set.x.max() > 200
    assert torch.equal(data.train_set.x, data.train_set.x.round())


def digits(samples: Samples) -> list[int]:
    """The first pixel of each image tells its digit."""
    return sorted(int(value) for value in samples.x[:, 0, 0, 0])


@pytest.mark.parametrize("kind", ["matlab", "parquet"])
def test_svhn_without_extra_is_balanced_from_train_alone(kind: str, tmp_path: Path) -> None:
    folder, cache = tmp_path / "files", tmp_path / "cache"
    folder.mkdir()
    if kind == "matlab":
        for name, content in FILES.items():
            if "extra" not in name:
                (folder / name).write_bytes(content)
    else:
        parquet_folder(folder)
        for file in folder.rglob("extra*"):
            file.unlink()
    with pytest.raises(FileNotFoundError, match="extra=False does without extra"):
        SVHNParity(path=str(folder), cache=str(cache))
    found = SVHNParity(path=str(folder), cache=str(cache), extra=False).load(train=True)
    all_digits = split("train")[1]
    even = [digit for digit in all_digits if digit % 2 == 0]
    assert len(found) == 2 * len(even)  # the rarer parity, as a whole
    assert [digit for digit in digits(found) if digit % 2 == 0] == sorted(even)
    assert found.y.sum() == 0


def test_svhn_with_and_without_extra_share_no_cached_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: Path, md5: str | None = None) -> Path:
        asked.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(FILES[path.name])
        return path

    monkeypatch.setattr("ntk_lightning.datamodules.svhn.download_temporary", download)
    few = SVHNParity(cache=str(tmp_path), extra=False)
    few.prepare_data()
    assert asked == ["train_32x32.mat", "test_32x32.mat"]
    many = SVHNParity(cache=str(tmp_path))
    many.prepare_data()
    assert "extra_32x32.mat" in asked
    assert len(few.load(train=True)) < len(many.load(train=True))
    assert torch.equal(few.load(train=False).x, many.load(train=False).x)


def test_masks_are_normalized_as_zeros_and_ones() -> None:
    x = vectors()[:, [0, 1, 3]] > 0
    mask, number = (TensorData((part, Y), (part, Y)) for part in (x, x.float()))
    for module in (mask, number):
        module.setup()
    assert torch.equal(mask.train_set.x, number.train_set.x)
    assert mask.train_set.x.mean(0) == pytest.approx(torch.zeros(3), abs=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_complex_samples_do_not_lose_their_imaginary_part(normalize: bool) -> None:
    x = vectors() + 1j
    with pytest.raises(TypeError, match=r"must be real, got torch\.complex128"):
        TensorData((x, Y), (x, Y), normalize=normalize).setup()
