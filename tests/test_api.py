"""The public API: listed in one place, documented, as the README says, and cheap to import."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import ntk_lightning

ROOT = Path(__file__).parents[1]
HOMES = ("callbacks", "datamodules", "kernels", "modules", "networks", "optim", "scaling", "solvers", "studies")
EXPORTS: dict[str, list[str]] = {home: import_module(f"ntk_lightning.{home}").__all__ for home in HOMES}
PUBLIC = [(home, name) for home, names in EXPORTS.items() for name in names]
DEPENDENCIES = {
    *(
        "datasets",
        "filelock",
        "jsonargparse",
        "lightning",
        "matplotlib",
        "numba",
        "numpy",
        "pandas",
        "PIL",
        "pyarrow",
        "ray",
    ),
    *("rich", "scipy", "torch", "torchmetrics", "torchvision", "triton", "wandb", "yaml", "zarr"),
}
STD = {"weight_std": 2**0.5, "bias_std": 0.0}
FIXED: dict[str, dict[str, Any]] = {  # leading parameters, in order; ... where there is no default
    "networks.NTKConv2d": {"in_channels": ..., "out_channels": ..., "kernel_size": ..., "padding": "same", **STD},
    "networks.NTKLinear": {"in_features": ..., "out_features": ..., **STD},
    "networks.MyrtleCNN": {"width": 64, "depth": 5, "in_channels": 3, "num_outputs": 1, **STD},
    "networks.FiveLayerCNN": {"width": 64, "in_channels": 3, "num_outputs": 1, **STD},
    "networks.MLP": {"width": ..., "depth": ..., "in_features": ..., "activation": None, "num_outputs": 1, **STD},
    "networks.Erf": {},
    "networks.Pointwise": {"function": ..., "kinks": ()},
    "kernels.InfiniteNTK": {"net": ..., "kind": "ntk", "backend": "auto"},
    "kernels.EmpiricalNTK": {"net": ...},
    "kernels.KernelStore": {"folder": ..., "kernel": ..., "x": ...},
    "modules.FiniteNetwork": {"net": ...},
    "modules.LinearizedNetwork": {"net": ...},
    "modules.KernelReadout": {"kernel": ...},
    "modules.InfiniteNTKReadout": {"net": ...},
    "solvers.kernel_sgd": {"kernel": ..., "targets": ..., "optimizer": ...},
    "solvers.gradient_descent": {"kernel": ..., "targets": ..., "optimizer": ...},
    "solvers.ridge": {"kernel": ..., "targets": ...},
    "solvers.KernelBlocks": {"train": ..., "test_train": ..., "test": ...},
    "solvers.nngp_posterior": {"nngp": ..., "targets": ..., "noise": 0.0},
    "solvers.ntk_ensemble": {"nngp": ..., "ntk": ..., "targets": ..., "time": float("inf")},
    "solvers.log_marginal_likelihood": {"nngp": ..., "targets": ..., "noise": 0.0},
    "scaling.fit_power_law": {"n": ..., "errors": ...},
    "scaling.predict_learning_curve": {"kernel": ..., "targets": ..., "sizes": ..., "ridge": 0.0},
    "scaling.compare_exponents": {"a": ..., "b": ...},
    "callbacks.EmpiricalNTKDynamics": {"every_n_batches": None, "log_spaced": None},
    "callbacks.AfterKernel": {},
    "callbacks.KernelDiagnostics": {"every_n_batches": None, "log_spaced": None},
    "callbacks.OptimalEarlyStopping": {},
    "callbacks.StopAtTrainError": {},
    "datamodules.FashionMNISTBinary": {"n_train": 2000, "n_test": 1000},
    "datamodules.CIFAR10Binary": {},
    "datamodules.CIFAR5mBinary": {},
    "datamodules.SVHNParity": {},
    "datamodules.SyntheticTeacher": {},
}


def parameters(made: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(made).parameters.values())


def test_the_package_exports_what_its_subpackages_do() -> None:
    names = [name for _, name in PUBLIC]
    assert len(set(names)) == len(names)
    assert sorted(ntk_lightning.__all__) == sorted(names)
    assert set(names) <= set(dir(ntk_lightning))
    for home, name in PUBLIC:
        assert getattr(ntk_lightning, name) is getattr(import_module(f"ntk_lightning.{home}"), name), name


def test_the_version_is_that_of_the_installed_package() -> None:
    assert ntk_lightning.__version__ == version("ntk_lightning")


def test_other_names_are_refused() -> None:
    for module in (ntk_lightning, ntk_lightning.studies):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'wrong'"):
            _ = module.wrong


def test_readme_lists_every_public_name() -> None:
    rows = re.findall(r"^\| `ntk_lightning\.(\w+)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    listed = {home: sorted(re.findall(r"`(\w+)`", names)) for home, names in rows}
    assert listed == {home: sorted(names) for home, names in EXPORTS.items()}


@pytest.mark.parametrize(("home", "name"), PUBLIC, ids=lambda part: part)
def test_public_names_document_their_arguments(home: str, name: str) -> None:
    made = getattr(import_module(f"ntk_lightning.{home}"), name)
    text = inspect.getdoc(made) or ""
    assert text.splitlines()[0].endswith((".", "?")), "the first line is a sentence"
    own = inspect.isfunction(made) or dataclasses.is_dataclass(made) or "__init__" in vars(made)
    for parameter in parameters(made) if own else []:
        assert re.search(rf"^ +\*{{0,2}}{parameter.name}:|``{parameter.name}``", text, re.MULTILINE), parameter
    if inspect.isfunction(made) and inspect.signature(made).return_annotation not in (None, "None"):
        assert "Returns:" in text


@pytest.mark.parametrize("path", FIXED)
def test_fixed_names_take_their_leading_parameters(path: str) -> None:
    home, name = path.split(".")
    expected = FIXED[path]
    found = parameters(getattr(import_module(f"ntk_lightning.{home}"), name))[: len(expected)]
    assert [parameter.name for parameter in found] == list(expected)
    for parameter, default in zip(found, expected.values(), strict=True):
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if default is ...:
            assert parameter.default is inspect.Parameter.empty, parameter
        elif default is not None or not inspect.isclass(parameter.default):
            assert parameter.default == default, parameter


def test_every_kernel_is_called_the_same_way() -> None:
    for kernel, call in (
        (ntk_lightning.InfiniteNTK, ntk_lightning.InfiniteNTK.__call__),
        (ntk_lightning.EmpiricalNTK, ntk_lightning.EmpiricalNTK.forward),
    ):
        assert [p.name for p in parameters(call)][:4] == ["self", "x1", "x2", "progress"]
        assert inspect.signature(call).parameters["x2"].default is None
        assert inspect.signature(call).parameters["progress"].kind is inspect.Parameter.KEYWORD_ONLY
        assert [p.name for p in parameters(kernel.diag)][:2] == ["self", "x"]


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        ((), ("ntk_lightning",)),
        (tuple(f"ntk_lightning.{home}" for home in HOMES), ("ntk_lightning", "filelock", "scipy")),
        (("ntk_lightning.cli",), ("ntk_lightning", "filelock", "scipy", "jsonargparse", "lightning")),  # its CLI
    ],
    ids=["package", "subpackages", "cli"],
)
def test_imports_load_nothing_heavy_beyond_lightning(modules: tuple[str, ...], allowed: tuple[str, ...]) -> None:
    program = (
        f"import sys\n{'import lightning' if modules else ''}\nbefore = set(sys.modules)\n"
        f"import {', '.join(('ntk_lightning', *modules))}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", program]
    new = set(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout.split())
    assert "ntk_lightning" in new
    assert not new & DEPENDENCIES - set(allowed)
