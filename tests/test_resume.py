"""A run that is killed and started again ends with the bits of a run that nothing disturbed.

Longer than 300 lines, since every way to end a run is held against one undisturbed run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_run import Recorder, flat_net
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import QUIET, data, file_size_limit, net
from torch import Tensor, nn

from ntk_lightning.callbacks import (
    AfterKernel,
    ComparisonTable,
    EmpiricalNTKDynamics,
    InfiniteNTKFit,
    KernelDiagnostics,
    OptimalEarlyStopping,
    ResumableCheckpoint,
    StopAtTrainError,
)
from ntk_lightning.callbacks.resumable_checkpoint import SIGNALS
from ntk_lightning.checkpoint_io import AtomicCheckpointIO
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.modules import FiniteNetwork, InfiniteNTKReadout, KernelReadout, LinearizedNetwork
from ntk_lightning.optim import OptimizerConfig

OPTIMIZER = OptimizerConfig(lr=0.2, momentum=0.9, batch_size=12)


class Noise(nn.Identity):
    """Draws from the global random state in training, as dropout does."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * torch.randn(x.shape, dtype=x.dtype) if self.training else x


def jitter(x: Tensor) -> Tensor:
    """Brighten a batch at random, as an augmentation does."""
    return x + 0.2 * torch.randn(len(x), 1, 1, 1)


class Stop(Callback):
    """Ends a run in one hook after so many steps: with nothing saved, as SIGKILL does, or by a signal to itself."""

    def __init__(self, hook: str, step: int, number: int = 0) -> None:
        self.step, self.number = step, number
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, *_: Any, **__: Any) -> None:  # noqa: ANN401 - any hook
        if trainer.global_step == self.step and not trainer.sanity_checking:
            if not self.number:
                raise ChildProcessError("killed")
            os.kill(os.getpid(), self.number)


MODULES: dict[str, Callable[[], LightningModule]] = {
    "finite": lambda: FiniteNetwork(nn.Sequential(Noise(), flat_net()), OPTIMIZER),
    "linearized": lambda: LinearizedNetwork(net(), OPTIMIZER),
    "readout": lambda: KernelReadout(EmpiricalNTK(net()), OPTIMIZER),
    "infinite": lambda: InfiniteNTKReadout(flat_net(), OPTIMIZER, backend="reference"),
}


def train(
    name: str,
    folder: Path,
    logger: Recorder,
    *extra: Callback,
    every: int = 3,
    **kwargs: Any,  # noqa: ANN401 - the Trainer's
) -> LightningModule:
    """Run for 4 epochs of 4 batches, augmented where the module can, with all callbacks on the finite network."""
    callbacks: list[Callback] = [ResumableCheckpoint(folder, every_n_steps=every), StopAtTrainError(0.0)]
    if kwargs.get("limit_val_batches") != 0:
        callbacks += [OptimalEarlyStopping(), ComparisonTable()]
    if name == "finite":
        callbacks += [EmpiricalNTKDynamics(every_n_batches=5, optimizer=OptimizerConfig(epochs=2))]
        callbacks += [KernelDiagnostics(every_n_batches=2, probe_size=12), AfterKernel()]
        callbacks += [InfiniteNTKFit(backend="reference", network="net.1")]
    torch.manual_seed(3)
    module = MODULES[name]()
    torch.manual_seed(4)
    lengths = {"max_epochs": 4, "min_epochs": 4} | kwargs
    trainer = Trainer(
        **QUIET | {"logger": logger, "enable_checkpointing": True} | lengths,
        default_root_dir=folder,
        callbacks=[*callbacks, *extra],
    )
    trainer.fit(module, data(n_val=10, transform=jitter if name in ("finite", "linearized") else None))
    return module


def tables(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.csv")}


def check_resumed(name: str, tmp_path: Path, stops: list[Stop], **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's
    """Compare weights, logged values and tables of a stopped and an undisturbed run, bit for bit."""
    calm, logged = Recorder(), Recorder()
    expected = train(name, tmp_path / "calm", calm, **kwargs).state_dict()
    for stop in stops:
        with pytest.raises((ChildProcessError, SystemExit)):
            train(name, tmp_path / "stopped", logged, stop, **kwargs)
        assert (tmp_path / "stopped" / "resume.ckpt").exists()
    found = train(name, tmp_path / "stopped", logged, **kwargs).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert logged.values == calm.values
    assert tables(tmp_path / "stopped") == tables(tmp_path / "calm")
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_callback_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    stops = [Stop("on_train_batch_end", 5), Stop("on_train_batch_start", 9, signal.SIGTERM)]
    check_resumed(name, tmp_path, [*stops, Stop("on_validation_batch_end", 12), Stop("on_train_end", 16)])
    written = {path.name for path in (tmp_path / "calm").rglob("*.csv")}
    assert len(written) == (6 if name == "finite" else 2)


@pytest.mark.parametrize("name", ["finite", "readout"])
def test_float64_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    check_resumed(name, tmp_path, [Stop("on_train_batch_end", 5)], precision="64-true")


@pytest.mark.parametrize("name", ["finite", "readout"])
def test_other_data_do_not_resume(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildProcessError):
        train(name, tmp_path, Recorder(), Stop("on_train_batch_end", 5))
    monkeypatch.setitem(globals(), "data", partial(data, subset_seed=1))
    with pytest.raises(ValueError, match="trained on other samples"):
        train(name, tmp_path, Recorder())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_end"])
def test_a_signal_outside_the_training_ends_the_run_at_once(hook: str, tmp_path: Path) -> None:
    """Kernels are computed there, for hours maybe: nothing may swallow the signal, and the job is run again."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    step = 16 if hook == "on_train_end" else 0
    after: list[str] = []

    class Late(Callback):
        def on_train_end(self, *_: Any) -> None:  # noqa: ANN401 - Lightning's signature
            after.append("went on")

    with pytest.raises(SystemExit) as ended:
        train("readout", tmp_path, Recorder(), Stop(hook, step, signal.SIGUSR1), Late())
    assert ended.value.code == 128 + signal.SIGUSR1
    assert not after
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
    train("readout", tmp_path, Recorder())


def test_a_second_last_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Leave save_last out"):
        train("readout", tmp_path, Recorder(), ModelCheckpoint(tmp_path, save_last=True))


STEPS = {"max_epochs": -1, "min_epochs": None, "max_steps": 14}


@pytest.mark.parametrize(
    "lengths",
    [
        STEPS,
        {"val_check_interval": 0.5},
        {**STEPS, "val_check_interval": 0.5},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"limit_val_batches": 0},
        {**STEPS, "limit_val_batches": 0},
    ],
)
@pytest.mark.parametrize("every", [1, 4])
def test_lengths_and_grids_of_validation(lengths: dict[str, Any], every: int, tmp_path: Path) -> None:
    hooks = ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_validation_end"]
    validated = 16 if lengths.get("check_val_every_n_epoch") == 2 else 12
    steps = [5, 6, 8, validated] if lengths.get("limit_val_batches") != 0 else [5, 6, 8]
    stops = [Stop(hook, step) for hook, step in zip(hooks, steps, strict=False)]
    check_resumed("readout", tmp_path, stops, every=every, **lengths)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 4])
def test_a_signal_saves_at_once(number: int, step: int, tmp_path: Path) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        train("linearized", tmp_path, Recorder(), Stop("on_train_batch_end", step, number), every=1000)
    assert ended.value.code == 128 + number
    saved = torch.load(tmp_path / "resume.ckpt", weights_only=True)
    assert saved["global_step"] == step
    assert signal.getsignal(number) == before


def test_slurm_requeues_after_its_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    for variable, value in {"NTASKS": 1, "JOB_NAME": "ntk", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{variable}", str(value))
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    check_resumed("readout", tmp_path, [Stop("on_train_batch_end", 6, signal.SIGUSR1)], devices=1)
    assert (tmp_path / "calls").read_text() == "requeue 1234\n"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_checkpoint_is_named(share: float, tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError):
        train("readout", tmp_path, Recorder(), Stop("on_train_batch_end", 5))
    file = tmp_path / "resume.ckpt"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(RuntimeError, match=r"resume\.ckpt is not a whole checkpoint.*Remove it"):
        train("readout", tmp_path, Recorder())


def test_a_kill_in_mid_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, writer = tmp_path / "resume.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, file)

    def half(checkpoint: object, stream: Any) -> None:  # noqa: ANN401 - a binary file
        stream.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"step": 2}, file)
    assert writer.load_checkpoint(file) == {"step": 1}


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_a_full_disk_is_told_and_keeps_the_checkpoint_before(limit: int, tmp_path: Path) -> None:
    file, writer = tmp_path / "resume.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint({"step": 1}, file)
    with file_size_limit(limit), pytest.raises(OSError, match=r"resume\.ckpt: File too large\. Make room"):
        writer.save_checkpoint({"step": 2, "weights": torch.ones(100_000)}, file)
    assert writer.load_checkpoint(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["resume.ckpt"]


def test_another_optimizer_config_does_not_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildProcessError):
        train("readout", tmp_path, Recorder(), Stop("on_train_batch_end", 5))
    other = OptimizerConfig(lr=0.5, momentum=0.9, batch_size=12)
    monkeypatch.setitem(MODULES, "readout", lambda: KernelReadout(EmpiricalNTK(net()), other))
    with pytest.raises(ValueError, match=r"lr=0\.2, this one has lr=0\.5"):
        train("readout", tmp_path, Recorder())


CLI = """
import os, signal, sys
from lightning import Callback
from ntk_lightning.callbacks import OptimalEarlyStopping
from ntk_lightning.cli import main
stop = int(os.environ.get("STOP", 0))
def die(self, trainer, *_):
    if stop and trainer.global_step == 5:
        os.kill(os.getpid(), stop)
OptimalEarlyStopping.on_train_batch_end = die
main()
"""


@pytest.mark.ci
def test_the_same_command_goes_on_after_sigkill_and_sigterm(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    configs = [
        root / "cli_configs" / name for name in ("myrtle64.yaml", "overlays/linearized.yaml", "overlays/resume.yaml")
    ]
    (tmp_path / "tiny.yaml").write_text(
        "trainer: {max_epochs: 4, accelerator: cpu, logger: false}\n"
        "model: {init_args: {net: {init_args: {width: 4}}, optimizer: {batch_size: 8}}}\n"
        "data: {init_args: {n_train: 16, n_test: 12, fresh: 0}}\n"
    )
    arguments = ["fit", *(f"--config={file}" for file in [*configs, tmp_path / "tiny.yaml"])]

    def run(folder: str, stop: int = 0) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "STOP": str(stop)}
        more = [f"--trainer.default_root_dir={tmp_path / folder}", "--trainer.callbacks.every_n_steps=3"]
        command = [sys.executable, "-c", CLI, *arguments, *more]
        return subprocess.run(command, cwd=tmp_path / folder, env=environment, timeout=100).returncode

    assert run("calm") == 0  # by the same command: another number of threads sums in another order
    assert run("stopped", signal.SIGKILL) == -signal.SIGKILL
    assert run("stopped", signal.SIGTERM) == 128 + signal.SIGTERM
    assert (tmp_path / "stopped/runs/resume/resume.ckpt").exists()
    assert run("stopped") == 0
    expected = tables(tmp_path / "calm")
    assert "error_curve.csv" in expected
    assert tables(tmp_path / "stopped") == expected
