"""PyTorch Lightning modules for one question: how far does the NTK explain a real network's generalization?

Every public name can be imported from here; it is looked up when it is first used, so this import alone costs nothing.
"""

from typing import TYPE_CHECKING

from ntk_lightning.lazy import lazy_names

if TYPE_CHECKING:
    from ntk_lightning.callbacks import (
        AfterKernel,
        ComparisonTable,
        EmpiricalNTKDynamics,
        InfiniteNTKFit,
        KernelDiagnostics,
        ModelErrors,
        OptimalEarlyStopping,
        ResumableCheckpoint,
        ScheduledCallback,
        StopAtTrainError,
    )
    from ntk_lightning.datamodules import (
        Batch,
        BatchLoader,
        CIFAR5mBinary,
        CIFAR10Binary,
        FashionMNISTBinary,
        ImageDataModule,
        Samples,
        SVHNParity,
        SyntheticTeacher,
        TensorData,
    )
    from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, KernelStore, compute_on_ray, kernel_key
    from ntk_lightning.kernels.monte_carlo import monte_carlo  # a file and its function: type checkers must see which
    from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
    from ntk_lightning.networks import (
        MLP,
        ChannelNorm,
        Erf,
        FiveLayerCNN,
        MyrtleCNN,
        NTKConv1d,
        NTKConv2d,
        NTKLinear,
        Pointwise,
        Residual,
        SelfAttention,
        ntk_parameterize,
    )
    from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
    from ntk_lightning.scaling import (
        ExponentDifference,
        LearningCurve,
        PowerLawFit,
        compare_exponents,
        fit_power_law,
        predict_learning_curve,
    )
    from ntk_lightning.solvers import (
        GaussianPrediction,
        KernelBlocks,
        KernelFit,
        RidgeFit,
        gradient_descent,
        gradient_flow,
        kernel_sgd,
        kernel_sgd_grid,
        log_marginal_likelihood,
        nngp_posterior,
        ntk_ensemble,
        ridge,
    )
    from ntk_lightning.studies import (
        Arm,
        FigureConfig,
        FittedSeries,
        Grid,
        StudyConfig,
        StudyError,
        StudyResults,
        draw_study,
        exponents_table,
        fit_series,
        read_config,
        read_results,
        read_study,
        run_study,
    )

    __version__: str
else:
    _public_name, __dir__ = lazy_names(
        __name__,
        ("networks", "optim", "kernels", "solvers", "scaling", "studies", "datamodules", "modules", "callbacks"),
    )

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version  # here: what nobody asks for costs nothing

            return version("ntk_lightning")
        return _public_name(name)


__all__ = [
    "MLP",
    "AfterKernel",
    "Arm",
    "Batch",
    "BatchLoader",
    "CIFAR5mBinary",
    "CIFAR10Binary",
    "ChannelNorm",
    "ComparisonTable",
    "EmpiricalNTK",
    "EmpiricalNTKDynamics",
    "Erf",
    "ExponentDifference",
    "FashionMNISTBinary",
    "FigureConfig",
    "FiniteNetwork",
    "FittedSeries",
    "FiveLayerCNN",
    "GaussianPrediction",
    "Grid",
    "ImageDataModule",
    "InfiniteNTK",
    "InfiniteNTKFit",
    "InfiniteNTKReadout",
    "KernelBlocks",
    "KernelDiagnostics",
    "KernelFit",
    "KernelReadout",
    "KernelStore",
    "LearningCurve",
    "LinearizedNetwork",
    "ModelErrors",
    "MyrtleCNN",
    "NTKConv1d",
    "NTKConv2d",
    "NTKLinear",
    "OptimalEarlyStopping",
    "OptimizerConfig",
    "Pointwise",
    "PowerLawFit",
    "Residual",
    "ResumableCheckpoint",
    "RidgeFit",
    "SVHNParity",
    "Samples",
    "ScheduledCallback",
    "SelfAttention",
    "StopAtTrainError",
    "StudyConfig",
    "StudyError",
    "StudyResults",
    "SyntheticTeacher",
    "TensorData",
    "compare_exponents",
    "compute_on_ray",
    "critical_learning_rate",
    "draw_study",
    "exponents_table",
    "fit_power_law",
    "fit_series",
    "gradient_descent",
    "gradient_flow",
    "kernel_key",
    "kernel_sgd",
    "kernel_sgd_grid",
    "log_marginal_likelihood",
    "monte_carlo",
    "nngp_posterior",
    "ntk_ensemble",
    "ntk_parameterize",
    "predict_learning_curve",
    "read_config",
    "read_results",
    "read_study",
    "ridge",
    "run_study",
]
