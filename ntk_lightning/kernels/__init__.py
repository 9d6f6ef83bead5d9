"""Neural tangent kernels: of a finite network at its weights, and of the infinitely wide one."""

from ntk_lightning.kernels.empirical.empirical_ntk import EmpiricalNTK
from ntk_lightning.kernels.grams.kernel_key import kernel_key
from ntk_lightning.kernels.grams.store import KernelStore
from ntk_lightning.kernels.grams.store_ray import compute_on_ray
from ntk_lightning.kernels.infinite.infinite_ntk import InfiniteNTK
from ntk_lightning.kernels.monte_carlo import monte_carlo

__all__ = ["EmpiricalNTK", "InfiniteNTK", "KernelStore", "compute_on_ray", "kernel_key", "monte_carlo"]
