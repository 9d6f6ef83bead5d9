"""Which loaders of a run its kernels are computed on, also before Lightning has made them."""

from __future__ import annotations

import copy
from typing import Any

from lightning import Trainer

from ntk_lightning.datamodules.from_loaders import choose_loader, named_loaders
from ntk_lightning.random_state import fixed_seed

__all__ = ["evaluation_loader", "train_loader"]


def train_loader(trainer: Trainer) -> object:
    """Find the loader of a run's training batches.

    Args:
        trainer: Of the run, from ``on_fit_start`` on: before the sanity check, when Lightning has no loaders yet. There
            a ``train_dataloader`` method is asked once more than Lightning asks, on a copy of its module, and from
            ``on_train_start`` on this is the loader that the run itself iterates over.

    Returns:
        The loader.

    Raises:
        ValueError: The run has no training loader, or several.
    """
    loaders = trainer.train_dataloader
    if loaders is None:
        loaders = _request(trainer, trainer.fit_loop._data_source)
    if len(named_loaders(loaders)) > 1:
        raise ValueError(
            "A kernel is fitted to the samples of one training loader, and this run has several: give one loader, for "
            "example of a ConcatDataset."
        )
    return choose_loader(loaders)


def evaluation_loader(trainer: Trainer, which: int | str | None = None) -> tuple[str, object]:
    """Find the loader that kernels are measured on.

    Args:
        trainer: As of :func:`train_loader`.
        which: Number or name of a validation loader: a key of a mapping of loaders, or one of the data module's
            ``evaluation_splits``; or "test" for the (first) test loader and "val" for the first validation loader. By
            default the test loader where the run's module or data module has one, else the first validation loader.

    Returns:
        "test" or "val", and the loader. A test loader is asked for on a copy of its module that is set up for "test".

    Raises:
        ValueError: There is no such loader.
    """
    validation = trainer.val_dataloaders
    if validation is None:
        validation = _request(trainer, trainer.fit_loop.epoch_loop.val_loop._data_source)
    found = named_loaders(validation)
    splits: tuple[str, ...] = getattr(getattr(trainer, "datamodule", None), "evaluation_splits", ())[: len(found)]
    named = dict(
        zip([*splits, *(name for name, _ in found[len(splits) :])], (loader for _, loader in found), strict=True)
    )
    if which is None or (which == "test" and "test" not in named):
        test = named_loaders(_request(trainer, trainer.test_loop._data_source, stage="test"))
        if test:
            return "test", test[0][1]
        if which == "test":
            raise ValueError('This run has no test loader: give a data module with test_dataloader, or choose "val".')
    if not named:
        raise ValueError(
            "Kernels are measured on a test or validation loader, and this run has neither: "
            "fit(model, train_loader, val_loader), or give a data module that has one."
        )
    if which is None or (which == "val" and not splits and "val" not in named):
        which = 0
    loader = choose_loader(named, which)
    return ("test" if loader is named.get("test") else "val"), loader


def _request(trainer: Trainer, source: Any, stage: str | None = None) -> object:  # noqa: ANN401 - private to Lightning
    """Ask for loaders as Lightning does, without a trace in the module that makes them, and alike at every call."""
    if not source.is_defined():
        return None
    if not source.is_module():
        return source.instance  # as given to fit
    with fixed_seed(0):
        maker = _separate(source.instance)
        maker.trainer = trainer
        try:
            if stage is not None:
                maker.setup(stage)
            loaders: object = getattr(maker, source.name)()
        except Exception as error:
            error.add_note(f"Kernels are computed on the samples of {source.name}() of {type(maker).__name__}.")
            raise
        return loaders


def _separate(module: Any) -> Any:  # noqa: ANN401 - a module or data module of either Lightning package
    """Copy a module so that attributes, parts and entries set in the copy stay there; what they hold is shared."""
    separate = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, list, set)):
            separate.__dict__[name] = copy.copy(value)
    return separate
