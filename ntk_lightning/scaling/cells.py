"""A study's configuration, and the cells of its grid: one training run or kernel fit each.

Longer than 300 lines for the documentation of the configuration's keys, which YAML files are checked against.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn

from ntk_lightning.configs import find_config
from ntk_lightning.datamodules.base import ImageDataModule
from ntk_lightning.optim import OptimizerConfig

__all__ = ["Arm", "Cell", "FigureConfig", "Grid", "Model", "StudyConfig", "build", "check", "read_config"]

Model: TypeAlias = Literal["network", "empirical", "infinite", "nngp", "order 2", "order 3"]
TRAINED = ("network", "order 2", "order 3")
WIDTH_FREE = ("infinite", "nngp")


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
        show: Which of the models above belong to the figure: "network", "after-kernel", "after-kernel, fresh", "kernel
            during training"; by default all.
    """

    label: str
    model: Model = "network"
    grid: Grid = field(default_factory=Grid)
    after: list[int | Literal["m"]] = field(default_factory=list)
    after_fresh: list[int | Literal["m"]] = field(default_factory=list)
    kernels_at: int | list[int] | None = None
    until_train_error: float | None = None
    show: list[str] | None = None

    def __post_init__(self) -> None:
        kernels = {name: getattr(self, name) for name in ("after", "after_fresh", "kernels_at", "until_train_error")}
        asked = [name for name, value in kernels.items() if value]
        if asked and self.model != "network":
            raise ValueError(f"Arm {self.label!r} of model {self.model!r} cannot have {asked}: only a network can.")


@dataclass(frozen=True)
class FigureConfig:
    """How a study is drawn.

    Args:
        x: The horizontal axis: training samples n, samples m behind an after-kernel, time t in steps, or width.
        fitted_on: Show only kernels of trained networks that were fitted on so many samples; "m" for as many as the
            network was trained on.
        at: Show only kernels K^t at these steps t.
        published: Exponents of the source paper, by label, for the caption.
        caption: What the figure shows.
    """

    x: Literal["n", "m", "t", "width"] = "n"
    fitted_on: int | Literal["m"] | None = None
    at: list[int] | None = None
    published: dict[str, float] = field(default_factory=dict)
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """One training run or kernel fit, with everything that its result depends on.

    Args:
        model: What is trained or fitted.
        n: Training samples.
        width: Of the network, None where the width is infinite.
        seed: Of the training subset and of the initial weights.
        optimizer: Shared by the network and the kernels extracted from it.
        after: Sizes that the after-kernel is fitted on.
        after_fresh: The same, fresh samples.
        kernels_at: Steps at which K^t is fitted.
        log_spaced: Or their number.
        until_train_error: Stop there.
        data: Class path and arguments of the data module.
        net: Class path and arguments of the network.
    """

    model: Model
    n: int
    width: int | None
    seed: int
    optimizer: OptimizerConfig
    after: tuple[int, ...] = ()
    after_fresh: tuple[int, ...] = ()
    kernels_at: tuple[int, ...] | None = None
    log_spaced: int | None = None
    until_train_error: float | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    net: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def key(self) -> str:
        """Name of the cell: a hash of its content, the same in every study."""
        return hashlib.sha256(self.config.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        width = "" if self.width is None else f", width {self.width}"
        return f"{self.model}, n {self.n}{width}, lr {self.optimizer.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class StudyConfig:
    """A grid of runs over models, sizes, widths, optimizers and seeds, and the figure that they make.

    Args:
        name: Of the result table and of the pictures.
        title: Of the figure.
        data: ``class_path`` and ``init_args`` of a data module; sizes and subset seed come from the grid.
        net: The same of the network; its width comes from the grid.
        arms: The curves.
        grid: Values of every axis.
        figure: How it is drawn.
        scale: Name of the scale that was chosen.
    """

    name: str
    title: str
    data: dict[str, Any]
    net: dict[str, Any]
    arms: list[Arm]
    grid: Grid
    figure: FigureConfig = field(default_factory=FigureConfig)
    scale: str = "paper"

    def cells(self) -> dict[str, list[Cell]]:
        """Expand the grid.

        Returns:
            The cells of each arm by its label, each cell once.

        Raises:
            ValueError: Two arms have one label, an axis is empty, or a value is out of range.
        """
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) < len(labels) or not labels:
            raise ValueError(f"Study {self.name} needs arms with different labels, got {labels}.")
        grids = {arm.label: _merge_grids(self.grid, arm.grid) for arm in self.arms}
        largest = max(max(grid["n"]) for grid in grids.values())
        return {arm.label: self._cells_of(arm, grids[arm.label], largest) for arm in self.arms}

    def shows(self, arm: Arm, row: Mapping[str, Any]) -> bool:
        """Tell whether a row of an arm's results belongs to the figure."""
        fitted_on = row["m"] if self.figure.fitted_on == "m" else self.figure.fitted_on
        during = row["model"] == "kernel during training"
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


def build(cell: Cell) -> tuple[ImageDataModule, nn.Sequential]:
    """Make a cell's data module and its network, whose weights are drawn from the generator as it stands.

    Args:
        cell: The cell.

    Returns:
        Data module, not set up, and network.

    Raises:
        ValueError: A class path or an argument is wrong.
    """
    parser, parsed = _parse(cell)
    made = parser.instantiate_classes(parsed)
    if not isinstance(made.net, nn.Sequential):
        raise ValueError(f"net must make an nn.Sequential, {cell.net.get('class_path')} makes {type(made.net)}.")
    return made.data, made.net


def check(cell: Cell) -> None:
    """Check the class paths and arguments of a cell without making anything.

    Args:
        cell: The cell.

    Raises:
        ValueError: A class path or an argument is wrong.
    """
    _parse(cell)


def _parse(cell: Cell) -> tuple[ArgumentParser, Namespace]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageDataModule, required=True)
    parser.add_argument("--net", type=nn.Module, required=True)
    try:
        return parser, parser.parse_object({"data": dict(cell.data), "net": dict(cell.net)})
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"data or net of the study: {error}") from error


def read_config(files: Sequence[str | Path], scale: str | None = None) -> StudyConfig:
    """Read a study from YAML.

    Args:
        files: Later files change earlier ones; one that is not there is looked for among those that come with the
            package, such as ``cli_configs/studies/figure_1a.yaml``. Their key ``base`` names a file beside them that
            they change; their key ``scales`` holds, by name, further changes.
        scale: Which of those to make, in every file that has it; None for none.

    Returns:
        The study.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A key or value is wrong, or there is no such scale.
    """
    raw: dict[str, Any] = {}
    names: set[str] = set()
    for file in files:
        content = _read_yaml(Path(find_config(str(file))))
        scales = content.pop("scales", {})
        names.update(scales)
        raw = _merge(_merge(raw, content), scales.get(scale, {}))
    if scale is not None:
        if scale not in names:
            raise ValueError(f"There is no scale {scale!r} in {[str(file) for file in files]}, only {sorted(names)}.")
        raw["scale"] = scale
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyConfig, as_group=False)
    try:
        parsed = parser.instantiate_classes(parser.parse_object(raw))
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{', '.join(map(str, files))}: {error}") from error
    return StudyConfig(**vars(parsed))


def _read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"No study configuration at {file}: cli_configs/studies has one per figure.")
    content = yaml.safe_load(file.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a mapping of study settings: see cli_configs/studies.")
    base = content.pop("base", None)
    return content if base is None else _merge(_read_yaml(file.parent / base), content)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Change some keys, at any depth; a new ``class_path`` takes none of the old one's arguments."""
    if change.get("class_path", base.get("class_path")) != base.get("class_path"):
        return change
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
