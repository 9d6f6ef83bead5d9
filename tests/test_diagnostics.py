"""Measures of Gram matrices against their definitions, written out with explicit matrices in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ntk_lightning.kernels.diagnostics import (
    centered_kernel_alignment,
    effective_rank,
    kernel_distance,
    kernel_target_alignment,
    kernel_velocity,
    leading_eigenvalues,
    target_share,
)

N = 25


def gram(seed: int, rank: int = 40) -> Tensor:
    features = torch.randn(N, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.2 + features @ features.T / rank


@pytest.fixture
def targets() -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64).sign()


def trace_product(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.trace(a.T @ b))


def test_centered_kernel_alignment() -> None:
    first, second = gram(0), gram(1)
    center = np.eye(N) - np.ones((N, N)) / N
    a, b = center @ first.numpy() @ center, center @ second.numpy() @ center
    expected = trace_product(a, b) / math.sqrt(trace_product(a, a) * trace_product(b, b))
    assert centered_kernel_alignment(first, second) == pytest.approx(expected, rel=1e-12)
    assert centered_kernel_alignment(first, 3 * first + 5) == pytest.approx(1, rel=1e-12)
    assert centered_kernel_alignment(first, second) != pytest.approx(centered_kernel_alignment(first, first))


def test_kernel_target_alignment(targets: Tensor) -> None:
    kernel = gram(0)
    expected = float(targets @ kernel @ targets / (torch.linalg.matrix_norm(kernel) * targets @ targets))
    assert kernel_target_alignment(kernel, targets) == pytest.approx(expected, rel=1e-12)
    one_hot = torch.stack((targets > 0, targets < 0), 1).double()
    label_kernel = one_hot @ one_hot.T
    expected = float((kernel * label_kernel).sum() / (kernel.norm() * label_kernel.norm()))
    assert kernel_target_alignment(kernel, one_hot) == pytest.approx(expected, rel=1e-12)
    assert kernel_target_alignment(label_kernel, one_hot) == pytest.approx(1, rel=1e-12)


def test_kernel_distance_and_velocity() -> None:
    first, second = gram(0), gram(1)
    a, b = first.numpy(), second.numpy()
    expected = 1 - trace_product(a, b) / math.sqrt(trace_product(a, a) * trace_product(b, b))
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-12)
    assert kernel_velocity(first, second, 40) == pytest.approx(expected / 40, rel=1e-12)
    assert kernel_distance(first, 7 * first) == pytest.approx(0, abs=1e-30)


def test_a_tiny_distance_is_not_lost_to_rounding() -> None:
    first, second = torch.diag(torch.tensor([1.0, 0.0])).double(), torch.diag(torch.tensor([1.0, 1e-10])).double()
    assert kernel_distance(first, second) == pytest.approx(5e-21, rel=1e-6)


def test_effective_rank() -> None:
    values = np.array([5.0, 3.0, 1.0, 0.5])
    p = values / values.sum()
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    kernel = basis @ torch.diag(torch.from_numpy(values)) @ basis.T
    assert effective_rank(kernel) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-10)
    vector = torch.arange(1.0, 6.0, dtype=torch.float64)
    assert effective_rank(torch.outer(vector, vector)) == pytest.approx(1, abs=1e-6)


def test_leading_eigenvalues_and_target_share(targets: Tensor) -> None:
    kernel = gram(0)
    values, vectors = np.linalg.eigh(kernel.numpy())
    np.testing.assert_allclose(leading_eigenvalues(kernel, 3).numpy(), values[::-1][:3], rtol=1e-12)
    components = vectors.T @ targets.numpy()
    for k in (1, 7, N):
        expected = (components[::-1][:k] ** 2).sum() / N
        assert target_share(kernel, targets, k) == pytest.approx(expected, rel=1e-9)
    assert target_share(kernel, torch.stack((targets, targets), 1), 7) == pytest.approx(
        target_share(kernel, targets, 7)
    )


def test_float32_grams_are_measured_in_float64(targets: Tensor) -> None:
    kernel = gram(0)
    assert kernel_target_alignment(kernel.float(), targets.float()) == pytest.approx(
        kernel_target_alignment(kernel.float().double(), targets), rel=1e-14
    )


def test_zero_kernels_have_no_angle() -> None:
    zero = torch.zeros(3, 3)
    assert math.isnan(centered_kernel_alignment(zero + 1, torch.eye(3)))
    assert math.isnan(kernel_distance(zero, torch.eye(3)))
    assert math.isnan(effective_rank(zero))


def test_rejects_bad_input(targets: Tensor) -> None:
    kernel = gram(0)
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        effective_rank(kernel[:3])
    with pytest.raises(ValueError, match="same points"):
        kernel_distance(kernel, kernel[:3, :3])
    with pytest.raises(ValueError, match="diverged"):
        centered_kernel_alignment(kernel, torch.full_like(kernel, torch.nan))
    with pytest.raises(ValueError, match="targets must be"):
        kernel_target_alignment(kernel, targets[:3])
    for k in (0, N + 1):
        with pytest.raises(ValueError, match="from 1 to 25"):
            target_share(kernel, targets, k)
        with pytest.raises(ValueError, match="from 1 to 25"):
            leading_eigenvalues(kernel, k)
    with pytest.raises(ValueError, match="more than 0"):
        kernel_velocity(kernel, kernel, 0)
