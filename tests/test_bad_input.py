"""Bad input is refused before any work, with one sentence that says what to do; odd but legal input is right.

Longer than 300 lines, since it is one table of cases.
"""

from __future__ import annotations

import csv
import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from lightning import Callback, Trainer
from test_datamodules import cifar_folder
from tiny import OPTIMIZER, QUIET, data, fit, net
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ntk_lightning import __main__ as entry
from ntk_lightning.callbacks import (
    AfterKernel,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    StopAtTrainError,
)
from ntk_lightning.datamodules import CIFAR10Binary, FashionMNISTBinary, SyntheticTeacher, TensorData
from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, KernelStore, diagnostics
from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
from ntk_lightning.networks import MLP, FiveLayerCNN, MyrtleCNN, NTKConv2d, NTKLinear, Residual
from ntk_lightning.objective import check_labels
from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.scaling import compare_exponents, fit_power_law
from ntk_lightning.solvers import gradient_descent, gradient_flow, kernel_sgd, kernel_sgd_grid, ridge

Call = Callable[[], object]
A: Any = None  # stands where a wrong type is passed on purpose

X, V = torch.ones(2, 3, 8, 8), torch.ones(2, 4)
EYE, Y = torch.eye(4), torch.tensor([1.0, -1.0, 1.0, -1.0])
IMAGES, LABELS = (
    torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([-1.0, 1.0]).repeat(5),
)
SIZES, ERRORS = [100, 200, 400, 800], [0.3, 0.2, 0.15, 0.1]


def infinite(*layers: nn.Module, x: Any = X, **kwargs: Any) -> Call:  # noqa: ANN401 - wrong types on purpose
    """Build the infinite kernel of these layers, or of a Myrtle network, and call it."""
    return lambda: InfiniteNTK(nn.Sequential(*layers) if layers else MyrtleCNN(1), **kwargs)(x)


def empirical(network: nn.Module | None = None, x: Any = V, **kwargs: Any) -> Call:  # noqa: ANN401
    return lambda: EmpiricalNTK(MLP(2, 1, 4) if network is None else network, **kwargs)(x)


def sgd(kernel: Any = EYE, targets: Any = Y, config: Any = OPTIMIZER, **kwargs: Any) -> Call:  # noqa: ANN401
    return lambda: kernel_sgd(kernel, targets, config, **kwargs)


def tensors(x: Any = IMAGES, y: Any = LABELS, **kwargs: Any) -> Call:  # noqa: ANN401
    return lambda: TensorData((x, y), (x, y), **kwargs).setup()


def training(callback: Callback | None = None, module: Any = None, **kwargs: Any) -> Call:  # noqa: ANN401
    """Fit a tiny network with a callback."""
    return lambda: fit(
        FiniteNetwork(net(), OPTIMIZER) if module is None else module(),
        data(),
        callbacks=[] if callback is None else [callback],
        **kwargs,
    )


def lr(value: Any) -> Call:  # noqa: ANN401
    return lambda: OptimizerConfig(lr=value)


def loader(labels: Tensor) -> Call:
    """Fit a network on a plain loader of images and labels."""
    module = FiniteNetwork(FiveLayerCNN(2, 1), OPTIMIZER)
    return lambda: Trainer(max_epochs=1, **QUIET).fit(module, DataLoader(TensorDataset(IMAGES, labels), 5))


def readout_on_a_loader() -> None:
    Trainer(max_epochs=1, **QUIET).fit(
        InfiniteNTKReadout(FiveLayerCNN(2, 1)), DataLoader(TensorDataset(IMAGES, LABELS), 5)
    )


def frozen() -> nn.Module:
    return MLP(2, 1, 4).requires_grad_(False)


def nan_weights() -> nn.Module:
    network = MLP(2, 1, 4)
    nn.init.constant_(network[1].weight, torch.nan)  # type: ignore[arg-type]  # a parameter
    return network


CONV, HEAD = NTKConv2d(3, 2, 3), (nn.Flatten(), NTKLinear(128, 1))
NETWORKS = [
    pytest.param(lambda: NTKLinear(0, 1), ValueError, "needs positive sizes", id="no inputs"),
    pytest.param(lambda: NTKLinear(A or 4.5, 1), TypeError, "whole numbers", id="half an input"),
    pytest.param(lambda: NTKLinear(4, 1, weight_std=0), ValueError, "weight_std must be > 0", id="weight_std 0"),
    pytest.param(lambda: NTKLinear(4, 1, torch.nan), ValueError, "weight_std must be > 0", id="weight_std nan"),
    pytest.param(lambda: NTKLinear(4, 1, bias_std=-1), ValueError, "bias_std >= 0", id="bias_std negative"),
    pytest.param(lambda: NTKConv2d(3, 4, 2), ValueError, 'use "valid", an odd one', id="even filter"),
    pytest.param(lambda: NTKConv2d(3, 4, 3, A or "reflect"), ValueError, '"same", "valid"', id="padding unknown"),
    pytest.param(lambda: NTKConv2d(3, 4, 3, stride=0), ValueError, "stride must be at least 1", id="stride 0"),
    pytest.param(lambda: MLP(4, -1, 4), ValueError, "depth counts hidden layers", id="depth negative"),
    pytest.param(lambda: MyrtleCNN(depth=6), ValueError, r"defined for depth \[5, 7, 10\]", id="Myrtle depth 6"),
    pytest.param(lambda: MyrtleCNN(2)(X[:, :1]), ValueError, "set in_channels=1", id="channels differ"),
    pytest.param(lambda: MLP(2, 1, 5)(V), ValueError, "set in_features=4", id="features differ"),
]
INFINITE = [
    pytest.param(infinite(x=X.byte()), TypeError, r"call \.float\(\) first", id="bytes"),
    pytest.param(infinite(x=X.numpy()), TypeError, "torch.from_numpy", id="numpy array"),
    pytest.param(infinite(x=[1.0]), TypeError, "floating-point tensor", id="list"),
    pytest.param(infinite(x=X * torch.nan), ValueError, "first in sample 0: clean the data", id="nan"),
    pytest.param(infinite(x=X / 0), ValueError, "NaN or infinite entry", id="inf"),
    pytest.param(infinite(x=X[:0]), ValueError, "at least one sample", id="empty"),
    pytest.param(infinite(x=X[0]), ValueError, r"needs images \(n, C, H, W\)", id="three dimensions"),
    pytest.param(infinite(x=V), ValueError, "give inputs of shape", id="vectors for images"),
    pytest.param(infinite(x=X[..., :3, :3]), ValueError, "image is too small", id="nothing left to pool"),
    pytest.param(lambda: InfiniteNTK(MyrtleCNN(1))(X, X.double()), ValueError, "differ in dtype", id="two dtypes"),
    pytest.param(lambda: InfiniteNTK(MyrtleCNN(1))(X, X[..., :4, :4]), ValueError, "different shapes", id="two shapes"),
    pytest.param(infinite(kind="kernel"), ValueError, '"ntk" or "nngp"', id="kind unknown"),
    pytest.param(infinite(backend="tpu"), ValueError, '"reference", "cpu" or "cuda"', id="backend unknown"),
    pytest.param(infinite(backend="cuda"), ValueError, 'Use backend="auto"', id="backend without its device"),
    pytest.param(infinite(CONV, nn.BatchNorm2d(2), *HEAD), TypeError, "Supported: NTKLinear", id="batch norm"),
    pytest.param(infinite(CONV, nn.MaxPool2d(2), *HEAD), TypeError, r"net\.1 is MaxPool2d", id="max pool"),
    pytest.param(infinite(nn.Flatten(), nn.LSTM(192, 1)), TypeError, r"net\.1 is LSTM.*Supported", id="recurrent"),
    pytest.param(infinite(CONV, nn.PReLU(), *HEAD), TypeError, r"nn\.LeakyReLU", id="PReLU"),
    pytest.param(
        infinite(CONV, nn.AvgPool2d(2, ceil_mode=True), *HEAD), TypeError, "is AvgPool2d", id="pool that exceeds"
    ),
    pytest.param(infinite(CONV, nn.AvgPool2d(0), *HEAD), ValueError, "at least one pixel", id="pool of nothing"),
    pytest.param(infinite(nn.ReLU(), *HEAD), ValueError, "Put an affine layer", id="activation first"),
    pytest.param(infinite(CONV, nn.Flatten(), nn.ReLU(), HEAD[1]), ValueError, "swap the two", id="ReLU after flatten"),
    pytest.param(infinite(CONV, nn.Flatten()), ValueError, "must end in an NTKLinear", id="no readout"),
    pytest.param(infinite(Residual(nn.ReLU()), *HEAD), ValueError, "the end of every branch", id="residual"),
    pytest.param(infinite(NTKConv2d(3, 1, 9, "valid"), *HEAD), ValueError, "image is too small", id="image too small"),
    pytest.param(infinite(x=1e30 * X), FloatingPointError, "in float64, or scale", id="overflow"),
    pytest.param(lambda: InfiniteNTK(A or "Myrtle"), TypeError, "Supported", id="not a module"),
]
EMPIRICAL = [
    pytest.param(empirical(frozen()), ValueError, "unfreeze some", id="frozen"),
    pytest.param(empirical(memory="lots"), ValueError, 'such as "4GB"', id="memory unknown"),
    pytest.param(empirical(memory="10B"), ValueError, "at the least", id="memory too small"),
    pytest.param(empirical(features="int8"), ValueError, '"float32", "tf32" or "bfloat16"', id="features unknown"),
    pytest.param(empirical(features="tf32"), ValueError, 'use "float32"', id="tf32 without a GPU"),
    pytest.param(empirical(dtype=torch.float16), ValueError, "dtype must be torch.float32", id="half precision"),
    pytest.param(empirical(full=True, output=0), ValueError, "choose", id="full and output"),
    pytest.param(empirical(output=7), ValueError, "one of the network's 1", id="no such output"),
    pytest.param(empirical(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))), ValueError, r"net\.eval\(\)", id="norm"),
    pytest.param(empirical(nn.Sequential(nn.Dropout(), nn.Linear(4, 1))), ValueError, r"net\.eval\(\)", id="dropout"),
    pytest.param(empirical(nn.Unflatten(1, (2, 2))), ValueError, "unfreeze some", id="nothing to differentiate"),
    pytest.param(empirical(x=V.int()), TypeError, r"call \.float\(\) first", id="integers"),
    pytest.param(empirical(x=V * torch.nan), ValueError, "clean the data", id="nan pixels"),
    pytest.param(empirical(x=V[:0]), ValueError, "at least one sample", id="empty set"),
    pytest.param(empirical(x=V[:, :3]), ValueError, "set in_features=3", id="other features"),
    pytest.param(empirical(nan_weights()), FloatingPointError, "lower the learning rate", id="nan weights"),
    pytest.param(
        lambda: EmpiricalNTK(MLP(2, 1, 4)).matvec(V, torch.ones(3)), ValueError, r"v must be \(n,\)", id="vector length"
    ),
]
SOLVERS = [
    pytest.param(sgd(EYE.numpy()), TypeError, "torch.from_numpy", id="numpy kernel"),
    pytest.param(sgd(EYE.int()), TypeError, r"call \.float\(\) first", id="integer kernel"),
    pytest.param(sgd(EYE[:3]), ValueError, "kernel must be square", id="oblong kernel"),
    pytest.param(sgd(EYE[:0]), ValueError, "non-empty matrix", id="empty kernel"),
    pytest.param(sgd(EYE * torch.nan), ValueError, "recompute it", id="nan kernel"),
    pytest.param(sgd(EYE.roll(1, 0)), ValueError, r"or \(kernel \+ kernel\.T\) / 2", id="asymmetric kernel"),
    pytest.param(sgd(targets=[1.0, -1.0, 1.0, -1.0]), TypeError, "torch.as_tensor", id="list of labels"),
    pytest.param(sgd(targets=Y[:3]), ValueError, r"targets must be \(4,\)", id="too few labels"),
    pytest.param(
        sgd(targets=(Y + 1) / 2),
        ValueError,
        r"map your two classes to them \(0 and 1 by 2 \* y - 1\)",
        id="labels 0 and 1",
    ),
    pytest.param(sgd(targets=Y * torch.nan), ValueError, "clean the data", id="nan labels"),
    pytest.param(sgd(config={"lr": 1}), TypeError, r"OptimizerConfig\(", id="dict for a config"),
    pytest.param(sgd(test=EYE), TypeError, r"test=\(kernel, targets\)", id="half a test set"),
    pytest.param(sgd(test=(torch.ones(4, 2), Y)), ValueError, "transpose it", id="test kernel on its side"),
    pytest.param(sgd(test=(EYE.double(), Y)), ValueError, "differ in dtype", id="dtypes of kernels"),
    pytest.param(sgd(eval_every=0), ValueError, "at least 1 step", id="evaluated never"),
    pytest.param(sgd(eval_every=[10**9]), ValueError, "the length of the run", id="evaluated after the end"),
    pytest.param(sgd(initial_coefficients=Y[:2]), ValueError, "the shape of targets", id="initial coefficients"),
    pytest.param(
        lambda: kernel_sgd_grid(EYE, Y, [OPTIMIZER], sizes=[5]), ValueError, "between 1 and 4", id="size above n"
    ),
    pytest.param(lambda: kernel_sgd_grid(EYE, Y, []), ValueError, "at least one optimizer", id="no optimizer"),
    pytest.param(lambda: gradient_descent(EYE, Y, OPTIMIZER, [-1]), ValueError, "of at least 0", id="negative steps"),
    pytest.param(lambda: gradient_descent(EYE, Y, OPTIMIZER, []), ValueError, "of at least 0", id="no steps"),
    pytest.param(lambda: gradient_flow(EYE, Y, [torch.nan]), ValueError, "finite and at least 0", id="nan time"),
    pytest.param(lambda: ridge(EYE, Y, -1), ValueError, "must be >= 0", id="negative regularization"),
    pytest.param(lambda: ridge(EYE, Y, torch.nan), ValueError, "must be >= 0", id="nan regularization"),
    pytest.param(lambda: ridge(EYE, Y, method=A or "lu"), ValueError, '"auto", "cholesky" or "cg"', id="no method"),
    pytest.param(lambda: ridge(lambda v: v, Y, method="cholesky"), ValueError, 'or use "cg"', id="function, cholesky"),
    pytest.param(
        lambda: critical_learning_rate(EYE, momentum=1), ValueError, r"momentum must be in \[0, 1\)", id="momentum 1"
    ),
    pytest.param(lambda: critical_learning_rate(lambda v: v), ValueError, "Pass n", id="function without n"),
    pytest.param(lambda: critical_learning_rate(EYE[:2]), ValueError, "square Gram", id="oblong Gram"),
]
CONFIGS = [
    pytest.param(lr(0), ValueError, "lr must be > 0", id="lr 0"),
    pytest.param(lr(torch.nan), ValueError, "lr must be > 0", id="lr nan"),
    pytest.param(lr(torch.inf), ValueError, "finite", id="lr inf"),
    pytest.param(lr("0.1"), TypeError, "lr must be a number", id="lr text"),
    pytest.param(lambda: OptimizerConfig(momentum=1), ValueError, r"in \[0, 1\)", id="momentum 1"),
    pytest.param(lambda: OptimizerConfig(batch_size=0), ValueError, "batch_size must be at least 1", id="batch 0"),
    pytest.param(lambda: OptimizerConfig(batch_size=True), TypeError, "batch_size must be a whole", id="batch True"),
    pytest.param(lambda: OptimizerConfig(lr=True), TypeError, "lr must be a number", id="lr True"),
    pytest.param(lambda: OptimizerConfig(full_batch=A or 2), TypeError, "True or False", id="full batch 2"),
    pytest.param(lambda: OptimizerConfig(batch_size=A or 2.5), TypeError, "batch_size must be a whole", id="batch 2.5"),
    pytest.param(lambda: OptimizerConfig(steps=0), ValueError, "steps must be at least 1", id="steps 0"),
    pytest.param(lambda: OptimizerConfig(seed=-1), ValueError, "seed must be at least 0", id="seed -1"),
    pytest.param(lambda: check_labels(Y, 2), ValueError, "class numbers 0 to 1", id="classes -1, 1"),
    pytest.param(lambda: check_labels(3 * Y.abs(), 3), ValueError, "class numbers 0 to 2", id="class 3"),
]
DATA = [
    pytest.param(tensors(n_train=11), ValueError, "ask for fewer", id="n_train above the pool"),
    pytest.param(tensors(n_train=8, fresh=3), ValueError, "ask for fewer", id="fresh above the pool"),
    pytest.param(tensors(n_train=0), ValueError, "n_train must be at least 1", id="n_train 0"),
    pytest.param(tensors(n_train="ten"), TypeError, "n_train must be a whole number", id="n_train text"),
    pytest.param(tensors(n_test=-1), ValueError, "n_test must be at least 1", id="n_test -1"),
    pytest.param(tensors(y=LABELS[:5]), ValueError, "need as many labels", id="labels missing"),
    pytest.param(tensors(y=(LABELS + 1) / 2), ValueError, "map your two classes", id="labels 0, 1"),
    pytest.param(tensors(y=LABELS.tolist()), TypeError, "torch.as_tensor", id="labels in a list"),
    pytest.param(tensors(x=IMAGES.numpy()), TypeError, "torch.as_tensor", id="images in numpy"),
    pytest.param(tensors(x=IMAGES / 0), ValueError, "clean the data", id="infinite pixels"),
    pytest.param(tensors(x=IMAGES[:0], y=LABELS[:0]), ValueError, "n_train must be at least 1", id="no image"),
    pytest.param(lambda: FashionMNISTBinary(100_000).setup(), ValueError, "has 4096 such samples", id="n_train 100000"),
    pytest.param(lambda: SyntheticTeacher(A or "cauchy"), ValueError, "distribution must be", id="distribution"),
    pytest.param(lambda: SyntheticTeacher(pool_size=0), ValueError, "pool_size must be", id="empty pool"),
    pytest.param(lambda: SyntheticTeacher(shape=(1, 4, 4)), ValueError, "at least 8x8 pixels", id="teacher too deep"),
    pytest.param(
        lambda: CIFAR10Binary(classes=(5, 5)), ValueError, "two different class numbers", id="one class twice"
    ),
]
MODULES = [
    pytest.param(lambda: LinearizedNetwork(frozen()), ValueError, "requires_grad", id="linearized and frozen"),
    pytest.param(lambda: LinearizedNetwork(net(), order=0), ValueError, "order must be at least 1", id="order 0"),
    pytest.param(lambda: InfiniteNTKReadout(nn.BatchNorm2d(3)), TypeError, "Supported", id="readout of batch norm"),
    pytest.param(
        lambda: InfiniteNTKReadout(net())(X), RuntimeError, "fit it or load a checkpoint", id="readout unfitted"
    ),
    pytest.param(readout_on_a_loader, TypeError, "TensorData takes your own tensors", id="readout on a loader"),
    pytest.param(loader((LABELS + 1) / 2), ValueError, "map your two classes", id="loader of labels 0, 1"),
    pytest.param(
        training(module=lambda: FiniteNetwork(nn.Sequential(net(), nn.Flatten(0)))),
        ValueError,
        r"to \(n, num_outputs\)",
        id="outputs without a dimension",
    ),
    pytest.param(training(EmpiricalNTKDynamics(fit_sizes=[41])), ValueError, "between 1 and the 40", id="fit size 41"),
    pytest.param(training(EmpiricalNTKDynamics(network="nut")), AttributeError, "as network=", id="no such network"),
    pytest.param(training(AfterKernel(fresh=True)), TypeError, "n_val and fresh make", id="no fresh samples"),
    pytest.param(training(AfterKernel(memory="1KB")), ValueError, "at the least", id="memory found out at the start"),
    pytest.param(
        training(InfiniteNTKFit(store="taken")), NotADirectoryError, "choose another folder", id="store folder"
    ),
    pytest.param(
        training(OptimalEarlyStopping(), default_root_dir="taken/run"),
        NotADirectoryError,
        "choose another default_root_dir",
        id="run folder",
    ),
    pytest.param(training(KernelDiagnostics(leading=41)), ValueError, "training set has 40 samples", id="leading 41"),
    pytest.param(training(AfterKernel(), epochs=-1), ValueError, "set max_epochs or max_steps", id="run without end"),
    pytest.param(training(OptimalEarlyStopping("test/eror")), KeyError, "as monitor=", id="monitor misspelled"),
    pytest.param(lambda: StopAtTrainError(5), ValueError, r"fraction in \[0, 1\)", id="threshold in percent"),
    pytest.param(lambda: EmpiricalNTKDynamics(2, 3), ValueError, "Give only one", id="two schedules"),
    pytest.param(lambda: EmpiricalNTKDynamics(0), ValueError, "must be at least 1", id="every 0 batches"),
]
MEASURES = [
    pytest.param(lambda: diagnostics.effective_rank(EYE / 0), ValueError, "diverged", id="rank of inf"),
    pytest.param(lambda: diagnostics.target_share(EYE, Y, 5), ValueError, "from 1 to 4", id="five of four"),
    pytest.param(lambda: diagnostics.kernel_velocity(EYE, EYE, 0), ValueError, "more than 0", id="no time"),
    pytest.param(lambda: fit_power_law(SIZES, ERRORS[:3]), ValueError, r"errors \(seeds, sizes\)", id="sizes missing"),
    pytest.param(lambda: fit_power_law(SIZES, [torch.nan] * 4), ValueError, "leave out seeds", id="nan error"),
    pytest.param(lambda: fit_power_law([0, *SIZES[1:]], ERRORS), ValueError, "different positive sizes", id="n = 0"),
    pytest.param(lambda: fit_power_law(SIZES, [0.1, 0, 0, 0]), ValueError, "a larger test set", id="errors of 0"),
    pytest.param(
        lambda: compare_exponents(fit_power_law(SIZES, ERRORS), fit_power_law(SIZES, ERRORS, confidence=0.9)),
        ValueError,
        "at the same confidence",
        id="two confidences",
    ),
]


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything that takes long fail: what is refused must be refused before it."""

    def begin(*_: object, **__: object) -> None:
        raise AssertionError("long work began")

    for place in (
        "ntk_lightning.solvers.sgd_steps.advance",
        "lightning.pytorch.strategies.Strategy.backward",
        "torch.linalg.eigh",
    ):
        monkeypatch.setattr(place, begin)
    ridge_module = sys.modules["ntk_lightning.solvers.ridge"]  # as an attribute of the package it is the function
    monkeypatch.setattr(ridge_module, "_conjugate_gradient", begin)


@pytest.mark.usefixtures("no_work")
@pytest.mark.filterwarnings("ignore:A power law fitted", "ignore:At n=")
@pytest.mark.parametrize(
    ("call", "error", "advice"), [*NETWORKS, *INFINITE, *EMPIRICAL, *SOLVERS, *CONFIGS, *DATA, *MODULES, *MEASURES]
)
def test_bad_input_is_refused_before_any_work(
    call: Call, error: type[Exception], advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(error, match=advice) as refusal:
        call()
    assert refusal.type is error
    assert "\n" not in str(refusal.value)


G = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TWICE = torch.cat([G[:3], G[:3]])
ZERO = torch.cat([G[:2], 0 * G[:1]])
BIASED = FiveLayerCNN(2, weight_std=1.2, bias_std=0.4)
ONE = torch.tensor([[2.0]], dtype=torch.float64)
PLUS, RATE = torch.tensor([1.0], dtype=torch.float64), OptimizerConfig(lr=0.1, momentum=0, epochs=3, batch_size=7)


def repeated(kernel: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Duplicate images have equal rows and columns."""
    return kernel(TWICE), kernel(G[:3]).repeat(2, 2)


def in_two_stores(folder: str) -> tuple[Tensor, Tensor]:
    """One folder keeps the Grams of two architectures apart."""
    kernels = InfiniteNTK(MyrtleCNN(1)), InfiniteNTK(BIASED)
    grams = [KernelStore(folder, kernel, G, block=2).gram(slice(None), progress=False) for kernel in kernels]
    return torch.stack(grams), torch.stack([kernel(G) for kernel in kernels])


def trained_once(n: int) -> tuple[Tensor, Tensor]:
    """A batch size above n is full batch."""
    first, second = (FiniteNetwork(net(), OptimizerConfig(lr=0.5, batch_size=size)) for size in (n, 10**6))
    for module in (first, second):
        fit(module, data(n), epochs=1)
    return first.net[0].weight, second.net[0].weight  # type: ignore[index]


LEGAL = [
    pytest.param(lambda _: repeated(InfiniteNTK(MyrtleCNN(1))), id="duplicate images, infinite"),
    pytest.param(lambda _: repeated(InfiniteNTK(MyrtleCNN(1), backend="reference")), id="duplicates, reference"),
    pytest.param(lambda _: repeated(EmpiricalNTK(BIASED)), id="duplicate images, empirical"),
    pytest.param(
        lambda _: (InfiniteNTK(MyrtleCNN(1))(ZERO)[2], torch.zeros(3).double()), id="a zero image has kernel 0"
    ),
    pytest.param(
        lambda _: (InfiniteNTK(BIASED)(ZERO), InfiniteNTK(BIASED, backend="reference")(ZERO)), id="a zero image, biases"
    ),
    pytest.param(lambda _: (EmpiricalNTK(net())(ZERO)[2], torch.zeros(3).double()), id="a zero image, empirical"),
    pytest.param(lambda _: (InfiniteNTK(MyrtleCNN(1))(G[:1]), InfiniteNTK(MyrtleCNN(1))(G)[:1, :1]), id="one image"),
    pytest.param(lambda _: (EmpiricalNTK(BIASED)(G[:1]), EmpiricalNTK(BIASED)(G)[:1, :1]), id="one image, empirical"),
    pytest.param(
        lambda _: (kernel_sgd(ONE, PLUS, RATE).coefficients, PLUS * (1 - 0.6**3) / 2), id="SGD on one sample, batch 7"
    ),
    pytest.param(
        lambda _: (gradient_descent(ONE, PLUS, RATE, [0, 3]).coefficients, PLUS * (1 - 0.6**3) / 2), id="descent, n = 1"
    ),
    pytest.param(lambda _: (ridge(ONE, PLUS).coefficients, PLUS / 2), id="interpolation of one sample"),
    pytest.param(
        lambda _: (ridge(torch.ones(2, 2), Y[:2], 0.5, method="cg").coefficients, Y[:2].double()), id="equal samples"
    ),
    pytest.param(lambda _: (kernel_sgd(0 * EYE, Y, RATE).predict(EYE), 0.15 * Y), id="a kernel of zeros"),
    pytest.param(
        lambda _: (torch.tensor(critical_learning_rate(0 * EYE)), torch.tensor(torch.inf)), id="critical rate of zeros"
    ),
    pytest.param(
        lambda _: (torch.tensor(diagnostics.effective_rank(torch.ones(4, 4))), torch.tensor(1.0)), id="rank 1"
    ),
    pytest.param(lambda folder: in_two_stores(folder), id="a store of another architecture"),
    pytest.param(lambda _: trained_once(1), id="a network on one sample"),
    pytest.param(lambda _: trained_once(5), id="a batch above n"),
]


@pytest.mark.parametrize("call", LEGAL)
def test_odd_but_legal_input_gives_right_values(call: Callable[[str], tuple[Tensor, Tensor]], tmp_path: Path) -> None:
    found, expected = call(str(tmp_path))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12, check_dtype=False)


def test_one_sample_has_no_spread_but_its_pixels_have() -> None:
    one = TensorData((IMAGES, LABELS), (IMAGES, LABELS), n_train=1)
    one.setup()
    assert one.train_set is not None
    assert abs(float(one.train_set.x.std(correction=0)) - 1) < 1e-6


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b"PAR1"), lambda file: file.unlink()])
def test_damaged_parquet_is_named(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(next(cifar_folder(tmp_path).glob("test*")))
    with pytest.raises((ValueError, FileNotFoundError), match=r"download it again|give the folder"):
        CIFAR10Binary(path=str(tmp_path))


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, after: int = 0) -> Iterator[None]:
    """Let the calls of a function that writes fail after some, as on a full disk."""
    original, calls = getattr(owner, name), []

    def write(*args: Any, **kwargs: Any) -> object:  # noqa: ANN401 - passed on
        calls.append(args)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, write)
        yield


def test_a_store_keeps_the_blocks_before_the_disk_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = InfiniteNTK(MyrtleCNN(1))
    store = KernelStore(tmp_path, kernel, G, block=2)
    with full_disk(monkeypatch, zarr, "create_array", after=4), pytest.raises(OSError, match="Make room there"):
        store.compute(progress=False)
    assert len(store.missing()) == 2
    torch.testing.assert_close(store.gram(slice(None), progress=False), kernel(G))


def test_a_table_that_cannot_be_written_is_in_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = [OptimalEarlyStopping(), EmpiricalNTKDynamics(every_n_batches=2)]
    old = tmp_path / "error_curve.csv"
    old.write_text("of an earlier run")
    module = FiniteNetwork(net(), OPTIMIZER)
    with (
        full_disk(monkeypatch, Path, "write_text"),
        pytest.warns(UserWarning, match=r"step,n,optimal_error(.|\n)*0,40,"),
        pytest.raises(OSError, match=r"Make room there(.|\n)*step,test_error") as refusal,
    ):
        fit(module, data(), callbacks=watch, default_root_dir=tmp_path)
    assert refusal.value.errno == errno.ENOSPC
    assert old.read_text() == "of an earlier run"


class Accident(Callback):
    """Breaks a run off."""

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == 6:
            raise IndexError("an accident")


def test_a_run_that_breaks_off_keeps_its_tables(tmp_path: Path) -> None:
    watch = [OptimalEarlyStopping(), EmpiricalNTKDynamics(every_n_batches=2), KernelDiagnostics(2), Accident()]
    with pytest.raises(IndexError, match="an accident"):
        fit(FiniteNetwork(net(), OPTIMIZER), data(), callbacks=watch, default_root_dir=tmp_path)
    for name, steps in (
        ("error_curve", ["4"]),
        ("kernel_dynamics", list("0246")),
        ("kernel_diagnostics", list("0246")),
    ):
        with (tmp_path / f"{name}.csv").open() as lines:
            assert [row["step"] for row in csv.DictReader(lines)] == steps


def test_a_network_that_diverges_ends_the_run_and_keeps_what_was_measured(tmp_path: Path) -> None:
    watch = [OptimalEarlyStopping(), EmpiricalNTKDynamics(every_n_batches=6), AfterKernel(), InfiniteNTKFit()]
    module = FiniteNetwork(net(), OptimizerConfig(lr=1e9, batch_size=12))
    with pytest.warns(UserWarning, match="has diverged") as warned:
        trainer = fit(module, data(), 50, callbacks=watch, default_root_dir=tmp_path, precision="32-true")
    told = [str(warning.message) for warning in warned]
    assert len([message for message in told if "Lower the learning rate, which is 1e+09" in message]) == 1
    assert trainer.current_epoch < 5
    assert watch[1].rows[0]["step"] == 0
    assert [arm.name for arm in (*watch[0].model_errors(), *watch[3].model_errors())] == [
        "finite network",
        "infinite NTK",
    ]
    assert (tmp_path / "kernel_dynamics.csv").exists()


class LinearKernel:
    """The identity on any samples."""

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        return torch.eye(len(x1), len(x1 if x2 is None else x2), dtype=x1.dtype)


@pytest.mark.parametrize(
    "start",
    [
        lambda config: kernel_sgd(EYE, Y, config),
        lambda config: gradient_descent(EYE, Y, config),
        lambda config: fit(KernelReadout(LinearKernel(), config), data(4), epochs=1),
    ],
)
def test_a_learning_rate_above_the_critical_one_is_told_with_both_numbers(
    start: Callable[[OptimizerConfig], object],
) -> None:
    config = OptimizerConfig(lr=100, momentum=0.5, full_batch=True, epochs=2)
    critical = critical_learning_rate(EYE, momentum=0.5)
    assert critical == pytest.approx(6)
    with pytest.warns(UserWarning, match=r"lr=100 is 16\.7 times the critical learning rate 6 "):
        start(config)


MAIN = Path(__file__).parents[1] / "cli_configs" / "myrtle64.yaml"
TINY = """
trainer: {max_epochs: 1, accelerator: cpu, logger: false, callbacks: [ntk_lightning.callbacks.OptimalEarlyStopping]}
model: {init_args: {net: {init_args: {width: 2}}, optimizer: {batch_size: 8}}}
data: {init_args: {n_train: 8, n_test: 8, fresh: 0}}
"""
LR, DEPTH = "--model.init_args.optimizer.lr", "--model.init_args.net.init_args.depth"
CALLBACK, ROOT = "--trainer.callbacks+=ntk_lightning.callbacks.", "--trainer.default_root_dir"
MISTAKES = [
    pytest.param([], "model: {init_args: {optimizer: {learning_rte: 1}}}", 2, "learning_rte", id="key misspelled"),
    pytest.param([], "modle: {init_args: {width: 3}}", 2, "modle", id="section misspelled"),
    pytest.param([], "data: {init_args: {n_train: ten}}", 2, r"n_train.*\s.*int.*ten", id="text for a number"),
    pytest.param([], "trainer: {max_epochs: [1", 2, "did not find expected", id="no YAML"),
    pytest.param(["--config=nowhere.yaml"], "", 2, r"does not exist.*nowhere\.yaml", id="no such file"),
    pytest.param(["--trainer.max_epohcs=3"], "", 2, "max_epohcs", id="option misspelled"),
    pytest.param([CALLBACK + "Nope"], "", 2, "no attribute 'Nope'", id="no such callback"),
    pytest.param(["--model.class_path=ntk_lightning.modules.Nope"], "", 2, "no attribute 'Nope'", id="no such module"),
    pytest.param(["--data.init_args.n_train=100000"], "", 1, "has 4096 such samples: ask for fewer", id="n above data"),
    pytest.param([LR + "=-1"], "", 1, "lr must be > 0", id="negative lr"),
    pytest.param([DEPTH + "=6"], "", 1, r"defined for depth \[5, 7, 10\], got 6", id="no such depth"),
    pytest.param(["--model.init_args.net.init_args.in_channels=3"], "", 1, "set in_channels=1", id="channels"),
    pytest.param(["--ckpt_path=truncated.ckpt"], "", 1, "a whole checkpoint of the same model", id="half a checkpoint"),
    pytest.param(["--ckpt_path=whole.ckpt"], "", 1, "resume with the same optimizer config", id="another's checkpoint"),
    pytest.param(["--ckpt_path=nowhere.ckpt"], "", 1, r"checkpoint", id="no checkpoint"),
    pytest.param([ROOT + "=taken/run"], "", 1, "choose another default_root_dir", id="run folder below a file"),
    pytest.param(
        [CALLBACK + "InfiniteNTKFit", "--trainer.callbacks.store=taken"], "", 1, "choose another folder", id="store"
    ),
    pytest.param(
        [CALLBACK + "AfterKernel", "--trainer.callbacks.memory=lots"], "", 1, r'such as "4GB"', id="memory text"
    ),
    pytest.param(
        ["--data=ntk_lightning.datamodules.CIFAR10Binary", "--data.path=."], "", 1, "leave path out", id="no parquet"
    ),
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``python -m ntk_lightning fit`` on a tiny configuration in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()

    def start(*arguments: str, overlay: str = "") -> None:
        (tmp_path / "tiny.yaml").write_text(TINY)
        (tmp_path / "overlay.yaml").write_text(overlay or "{}")
        configs = [f"--config={file}" for file in (MAIN, "tiny.yaml", "overlay.yaml")]
        monkeypatch.setattr(sys, "argv", ["ntk_lightning", "fit", *configs, *arguments])
        entry.run()

    return start


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of a network that is not the command's."""
    file = tmp_path_factory.mktemp("checkpoint") / "whole.ckpt"
    fit(FiniteNetwork(net(), OPTIMIZER), data(), epochs=1).save_checkpoint(file)
    return file.read_bytes()


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("arguments", "overlay", "code", "advice"), MISTAKES)
def test_the_command_line_ends_in_one_clear_error(
    arguments: list[str],
    overlay: str,
    code: int,
    advice: str,
    command: Callable[..., None],
    checkpoint: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("whole.ckpt").write_bytes(checkpoint)
    Path("truncated.ckpt").write_bytes(checkpoint[: len(checkpoint) // 2])
    with pytest.raises(SystemExit) as ended:
        command(*arguments, overlay=overlay)
    told = capsys.readouterr().err
    assert ended.value.code == code
    assert "Traceback" not in told
    before, _, message = told.partition("error: ")
    assert re.search(advice, message)
    assert len(message.splitlines()) == 1 if code == 1 else len(message.splitlines()) <= 16
    assert "usage: python -m ntk_lightning fit [options]" in before if code == 2 else "tip: " in before


def test_what_may_be_a_bug_keeps_its_traceback(command: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (IndexError("a bug"), ValueError("another package's")):
        monkeypatch.setattr(entry, "main", lambda error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error), match=str(error)):
            command()


def test_the_traceback_of_a_mistake_is_shown_on_request(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NTK_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ValueError, match="ask for fewer"):
        command("--data.init_args.n_train=100000")
