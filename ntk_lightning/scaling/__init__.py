"""Scaling laws: how error falls with samples, fitted with intervals."""

from ntk_lightning.scaling.power_law import ExponentDifference, PowerLawFit, compare_exponents, fit_power_law

__all__ = ["ExponentDifference", "PowerLawFit", "compare_exponents", "fit_power_law"]
