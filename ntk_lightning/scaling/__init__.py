"""Scaling laws: how error falls with samples, fitted with intervals or predicted from a kernel's spectrum."""

from ntk_lightning.scaling.learning_curve import LearningCurve, predict_learning_curve
from ntk_lightning.scaling.power_law import ExponentDifference, PowerLawFit, compare_exponents, fit_power_law

__all__ = [
    "ExponentDifference",
    "LearningCurve",
    "PowerLawFit",
    "compare_exponents",
    "fit_power_law",
    "predict_learning_curve",
]
