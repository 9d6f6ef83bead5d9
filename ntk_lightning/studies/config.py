"""A study's configuration: its arms, the grid of every axis, its figure, and the cells that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, Literal

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.cell_config import Cell
from ntk_lightning.studies.schema import AFTER, DURING, FRESH, WIDTH_FREE, Axis, Kernel, Model, Value

__all__ = ["Arm", "FigureConfig", "Grid", "StudyConfig"]


@dataclass(frozen=True)
class Grid:
    """Values of every axis; a study runs all combinations. An arm's own values replace the study's.

    Args:
        n: Training samples, nested: the first n in one order of the pool.
        width: Channels or units of the finite networks.
        seed: Fixes the training subset, the initial weights and the batches together.
        lr: Learning rates.
        momentum: Momenta.
        batch_size: Samples a step.
        full_batch: Whether a step takes the whole training set.
        epochs: Passes over the training set, after each of which the test set is measured.
    """

    n: list[int] | None = None
    width: list[int] | None = None
    seed: list[int] | None = None
    lr: list[float] | None = None
    momentum: list[float] | None = None
    batch_size: list[int] | None = None
    full_batch: list[bool] | None = None
    epochs: list[int] | None = None


@dataclass(frozen=True)
class Arm:
    """One curve of a figure: a model over the grid, and the kernels to extract from it.

    Args:
        label: Its name in legends and tables.
        model: "network"; "empirical", its NTK at initialization; "infinite" or "nngp", the kernels at infinite width;
            "order 2" or "order 3", its Taylor expansions, trained.
        grid: Values of axes that differ from the study's.
        after: Fit the network's after-kernel K_m on the first n of its m training samples, for each n given; "m" is m.
        after_fresh: The same on fresh samples, K_m^F.
        kernels_at: Fit the network's kernel K^t at these steps t, or at so many logarithmically spaced ones.
        until_train_error: Stop the network where its training error has fallen to this fraction.
        evaluate_every: Measure a network in training, and decide whether it stops, every so many epochs, a divisor of
            their number: on few images the test set is dearer than the training.
        show: Which of the arm's models belong to the figure: "network", "after-kernel", "after-kernel, fresh", "kernel
            during training"; by default all.

    Raises:
        ValueError: A value is out of range, or asks for a kernel that the arm does not make.
    """

    label: str
    model: Model = "network"
    grid: Grid = field(default_factory=Grid)
    after: list[int | Literal["m"]] = field(default_factory=list)
    after_fresh: list[int | Literal["m"]] = field(default_factory=list)
    kernels_at: int | list[int] | None = None
    until_train_error: float | None = None
    evaluate_every: int = 1
    show: list[Model | Kernel] | None = None

    def __post_init__(self) -> None:
        given = {
            "after": bool(self.after),
            "after_fresh": bool(self.after_fresh),
            "kernels_at": self.kernels_at is not None,
            "until_train_error": self.until_train_error is not None,
        }
        asked = [name for name, is_given in given.items() if is_given]
        if asked and self.model != "network":
            raise ValueError(f"Arm {self.label!r} of model {self.model!r} cannot have {asked}: only a network can.")
        for name, sizes in (("after", self.after), ("after_fresh", self.after_fresh)):
            if any(size != "m" and size < 1 for size in sizes):
                raise ValueError(f'{name} of arm {self.label!r} must be sizes of at least 1, or "m", got {sizes}.')
        steps = [self.kernels_at] if isinstance(self.kernels_at, int) else self.kernels_at
        if steps is not None and min(steps, default=0) < 1:
            raise ValueError(
                f"kernels_at of arm {self.label!r} must be steps of at least 1, or how many, got {self.kernels_at}."
            )
        if self.until_train_error is not None and not 0 <= self.until_train_error <= 1:
            raise ValueError(
                f"until_train_error of arm {self.label!r} must be in [0, 1], got {self.until_train_error}."
            )
        made = [self.model, *(kernel for kernel, key in _KERNELS.items() if given[key])]
        if (self.show is not None and not {*self.show} <= {*made}) or self.show == []:
            raise ValueError(f"show = {self.show} of arm {self.label!r} must name some of what it makes: {made}.")


_KERNELS: dict[Kernel, str] = {AFTER: "after", FRESH: "after_fresh", DURING: "kernels_at"}


@dataclass(frozen=True)
class FigureConfig:
    """How a study is drawn.

    Args:
        x: The horizontal axis: training samples n, samples m behind an after-kernel, time t in steps, or width.
        fitted_on: Show only kernels of trained networks that were fitted on so many samples; "m" for as many as the
            network was trained on.
        at: Show only kernels K^t at these steps t.
        value: "optimal" draws the least error or loss over training (an oracle), "last" that of the last step.
        first_epochs: Count only so many epochs of each curve. The cells are those without it, trained for longer: a
            fixed budget of epochs beside a sufficient one costs nothing.
        chance: Test error of guessing, near which a power law is not to be trusted.
        published: Exponents that the source paper prints, by label, for caption and table.
        caption: What the figure shows.

    Raises:
        ValueError: ``first_epochs`` is below 1.
    """

    x: Axis = "n"
    fitted_on: int | Literal["m"] | None = None
    at: list[int] | None = None
    value: Value = "optimal"
    first_epochs: int | None = None
    chance: float = 0.5
    published: dict[str, float] = field(default_factory=dict)
    caption: str = ""

    def __post_init__(self) -> None:
        if self.first_epochs is not None and self.first_epochs < 1:
            raise ValueError(f"figure.first_epochs must be at least 1, got {self.first_epochs}.")


@dataclass(frozen=True)
class StudyConfig:
    """A grid of runs over models, sizes, widths, optimizers and seeds, and the figure that they make.

    Args:
        name: Of the result table and of the pictures, in the folder of results.
        title: Of the figure.
        data: ``class_path`` and ``init_args`` of a data module; sizes and subset seed come from the grid.
        net: The same of the network; its width comes from the grid.
        arms: The curves.
        grid: Values of every axis.
        figure: How it is drawn.
        scale: Name of the scale that was chosen; empty for a study that is none of the paper's.
        below_critical: Before the first cell, measure the critical learning rate of every kernel, and say which arms
            are above it. (Whatever this says, each row of a kernel fit has its critical rate.)

    Raises:
        ValueError: The name cannot be that of a file.
    """

    name: str
    title: str
    data: dict[str, Any]
    net: dict[str, Any]
    arms: list[Arm]
    grid: Grid
    figure: FigureConfig = field(default_factory=FigureConfig)
    scale: str = ""
    below_critical: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or any(sign in self.name for sign in "/\\\0"):
            raise ValueError(f"name = {self.name!r} of the study must be a file's name: no / and no leading dot.")

    def cells(self) -> dict[str, list[Cell]]:
        """Expand the grid.

        Returns:
            The cells of each arm by its label, each cell once.

        Raises:
            ValueError: Two arms have one label, an axis is empty, a value is out of range, or an after-kernel is to be
                fitted on more samples than any network of the arm is trained on.
        """
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) < len(labels) or not labels:
            raise ValueError(f"Study {self.name} needs arms with different labels, got {labels}.")
        grids = {arm.label: _merge_grids(self.grid, arm.grid) for arm in self.arms}
        for arm in self.arms:
            useless = [size for size in arm.after if size != "m" and size > max(grids[arm.label]["n"])]
            if useless:
                raise ValueError(
                    f"after = {useless} of arm {arm.label!r} is more than any of its n = {grids[arm.label]['n']}: a "
                    "network's kernel is fitted on its own samples. Lower it, or take after_fresh."
                )
        largest = max(max(grid["n"]) for grid in grids.values())
        return {arm.label: self._cells_of(arm, grids[arm.label], largest) for arm in self.arms}

    def shows(self, arm: Arm, row: Mapping[str, Any]) -> bool:
        """Tell whether a row of an arm's results belongs to the figure."""
        fitted_on = row["m"] if self.figure.fitted_on == "m" else self.figure.fitted_on
        during = row["model"] == DURING
        return (
            (arm.show is None or row["model"] in arm.show)
            and (None in (row["m"], fitted_on) or row["n"] == fitted_on)
            and (not during or self.figure.at is None or row["t"] in self.figure.at)
        )

    def _cells_of(self, arm: Arm, grid: dict[str, list[Any]], largest: int) -> list[Cell]:
        cells = {}
        for values in product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            n, width, seed = (point.pop(name) for name in ("n", "width", "seed"))
            width = None if arm.model in WIDTH_FREE else width
            after, fresh = ({n if size == "m" else size for size in sizes} for sizes in (arm.after, arm.after_fresh))
            arguments = {"n_statistics": largest, **self.data.get("init_args", {})}
            sizes = {"n_train": n, "subset_seed": seed, "fresh": max(fresh, default=0)}
            cell = Cell(
                arm.model,
                n,
                width,
                seed,
                OptimizerConfig(**point, seed=seed),
                after=tuple(sorted(size for size in after if size <= n)),
                after_fresh=tuple(sorted(fresh)),
                kernels_at=tuple(arm.kernels_at) if isinstance(arm.kernels_at, list) else None,
                log_spaced=arm.kernels_at if isinstance(arm.kernels_at, int) else None,
                until_train_error=arm.until_train_error,
                evaluate_every=arm.evaluate_every,
                data={**self.data, "init_args": {**arguments, **sizes}},
                net={**self.net, "init_args": {**self.net.get("init_args", {}), "width": width or 1}},
            )
            cells[cell.key] = cell
        return list(cells.values())


def _merge_grids(shared: Grid, own: Grid) -> dict[str, list[Any]]:
    """Every axis with its values; an optimizer's axis that has none takes the optimizer's default."""
    merged = {}
    for axis in fields(Grid):
        values = getattr(own, axis.name) or getattr(shared, axis.name)
        if not values and axis.name in ("n", "width", "seed"):
            raise ValueError(f"The grid has no values for {axis.name}: give a list, such as {axis.name}: [1, 2, 3].")
        merged[axis.name] = values or [getattr(OptimizerConfig, axis.name)]
    return merged
