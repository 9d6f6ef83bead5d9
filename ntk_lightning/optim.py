"""One optimizer configuration for every arm of a comparison, and the learning rate above which it diverges."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

__all__ = ["OptimizerConfig", "critical_learning_rate"]


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent with momentum on the mean squared error, shared by networks and kernels.

    The defaults are this project's choice; the source paper's appendix with its values was not available.

    Args:
        lr: Learning rate for the loss mean_b (f(x_b) - y_b)^2.
        momentum: PyTorch's heavy-ball momentum mu: v <- mu v + g, w <- w - lr v.
        batch_size: Samples a step; the last batch of an epoch may be smaller.
        epochs: Passes over the training set; ignored where ``steps`` is given.
        steps: Total optimizer steps, instead of ``epochs``.
        full_batch: Use the whole training set in every step, whatever ``batch_size`` says.
        seed: Seed of the order of the samples; epoch e of any arm visits the same batches in the same order.

    Raises:
        TypeError: A value is not a number, or not a whole one where it must be.
        ValueError: A value is out of range.

    Example:
        >>> config = OptimizerConfig(batch_size=2)
        >>> [batch.tolist() for batch in config.batches(5, epoch=0)]
        [[1, 3], [0, 4], [2]]
    """

    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 200
    epochs: int = 20
    steps: int | None = None
    full_batch: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = name not in ("lr", "momentum")
            if not isinstance(value, Integral if whole else Real) and not (name == "steps" and value is None):
                raise TypeError(f"{name} must be a {'whole ' if whole else ''}number, got {value!r}.")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")

    def configure(self, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
        """Make the optimizer of a module's trainable parameters.

        Args:
            parameters: The parameters to train; frozen ones are left out.

        Returns:
            Plain SGD with this learning rate and momentum.
        """
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        return torch.optim.SGD(trainable, lr=self.lr, momentum=self.momentum)

    def steps_per_epoch(self, n: int) -> int:
        """Count the batches of one epoch.

        Args:
            n: Size of the training set.

        Returns:
            ceil(n / batch size).
        """
        return 1 if self.full_batch else -(-n // self.batch_size)

    def total_steps(self, n: int) -> int:
        """Count the optimizer steps of a whole run.

        Args:
            n: Size of the training set.

        Returns:
            ``steps`` where given, else ``epochs`` times the batches of an epoch.
        """
        return self.steps if self.steps is not None else self.epochs * self.steps_per_epoch(n)

    def batches(self, n: int, epoch: int) -> tuple[Tensor, ...]:
        """Give the index batches of one epoch: a random permutation of the training set, cut into batches.

        Args:
            n: Size of the training set.
            epoch: Number of the epoch, from 0. With the seed it fixes the permutation.

        Returns:
            int64 index tensors on the CPU, (batch_size,) each; the last may be shorter.
        """
        entropy = np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        return torch.split(torch.randperm(n, generator=generator), n if self.full_batch else self.batch_size)

    def schedule(self, n: int) -> Iterator[Tensor]:
        """Iterate over the index batches of a whole run, one a step.

        Args:
            n: Size of the training set.

        Yields:
            The batches of epoch 0, 1, ... up to the total number of steps.
        """
        remaining, epoch = self.total_steps(n), 0
        while remaining:
            for batch in self.batches(n, epoch)[:remaining]:
                yield batch
                remaining -= 1
            epoch += 1


def critical_learning_rate(
    kernel: Tensor | Callable[[Tensor], Tensor],
    n: int | None = None,
    momentum: float = 0.0,
    *,
    tolerance: float = 1e-6,
    max_products: int = 300,
    seed: int = 0,
) -> float:
    """Find the learning rate above which full-batch gradient descent on a kernel model diverges.

    (1 + mu) n / lambda_max(K): with f <- f - lr v and v <- mu v + (2 / n) K (f - y), an eigenvalue lambda is stable
    while 2 lr lambda / n < 2 (1 + mu). Polyak (1964), "Some methods of speeding up the convergence of iteration
    methods". lambda_max comes from the Lanczos iteration with full reorthogonalization (Golub and Van Loan, "Matrix
    Computations", chapter 10), which approaches it from below. Mini-batches can diverge at lower rates. A loss that
    is also averaged over C outputs multiplies the critical rate by C.

    Args:
        kernel: Gram of the training set (n, n), symmetric positive semidefinite, or a function that multiplies it by a
            vector (n,).
        n: Size of the training set; needed with a function.
        momentum: PyTorch's heavy-ball momentum mu.
        tolerance: Relative bound on the error of lambda_max at which Lanczos stops.
        max_products: Products with the kernel at most.
        seed: Seed of the start vector.

    Returns:
        The critical learning rate, infinite for the zero kernel.

    Raises:
        ValueError: An argument is out of range, ``n`` is missing, or the products are not finite.
        RuntimeError: Lanczos did not reach the tolerance.

    Example:
        >>> round(critical_learning_rate(torch.diag(torch.tensor([4.0, 1.0])), momentum=0.5), 6)
        0.75
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}.")
    multiply: Callable[[Tensor], Tensor]
    if isinstance(kernel, Tensor):
        matrix = kernel.detach()
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or n not in (None, len(matrix)):
            raise ValueError(f"kernel must be a square Gram (n, n) of n={n} samples, got {tuple(matrix.shape)}.")
        n, device, multiply = len(matrix), matrix.device, lambda vector: matrix @ vector.to(matrix.dtype)
    else:
        multiply, device = kernel, torch.device("cpu")
    if n is None or n < 1:
        raise ValueError("Pass n, the size of the training set, with a function that multiplies by the kernel.")
    largest = _largest_eigenvalue(multiply, n, tolerance, max_products, seed, device)
    return (1 + momentum) * n / largest if largest > 0 else float("inf")


def warn_above_critical(
    kernel: Tensor, optimizers: Sequence[OptimizerConfig], num_outputs: int = 1, *, stacklevel: int = 2
) -> None:
    """Warn about the learning rate that is the farthest above the one at which full-batch descent diverges.

    Args:
        kernel: Gram of the training set, (n, n).
        optimizers: Configs of the fits.
        num_outputs: Outputs over which the loss is averaged.
        stacklevel: Of the warning, as for ``warnings.warn``.
    """
    critical = num_outputs * critical_learning_rate(kernel, tolerance=1e-2)
    worst = max(optimizers, key=lambda o: o.lr / (1 + o.momentum))
    ratio = worst.lr / (1 + worst.momentum) / critical
    if ratio > 1:
        warnings.warn(
            f"lr={worst.lr:g} is {ratio:.3g} times the critical learning rate {worst.lr / ratio:.3g} of this kernel "
            f"({len(kernel)} samples, momentum {worst.momentum:g}): expect divergence.",
            stacklevel=stacklevel,
        )


def _largest_eigenvalue(
    multiply: Callable[[Tensor], Tensor], n: int, tolerance: float, max_products: int, seed: int, device: torch.device
) -> float:
    """Largest eigenvalue of a symmetric matrix from its products with vectors."""
    vector = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    below: list[float] = []
    for _ in range(min(n, max_products)):
        product = multiply(basis[-1]).to(device, torch.float64)
        diagonal.append(float(basis[-1] @ product))
        vectors = torch.stack(basis)
        for _ in range(2):  # once is not orthogonal to rounding
            product = product - vectors.T @ (vectors @ product)
        below.append(float(product.norm()))
        if not np.isfinite([diagonal[-1], below[-1]]).all():
            raise ValueError("Products with the kernel are not finite: check it for NaN and infinite entries.")
        values, ritz = eigh_tridiagonal(diagonal, below[:-1])
        scale = max(abs(values))
        if below[-1] * abs(ritz[-1, -1]) <= tolerance * scale or len(basis) == n:
            return float(values[-1])
        basis.append(product / below[-1])
    raise RuntimeError(
        f"Lanczos has not found the largest eigenvalue to {tolerance:g} in {max_products} products: raise max_products "
        "or tolerance."
    )
