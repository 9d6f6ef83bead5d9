"""A kernel fitted on nested training sets, the same way wherever the kernel comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ntk_lightning.datamodules import Samples
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit, gradient_flow, kernel_sgd, ridge
from ntk_lightning.solvers.kernel_fit import Curve

__all__ = ["FIT_NAMES", "FitKind", "NestedProblem", "check_sizes", "flow_times"]

FitKind = Literal["sgd", "flow", "ridge"]
FIT_NAMES: dict[FitKind, str] = {"sgd": "SGD", "flow": "gradient flow", "ridge": "ridge regression"}

_TIMES, _RIDGES = 200, 25


@dataclass(frozen=True, eq=False)
class NestedProblem:
    """The Grams that fits on the first n training samples are cut from, for every n up to N.

    Args:
        gram: Kernel of N training samples, (N, N).
        targets: Their targets, (N,) or (N, C).
        sets: By name, "test" and perhaps "val": kernel (m, N) of new points and their targets.
        real: The targets are real values, which have losses alone.
    """

    gram: Tensor
    targets: Tensor
    sets: dict[str, tuple[Tensor, Tensor]]
    real: bool = False

    @classmethod
    def compute(
        cls,
        grams: GramAndCross,
        train: Samples,
        evaluation: dict[str, Samples],
        n: int,
        real: bool = False,
    ) -> NestedProblem:
        """Compute both Grams, in one pass over the evaluation sets.

        Args:
            grams: Gives the kernel of n training inputs, (n, n), and those of other inputs with them, (m, n).
            train: The training set.
            evaluation: The "test" set, and the "val" set if there is one.
            n: The largest size to fit, N.
            real: As of the problem.

        Returns:
            The problem.
        """
        first = train.take(slice(n))
        gram, *crosses = grams(*(_argument(samples.x) for samples in (first, *evaluation.values())))
        sets = {name: (part, samples.y) for (name, samples), part in zip(evaluation.items(), crosses, strict=True)}
        return cls(gram, first.y, sets, real)

    def sgd(
        self, n: int, optimizer: OptimizerConfig, *, epochs_between: float = 1.0, steps: Sequence[int] | None = None
    ) -> KernelFit:
        """Fit the first n samples by kernel SGD.

        Args:
            n: How many.
            optimizer: The same as the network's.
            epochs_between: Epochs between two evaluations.
            steps: Evaluate after these steps instead.

        Returns:
            The fit.
        """
        every = max(1, round(optimizer.steps_per_epoch(n) * epochs_between))
        eval_every = every if steps is None else steps
        return kernel_sgd(*self._first(n), optimizer, **self._sets(n), eval_every=eval_every)

    def flow(self, n: int) -> KernelFit:
        """Fit the first n samples by gradient flow, at times that contain the best.

        Args:
            n: How many.

        Returns:
            The fit; its ``steps`` are times.
        """
        gram, targets = self._first(n)
        values, vectors = torch.linalg.eigh(gram.double())
        values = values.clamp_min(0)  # below zero is rounding, which would grow without bound
        times = flow_times(values, targets.numel(), torch.finfo(gram.dtype).eps)
        return gradient_flow(gram, targets, times, **self._sets(n), eigensystem=(values, vectors))

    def ridge(self, n: int) -> KernelFit:
        """Fit the first n samples by ridge regression with several regularizations, the largest first.

        Args:
            n: How many.

        Returns:
            The fits as one, with the last one's coefficients; its ``steps`` are regularizations.
        """
        gram, targets = self._first(n)
        largest = float(torch.linalg.eigvalsh(gram.double())[-1])
        smallest = max(10 * len(gram) * torch.finfo(gram.dtype).eps, 1e-10)  # of the eigenvalues: below it is rounding
        shares = torch.logspace(1, math.log10(smallest), _RIDGES, dtype=torch.float64)
        regularizations = shares * largest / n
        fits = [ridge(gram, targets, float(each), **self._sets(n)) for each in regularizations]
        curves = {}
        for name in fits[0].curves:
            errors, losses = zip(*(fit.curves[name] for fit in fits), strict=True)
            curves[name] = Curve(None if self.real else torch.cat(errors), torch.cat(losses))
        return KernelFit(fits[-1].coefficients, regularizations, curves)

    def _first(self, n: int) -> tuple[Tensor, Tensor]:
        return self.gram[:n, :n], self.targets[:n]

    def _sets(self, n: int) -> dict[str, Any]:
        """The solvers' keyword arguments."""
        sets = {name: (kernel[:, :n], targets) for name, (kernel, targets) in self.sets.items()}
        return {**sets, "real": self.real}


def flow_times(eigenvalues: Tensor, num_targets: int, precision: float) -> list[float]:
    """Choose times of gradient flow, from before anything is learned until all that a Gram knows is.

    An eigenvector with eigenvalue lambda is learned at the rate 2 lambda / (n C).

    Args:
        eigenvalues: Of the Gram, (n,), increasing.
        num_targets: n C.
        precision: Relative rounding of the Gram's entries.

    Returns:
        0, and logarithmically spaced times.

    Example:
        >>> times = flow_times(torch.tensor([1.0, 4.0], dtype=torch.float64), 2, 1e-7)
        >>> times[0], round(times[1], 6), round(times[-1], 6)
        (0.0, 0.0025, 10.0)
    """
    rates = 2 * eigenvalues / num_targets
    fastest = max(float(rates[-1]), torch.finfo(torch.float64).tiny)
    slowest = max(float(rates[0]), len(rates) * precision * fastest)  # below that an eigenvalue is rounding
    start, end = math.log10(0.01 / fastest), math.log10(10 / slowest)
    return [0.0, *torch.logspace(start, end, _TIMES, dtype=torch.float64).tolist()]


def _argument(x: Any) -> Any:  # noqa: ANN401 - a tensor stays one; of other inputs samples can then be taken
    return x if isinstance(x, Tensor) else Inputs.of(x)


def check_sizes(sizes: Sequence[int] | None, n: int, what: str) -> list[int]:
    """Check the sizes of nested training sets.

    Args:
        sizes: Sizes asked for, or None for the whole set.
        n: Samples that there are.
        what: Name of the set, for the message.

    Returns:
        The sizes, increasing.

    Raises:
        ValueError: A size is below 1 or above n.
    """
    chosen = sorted(set(sizes)) if sizes else [n]
    if chosen[0] < 1 or chosen[-1] > n:
        raise ValueError(f"Fit sizes {chosen} must lie between 1 and the {n} samples of the {what} set.")
    return chosen
