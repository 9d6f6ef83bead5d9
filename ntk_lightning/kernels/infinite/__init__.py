"""Kernels of infinitely wide networks: a readable reference, and fused kernels for CPU and GPU."""

from ntk_lightning.kernels.infinite.infinite_ntk import InfiniteNTK

__all__ = ["InfiniteNTK"]
