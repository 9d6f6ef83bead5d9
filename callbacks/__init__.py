"""What happens beside training: kernels extracted, fitted, compared and logged."""

from ntk_lightning.callbacks.after_kernel import AfterKernel
from ntk_lightning.callbacks.comparison_table import ComparisonTable
from ntk_lightning.callbacks.empirical_ntk_dynamics import EmpiricalNTKDynamics
from ntk_lightning.callbacks.infinite_ntk_fit import InfiniteNTKFit
from ntk_lightning.callbacks.kernel_diagnostics import KernelDiagnostics
from ntk_lightning.callbacks.model_errors import ModelErrors
from ntk_lightning.callbacks.optimal_early_stopping import OptimalEarlyStopping
from ntk_lightning.callbacks.resumable_checkpoint import ResumableCheckpoint
from ntk_lightning.callbacks.scheduled import ScheduledCallback
from ntk_lightning.callbacks.stop_at_train_error import StopAtTrainError

__all__ = [
    "AfterKernel",
    "ComparisonTable",
    "EmpiricalNTKDynamics",
    "InfiniteNTKFit",
    "KernelDiagnostics",
    "ModelErrors",
    "OptimalEarlyStopping",
    "ResumableCheckpoint",
    "ScheduledCallback",
    "StopAtTrainError",
]
