"""Exponents of spectra and targets: the textbook's fit, known power laws, intervals that hold, and the callback."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer

from ntk_lightning.callbacks import KernelDiagnostics
from ntk_lightning.datamodules import FashionMNISTBinary
from ntk_lightning.kernels.decay import decay_exponents
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP
from ntk_lightning.optim import OptimizerConfig


def task(n: int, a: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram of random features with variances i^-a, and targets whose squared coefficients fall as i^-2."""
    rng, ranks = np.random.default_rng(seed), np.arange(1, 801)
    features = rng.standard_normal((n, 800))
    return torch.from_numpy((features * ranks**-a) @ features.T), torch.from_numpy(features @ ranks**-1.0)


def test_exponents_are_slopes_in_log_log() -> None:
    gram, y = task(200, 1.5, 0)
    decays = decay_exponents(gram, y)
    assert decays is not None
    values, vectors = np.linalg.eigh(gram.numpy())
    values, vectors = values[::-1], vectors[:, ::-1]
    powers = (vectors.T @ y.numpy()) ** 2 / float(y @ y)
    ranks = np.unique(np.round(2 * 10 ** (np.arange(19) / 18))).astype(int)  # 2 to 20, evenly in log
    tails = np.array([1 - powers[:k].sum() for k in ranks])
    for decay, law in zip(decays, (values[ranks - 1], tails), strict=True):
        design = np.stack([np.ones(len(ranks)), np.log(ranks)], 1)
        assert decay.exponent == pytest.approx(-np.linalg.lstsq(design, np.log(law), rcond=None)[0][1], rel=1e-6)


@pytest.mark.parametrize("a", [1.5, 3.0])
def test_known_power_laws_lie_in_the_intervals(a: float) -> None:
    """The tail of i^-2 is k^-1. Finite samples bias a by a few percent; of 20 intervals of 95%, 15 must hold it."""
    found = [decay_exponents(*task(160, a, seed)) for seed in range(20)]
    for index, truth in enumerate((a, 1.0)):
        decays = [both[index] for both in found if both is not None]
        assert len(decays) == 20
        assert np.mean([decay.exponent for decay in decays]) == pytest.approx(truth, rel=0.06)
        assert sum(decay.interval[0] < truth < decay.interval[1] for decay in decays) >= 15
        widths = [decay.interval[1] - decay.interval[0] for decay in decays]
        spread = np.std([decay.exponent for decay in decays], ddof=1)
        assert 2 < np.mean(widths) / spread < 12


def test_several_outputs_are_summed_and_scales_do_not_matter() -> None:
    gram, y = task(100, 2.0, 1)
    one, twice = decay_exponents(gram, y), decay_exponents(7 * gram, torch.stack([y, -3 * y], 1))
    assert one is not None
    assert twice is not None
    for first, second in zip(one, twice, strict=True):
        assert second.exponent == pytest.approx(first.exponent)
        assert second.interval == pytest.approx(first.interval)


def test_few_samples_and_grams_of_low_rank_have_no_exponents() -> None:
    gram, y = task(100, 2.0, 1)
    assert decay_exponents(gram[:39, :39], y[:39]) is None
    assert decay_exponents(torch.zeros(100, 100), y) is None
    assert decay_exponents(gram, torch.zeros(100)) is None


@pytest.mark.parametrize("n", [48, 24])
def test_the_callback_logs_both_decays(n: int, tmp_path: Path) -> None:
    diagnostics = KernelDiagnostics(at=[1, 3], probe_size=48, leading=2)
    data = FashionMNISTBinary(n_train=n, n_test=8, image_size=8)
    net = torch.nn.Sequential(torch.nn.Flatten(), MLP(width=32, depth=2, in_features=64))
    trainer = Trainer(
        default_root_dir=tmp_path,
        max_steps=3,
        callbacks=[diagnostics],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(FiniteNetwork(net, OptimizerConfig(lr=0.05, batch_size=8)), datamodule=data)
    (table,) = tmp_path.rglob("kernel_diagnostics.csv")
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["0", "1", "3"]
    for row in rows:
        for name in ("spectrum", "target"):
            low, middle, high = (row[f"{name}_exponent{end}"] for end in ("_low", "", "_high"))
            if n < 40:
                assert (low, middle, high) == ("", "", "")
            else:
                assert float(low) < float(middle) < float(high)
    if n >= 40:
        assert (
            f"{trainer.callback_metrics['kernel/spectrum_exponent'].item():.5g}"
            == f"{float(rows[-1]['spectrum_exponent']):.5g}"
        )
