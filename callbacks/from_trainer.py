"""What callbacks read from a Trainer and its module: data sets, network, optimizer config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from ntk_lightning.datamodules.base import Samples, has_set, samples_of
from ntk_lightning.kernels import EmpiricalNTK
from ntk_lightning.kernels.empirical.evaluation import evaluation_ntk
from ntk_lightning.kernels.grams.agreement import agree_on_kernel, agree_on_tensors
from ntk_lightning.objective import check_labels, encode_targets
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.pytrees import named_tensors
from ntk_lightning.solvers.kernel_fit import error_and_loss

__all__ = [
    "check_sets",
    "count_outputs",
    "epochs_between_validations",
    "error_and_loss_of",
    "evaluating",
    "evaluation_kernel",
    "evaluation_sets",
    "network",
    "run_config",
    "samples",
    "trainer_options",
]

_REGRESSION = (
    " Kernel fits beside a run compare error rates: for regression, fit EmpiricalNTK(net) by ntk_lightning.solvers, "
    "which gives losses."
)
_USUAL_OPTIONS = {
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "gradient_clip_val": None,
}


def samples(trainer: Trainer, split: str, num_outputs: int = 1) -> Samples:
    """Take a whole data set from the data module, on the device and in the precision of the training.

    Args:
        trainer: Trainer whose data module is set up.
        split: "train", "test", "val" or "fresh".
        num_outputs: Outputs of the network; for several, class numbers become one-hot targets (n, num_outputs).

    Returns:
        Inputs (n, ...) and labels (n,), or targets (n, num_outputs).

    Raises:
        TypeError: The data module has no such set.
        ValueError: The labels do not fit the number of outputs.
    """
    found = samples_of(trainer, split).to(
        trainer.strategy.root_device, cast(torch.dtype, trainer.lightning_module.dtype)
    )
    if num_outputs == 1:
        return found
    check_labels(found.y, num_outputs)
    return replace(found, y=encode_targets(found.y, num_outputs, found.x.dtype))


def evaluation_sets(trainer: Trainer, num_outputs: int | None = None) -> dict[str, Samples]:
    """Take the sets that kernel fits are measured on.

    Args:
        trainer: Trainer whose data module is set up.
        num_outputs: Outputs of the network, as for :func:`samples`; None where they are not known yet.

    Returns:
        The "test" set, and the "val" set if the data module has one.

    Raises:
        TypeError: There is no test set.
        ValueError: The labels do not fit the number of outputs.
    """
    splits = ("test", "val") if has_set(trainer, "val") else ("test",)
    found = {split: samples(trainer, split, num_outputs or 1) for split in splits}
    if num_outputs == 1:
        for split, each in found.items():
            check_labels(each.y, name=f"Labels of the {split} set", hint=_REGRESSION)
    return found


def check_sets(trainer: Trainer) -> None:
    """Raise on every process where they hold different data sets: their kernels would be pieces of several.

    Args:
        trainer: Trainer whose data module is set up.

    Raises:
        ValueError: The sets of two processes differ in sizes, inputs or labels.
    """
    if trainer.world_size == 1:
        return
    tensors: dict[str, Tensor] = {}
    for split in ("train", "test", "val", "fresh"):
        if has_set(trainer, split):
            found = samples_of(trainer, split).to(trainer.strategy.root_device)  # where processes can exchange them
            tensors |= {**dict(named_tensors(found.x, f"{split} inputs")), f"{split} labels": found.y}
    agree_on_tensors(tensors, "every process must hold the same sets, so give random_split and the like one seed.")


def network(module: LightningModule, name: str) -> nn.Module:
    """Find the network inside a Lightning module.

    Args:
        module: Module that holds it.
        name: Attribute path of the submodule that maps inputs to outputs; "" is the module itself.

    Returns:
        The submodule.

    Raises:
        AttributeError: There is no such submodule.
    """
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        children = [child for child, _ in module.named_children()]
        raise AttributeError(
            f"{type(module).__name__} has no network {name!r}; its submodules are {children}. Give the callback the "
            'one that maps inputs to outputs as network=..., or network="" for the module itself, by its forward.'
        ) from error


def count_outputs(trainer: Trainer, net: nn.Module) -> int:
    """Count the outputs of a network, on one training sample and in evaluation mode.

    Args:
        trainer: Trainer whose data module is set up.
        net: Network on the device of the training; it is left as it is.

    Returns:
        The number C where it maps (n, ...) to (n, C); 1 where it maps to (n,).
    """
    with torch.no_grad(), evaluating(net):
        outputs: Tensor = net(samples(trainer, "train").x[:1])
    return outputs.numel()


def trainer_options(trainer: Trainer) -> list[str]:
    """List the Trainer's options that make other steps of a run than those of the optimizer config.

    Args:
        trainer: Trainer of the run.

    Returns:
        "name=value" each; none in a ``fast_dev_run``, whose limits are Lightning's.
    """
    changed = {
        name: value for name, usual in _USUAL_OPTIONS.items() if (value := getattr(trainer, name)) not in (usual, None)
    }
    if type(trainer.limit_train_batches) is int:  # 1 is one batch, 1.0 is all
        changed["limit_train_batches"] = trainer.limit_train_batches
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside the class
        changed.pop("limit_train_batches", None)
    return [f"{name}={value}" for name, value in changed.items()]


def run_config(trainer: Trainer, module: LightningModule, optimizer: OptimizerConfig | None) -> OptimizerConfig:
    """Choose the optimizer config of kernel fits: the module's, for as many epochs or steps as the run.

    Args:
        trainer: Trainer, whose ``max_epochs`` or ``max_steps`` is the length.
        module: Module with an ``optimizer_config``.
        optimizer: Returned as it is, where given.

    Returns:
        The config of the fits.

    Raises:
        TypeError: There is no config to take.
        ValueError: The run has no end that the fits could share.
    """
    if optimizer is not None:
        return optimizer
    config = getattr(module, "optimizer_config", None)
    if not isinstance(config, OptimizerConfig):
        raise TypeError(
            f"{type(module).__name__} has no optimizer_config: give the callback optimizer=OptimizerConfig(...) for "
            "its kernel fits."
        )
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if steps == -1 and (epochs is None or epochs == -1):
        raise ValueError("The Trainer never ends: set max_epochs or max_steps, or give the callback its own optimizer.")
    return replace(config, epochs=epochs if epochs and epochs > 0 else 1, steps=None if steps == -1 else steps)


def epochs_between_validations(trainer: Trainer) -> float:
    """Compute how often the run is validated, so that kernel fits can be measured as often.

    Args:
        trainer: Trainer in training or after it.

    Returns:
        The distance in epochs; 1 for a run that is not validated.
    """
    batches, between = float(trainer.num_training_batches), trainer.val_check_batch
    if not trainer.enable_validation or between is None or not 0 < batches < float("inf"):
        return 1.0
    return (trainer.check_val_every_n_epoch or 1) * between / batches


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode for a while.

    Args:
        module: The module.

    Yields:
        None; every part is back in its own mode at the end.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def evaluation_kernel(trainer: Trainer, module: LightningModule, name: str, memory: str | int) -> EmpiricalNTK:
    """Make the empirical NTK of a module's network, in evaluation mode and the same on all processes.

    Args:
        trainer: Trainer of the run, in training or after it.
        module: Module that holds the network; it is left as it is.
        name: Attribute path of the network.
        memory: Budget of the kernel, such as "4GB".

    Returns:
        The kernel at the network's current weights, on the device of the training; its buffers, such as running
        statistics, are those of rank zero.

    Raises:
        ValueError: The weights differ between processes.
    """
    kernel = evaluation_ntk(network(module, name), memory).to(trainer.strategy.root_device)
    agree_on_kernel(kernel)
    return kernel


def error_and_loss_of(net: nn.Module, test: Samples) -> tuple[float, float]:
    """Measure a network's test error and test loss.

    Args:
        net: Maps (n, ...) to (n, num_outputs) or (n,), in the mode that it is in.
        test: Test set.

    Returns:
        Fraction of errors and mean squared error; 1 and infinity where an output is not finite.
    """
    with torch.no_grad():
        outputs = torch.cat([net(chunk).reshape(len(chunk), -1) for chunk in torch.split(test.x, 500)])
    error, loss = error_and_loss(outputs, encode_targets(test.y, outputs.shape[1], outputs.dtype))
    return float(error), float(loss)
