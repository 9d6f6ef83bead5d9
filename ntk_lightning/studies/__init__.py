"""Studies: grids of runs over sizes, widths, rates and seeds, with their figures and reports."""

from typing import TYPE_CHECKING

from ntk_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from ntk_lightning.studies.config import Arm, FigureConfig, Grid, StudyConfig
    from ntk_lightning.studies.config_yaml import read_config
    from ntk_lightning.studies.figure_draw import draw_study
    from ntk_lightning.studies.figure_fits import FittedSeries, fit_series
    from ntk_lightning.studies.figure_table import exponents_table
    from ntk_lightning.studies.results import StudyResults, read_results, read_study
    from ntk_lightning.studies.study import StudyError, run_study
else:
    __getattr__, __dir__ = lazy_names(
        __name__, ("results", "config", "config_yaml", "figure_fits", "figure_table", "figure_draw", "study")
    )

__all__ = [
    "Arm",
    "FigureConfig",
    "FittedSeries",
    "Grid",
    "StudyConfig",
    "StudyError",
    "StudyResults",
    "draw_study",
    "exponents_table",
    "fit_series",
    "read_config",
    "read_results",
    "read_study",
    "run_study",
]
