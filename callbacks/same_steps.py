"""Whether a run takes the plain SGD steps of its optimizer config, as the kernel fits beside it do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ntk_lightning.callbacks.find_network import network, predict
from ntk_lightning.callbacks.fitting import FittingCallback
from ntk_lightning.callbacks.from_trainer import run_config, trainer_options
from ntk_lightning.callbacks.measured import Measured
from ntk_lightning.callbacks.nested_fits import FIT_NAMES
from ntk_lightning.callbacks.steps import steps_of
from ntk_lightning.datamodules.base import Batch
from ntk_lightning.modules.base import NTKModule
from ntk_lightning.objective import encode_targets, squared_error
from ntk_lightning.optim import OptimizerConfig

__all__ = ["SameSteps", "departures"]

_LOSS_TOLERANCE = 0.02  # relative: mixed precision rounds
_STEP_TOLERANCE = 1e-3


class SameSteps(FittingCallback):
    """Mixin of callbacks that fit kernels, and where by the module's optimizer config, the run must take its steps.

    What can be seen when the training starts is refused by a ValueError; what shows itself later, when a refusal would
    lose the run, is warned about once, and marks the models of the callback in tables. A callback with an optimizer of
    its own, or one that fits otherwise than by SGD, compares nothing.
    """

    def _compares(self, module: LightningModule) -> bool:
        """Tell whether the run must take the steps of the module's config."""
        return self.optimizer is None and self.fit_kind(module) == "sgd"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse Trainer options that change the steps."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        _WATCHED[trainer] = _Watch()
        if self.fit_kind(pl_module) == "sgd":
            run_config(trainer, pl_module, self.optimizer)
        if self._compares(pl_module) and (changed := trainer_options(trainer)):
            raise ValueError(
                "Kernel fits take the plain steps of the optimizer config, but the Trainer has "
                f"{', '.join(changed)}: leave that out (batch_size and n_train do the like), or give the callback "
                'its own optimizer, or fit="flow".'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an optimizer, a schedule or hooks that change the steps."""
        if self._compares(pl_module):
            self._check(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = departures(trainer, pl_module, self.measured.network)
        if not pl_module.automatic_optimization:
            rank_zero_warn(
                f"{type(pl_module).__name__} optimizes manually, so that its steps cannot be compared with those of "
                "its optimizer config, which the kernel fits take."
            )
        if found and trainer.global_step:  # resumed: what changed in mid-run has been accepted there with a warning
            _watch(trainer).depart(trainer, found)
        elif found:
            raise ValueError(
                f"Kernel fits take the plain SGD steps of the optimizer config, but {'; '.join(found)}: leave that "
                'out, or give the callback its own optimizer=OptimizerConfig(...), or fit="flow", which takes no steps.'
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Compute, before the first batch, what its loss should be."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        watch = _watch(trainer)
        if self._compares(pl_module) and not watch.begun:
            watch.begun = True
            watch.expected_loss = _expected_loss(trainer, pl_module, batch, self.measured)
            watch.trainable = _trainable(pl_module)
        elif watch.after and (found := watch.between_batches()):
            watch.depart(trainer, found)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep, in the first batch, the gradients that plain SGD would step with."""
        watch, scaler = _watch(trainer), getattr(trainer.precision_plugin, "scaler", None)
        if watch.before is None and trainer.global_step == 0 and scaler is None and self._compares(pl_module):
            watch.before = [
                (weight, weight.detach().clone(), weight.grad.detach().clone())
                for weight in pl_module.parameters()
                if weight.requires_grad and weight.grad is not None
            ]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare the first batch's loss and step, and the optimizer after every batch."""
        watch = _watch(trainer)
        last = trainer.fit_loop.total_batch_idx
        if watch.departed_at is None and watch.batch != last and self._compares(pl_module):
            watch.batch = last  # the first of the run's callbacks looks for all
            found = [
                *departures(trainer, pl_module, self.measured.network),
                *watch.first_batch(trainer, pl_module, outputs),
                *watch.every_batch(pl_module, outputs),
            ]
            if found:
                watch.depart(trainer, found)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def departed(self, trainer: Trainer) -> bool:
        """Tell whether the run has left the steps of its config, so that network and kernel fits are not comparable.

        Args:
            trainer: Trainer of the run.

        Returns:
            True if it was warned about.
        """
        return self._compares(trainer.lightning_module) and _watch(trainer).departed_at is not None

    def compared_name(self, trainer: Trainer, model: str) -> str:
        """Name a model in tables, with its fit unless by SGD, and a mark where the network takes other steps.

        Args:
            trainer: Trainer of the run.
            model: Such as "after-kernel".

        Returns:
            The name.
        """
        kind = self.fit_kind(trainer.lightning_module)
        name = self.model_name(model) + ("" if kind == "sgd" else f", {FIT_NAMES[kind]}")
        return f"{name}, other steps than the network" if self.departed(trainer) else name


class _Watch:
    """What the callbacks of one run have seen of its steps."""

    def __init__(self) -> None:
        self.begun = False
        self.batch = -1
        self.expected_loss: float | None = None
        self.before: list[tuple[Tensor, Tensor, Tensor]] | None = None  # weight, its value and gradient, first batch
        self.after: list[tuple[Tensor, Tensor]] = []  # weight and its value when the first batch ended, for the second
        self.trainable: set[str] = set()
        self.departed_at: int | None = None

    def every_batch(self, module: LightningModule, outputs: object) -> list[str]:
        """Look for a batch without a loss, and for weights that were frozen or released since the first batch."""
        found = [] if outputs or not module.automatic_optimization else ["training_step gave no loss"]
        if changed := sorted(self.trainable ^ _trainable(module)) if self.begun else []:
            found.append(f"requires_grad has changed for {', '.join(map(repr, changed[:3]))}")
        return found

    def between_batches(self) -> list[str]:
        """Compare the weights that the second batch begins with and those that the first has left."""
        after, self.after = self.after, []
        changed = any(not torch.equal(weight.detach(), value) for weight, value in after)
        return ["the weights changed between the first batch and the second"] if changed else []

    def first_batch(self, trainer: Trainer, module: LightningModule, outputs: object) -> list[str]:
        """Compare the loss and the step of the first batch with those of plain SGD on the squared error."""
        found, expected, before = [], self.expected_loss, self.before or []
        self.expected_loss, self.before = None, []
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if expected is not None and isinstance(loss, Tensor) and loss.numel() == 1:
            given = float(loss)
            if not abs(given - expected) <= _LOSS_TOLERANCE * abs(expected) + 1e-6:  # NaN too
                found.append(f"the loss of the first batch is {given:.4g}, its mean squared error {expected:.4g}")
        if before and module.automatic_optimization and trainer.global_step == 1:
            lr = _config(module).lr
            wrong = [
                float(
                    (weight.detach() - start + lr * gradient).norm() - 2 * torch.finfo(weight.dtype).eps * start.norm()
                )
                > _STEP_TOLERANCE * float(lr * gradient.norm())
                for weight, start, gradient in before
            ]
            self.after = [(weight, weight.detach().clone()) for weight, _, _ in before]
            if any(wrong):
                found.append("the first step is not the learning rate times the gradient of the loss")
        return found

    def depart(self, trainer: Trainer, found: list[str]) -> None:
        """Warn, once in a run, that it does not take the steps of its config."""
        if self.departed_at is None:
            self.departed_at = steps_of(trainer).taken(trainer)
            rank_zero_warn(
                f"At step {self.departed_at} the run does not take the plain SGD steps of its optimizer config: "
                f"{'; '.join(found)}. The kernel fits do, so that they and the network are not trained alike; tables "
                "say so. Give the callback its own optimizer=OptimizerConfig(...) to choose its steps yourself."
            )


_WATCHED: WeakKeyDictionary[Trainer, _Watch] = WeakKeyDictionary()


def _trainable(module: nn.Module) -> set[str]:
    return {name for name, weight in module.named_parameters() if weight.requires_grad}


def _watch(trainer: Trainer) -> _Watch:
    return _WATCHED.setdefault(trainer, _Watch())


def departures(trainer: Trainer, module: LightningModule, name: str | None) -> list[str]:
    """List what makes the steps of a run others than plain SGD with the module's optimizer config.

    Args:
        trainer: Trainer whose optimizers are set up.
        module: Module with an ``optimizer_config``.
        name: As of :func:`~ntk_lightning.callbacks.find_network.network_name`.

    Returns:
        One phrase each: Trainer options, optimizers, their settings, schedules, weights they leave out, hooks.
    """
    config = _config(module)
    found = [f"the Trainer has {option}" for option in trainer_options(trainer)]
    found += [
        f"{type(module).__name__} has its own {hook}"
        for hook in ("configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad", "backward")
        if is_overridden(hook, module, LightningModule)
    ]
    found += [f"there is a schedule, {type(each.scheduler).__name__}" for each in trainer.lr_scheduler_configs]
    if len(trainer.optimizers) != 1:
        return [*found, f"there are {len(trainer.optimizers)} optimizers"]
    (optimizer,) = trainer.optimizers
    if type(optimizer) is not torch.optim.SGD:
        return [*found, f"the optimizer is {type(optimizer).__name__}"]
    plain = {"lr": config.lr, "momentum": config.momentum, "dampening": 0, "weight_decay": 0, "nesterov": False}
    for setting, value in (plain | {"maximize": False}).items():
        others = {float(group[setting]) for group in optimizer.param_groups} - {float(value)}
        found += [f"the optimizer has {setting}={other:g} instead of {value:g}" for other in sorted(others)]
    trained = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    weights = network(module, name).named_parameters()
    left_out = [weight for weight, values in weights if values.requires_grad and id(values) not in trained]
    if left_out:
        found.append(f"the optimizer leaves out {', '.join(map(repr, left_out[:3]))}")
    return found


def _config(module: LightningModule) -> OptimizerConfig:
    return cast(OptimizerConfig, module.optimizer_config)


def _expected_loss(trainer: Trainer, module: LightningModule, batch: object, measured: Measured) -> float | None:
    """Squared error of the module on a batch, at its weights and in its modes of this moment; None where unknown."""
    if isinstance(module, NTKModule) and not any(
        getattr(type(module), step) is not getattr(NTKModule, step) for step in ("training_step", "_shared_step")
    ):
        return None  # it is the squared error
    if (
        not isinstance(batch, (tuple, list))
        or len(batch) < 2
        or not all(isinstance(part, Tensor) for part in batch[:2])
    ):
        return None
    x, y = cast(Tensor, batch[0]), cast(Tensor, batch[1])
    whole = batch if isinstance(batch, Batch) else Batch(x, y, torch.arange(0), len(y) * trainer.world_size)
    with _undisturbed(module), trainer.precision_plugin.forward_context():
        outputs = (
            module.predict(whole, "train")
            if isinstance(module, NTKModule)
            else predict(measured.net(module), x, measured.output)
        )
        outputs = outputs.reshape(len(y), -1).float()
    real = y.is_floating_point() and y.numel() == outputs.numel()
    targets = y.reshape(outputs.shape).float() if real else encode_targets(y, outputs.shape[1], outputs.dtype)
    return float(squared_error(outputs, targets).sum()) * trainer.world_size / whole.size


@contextmanager
def _undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluate a module in training without a trace: no gradients, random state and buffers as before."""
    buffers: list[tuple[Any, Any]] = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with isolate_rng(), torch.no_grad():
        try:
            yield
        finally:
            for buffer, values in buffers:
                buffer.copy_(values)
