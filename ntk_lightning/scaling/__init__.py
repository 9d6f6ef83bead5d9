"""Scaling laws: how error falls with samples."""

from ntk_lightning.scaling.fit import ExponentDifference, PowerLawFit, compare_exponents, fit_power_law

__all__ = ["ExponentDifference", "PowerLawFit", "compare_exponents", "fit_power_law"]
