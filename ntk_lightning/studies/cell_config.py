"""The configuration of one cell of a study, and its key: the name of the file that keeps its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any

from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.schema import Model

__all__ = ["KEY_LENGTH", "Cell"]

KEY_LENGTH = 24  # hexadecimal digits; versions whose keys hashed the defaults too had 16


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
        evaluate_every: Epochs of a network in training from one evaluation to the next.
        data: Class path and arguments of the data module.
        net: Class path and arguments of the network.

    Raises:
        ValueError: n or width is below 1, or epochs are no multiple of ``evaluate_every``.
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
    evaluate_every: int = 1
    data: Mapping[str, Any] = field(default_factory=dict)
    net: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("width", self.width)):
            if value is not None and value < 1:
                raise ValueError(f"{name} of the grid must be at least 1, got {value}.")
        if self.evaluate_every < 1 or self.optimizer.epochs % self.evaluate_every:
            raise ValueError(
                f"evaluate_every = {self.evaluate_every} must divide epochs = {self.optimizer.epochs}, so that a run "
                "ends with an evaluation."
            )

    @property
    def n_test(self) -> int:
        """Test samples."""
        return int(self.data.get("init_args", {}).get("n_test", 1000))

    @property
    def num_evaluated(self) -> int:
        """Test and validation samples, which every fit is evaluated at."""
        return self.n_test + int(self.data.get("init_args", {}).get("n_val", 0))

    @property
    def config(self) -> str:
        """All of it as JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @property
    def key(self) -> str:
        """Name of the cell: a hash of what differs from the defaults, the same in every study.

        An option that is added later, with a default that changes nothing, leaves finished cells finished. A default
        that is there must therefore never change.
        """
        return hashlib.sha256(json.dumps(_non_defaults(self), sort_keys=True).encode()).hexdigest()[:KEY_LENGTH]

    def __str__(self) -> str:
        width = "" if self.width is None else f", width {self.width}"
        return f"{self.model}, n {self.n}{width}, lr {self.optimizer.lr:g}, seed {self.seed}"


def _non_defaults(config: object) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; of a dataclass inside it, the same."""
    assert is_dataclass(config)
    given = {}
    for item in fields(config):
        value = getattr(config, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if value != default:
            given[item.name] = _non_defaults(value) if is_dataclass(value) else value
    return given
