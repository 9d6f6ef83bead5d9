"""The precision that kernels and fits compute in, whatever a training run has set for its network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

__all__ = ["at_least_float32", "own_precision"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Give the precision of a kernel of such inputs.

    Args:
        dtype: Floating-point dtype of the inputs.

    Returns:
        float64 for float64, float32 for everything else.

    Example:
        >>> at_least_float32(torch.bfloat16), at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


@contextmanager
def own_precision(device_type: str, rounding: Literal["ieee", "tf32"] = "ieee") -> Iterator[None]:
    """Compute in the tensors' own precision: without autocast, and float32 products rounded as told.

    Args:
        device_type: Where the tensors lie: "cpu" or "cuda", for example.
        rounding: "ieee" keeps all digits of float32; "tf32" lets a GPU round the factors of products.

    Yields:
        None; the settings from before come back at the end.
    """
    cudnn: Any = torch.backends.cudnn  # these settings are not declared
    mkldnn: Any = torch.backends.mkldnn
    settings = torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = rounding
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
