"""The empirical NTK of any network, at its current weights."""

from ntk_lightning.kernels.empirical.empirical_ntk import EmpiricalNTK

__all__ = ["EmpiricalNTK"]
