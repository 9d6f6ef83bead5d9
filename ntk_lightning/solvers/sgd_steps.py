"""Steps of mini-batch SGD in coefficient space: compiled on the CPU, PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ntk_lightning.precision import own_precision

__all__ = ["advance", "product"]

_REASSOCIATE = {"reassoc", "contract", "nsz"}  # lets sums run in vector registers; NaN and infinity stay exact


def product(kernel: Tensor, coefficients: Tensor) -> Tensor:
    """Compute the predictions K a of several models in the kernel's dtype, reading every row once.

    Args:
        kernel: Kernel rows (m, n).
        coefficients: One model a row, (R, n).

    Returns:
        (R, m), in the kernel's dtype.
    """
    models = coefficients.to(kernel.dtype)
    if kernel.device.type != "cpu":
        with own_precision(kernel.device.type):
            return models @ kernel.T
    flat, stride = _flat(kernel)
    out = kernel.new_empty(len(models), len(kernel))
    with _torch_threads():
        _rows_product(flat, stride, np.arange(len(kernel)), models.contiguous().numpy(), out.numpy())
    return out


def advance(
    kernel: Tensor,
    targets: Tensor,
    batches: Sequence[Tensor],
    coefficients: Tensor,
    velocity: Tensor,
    rates: Tensor,
    outputs: int,
) -> None:
    """Run SGD steps of several models on the same batches, in place.

    g_b = 2 / (B C) (K[b] a - y_b), 0 elsewhere; v <- mu v + g; a <- a - lr v. On the CPU a row of K is read from memory
    once, where it lies, for all models; elsewhere the batch's rows are gathered.

    Args:
        kernel: Gram of the training set, (n, n).
        targets: Labels y, one model a row, (R, n), float64.
        batches: Indices of every step, (B,) each.
        coefficients: a, (R, n), float64.
        velocity: v, (R, n), float64.
        rates: Learning rate and momentum of each model, (R, 2), float64.
        outputs: C, the number of outputs over which the loss is averaged.
    """
    if kernel.device.type == "cpu":
        flat, stride = _flat(kernel)
        ends = np.cumsum([0, *map(len, batches)])
        state = coefficients.numpy(), velocity.numpy()
        order = torch.cat(list(batches)).numpy()
        with _torch_threads():
            _advance_cpu(flat, stride, targets.numpy(), order, ends, *state, rates.numpy(), outputs)
    else:
        _advance_torch(kernel, targets, batches, coefficients, velocity, rates, outputs)


def _advance_torch(
    kernel: Tensor,
    targets: Tensor,
    batches: Sequence[Tensor],
    coefficients: Tensor,
    velocity: Tensor,
    rates: Tensor,
    outputs: int,
) -> None:
    lr, momentum = rates[:, :1], rates[:, 1:]
    with own_precision(kernel.device.type):
        for batch in batches:
            batch = batch.to(kernel.device)
            residuals = coefficients.to(kernel.dtype) @ kernel[batch].T - targets[:, batch]
            velocity.mul_(momentum).index_add_(1, batch, residuals, alpha=2 / (len(batch) * outputs))
            coefficients.sub_(lr * velocity)


@numba.njit(parallel=True, cache=True, fastmath=_REASSOCIATE)
def _rows_product(
    flat: NDArray[np.floating],
    stride: int,
    rows: NDArray[np.int64],
    models: NDArray[np.floating],
    out: NDArray[np.floating],
) -> None:
    """out[r, i] = <row rows[i] of the matrix that starts at flat, models[r]>; four rows at once keep loads busy."""
    count, n = models.shape
    last = rows.size - 1
    for block in numba.prange((rows.size + 3) // 4):
        i0 = 4 * block
        i1, i2, i3 = min(i0 + 1, last), min(i0 + 2, last), min(i0 + 3, last)
        row0, row1 = flat[rows[i0] * stride :][:n], flat[rows[i1] * stride :][:n]
        row2, row3 = flat[rows[i2] * stride :][:n], flat[rows[i3] * stride :][:n]
        for r in range(count):
            model = models[r]
            sum0 = sum1 = sum2 = sum3 = flat.dtype.type(0)
            for j in range(n):
                sum0 += row0[j] * model[j]
                sum1 += row1[j] * model[j]
                sum2 += row2[j] * model[j]
                sum3 += row3[j] * model[j]
            out[r, i0], out[r, i1], out[r, i2], out[r, i3] = sum0, sum1, sum2, sum3


@numba.njit(cache=True, fastmath=_REASSOCIATE)
def _advance_cpu(
    flat: NDArray[np.floating],
    stride: int,
    targets: NDArray[np.float64],
    order: NDArray[np.int64],
    ends: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    velocity: NDArray[np.float64],
    rates: NDArray[np.float64],
    outputs: int,
) -> None:
    count, n = coefficients.shape
    models = np.empty((count, n), flat.dtype)
    models[:] = coefficients
    for step in range(ends.size - 1):
        batch = order[ends[step] : ends[step + 1]]
        scale = 2.0 / (batch.size * outputs)
        predictions = np.empty((count, batch.size), flat.dtype)
        _rows_product(flat, stride, batch, models, predictions)
        for r in range(count):
            lr, momentum = rates[r]
            velocity[r] *= momentum
            for i in range(batch.size):
                velocity[r, batch[i]] += scale * (predictions[r, i] - targets[r, batch[i]])
            coefficients[r] -= lr * velocity[r]
            models[r] = coefficients[r]


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Compute on as many threads as torch, and leave torch its number, which Numba's OpenMP layer overwrites."""
    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]  # set at import
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _flat(matrix: Tensor) -> tuple[NDArray[np.floating], int]:
    """View a matrix, or a corner of one, as a flat array and the distance of its rows in it."""
    if matrix.stride(1) != 1 or matrix.stride(0) < matrix.shape[1]:
        matrix = matrix.contiguous()
    rows, columns = matrix.shape
    stride = matrix.stride(0)
    return matrix.as_strided(((rows - 1) * stride + columns,), (1,)).numpy(), stride
