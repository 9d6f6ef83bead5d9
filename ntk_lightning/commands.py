"""The subcommands beside LightningCLI's: ``study``, ``figures`` and ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

__all__ = ["COMMANDS", "run_command"]

COMMANDS = {
    "study": "Run a grid of training runs and kernel fits, and keep their errors in one table.",
    "figures": "Draw the figures of finished studies.",
    "report": "Make a W&B report, or a page of HTML, of finished studies.",
}
EXAMPLES = {
    "study": "python -m ntk_lightning study --config cli_configs/studies/figure_1a.yaml --scale small",
    "figures": "python -m ntk_lightning figures runs/studies/small",
    "report": "python -m ntk_lightning report runs/studies/small",
}


def run_command(args: Sequence[str]) -> None:
    """Run one of ``COMMANDS``.

    Args:
        args: Its name and its arguments.

    Raises:
        SystemExit: The arguments are wrong, or help was asked for.
    """
    name = args[0]
    parser = argparse.ArgumentParser(
        prog=f"python -m ntk_lightning {name}",
        description=COMMANDS[name],
        epilog=f"example: {EXAMPLES[name]}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name == "study":
        _add_study_arguments(parser)
    else:
        parser.add_argument("results", metavar="RESULTS", help="folder that studies wrote their tables to")
    if name == "figures":
        parser.add_argument("--output", metavar="FOLDER", help="where the pictures go (default: RESULTS)")
        parser.add_argument("--format", choices=("png", "pdf", "svg"), default="png", help="kind of picture")
    elif name == "report":
        parser.add_argument("--project", default="ntk_lightning", help="W&B project of the runs and the report")
        parser.add_argument("--entity", help="W&B user or team")
    options = vars(parser.parse_args(args[1:]))
    if name == "study":
        from ntk_lightning.scaling.study import study  # here: a command imports only what it runs

        study(**options)
    elif name == "figures":
        from ntk_lightning.scaling.study_figures import figures

        figures(**options)
    else:
        from ntk_lightning.scaling.report import report

        report(**options)


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="a study; more files change the first")
    add("--scale", help="a scale of the study, such as small: embedded data, minutes on two cores")
    add("--output", metavar="FOLDER", help="where results go (default: runs/studies/SCALE); run again to resume")
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="run the cells on Ray: on this machine or a cluster")
    add("--cpus", type=int, help="CPU threads of a cell (default: all of this machine)")
    add("--gpus", type=float, default=0.0, help="GPUs of a cell on Ray; 0.25 lets four cells share one (default: 0)")
    add("--wandb", metavar="PROJECT", help="log every new cell as runs of this W&B project (default: none)")
