"""Loss and error rate of a data set, summed over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from ntk_lightning.objective import count_errors, squared_error

__all__ = ["LossAndError"]


class LossAndError(Metric):
    """Mean squared error and error rate over all samples seen, whatever the sizes of their batches.

    Example:
        >>> metric = LossAndError()
        >>> metric.update(torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [1.0]]))
        >>> metric.compute()
        {'loss': tensor(2.), 'error': tensor(0.5000)}
    """

    full_state_update = False
    totals: Tensor  # (3,): sum of the losses, number of errors, number of samples

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(3), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add the samples of one batch.

        Args:
            outputs: (b, num_outputs).
            targets: (b, num_outputs).
        """
        errors = count_errors(outputs, targets).sum()
        loss = squared_error(outputs, targets).sum()
        totals = torch.stack([loss, errors, errors.new_full((), len(targets))])
        self.totals = self.totals + totals  # not in place, which would round float64 to the state's float32

    def compute(self) -> dict[str, Tensor]:
        """Average over the samples.

        Returns:
            "loss" and "error", the fraction misclassified.
        """
        loss, errors, count = self.totals
        return {"loss": loss / count, "error": errors / count}

    def load_share(self, totals: Tensor, rank: int, world_size: int) -> None:
        """Restore sums that were saved, also by another number of processes.

        Args:
            totals: The ``totals`` of each saved process, stacked or as gathered from a single one.
            rank: Number of this process.
            world_size: Number of processes now.
        """
        rows = totals.reshape(-1, *self.totals.shape)  # one a saved process
        self.totals = rows[rank::world_size].sum(0)  # each saved row is taken by one process
