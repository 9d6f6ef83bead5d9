"""ZCA whitening: its matrix by another way, the spectrum it leaves, its place among the options, and what it helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import inv, sqrtm

from ntk_lightning.datamodules import FashionMNISTBinary, TensorData, whitening
from ntk_lightning.datamodules.whitening import zca_whitening
from ntk_lightning.kernels import InfiniteNTK
from ntk_lightning.networks import MLP
from ntk_lightning.solvers import ridge
from ntk_lightning.studies.build import set_up_data
from ntk_lightning.studies.cell import run_cell
from ntk_lightning.studies.config import Arm, Grid, StudyConfig
from ntk_lightning.studies.shared_gram import cells_of_pools

Pool = tuple[torch.Tensor, torch.Tensor]


def pool(n: int, seed: int = 0, shape: tuple[int, ...] = (2, 6, 6)) -> Pool:
    """Images with correlated pixels of unequal variance and a mean."""
    rng = np.random.default_rng(seed)
    d = int(np.prod(shape))
    mixing = np.random.default_rng(99).standard_normal((d, d)) / (1 + np.arange(d)) ** 0.7
    x = (rng.standard_normal((n, d)) @ mixing.T + 2).reshape(n, *shape)
    return torch.from_numpy(x), torch.tensor([-1.0, 1.0]).repeat(n // 2)


def whitening_matrix(x: np.ndarray, zca: float) -> np.ndarray:
    """(C + zca tr(C) / d)^(-1/2) of samples (n, d), by Schur's decomposition."""
    covariance = np.cov(x.T, bias=True)
    matrix: np.ndarray = inv(sqrtm(covariance + zca * np.trace(covariance) / len(covariance) * np.eye(x.shape[1])))
    return matrix


@pytest.mark.parametrize("zca", [0.1, 1e-3])
@pytest.mark.parametrize("n", [40, 72, 300])  # 72 entries a sample: fewer samples, as many, more
def test_samples_are_multiplied_by_the_inverse_root_of_the_regularized_covariance(n: int, zca: float) -> None:
    (train, y), (test, test_y) = pool(n), pool(20, seed=1)
    data = TensorData((train, y), (test, test_y), n_train=n // 2, n_val=4, fresh=6, normalize=False, zca=zca)
    data.setup()
    plain = TensorData((train, y), (test, test_y), n_train=n // 2, n_val=4, fresh=6, normalize=False)
    plain.setup()
    x = train.flatten(1).numpy()
    matrix = whitening_matrix(x, zca)
    for split in ("train", "test", "val", "fresh"):
        whitened, before = (getattr(module, f"{split}_set").x for module in (data, plain))
        assert whitened.dtype == torch.float32
        expected = (before.flatten(1).double().numpy() - x.mean(0)) @ matrix
        np.testing.assert_allclose(whitened.flatten(1).double().numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("zca", [0.1, 1.0])
def test_the_whitened_covariance_has_the_eigenvalues_of_the_formula(n: int, zca: float) -> None:
    data = TensorData(pool(n), pool(2), n_statistics=n, zca=zca)
    plain = TensorData(pool(n), pool(2), n_statistics=n)
    spectra = []
    for module in (data, plain):
        module.setup()
        assert module.train_set is not None
        spectra.append(np.linalg.eigvalsh(np.cov(module.train_set.x.flatten(1).double().numpy().T, bias=True)))
    whitened, before = spectra
    np.testing.assert_allclose(whitened, before / (before + zca * before.mean()), rtol=0, atol=1e-5)


def test_embedded_images_are_whitened_as_pooled_and_normalized() -> None:
    kwargs: dict[str, Any] = {"n_train": 500, "n_test": 100, "n_statistics": 4096, "image_size": 8}
    plain, data = FashionMNISTBinary(**{**kwargs, "n_train": 4096}), FashionMNISTBinary(**kwargs, zca=0.1)
    for module in (plain, data):
        module.setup()
    assert plain.train_set is not None
    assert plain.test_set is not None
    assert data.train_set is not None
    assert data.test_set is not None
    x = plain.train_set.x.flatten(1).double().numpy()
    matrix = whitening_matrix(x, 0.1)
    for samples, before in ((data.train_set, x[:500]), (data.test_set, plain.test_set.x.flatten(1).double().numpy())):
        expected = (before - x.mean(0)) @ matrix
        np.testing.assert_allclose(samples.x.flatten(1).double().numpy(), expected, rtol=0, atol=2e-5)
    spectrum = np.linalg.eigvalsh(np.cov(data.train_set.x.flatten(1).double().numpy().T))
    before = np.linalg.eigvalsh(np.cov(x[:500].T))
    assert before[-1] / before[-32] > 10 * spectrum[-1] / spectrum[-32]


def test_whitening_lets_a_kernel_see_what_varies_little() -> None:
    """The label is in a direction of 1/400 of the variance of the others: as with details of images, zca shows it."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((1400, 20)).astype(np.float32))
    y = x[:, 0].sign()
    x[:, 0] /= 20
    rotation = torch.from_numpy(np.linalg.qr(rng.standard_normal((20, 20)))[0].astype(np.float32))
    x = x @ rotation
    errors: dict[float | None, float] = {}
    for zca in (None, 0.01):
        data = TensorData((x[:400], y[:400]), (x[400:], y[400:]), n_train=200, normalize=False, zca=zca)
        data.setup()
        train, test = data.train_set, data.test_set
        assert train is not None
        assert test is not None
        kernel = InfiniteNTK(MLP(width=1, depth=2, in_features=20))
        fit = ridge(kernel(train.x), train.y, 1e-3, test=(kernel(test.x, train.x), test.y))
        assert fit.test_error is not None
        errors[zca] = fit.test_error
    assert errors[0.01] < 0.25
    assert errors[None] > 0.4


def test_a_samples_digits_depend_neither_on_the_subset_nor_on_threads_nor_on_the_order() -> None:
    train, test = pool(300), pool(20, seed=1)
    before = torch.get_num_threads()
    sets = []
    try:
        for n, threads, seed in ((300, 1, 0), (40, 2, 0), (40, 1, 1)):
            torch.set_num_threads(threads)
            data = TensorData(train, test, n_train=n, n_statistics=300, normalize=False, zca=0.1, subset_seed=seed)
            data.setup()
            assert torch.get_num_threads() == threads
            sets.append((data.train_set, data.test_set))
    finally:
        torch.set_num_threads(before)
    (large, large_test), (small, small_test), (_, other_test) = sets
    assert torch.equal(small.x, large.x[:40])
    assert torch.equal(small_test.x, large_test.x)
    assert torch.equal(other_test.x, large_test.x)


@pytest.mark.parametrize("n", [60, 300])
def test_a_large_decomposition_is_kept_and_read_again(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_KEPT", 50)
    x, _ = pool(n)
    plain = zca_whitening(x.__getitem__, n, 0.1, tmp_path)(x)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    decompose = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("was decomposed again"))
    assert torch.equal(zca_whitening(x.__getitem__, n, 0.1, tmp_path)(x), plain)
    monkeypatch.setattr(torch.linalg, "eigh", decompose)
    for changed, zca in ((x, 0.2), (x * (1 + torch.arange(72).reshape(2, 6, 6) * 1e-2), 0.1)):
        assert not torch.equal(zca_whitening(changed.__getitem__, n, zca, tmp_path)(changed), plain)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_a_cells_key_knows_the_whitening() -> None:
    def key(**arguments: object) -> str:
        data = {"class_path": "ntk_lightning.datamodules.FashionMNISTBinary", "init_args": arguments}
        net = {"class_path": "ntk_lightning.networks.MyrtleCNN", "init_args": {"in_channels": 1}}
        (cell,) = StudyConfig("a", "a", data, net, [Arm("a")], Grid(n=[8], width=[2], seed=[0])).cells()["a"]
        return cell.key

    assert len({key(), key(zca=0.1), key(zca=0.2), key(balanced=True)}) == 4


def test_one_gram_of_the_pool_serves_balanced_averaged_and_whitened_subsets(tmp_path: Path) -> None:
    arguments = {"shape": [1, 8, 8], "pool_size": 64, "n_test": 10, "n_statistics": 64}
    options = {"balanced": True, "image_size": 4, "zca": 0.1}
    data = {"class_path": "ntk_lightning.datamodules.SyntheticTeacher", "init_args": {**arguments, **options}}
    net = {"class_path": "ntk_lightning.networks.MLP", "init_args": {"in_features": 16, "depth": 1}}
    grid = Grid(n=[32], seed=[0, 1, 2, 3], width=[1], lr=[0.1], epochs=[3], batch_size=[8])
    cells = StudyConfig("a", "a", data, net, [Arm("a", "infinite")], grid).cells()["a"]
    loaded = set_up_data(cells)
    assert loaded is not None
    assert cells_of_pools(cells, loaded, tmp_path / "shared") == {cell.key for cell in cells}
    for cell in cells[:2]:
        (shared,) = run_cell(cell, tmp_path / "shared", "1GB", loaded=loaded, whole_pool=True)
        (own,) = run_cell(cell, tmp_path / "own", "1GB")
        assert shared["curve_losses"] == pytest.approx(own["curve_losses"], rel=1e-5)


@pytest.mark.parametrize("zca", [0, -0.1, float("nan"), float("inf")])
def test_a_regularization_that_is_not_positive_is_refused(zca: float) -> None:
    with pytest.raises(ValueError, match="zca must be positive"):
        FashionMNISTBinary(zca=zca)


@pytest.mark.parametrize("zca", ["0.1", True])
def test_a_regularization_that_is_no_number_is_refused(zca: Any) -> None:  # noqa: ANN401 - wrong on purpose
    with pytest.raises(TypeError, match="zca must be a number"):
        FashionMNISTBinary(zca=zca)


def test_equal_samples_are_refused() -> None:
    same = torch.full((8, 1, 2, 2), 0.1), torch.tensor([-1.0, 1.0]).repeat(4)
    with pytest.raises(ValueError, match="all 8 samples of the training pool are equal"):
        TensorData(same, same, normalize=False, zca=0.1).setup()
