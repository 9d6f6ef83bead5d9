"""The command line: Lightning's, for the modules and data of this package or any other."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from jsonargparse import DefaultHelpFormatter
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from ntk_lightning.atomic_files import writing
from ntk_lightning.callbacks.run_output import ADVICE, run_folder
from ntk_lightning.callbacks.training_lines import TrainingLines
from ntk_lightning.commands import COMMANDS, OWN, PROGRAM, example, overview, run_command
from ntk_lightning.shipped_configs import find_configs

__all__ = ["main"]


OF_CLASSES = """
options of one class: --model.help FiniteNetwork, --data.help FashionMNISTBinary,
                      --trainer.callbacks.help EmpiricalNTKDynamics
whole configuration:  --print_config, beside the other options"""


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of an example as they are."""


class RunConfig(SaveConfigCallback):
    """Keeps the whole configuration of a run beside its tables and pictures."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write ``config.yaml`` into the run's folder."""
        path = run_folder(trainer) / "config.yaml"
        with writing(path, ADVICE):
            self.parser.save(self.config, path, skip_none=False, overwrite=True)


def main(args: Sequence[str] | None = None) -> LightningCLI | None:
    """Run ``fit``, ``validate``, ``test`` or ``predict``, which are LightningCLI's, or one of the other commands.

    W&B runs offline unless ``WANDB_MODE`` says otherwise. A ``--config`` that is not there is looked for among those
    that come with the package.

    Args:
        args: Command line, by default the process's.

    Returns:
        The CLI after the run, with ``trainer``, ``model`` and ``datamodule``; None of the other commands.

    Raises:
        SystemExit: The arguments are wrong, or help was asked for.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # Lightning would unpickle what it downloads
    given = find_configs(sys.argv[1:] if args is None else args)
    if given and given[0] in OWN:
        run_command(given)
        return None
    if given in ([], ["-h"], ["--help"]):
        print(overview(), file=sys.stdout if given else sys.stderr)
        sys.exit(0 if given else 2)
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`")  # Lightning's own, on recent torch
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")  # they are the process's, with configs found
    return LightningCLI(
        LightningModule,
        LightningDataModule,
        RunConfig,
        {"save_to_log_dir": False},
        trainer_defaults={"callbacks": [TrainingLines()]},
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        parser_kwargs={
            "prog": PROGRAM,
            **{
                name: {
                    "usage": f"{PROGRAM} {name} [options]",
                    "description": COMMANDS[name].text,
                    "epilog": f"{example(name)}\n{OF_CLASSES}",
                    "formatter_class": _Help,
                }
                for name in LightningCLI.subcommands()
            },
        },
        args=given,
    )
