"""Regularized ZCA whitening, as the kernel literature prepares CIFAR-10."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.atomic_files import atomic_write
from ntk_lightning.datamodules.cache import ADVICE, cache_folder, locked
from ntk_lightning.progress import progress_bar

__all__ = ["check_zca", "zca_whitening"]

_CHUNK = 1024  # samples of the pool that are in float64 at a time
_ROWS = 256  # samples whitened at a time, always as many: a sample's last digits do not depend on how many there are
_KEPT = 1024  # a matrix of this side takes seconds to decompose, and is kept
_CONSTANT = 1e-18  # so little variance beside the squared mean is rounding


def check_zca(zca: float | None) -> None:
    """Check the regularization.

    Args:
        zca: What was given; None for no whitening.

    Raises:
        TypeError: It is no number.
        ValueError: It is not positive and finite.
    """
    if zca is None:
        return
    if isinstance(zca, bool) or not isinstance(zca, (int, float)):
        raise TypeError(f"zca must be a number such as 0.1, got {zca!r}.")
    if not (isfinite(zca) and zca > 0):
        raise ValueError(f"zca must be positive, got {zca}: 0.1 is usual; directions without variance need some.")


def zca_whitening(
    chunk: Callable[[slice], Tensor], n: int, zca: float, folder: Path | None = None
) -> Callable[[Tensor], Tensor]:
    """Estimate mean and covariance of a pool, and make the function that whitens by them.

    With mean mu and covariance C = U diag(lambda) U' of the n flattened samples of d entries, and
    e = zca * mean(lambda), a sample becomes (x - mu) W, W = U diag((lambda + e)^(-1/2)) U' (Shankar et al., 2020, arXiv
    2003.02237; Nguyen et al., 2021, arXiv 2107.13034). The pool's covariance is then U diag(lambda / (lambda + e)) U'.

    All of it is computed in float64 on one thread, so that last digits, and with them the names of stored Grams, do not
    depend on the number of threads. What takes long is kept in a folder, by the contents of the pool.

    Args:
        chunk: Gives those samples of the pool that a slice selects, (b, ...).
        n: Samples in the pool.
        zca: Regularization as a fraction of the mean eigenvalue.
        folder: Where decompositions of large matrices are kept; by default ``zca`` in the cache folder.

    Returns:
        Maps samples (m, ...) to whitened ones of the same shape, float32.

    Raises:
        ValueError: All samples of the pool are equal.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # eigenvalues 4.5 and 0.5
        >>> zca_whitening(x.__getitem__, 4, 0.2)(x[::2])
        tensor([[1.3416, 0.0000],
                [0.0000, 1.0000]])
    """
    slices = [slice(start, min(start + _CHUNK, n)) for start in range(0, n, _CHUNK)]
    with _one_thread():
        mean, name = _mean(chunk, slices)
        d = mean.numel()

        def centered(rows: slice) -> Tensor:
            return chunk(rows).flatten(1).double() - mean

        # n < d: from the Gram of the samples X (n, n), W = e^(-1/2) 1 + X' A X, without any matrix of d x d
        pool = torch.cat([centered(rows) for rows in slices]) if n < d else None

        def decompose() -> Tensor:
            if pool is None:
                moment = torch.zeros(d, d, dtype=torch.float64)
                with progress_bar("covariance of the images", n, "images") as advance:
                    for rows in slices:
                        x = centered(rows)
                        moment.addmm_(x.T, x)
                        advance(len(x))
            else:
                moment = pool @ pool.T
            moment /= n
            if moment.trace() <= _CONSTANT * mean.square().sum():
                raise ValueError(
                    f"zca = {zca}: all {n} samples of the training pool are equal, nothing can be whitened."
                )
            e = zca * moment.trace() / d
            values, vectors = torch.linalg.eigh(moment)
            root, least = (values.clamp(min=0) + e).sqrt(), e.sqrt()
            # n < d: (lambda + e)^(-1/2) - e^(-1/2), divided by n lambda for X' A X, is free of cancellation like this
            scale = 1 / root if pool is None else -1 / (n * least * root * (least + root))
            matrix: Tensor = (vectors * scale) @ vectors.T
            return matrix

        matrix = (
            _kept(decompose, (folder or cache_folder() / "zca") / f"{name}-{zca!r}.npy")
            if min(n, d) >= _KEPT
            else decompose()
        )
        e = zca * (torch.ones(()) if pool is None else pool.square().sum() / (n * d))

    def whiten(samples: Tensor) -> Tensor:
        out = torch.empty(samples.shape)
        with _one_thread():
            for part, whitened in zip(samples.split(_ROWS), out.split(_ROWS), strict=True):
                x = F.pad(part.flatten(1).double() - mean, (0, 0, 0, _ROWS - len(part)))
                y = x @ matrix if pool is None else x / e.sqrt() + x @ pool.T @ matrix @ pool
                whitened.copy_(y[: len(part)].reshape(part.shape))
        return out

    return whiten


def _mean(chunk: Callable[[slice], Tensor], slices: list[slice]) -> tuple[Tensor, str]:
    """Mean (d,) of the samples, and a name of their contents."""
    total, name = torch.zeros((), dtype=torch.float64), hashlib.blake2b(digest_size=16)
    for rows in slices:
        x = chunk(rows).flatten(1)
        total = total + x.double().sum(0)
        name.update(x.contiguous().numpy().data)
    return total / slices[-1].stop, name.hexdigest()


def _kept(compute: Callable[[], Tensor], path: Path) -> Tensor:
    """Read a matrix that was computed before, by this or another process, or compute it and keep it."""
    with locked(path):
        if not path.exists():
            with atomic_write(path, ADVICE) as temporary, temporary.open("wb") as file:
                np.save(file, compute().numpy())
        return torch.from_numpy(np.load(path, allow_pickle=False))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
