"""Fits of kernel models, and Gaussian predictions of infinitely wide networks."""

from ntk_lightning.solvers.gaussian_process import (
    GaussianPrediction,
    KernelBlocks,
    log_marginal_likelihood,
    nngp_posterior,
    ntk_ensemble,
)
from ntk_lightning.solvers.gradient_descent import gradient_descent, gradient_flow
from ntk_lightning.solvers.kernel_fit import KernelFit
from ntk_lightning.solvers.ridge import RidgeFit, ridge
from ntk_lightning.solvers.sgd import kernel_sgd, kernel_sgd_grid

__all__ = [
    "GaussianPrediction",
    "KernelBlocks",
    "KernelFit",
    "RidgeFit",
    "gradient_descent",
    "gradient_flow",
    "kernel_sgd",
    "kernel_sgd_grid",
    "log_marginal_likelihood",
    "nngp_posterior",
    "ntk_ensemble",
    "ridge",
]
