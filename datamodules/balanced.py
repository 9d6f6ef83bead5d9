"""Orders of a pool whose beginnings have every class equally often."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interleave"]


def interleave(order: Tensor, strata: Tensor) -> Tensor:
    """Sort an order by how often a sample's stratum came before it, and otherwise leave it.

    Round r of the result has the r-th sample of every stratum, as long as there is one: S strata come equally often in
    the first n samples, if S divides n and none is exhausted, and their numbers differ by at most one for any n.

    Args:
        order: (n,) positions of samples.
        strata: (N,) stratum of each sample, such as its class.

    Returns:
        The same positions, (n,).

    Example:
        >>> interleave(torch.tensor([2, 0, 1, 3]), torch.tensor([0, 0, 0, 1]))
        tensor([2, 3, 0, 1])
    """
    own = strata[order]
    rounds = torch.empty_like(order)
    for stratum in own.unique():
        members = own == stratum
        rounds[members] = torch.arange(int(members.sum()))
    return order[rounds.argsort(stable=True)]
