"""Neural tangent kernels: of a finite network at its weights, and of the infinitely wide one."""

from ntk_lightning.kernels.empirical import EmpiricalNTK
from ntk_lightning.kernels.fingerprint import kernel_key
from ntk_lightning.kernels.infinite import InfiniteNTK
from ntk_lightning.kernels.store import KernelStore, compute_on_ray

__all__ = ["EmpiricalNTK", "InfiniteNTK", "KernelStore", "compute_on_ray", "kernel_key"]
