"""Files are data and never code, stores stay in their folder, and secrets stay out of what a run keeps."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from tiny import QUIET, data, net

from ntk_lightning import __main__ as entry
from ntk_lightning.kernels import InfiniteNTK, KernelStore
from ntk_lightning.modules import FiniteNetwork
from ntk_lightning.networks import MLP

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("ntk_lightning", "callbacks", "datamodules", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TINY = """
trainer: {max_epochs: 1, accelerator: cpu, limit_train_batches: 1, callbacks: []}
model: {init_args: {net: {init_args: {width: 2}}, optimizer: {batch_size: 8}}}
data: {init_args: {n_train: 8, n_test: 8, fresh: 0}}
"""


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # set by the command line; taken back after the test


def configurations() -> list[str]:
    Path("tiny.yaml").write_text(TINY)
    return [f"--config={ROOT / 'cli_configs' / 'myrtle64.yaml'}", "--config=tiny.yaml"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["ntk_lightning", "fit", *configurations(), *arguments])
    entry.run()


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("unpickled",)


def test_a_checkpoint_that_holds_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "payload": Payload()}, "evil.ckpt")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--trainer.logger=false", "--ckpt_path=evil.ckpt")
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: The checkpoint cannot be restored")
    with pytest.raises(Exception, match="Weights only load failed"):
        Trainer(max_epochs=1, **QUIET).fit(FiniteNetwork(net()), datamodule=data(), ckpt_path="evil.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        FiniteNetwork.load_from_checkpoint("evil.ckpt", net=net())
    assert not Path("unpickled").exists()


def test_the_command_line_lets_no_file_be_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    with pytest.raises(SystemExit):
        command(monkeypatch, "--trainer.logger=false", "--no_such_option=1")
    torch.save(Payload(), "evil.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load("evil.ckpt", weights_only=False)  # as Lightning does with a checkpoint from the network
    assert not Path("unpickled").exists()


def calls(tree: ast.AST) -> list[tuple[str, dict[str, object]]]:
    """Dotted names of the functions that are called, and their constant keyword arguments."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(call.func), {k.arg or "": getattr(k.value, "value", None) for k in call.keywords})
        for call in found
    ]


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
ONLY_AS_ATTRIBUTES = {"torch.load", "numpy.load", "os.system", "yaml.load", "yaml.unsafe_load"}  # calls() sees them so


def unsafe_imports(tree: ast.AST) -> set[str]:
    """Dotted names of what is imported and can run code out of a file, or hides from calls()."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    unsafe = {name for name in names if PICKLES & {*name.split(".")}} | names & ONLY_AS_ATTRIBUTES
    return unsafe - {"pickle.UnpicklingError"}  # what torch.load raises


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("import pickle", {"pickle"}),
        ("from pickle import loads", {"pickle.loads"}),
        ("from pickle import UnpicklingError, Unpickler as U", {"pickle.Unpickler"}),
        ("from pickle import *", {"pickle.*"}),
        ("from ray import cloudpickle", {"ray.cloudpickle"}),
        ("def f():\n    from torch import load", {"torch.load"}),
        ("from pickle import UnpicklingError\nimport torch", set()),
    ],
)
def test_unsafe_imports_are_seen(code: str, unsafe: set[str]) -> None:
    assert unsafe_imports(ast.parse(code)) == unsafe


def test_every_file_is_loaded_as_data() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert not unsafe_imports(tree), path
        for name, keywords in calls(tree):
            assert name != "torch.load" or keywords.get("weights_only") is True or path == Path(__file__), path
            assert name not in ("np.load", "numpy.load") or keywords.get("allow_pickle") is False, path
            assert name not in ("os.system", "yaml.load", "yaml.unsafe_load"), path
            assert name not in ("eval", "exec") or path.name in ("test_readme.py", "test_docs.py"), (
                path
            )  # which runs the README's code
            assert not name.startswith("subprocess.") or not keywords.get("shell"), path
            assert not name.endswith(".extractall") or keywords.get("filter") == "data", path


def test_a_store_does_not_follow_a_planted_link_out_of_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    store = KernelStore(tmp_path / "store", InfiniteNTK(MLP(1, 1, 4)), torch.randn(4, 4).double(), block=2)
    store.compute([(0, 1)], progress=False)
    assert store.folder.parent == tmp_path / "store"
    (block,) = store.folder.glob("*.zarr.zip")
    block.rename(tmp_path / "moved")
    block.symlink_to(outside)
    with pytest.warns(RuntimeWarning, match="damaged"):
        store.compute(progress=False)
    assert not block.is_symlink()
    assert store.missing() == []
    assert [path.name for path in outside.iterdir()] == ["precious"]


@pytest.mark.ci
def test_secrets_of_the_environment_are_in_no_file_of_a_run(tmp_path: Path) -> None:
    secret = "0123456789abcdef" * 2 + "deadbeef"
    secrets = {"WANDB_API_KEY": secret, "HF_TOKEN": f"hf_{secret}"}
    own = {name: value for name, value in os.environ.items() if "WANDB" not in name}  # not this process's W&B service
    environment = {**own, "WANDB_MODE": "offline", **secrets, "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "ntk_lightning", "fit", *configurations()]
    told = subprocess.run(arguments, env=environment, capture_output=True, check=True)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert "config.yaml" in {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for text in (told.stdout, told.stderr, *(path.read_bytes() for path in files)):
        assert secret.encode() not in text
