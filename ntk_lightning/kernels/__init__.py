"""Neural tangent kernels: of a finite network at its weights, and of the infinitely wide one."""

from ntk_lightning.kernels.empirical import EmpiricalNTK
from ntk_lightning.kernels.infinite import InfiniteNTK

__all__ = ["EmpiricalNTK", "InfiniteNTK"]
