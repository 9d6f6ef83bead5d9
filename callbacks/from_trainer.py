"""What callbacks ask of a run: its data, its network and its optimizer config."""

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
from ntk_lightning.objective import check_labels, encode_targets
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers.kernel_fit import error_and_loss

__all__ = [
    "count_outputs",
    "epochs_between_validations",
    "error_and_loss_of",
    "evaluating",
    "evaluation_kernel",
    "evaluation_sets",
    "network",
    "run_config",
    "samples",
]


def samples(trainer: Trainer, split: str, num_outputs: int = 1) -> Samples:
    """Take a whole data set from the run's data module, on the device and in the precision of the training.

    Args:
        trainer: Of the run, set up.
        split: "train", "test", "val" or "fresh".
        num_outputs: Of the network; for several, class numbers become one-hot targets (n, num_outputs).

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


def evaluation_sets(trainer: Trainer, num_outputs: int = 1) -> dict[str, Samples]:
    """Take the sets that kernel fits are measured on.

    Args:
        trainer: Of the run, set up.
        num_outputs: As of :func:`samples`.

    Returns:
        The "test" set, and the "val" set if the data module has one.

    Raises:
        TypeError: There is no test set.
        ValueError: The labels do not fit the number of outputs.
    """
    splits = ("test", "val") if has_set(trainer, "val") else ("test",)
    return {split: samples(trainer, split, num_outputs) for split in splits}


def network(module: LightningModule, name: str) -> nn.Module:
    """Find the network inside a Lightning module.

    Args:
        module: Of the run.
        name: Attribute path of the submodule that maps inputs to outputs.

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
            "one that maps inputs to outputs as network=..."
        ) from error


def count_outputs(trainer: Trainer, module: LightningModule, name: str) -> int:
    """Count the outputs of a module's network, on one training sample and in evaluation mode.

    Args:
        trainer: Of the run, on its device.
        module: Of the run; it is left as it is.
        name: Attribute path of the network.

    Returns:
        The number C where it maps (n, ...) to (n, C); 1 where it maps to (n,).
    """
    net = network(module, name)
    with torch.no_grad(), evaluating(net):
        outputs: Tensor = net(samples(trainer, "train").x[:1])
    return outputs.numel()


def run_config(trainer: Trainer, module: LightningModule, optimizer: OptimizerConfig | None) -> OptimizerConfig:
    """Give kernel fits the optimizer config and length of the run they are compared with.

    Args:
        trainer: Fixes the length by ``max_epochs`` or ``max_steps``.
        module: Fixes the rest by its ``optimizer_config``.
        optimizer: Used as it is instead, where given.

    Returns:
        The config of the fits.

    Raises:
        TypeError: There is no config to take.
        ValueError: The run has no end that the fits could share, or takes other steps than the fits would.
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
    usual = {
        "accumulate_grad_batches": 1,
        "limit_train_batches": 1.0,
        "overfit_batches": 0.0,
        "gradient_clip_val": None,
    }
    changed = {name: value for name in usual if (value := getattr(trainer, name)) not in (usual[name], None)}
    if type(trainer.limit_train_batches) is int:  # 1 is one batch, 1.0 is all
        changed["limit_train_batches"] = trainer.limit_train_batches
    if changed:
        options = ", ".join(f"{name}={value}" for name, value in changed.items())
        raise ValueError(
            f"Kernel fits take the plain steps of the optimizer config, but the Trainer has {options}: leave that out "
            "(batch_size and n_train do the like), or give the callback its own optimizer."
        )
    return replace(config, epochs=epochs if epochs and epochs > 0 else 1, steps=None if steps == -1 else steps)


def epochs_between_validations(trainer: Trainer) -> float:
    """Tell how often the run is validated, so that kernel fits can be measured as often.

    Args:
        trainer: Of the run, training or trained.

    Returns:
        The distance in epochs; 1 for a run that is not validated.
    """
    batches, between = float(trainer.num_training_batches), trainer.val_check_batch
    if not trainer.enable_validation or between is None or not 0 < batches < float("inf"):
        return 1.0
    return (trainer.check_val_every_n_epoch or 1) * between / batches


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and its parts into evaluation mode, and back into the mode each was in.

    Args:
        module: The module.

    Yields:
        Nothing.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def evaluation_kernel(module: LightningModule, name: str, memory: str) -> EmpiricalNTK:
    """Copy a module's network, in evaluation mode, and take its empirical NTK.

    Args:
        module: Of the run; it is left as it is.
        name: Attribute path of the network.
        memory: Budget of the kernel, such as "4GB".

    Returns:
        The kernel at the network's current weights.
    """
    kernel = EmpiricalNTK(network(module, name), memory=memory)
    kernel.net.eval()
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
