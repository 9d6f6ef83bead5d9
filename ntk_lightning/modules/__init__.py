"""Three models of one network as Lightning modules."""

from ntk_lightning.modules.finite import FiniteNetwork
from ntk_lightning.modules.kernel_readout import InfiniteNTKReadout, KernelReadout
from ntk_lightning.modules.linearized import LinearizedNetwork

__all__ = ["FiniteNetwork", "InfiniteNTKReadout", "KernelReadout", "LinearizedNetwork"]
