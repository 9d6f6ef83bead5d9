"""Fits of kernel models."""

from ntk_lightning.solvers.gradient_descent import gradient_descent, gradient_flow
from ntk_lightning.solvers.kernel_fit import KernelFit
from ntk_lightning.solvers.ridge import RidgeFit, ridge
from ntk_lightning.solvers.sgd import kernel_sgd, kernel_sgd_grid

__all__ = ["KernelFit", "RidgeFit", "gradient_descent", "gradient_flow", "kernel_sgd", "kernel_sgd_grid", "ridge"]
