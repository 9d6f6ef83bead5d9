"""Fits of kernel models."""

from ntk_lightning.solvers.result import KernelFit
from ntk_lightning.solvers.sgd import kernel_sgd, kernel_sgd_grid

__all__ = ["KernelFit", "kernel_sgd", "kernel_sgd_grid"]
