"""What callbacks read from a Trainer and its module about the steps of a run."""

from __future__ import annotations

from dataclasses import replace

from lightning import LightningModule, Trainer

from ntk_lightning.optim import OptimizerConfig

__all__ = ["epochs_between_validations", "run_config", "trainer_options"]

_USUAL_OPTIONS = {
    "accumulate_grad_batches": 1,
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "gradient_clip_val": None,
}


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
            'its kernel fits by SGD, or fit="flow", which needs none.'
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
