"""The errors of one model of a comparison."""

from __future__ import annotations

import torch

from ntk_lightning.callbacks import ModelErrors
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.solvers import kernel_sgd

CONFIG = OptimizerConfig(lr=0.1, epochs=3)


def test_errors_are_summarized_and_read_back_from_a_longer_row() -> None:
    labels, kernel = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.eye(4)
    sets = {"test": (-kernel, labels), "val": (kernel, labels)}
    fit = kernel_sgd(kernel, labels, CONFIG, **sets, eval_every=[0, 2, 3])
    errors = ModelErrors.of_fit("kernel", 4, fit)
    assert errors.row() == {
        "name": "kernel",
        "n": 4,
        "optimal_error": 1.0,
        "optimal_step": 0,
        "last_error": 1.0,
        "validated_error": 1.0,
    }
    assert errors.curve["steps"] == [0, 2, 3]
    assert errors.curve["errors"] == [1.0, 1.0, 1.0]
    assert errors.curve["losses"] == fit.curves["test"].losses.tolist()
    again = ModelErrors.of_row({"step": 3, **vars(errors), "network_error": 0.5})
    assert (again, again.curve) == (errors, errors.curve)
    assert ModelErrors.of_fit("", 4, kernel_sgd(kernel, labels, CONFIG, test=sets["test"])).validated_error is None


def test_real_targets_have_losses_in_place_of_errors() -> None:
    points = torch.linspace(-1, 1, 6)
    kernel = torch.exp(-((points[:, None] - points) ** 2))
    fit = kernel_sgd(kernel, points.sin(), CONFIG, test=(kernel, points.sin()))
    errors = ModelErrors.of_fit("kernel", 6, fit)
    losses = fit.curves["test"].losses.tolist()
    assert errors.row() == {
        "name": "kernel",
        "n": 6,
        "optimal_step": fit.optimal_step,
        "optimal_loss": min(losses),
        "last_loss": losses[-1],
        "validated_loss": None,
    }
    again = ModelErrors.of_row({"step": 3, **errors.row(), "curve": errors.curve})
    assert again == errors
    assert errors.curve == {"steps": fit.steps.tolist(), "losses": losses}
