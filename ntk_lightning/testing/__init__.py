"""Checks that a kernel of your own can inherit in its tests."""

from ntk_lightning.testing.kernel_contract import KernelContract

__all__ = ["KernelContract"]
