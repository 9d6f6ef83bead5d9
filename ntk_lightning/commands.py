"""Every subcommand with its example, and those beside LightningCLI's: ``study``, ``figures`` and ``report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ntk_lightning.studies.executors import Resources

__all__ = ["COMMANDS", "OWN", "overview", "run_command"]

PROGRAM = "python -m ntk_lightning"


class Command(NamedTuple):
    """What a subcommand does, in a sentence, and arguments that show it."""

    text: str
    example: str


COMMANDS = {
    "fit": Command(
        "Train a model and compare it with the kernels that callbacks extract from it.",
        "--config cli_configs/myrtle64.yaml --trainer.max_epochs 20",
    ),
    "validate": Command(
        "Measure a trained model on the evaluation sets.",
        "--config cli_configs/myrtle64.yaml --ckpt_path FILE",
    ),
    "test": Command(
        "Measure a trained model on the test set.",
        "--config cli_configs/myrtle64.yaml --ckpt_path FILE",
    ),
    "predict": Command(
        "Evaluate a trained model on the test set.",
        "--config cli_configs/myrtle64.yaml --ckpt_path FILE",
    ),
    "study": Command(
        "Run a grid of training runs and kernel fits, and keep their errors in one table.",
        "--config cli_configs/studies/figure_1a.yaml --scale small",
    ),
    "figures": Command("Draw the figures of finished studies, and print their exponents.", "runs/studies/small"),
    "report": Command("Make a W&B report, or a page of HTML, of finished studies.", "runs/studies/small"),
}
OWN = ("study", "figures", "report")


def example(name: str) -> str:
    """Write a command line that shows a subcommand.

    Args:
        name: One of ``COMMANDS``.

    Returns:
        The line.

    Example:
        >>> example("figures")
        'example: python -m ntk_lightning figures runs/studies/small'
    """
    return f"example: {PROGRAM} {name} {COMMANDS[name].example}"


def overview() -> str:
    """List all subcommands with an example of each.

    Returns:
        The help text of the program.
    """
    lines = [
        f"usage: {PROGRAM} COMMAND [options]",
        "",
        "Train networks beside their neural tangent kernels, run studies of them, draw and report these.",
        "",
        *(f"  {name:<10}{command.text}" for name, command in COMMANDS.items()),
        "",
        "examples:",
        *(f"  {PROGRAM} {name} {command.example}" for name, command in COMMANDS.items()),
        "",
        f"{PROGRAM} COMMAND --help lists the options of a command.",
        "Configurations in cli_configs/ come with the package.",
    ]
    return "\n".join(lines)


def run_command(args: Sequence[str]) -> None:
    """Run one of ``OWN``.

    Args:
        args: Its name and its arguments.

    Raises:
        SystemExit: The arguments are wrong, or help was asked for.
    """
    name = args[0]
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        description=COMMANDS[name].text,
        epilog=example(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name == "study":
        from ntk_lightning.studies.executors import Resources  # here: a command imports only what it runs
        from ntk_lightning.studies.study import study

        _add_study_arguments(parser)
        _add_resources(parser, Resources)
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
        resources = Resources(**{item.name: options.pop(item.name) for item in fields(Resources)})
        study(**options, resources=resources)
    elif name == "figures":
        from ntk_lightning.studies.figure_draw import figures

        figures(**options)
    else:
        from ntk_lightning.studies.report_wandb import report

        report(**options)


def _add_study_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", action="append", required=True, metavar="FILE", help="a study; more files change the first")
    scales = "a scale of the study: small (the embedded images, for two cores), cifar10 or two-cores (hours on them)"
    add("--scale", help=f"{scales}; without it the paper's size, CIFAR-5m (a download of 18 GB), for GPUs")
    add("--output", metavar="FOLDER", help="where results go (default: runs/studies/SCALE); run again to resume")
    plan = "only print what its cells will cost: pairs, gradients, peak memory and time, measured on small ones"
    add("--plan", action="store_true", help=plan)
    rates = "only print the critical learning rate of every kernel on these seeds, best such as the study does not use"
    add("--critical", nargs="+", type=int, metavar="SEED", help=rates)
    add("--wandb", metavar="PROJECT", help="log what is not yet logged as runs of this W&B project (default: none)")


def _add_resources(parser: argparse.ArgumentParser, resources: type[Resources]) -> None:
    add = parser.add_argument
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="run the cells on Ray: on this machine or a cluster")
    add(
        "--cpus",
        type=int,
        help="CPU threads of a cell (default: those that are free; on Ray, the smallest node's)",
    )
    sharing = "GPUs of a cell on Ray; 0.25 lets four cells share one (default: %(default)g)"
    add("--gpus", type=float, default=resources.gpus, help=sharing)
    budget = "memory for the gradients behind an empirical NTK (default: %(default)s); wide networks need more"
    add("--memory", default=resources.memory, metavar="AMOUNT", help=budget)
