"""A kernel fitted on nested training sets, the same way wherever the kernel comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ntk_lightning.datamodules import Samples
from ntk_lightning.kernels.grams.gram_and_cross import GramAndCross
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import KernelFit, kernel_sgd

__all__ = ["NestedProblem", "check_sizes", "fit_nested"]


@dataclass(frozen=True, eq=False)
class NestedProblem:
    """The Grams that fits on the first n training samples are cut from, for every n up to N.

    Args:
        gram: Kernel of N training samples, (N, N).
        targets: Their targets, (N,) or (N, C).
        sets: By name, "test" and perhaps "val": kernel (m, N) of new points and their targets.
    """

    gram: Tensor
    targets: Tensor
    sets: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def compute(
        cls,
        grams: GramAndCross,
        train: Samples,
        evaluation: dict[str, Samples],
        n: int,
    ) -> NestedProblem:
        """Compute both Grams, in one pass over the evaluation sets.

        Args:
            grams: Gives the kernel of n training inputs, (n, n), and those of other inputs with them, (m, n).
            train: The training set.
            evaluation: The "test" set, and the "val" set if there is one.
            n: The largest size to fit, N.

        Returns:
            The problem.
        """
        gram, *crosses = grams(train.x[:n], *(samples.x for samples in evaluation.values()))
        sets = {name: (part, samples.y) for (name, samples), part in zip(evaluation.items(), crosses, strict=True)}
        return cls(gram, train.y[:n], sets)

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
        sets = {name: (kernel[:, :n], targets) for name, (kernel, targets) in self.sets.items()}
        return kernel_sgd(
            self.gram[:n, :n],
            self.targets[:n],
            optimizer,
            test=sets["test"],
            val=sets.get("val"),
            eval_every=every if steps is None else steps,
        )


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


def fit_nested(
    grams: GramAndCross,
    train: Samples,
    evaluation: dict[str, Samples],
    optimizer: OptimizerConfig,
    sizes: Sequence[int],
    epochs_between: float = 1.0,
) -> dict[int, KernelFit]:
    """Fit a kernel by SGD on the first n training samples, for several n.

    Args:
        grams: As of :meth:`NestedProblem.compute`.
        train: The largest training set.
        evaluation: The "test" set, and the "val" set if there is one.
        optimizer: The same as the network's.
        sizes: Sizes of the nested training sets, increasing.
        epochs_between: Epochs between two evaluations.

    Returns:
        The fit of each size.
    """
    problem = NestedProblem.compute(grams, train, evaluation, sizes[-1])
    return {n: problem.sgd(n, optimizer, epochs_between=epochs_between) for n in sizes}
