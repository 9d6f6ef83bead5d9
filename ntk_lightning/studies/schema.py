"""Names that tables, figures and reports of studies share: models, quantities and columns."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import pyarrow as pa

__all__ = [
    "AFTER",
    "COLUMNS",
    "DURING",
    "FRESH",
    "LATER",
    "MODELS",
    "QUANTITIES",
    "TRAINED",
    "WIDTH_FREE",
    "Axis",
    "Kernel",
    "Model",
    "Quantity",
    "Value",
]

Model: TypeAlias = Literal["network", "empirical", "infinite", "nngp", "order 2", "order 3"]
Kernel: TypeAlias = Literal["after-kernel", "after-kernel, fresh", "kernel during training"]
Quantity: TypeAlias = Literal["error", "loss"]
Axis: TypeAlias = Literal["n", "m", "t", "width"]
Value: TypeAlias = Literal["optimal", "last"]

AFTER: Final = "after-kernel"
FRESH: Final = "after-kernel, fresh"
DURING: Final = "kernel during training"
MODELS: tuple[str, ...] = (*get_args(Model), *get_args(Kernel))
TRAINED = ("network", "order 2", "order 3")
WIDTH_FREE = ("infinite", "nngp")
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
LATER = (
    "critical_lr",
    "predicted_sizes",
    "predicted_errors",
    "predicted_losses",
)  # columns that tables of earlier versions lack

COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("study", "arm", "model", "cell")),
        *((name, pa.int64()) for name in ("n", "m", "t", "width", "seed")),
        *((name, pa.float64()) for name in ("lr", "momentum")),
        ("batch_size", pa.int64()),
        ("full_batch", pa.bool_()),
        *((name, pa.int64()) for name in ("epochs", "steps")),
        *((name, pa.float64()) for name in ("optimal_error", "last_error", "optimal_loss", "last_loss")),
        ("optimal_step", pa.int64()),
        ("critical_lr", pa.float64()),
        *((name, pa.float64()) for name in ("network_error", "network_loss", "initial_error", "initial_loss")),
        ("curve_steps", pa.list_(pa.int64())),
        *((name, pa.list_(pa.float64())) for name in ("curve_errors", "curve_losses")),
        ("predicted_sizes", pa.list_(pa.int64())),
        *((name, pa.list_(pa.float64())) for name in ("predicted_errors", "predicted_losses")),
        ("seconds", pa.float64()),
        *((name, pa.string()) for name in ("config", "git_revision", "version")),
    ]
)
