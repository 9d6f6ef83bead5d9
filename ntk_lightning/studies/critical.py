"""Critical learning rates of a study's kernels, measured before any cell runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from torch import Tensor

from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.spectrum import critical_learning_rate
from ntk_lightning.studies.build import compute_device, set_up
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.config import StudyConfig
from ntk_lightning.studies.schema import WIDTH_FREE
from ntk_lightning.studies.shared_gram import infinite_kernel

__all__ = ["CriticalRate", "critical_rates", "print_critical_rates", "tell_above_critical"]

MOST = 256  # samples that a rate is measured on: lambda_max / n hardly falls beyond, so the rate hardly rises


@dataclass(frozen=True)
class CriticalRate:
    """The learning rate above which full-batch descent diverges, for one arm, size, width and seed.

    Args:
        arm: Label of the arm; a network's rate is that of its kernel at initialization.
        n: Training samples.
        width: Of the network; None where it is infinite.
        seed: Of subset and weights.
        rate: (1 + mu) n / lambda_max, from the Gram of the first 256 samples where n is more.
        lr: The learning rate of the arm.
    """

    arm: str
    n: int
    width: int | None
    seed: int
    rate: float
    lr: float


def critical_rates(config: StudyConfig, seeds: Sequence[int] | None, memory: str) -> list[CriticalRate]:
    """Measure the critical learning rates of all arms of a study.

    Args:
        config: The study.
        seeds: Seeds to measure on; None for those of the study.
        memory: Budget of an extraction of an empirical NTK, such as "4GB".

    Returns:
        One for each arm, size, width, seed, learning rate and momentum.
    """
    if seeds is not None:
        grid = replace(config.grid, seed=[*seeds])
        arms = [replace(arm, grid=replace(arm.grid, seed=None)) for arm in config.arms]
        config = replace(config, grid=grid, arms=arms)
    grams: dict[tuple[str, int | None, int], Tensor] = {}
    rates = []
    cells = config.cells()
    most = min(MOST, max(cell.n for group in cells.values() for cell in group))
    for label, group in cells.items():
        for cell in group:
            model = cell.model if cell.model in WIDTH_FREE else "empirical"
            key = (model, cell.width, cell.seed)
            if key not in grams:
                grams[key] = _gram(cell, most, memory)
            n = min(cell.n, most)
            rate = critical_learning_rate(grams[key][:n, :n], momentum=cell.optimizer.momentum, tolerance=1e-3)
            rates.append(CriticalRate(label, cell.n, cell.width, cell.seed, rate, cell.optimizer.lr))
    return list(dict.fromkeys(rates))  # several budgets of epochs have one rate


def print_critical_rates(config: StudyConfig, seeds: Sequence[int], memory: str) -> float:
    """Print the critical learning rates of a study, to choose one below all of them.

    Args:
        config: The study.
        seeds: Seeds to measure on, best such as the study does not use.
        memory: Budget of an extraction of an empirical NTK.

    Returns:
        Half the smallest.
    """
    rates = critical_rates(config, seeds, memory)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(f"Critical learning rates of {config.name}, least and largest of seeds {', '.join(map(str, seeds))}:")
    groups = dict.fromkeys((each.arm, each.n, each.width) for each in rates)
    for arm, n, width in groups:
        group = [each.rate for each in rates if (each.arm, each.n, each.width) == (arm, n, width)]
        of_width = "" if width is None else f", width {width}"
        measured = f" (measured on {MOST})" if n > MOST else ""
        console.print(f"  {arm}{of_width}, n {n}{measured}: {min(group):.3g} to {max(group):.3g}")
    half = min(each.rate for each in rates) / 2
    console.print(f"Half the smallest: {half:.3g}. Mini-batches can diverge below the critical rate of full batches.")
    return half


def tell_above_critical(config: StudyConfig, memory: str) -> list[str]:
    """Print which arms of a study have a learning rate above the critical one of their kernel.

    Args:
        config: The study.
        memory: Budget of an extraction of an empirical NTK.

    Returns:
        The labels of those arms.
    """
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    above = []
    worst = {each.arm: each for each in sorted(critical_rates(config, None, memory), key=lambda r: r.lr / r.rate)}
    for label in (arm.label for arm in config.arms):
        each = worst[label]
        if each.lr > each.rate:
            above.append(label)
            width = "" if each.width is None else f", width {each.width}"
            console.print(
                f"{config.name}: lr {each.lr:g} of {label} is {each.lr / each.rate:.3g} times the critical learning "
                f"rate {each.rate:.3g} of its kernel (n {each.n}{width}, seed {each.seed}): expect divergence."
            )
    if not above:
        share = max(each.lr / each.rate for each in worst.values())
        console.print(f"{config.name}: all learning rates are below critical, at most {share:.2g} of it.")
    return above


def _gram(cell: Cell, n: int, memory: str) -> Tensor:
    """The Gram of a cell's kernel on the first n samples of its subset."""
    arguments = {**cell.data.get("init_args", {}), "n_train": n, "fresh": 0}
    data, net = set_up(replace(cell, data={**cell.data, "init_args": arguments}))
    assert data.train_set is not None
    x = data.train_set.x.to(compute_device())
    if cell.model in WIDTH_FREE:
        return infinite_kernel(cell)(x)
    gram: Tensor = evaluation_ntk(net.to(x.device), memory)(x)
    return gram
