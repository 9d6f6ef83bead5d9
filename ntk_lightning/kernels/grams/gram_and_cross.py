"""The kernel matrices that a fit needs, as one function: a training set's Gram and other sets' kernels with it.

A :class:`GramAndCross` is what every fit asks. :func:`gram_and_cross` makes one that computes in this process,
:func:`~ntk_lightning.kernels.grams.distributed.distributed_gram_and_cross` divides one among the processes of a run,
and :func:`~ntk_lightning.kernels.grams.stored.stored_gram_and_cross` keeps what is computed in a store.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["GramAndCross", "JointKernel", "Kernel", "gram_and_cross"]


class Kernel(Protocol):
    """Maps inputs (n1, ...) and (n2, ...) to their kernel (n1, n2), or (n1, ...) alone to its symmetric Gram."""

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the kernel of x1 with x2, or of x1 with itself."""
        ...


class GramAndCross(Protocol):
    """Maps training inputs (n, ...) and any number of other inputs (m, ...) to (n, n) and, for each other, (m, n)."""

    def __call__(self, x_train: Tensor, /, *x_others: Tensor) -> tuple[Tensor, ...]:
        """Compute the Gram of the training inputs, then the kernel of each of the others with them."""
        ...


@runtime_checkable
class JointKernel(Protocol):
    """A kernel that computes both matrices in one pass, as EmpiricalNTK forms the training set's gradients once."""

    def gram_and_cross(self, x_train: Tensor, /, *x_others: Tensor, progress: bool = False) -> tuple[Tensor, ...]:
        """Compute what a :class:`GramAndCross` computes."""
        ...


def gram_and_cross(kernel: Kernel, *, progress: bool = False) -> GramAndCross:
    """Make the function that computes a kernel's two matrices in this process.

    Args:
        kernel: Any kernel; the two are computed in one pass where it is a :class:`JointKernel`.
        progress: Show a progress bar, on rank zero.

    Returns:
        The function.

    Example:
        >>> import torch
        >>> linear = lambda x1, x2=None, *, progress=False: x1 @ (x1 if x2 is None else x2).T
        >>> gram, cross = gram_and_cross(linear)(torch.eye(2), torch.ones(1, 2))
        >>> cross
        tensor([[1., 1.]])
    """
    if isinstance(kernel, JointKernel):
        return partial(kernel.gram_and_cross, progress=progress)

    def one_by_one(x_train: Tensor, /, *x_others: Tensor) -> tuple[Tensor, ...]:
        return kernel(x_train, progress=progress), *(kernel(x, x_train, progress=progress) for x in x_others)

    return one_by_one
