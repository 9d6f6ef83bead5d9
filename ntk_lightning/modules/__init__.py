"""Three models of one network as Lightning modules."""

from ntk_lightning.modules.finite import FiniteNetwork
from ntk_lightning.modules.readout import InfiniteNTKReadout, KernelReadout
from ntk_lightning.modules.taylor import LinearizedNetwork

__all__ = ["FiniteNetwork", "InfiniteNTKReadout", "KernelReadout", "LinearizedNetwork"]
