"""What a kernel fit is: coefficients that predict, and the curves of its errors and losses over training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ntk_lightning.objective import count_errors, squared_error
from ntk_lightning.precision import own_precision

__all__ = ["Curve", "EvaluationSet", "KernelFit", "KernelModel", "error_and_loss"]


class EvaluationSet(NamedTuple):
    """A set of new points that a fit is evaluated on.

    Attributes:
        kernel: Kernel between the new points and the training set, (m, n).
        targets: Labels of the new points, (m,) or (m, C).
    """

    kernel: Tensor
    targets: Tensor


class Curve(NamedTuple):
    """Error and loss on one set at the k evaluations of a fit.

    Attributes:
        errors: Fraction of the set that is misclassified, (k,), float64; None for real targets of one output, which
            have no error rate.
        losses: Mean squared error, (k,), float64.
    """

    errors: Tensor | None
    losses: Tensor

    @property
    def criterion(self) -> Tensor:
        """What early stopping minimizes: the errors, or the losses where targets are real, (k,)."""
        return self.losses if self.errors is None else self.errors


@dataclass(frozen=True, eq=False)
class KernelModel:
    """A kernel model f(x) = sum_i K(x, x_i) a_i.

    Args:
        coefficients: a, (n,) or (n, C).
    """

    coefficients: Tensor

    def predict(self, kernel_rows: Tensor) -> Tensor:
        """Predict at new points, f = K(x, X) a, in the kernel's precision (inside autocast too).

        Args:
            kernel_rows: Kernel between new points and the training set, (m, n).

        Returns:
            f at the new points, (m,) or (m, C), in the dtype of ``kernel_rows``.
        """
        with own_precision(kernel_rows.device.type):
            return kernel_rows @ self.coefficients.to(kernel_rows)


@dataclass(frozen=True, eq=False)
class KernelFit(KernelModel):
    """A kernel model f(x) = sum_i K(x, x_i) a_i fitted by gradient steps, and its curves over training.

    The optimal early stopping of the source paper picks the step by the test error itself: it is an oracle, so the last
    error and the error at the best validation step stand beside it. Real targets of one output have losses but no error
    rate: steps are then chosen by the loss, and the properties named after errors raise.

    Args:
        coefficients: The last coefficients a, (n,) or (n, C), float64.
        steps: Optimizer steps, or times, of the evaluations, (k,), increasing.
        curves: Errors and losses at these steps, by set: "test" and "val" where given, "train" where asked for.
        diverged: Whether a coefficient became infinite or NaN; errors from there on are 1, losses infinite.
        critical_lr: Of a fit by SGD: the learning rate above which full-batch descent on this Gram diverges, to 1%.

    Example:
        >>> curve = Curve(errors=torch.tensor([0.25, 0.5]), losses=torch.tensor([0.75, 1.0]))
        >>> fit = KernelFit(torch.zeros(2), torch.tensor([10, 20]), {"test": curve})
        >>> fit.optimal_error, fit.optimal_step, fit.last_error, fit.optimal_loss
        (0.25, 10, 0.5, 0.75)
    """

    steps: Tensor
    curves: dict[str, Curve] = field(default_factory=dict)
    diverged: bool = False
    critical_lr: float | None = None

    @property
    def optimal_error(self) -> float:
        """The least test error of all evaluations: optimal early stopping.

        Raises:
            ValueError: There is no test set, or its targets are real.
        """
        return float(self._errors().min())

    @property
    def optimal_step(self) -> int | float:
        """The first step with the least test error; with the least test loss where targets are real.

        Raises:
            ValueError: There is no test set.
        """
        return self.steps[self._curve("test").criterion.argmin()].item()

    @property
    def last_error(self) -> float:
        """The test error of the last evaluation.

        Raises:
            ValueError: There is no test set, or its targets are real.
        """
        return float(self._errors()[-1])

    @property
    def validated_error(self) -> float:
        """The test error at the first step with the least validation error.

        Raises:
            ValueError: There is no test or no validation set, or their targets are real.
        """
        return float(self._errors()[self._curve("val").criterion.argmin()])

    @property
    def optimal_loss(self) -> float:
        """The least test loss of all evaluations.

        Raises:
            ValueError: There is no test set.
        """
        return float(self._curve("test").losses.min())

    @property
    def last_loss(self) -> float:
        """The test loss of the last evaluation.

        Raises:
            ValueError: There is no test set.
        """
        return float(self._curve("test").losses[-1])

    @property
    def validated_loss(self) -> float:
        """The test loss at the first step with the least validation loss.

        Raises:
            ValueError: There is no test or no validation set.
        """
        return float(self._curve("test").losses[self._curve("val").losses.argmin()])

    def _curve(self, name: str) -> Curve:
        curve = self.curves.get(name)
        if curve is None or not len(curve.losses):
            raise ValueError(f"This fit has no {name} curve: pass {name}=(kernel, targets), and evaluate once.")
        return curve

    def _errors(self) -> Tensor:
        errors = self._curve("test").errors
        if errors is None:
            raise ValueError("Real targets have no error rate: ask for optimal_loss, last_loss or validated_loss.")
        return errors


def error_and_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute classification error and mean squared error.

    The errors and losses of :mod:`ntk_lightning.objective`, the same as every network's. A set with a NaN or infinite
    prediction has error 1: its model has diverged.

    Args:
        predictions: f, (..., m, C).
        targets: y, (..., m, C).

    Returns:
        The fraction of errors and the mean over samples and outputs of (f - y)^2, both (...,).

    Example:
        >>> error_and_loss(torch.tensor([[0.5], [-1.0]]), torch.tensor([[1.0], [1.0]]))
        (tensor(0.5000, dtype=torch.float64), tensor(2.1250))
    """
    finite = torch.isfinite(predictions).all(-1).all(-1)
    errors = torch.where(finite, count_errors(predictions, targets).double().mean(-1), 1.0)
    losses = torch.where(finite, squared_error(predictions, targets).mean(-1), torch.inf)
    return errors, losses
