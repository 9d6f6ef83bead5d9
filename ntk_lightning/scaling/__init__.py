"""Scaling laws: how error falls with samples, and studies that measure it.

Power laws are imported at once; studies, which train and draw, when one of their names is first used.
"""

from typing import TYPE_CHECKING

from ntk_lightning.lazy import lazy_names
from ntk_lightning.scaling.fit import ExponentDifference, PowerLawFit, compare_exponents, fit_power_law

if TYPE_CHECKING:
    from ntk_lightning.scaling.cells import Arm, FigureConfig, Grid, StudyConfig, read_config
    from ntk_lightning.scaling.exponents import FittedSeries, fit_series
    from ntk_lightning.scaling.results import StudyResults, read_results, read_study
    from ntk_lightning.scaling.study import StudyError, run_study
    from ntk_lightning.scaling.study_figures import draw_study, exponents_table
else:
    __getattr__, __dir__ = lazy_names(__name__, ("results", "cells", "exponents", "study_figures", "study"))

__all__ = [
    "Arm",
    "ExponentDifference",
    "FigureConfig",
    "FittedSeries",
    "Grid",
    "PowerLawFit",
    "StudyConfig",
    "StudyError",
    "StudyResults",
    "compare_exponents",
    "draw_study",
    "exponents_table",
    "fit_power_law",
    "fit_series",
    "read_config",
    "read_results",
    "read_study",
    "run_study",
]
