"""Kernel SGD against explicit loops: over coefficients, and over the weights of a linear model.

Longer than 300 lines, since both fits are held against the same explicit loops.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import KernelFit, kernel_sgd, kernel_sgd_grid, sgd_steps
from ntk_lightning.solvers.kernel_fit import Curve

N, M, FEATURES = 53, 21, 12
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture
def features() -> Tensor:
    """Features of N training and M test points, float64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N + M, FEATURES, generator=generator, dtype=torch.float64) / FEATURES**0.5


@pytest.fixture
def labels() -> Tensor:
    return torch.randn(3, N + M, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()


def weight_space(features: Tensor, targets: Tensor, optimizer: OptimizerConfig) -> list[Tensor]:
    """Predictions on all points after every step of torch.optim.SGD on a linear model's weights."""
    weight = torch.nn.Parameter(torch.zeros(features.shape[1], *targets.shape[1:], dtype=torch.float64))
    sgd = optimizer.configure([weight])
    predictions = [features @ weight.detach()]
    for batch in optimizer.run_batches(N):
        sgd.zero_grad()
        torch.nn.functional.mse_loss(features[batch] @ weight, targets[batch]).backward()
        sgd.step()
        predictions.append(features @ weight.detach())
    return predictions


def split(features: Tensor) -> tuple[Tensor, Tensor]:
    return features[:N] @ features[:N].T, features[N:] @ features[:N].T


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("outputs", [0, 1, 3])
@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(lr=0.2, momentum=0.9, batch_size=10, epochs=4, seed=0),  # ragged: 53 = 5 * 10 + 3
        OptimizerConfig(lr=0.2, momentum=0.9, batch_size=10, steps=17, seed=1),
        OptimizerConfig(lr=0.5, momentum=0.0, batch_size=7, epochs=2),
        OptimizerConfig(lr=0.3, momentum=0.5, full_batch=True, steps=9),
    ],
)
def test_equals_sgd_on_the_weights(
    features: Tensor, labels: Tensor, optimizer: OptimizerConfig, outputs: int, device: str
) -> None:
    targets = labels[0] if outputs == 0 else labels[:outputs].T
    kernel, test_kernel = (k.to(device) for k in split(features))
    expected = weight_space(features, targets[:N], optimizer)
    every = list(range(len(expected)))
    fit = kernel_sgd(
        kernel,
        targets[:N],
        optimizer,
        test=(test_kernel, targets[N:]),
        eval_every=every,
        evaluate_train=True,
    )
    assert fit.coefficients.shape == targets[:N].shape
    assert fit.coefficients.device == kernel.device
    torch.testing.assert_close(fit.predict(test_kernel).cpu(), expected[-1][N:], rtol=0, atol=1e-12)
    assert fit.steps.tolist() == every
    for part, errors, losses in (
        (slice(N, None), fit.curves["test"].errors, fit.curves["test"].losses),
        (slice(N), fit.curves["train"].errors, fit.curves["train"].losses),
    ):
        loss = torch.stack([(f[part] - targets[part]).square().mean() for f in expected])
        if outputs > 1:
            error = torch.stack([(f[part].argmax(1) != targets[part].argmax(1)).double().mean() for f in expected])
        else:
            error = torch.stack([(f[part].sign() != targets[part]).double().mean() for f in expected])
        assert errors is not None
        assert losses is not None
        torch.testing.assert_close(losses, loss, rtol=0, atol=1e-12)
        assert torch.equal(errors, error)


def test_starts_from_initial_coefficients(features: Tensor, labels: Tensor) -> None:
    kernel, _ = split(features)
    whole = OptimizerConfig(lr=0.4, momentum=0.0, full_batch=True, steps=8)
    first = kernel_sgd(kernel, labels[0, :N], replace(whole, steps=5))
    second = kernel_sgd(kernel, labels[0, :N], replace(whole, steps=3), initial_coefficients=first.coefficients)
    expected = kernel_sgd(kernel, labels[0, :N], whole).coefficients
    torch.testing.assert_close(second.coefficients, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [6, 12, 18]),
        ({"eval_every": 5}, [5, 10, 15, 18]),
        ({"eval_every": np.int64(5)}, [5, 10, 15, 18]),
        ({"eval_every": np.array([3, 7])}, [3, 7]),
        ({"eval_every": 100}, [18]),
        ({"eval_every": [7, 0, 3]}, [0, 3, 7]),
    ],
)
def test_evaluation_steps(features: Tensor, labels: Tensor, options: dict[str, object], expected: list[int]) -> None:
    kernel, test_kernel = split(features)
    sets = {"test": (test_kernel, labels[0, N:])}
    config = OptimizerConfig(batch_size=10, epochs=3)
    fit = kernel_sgd(kernel, labels[0, :N], config, **sets, **options)
    assert fit.steps.tolist() == expected
    assert len(fit.curves["test"].errors) == len(expected)
    full = kernel_sgd(kernel, labels[0, :N], config, **sets)
    assert torch.equal(fit.coefficients, full.coefficients)


def test_grid_equals_single_runs(features: Tensor, labels: Tensor) -> None:
    kernel, test_kernel = split(features)
    optimizers = [
        OptimizerConfig(lr=0.1, batch_size=10, epochs=3),
        OptimizerConfig(lr=0.3, momentum=0.5, batch_size=10, epochs=3),
        OptimizerConfig(lr=0.1, batch_size=10, epochs=3, seed=1),
        OptimizerConfig(lr=0.1, full_batch=True, epochs=3),
    ]
    fits = kernel_sgd_grid(
        kernel,
        labels[:, :N],
        optimizers,
        sizes=[20, N],
        test=(test_kernel, labels[:, N:]),
        val=(kernel[:9], labels[:, :9]),
    )
    assert list(fits) == [(size, optimizer, i) for size in (20, N) for optimizer in optimizers for i in range(3)]
    for (size, optimizer, i), fit in fits.items():
        single = kernel_sgd(
            kernel[:size, :size].clone(),
            labels[i, :size],
            optimizer,
            test=(test_kernel[:, :size].clone(), labels[i, N:]),
            val=(kernel[:9, :size], labels[i, :9]),
        )
        torch.testing.assert_close(fit.coefficients, single.coefficients, rtol=0, atol=1e-13)
        assert list(fit.curves) == list(single.curves) == ["test", "val"]
        for name, curve in fit.curves.items():
            torch.testing.assert_close(curve, single.curves[name], rtol=0, atol=1e-12)


def test_grid_of_one_hot_targets(features: Tensor, labels: Tensor) -> None:
    kernel, test_kernel = split(features)
    one_hot = torch.nn.functional.one_hot((labels > 0).sum(0), 4).double()
    several = torch.stack((one_hot, one_hot.flip(1)))
    optimizer = OptimizerConfig(lr=1.0, batch_size=10, epochs=2)
    fits = kernel_sgd_grid(kernel, several[:, :N], [optimizer], test=(test_kernel, several[:, N:]))
    for i in range(2):
        sets = {"test": (test_kernel, several[i, N:])}
        single = kernel_sgd(kernel, several[i, :N], optimizer, **sets)
        torch.testing.assert_close(fits[N, optimizer, i].coefficients, single.coefficients, rtol=0, atol=1e-13)
        assert fits[N, optimizer, i].last_error == single.last_error


def test_gathered_steps_equal_compiled_ones(features: Tensor, labels: Tensor) -> None:
    kernel, _ = split(features)
    batches = list(OptimizerConfig(batch_size=10, epochs=3).run_batches(N))
    rates = torch.tensor([[0.1, 0.9], [0.2, 0.0], [0.3, 0.5]], dtype=torch.float64)
    states = []
    for step in (sgd_steps.advance, sgd_steps._advance_torch):
        state = torch.zeros(2, 3, N, dtype=torch.float64)
        step(kernel, labels[:, :N].clone(), batches, *state, rates, 2)
        states.append(state)
    assert states[0].abs().max() > 0.1
    torch.testing.assert_close(*states, rtol=0, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_kernel_stays_close_to_float64(features: Tensor, labels: Tensor, device: str) -> None:
    kernel, test_kernel = (k.to(device) for k in split(features))
    config = OptimizerConfig(lr=0.2, batch_size=10, epochs=20)
    exact = kernel_sgd(kernel, labels[0, :N], config).predict(test_kernel)
    single = kernel_sgd(kernel.float(), labels[0, :N].float(), config).predict(test_kernel)
    assert (exact - single).abs().max() < 1e-5 * exact.abs().max()


def test_views_are_read_where_they_lie(features: Tensor, labels: Tensor) -> None:
    kernel, _ = split(features)
    config = OptimizerConfig(lr=0.2, batch_size=6, epochs=2)
    expected = kernel_sgd(kernel[10:40, 10:40].clone(), labels[0, :30], config).coefficients
    padded = torch.full((80, 90), torch.nan, dtype=torch.float64)
    padded[20:50, 30:60] = kernel[10:40, 10:40]
    for view in (kernel[10:40, 10:40], kernel[10:40, 10:40].T, padded[20:50, 30:60]):
        assert torch.equal(kernel_sgd(view, labels[0, :30], config).coefficients, expected)


def test_summaries_of_the_error_curve() -> None:
    curve = [0.5, 0.2, 0.1, 0.1, 0.3]
    fit = KernelFit(
        coefficients=torch.zeros(2),
        steps=torch.tensor([0, 10, 20, 30, 40]),
        curves={
            "test": Curve(torch.tensor(curve, dtype=torch.float64), torch.tensor([1.0, 0.9, 0.6, 0.5, 0.7])),
            "val": Curve(torch.tensor([0.5, 0.3, 0.4, 0.4, 0.4]), torch.tensor([1.0, 0.9, 0.8, 0.9, 0.9])),
        },
    )
    assert (fit.optimal_error, fit.optimal_step, fit.last_error, fit.validated_error) == (0.1, 20, 0.3, 0.2)
    losses = torch.tensor([fit.optimal_loss, fit.last_loss, fit.validated_loss])
    assert torch.equal(losses, torch.tensor([0.5, 0.7, 0.6]))
    with pytest.raises(ValueError, match=r"test=\(kernel, targets\)"):
        _ = KernelFit(torch.zeros(2), torch.tensor([1])).optimal_error


def test_zero_and_nan_are_errors(features: Tensor, labels: Tensor) -> None:
    kernel, test_kernel = split(features)
    sets = {"test": (test_kernel, labels[0, N:])}
    fit = kernel_sgd(kernel, labels[0, :N], OptimizerConfig(epochs=1), **sets, eval_every=[0])
    assert fit.last_error == 1.0
    with pytest.warns(UserWarning, match="lr=|learning rate") as caught:
        fit = kernel_sgd(kernel, labels[0, :N], OptimizerConfig(lr=1e6, epochs=1000, batch_size=10), **sets)
    assert [("critical" in str(w.message), "diverged" in str(w.message)) for w in caught] == [
        (True, False),
        (False, True),
    ]
    assert fit.diverged
    assert fit.last_error == 1.0
    assert fit.curves["test"].losses[-1] == torch.inf
    assert len(fit.steps) == 1000


def test_one_diverging_run_leaves_the_others_alone(features: Tensor, labels: Tensor) -> None:
    kernel, _ = split(features)
    good, bad = OptimizerConfig(lr=0.1, epochs=30, batch_size=10), OptimizerConfig(lr=1e6, epochs=30, batch_size=10)
    with pytest.warns(UserWarning, match="critical"), pytest.warns(UserWarning, match="1 of 2 kernel fits"):
        fits = kernel_sgd_grid(kernel, labels[0, :N], [good, bad])
    assert fits[N, bad, 0].diverged
    assert torch.equal(fits[N, good, 0].coefficients, kernel_sgd(kernel, labels[0, :N], good).coefficients)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_warns_above_the_critical_learning_rate(
    features: Tensor, labels: Tensor, momentum: float, recwarn: pytest.WarningsRecorder
) -> None:
    kernel, _ = split(features)
    critical = critical_learning_rate(kernel, momentum=momentum)
    kernel_sgd(kernel, labels[0, :N], OptimizerConfig(lr=0.95 * critical, momentum=momentum, steps=1, full_batch=True))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"is 2(\.0\d)? times the critical"):
        kernel_sgd(kernel, labels[0, :N], OptimizerConfig(lr=2 * critical, momentum=momentum, steps=1, full_batch=True))


def test_averaging_over_outputs_raises_the_critical_rate(
    features: Tensor, labels: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    kernel, _ = split(features)
    lr = 2.9 * critical_learning_rate(kernel)
    kernel_sgd(kernel, labels[:, :N].T, OptimizerConfig(lr=lr, momentum=0, full_batch=True, steps=500))
    assert not recwarn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": torch.ones(4)}, "non-empty matrix"),
        ({"kernel": torch.eye(4)[:3]}, "square"),
        ({"kernel": torch.eye(4, dtype=torch.int64)}, "float32 or float64"),
        ({"kernel": torch.eye(4, dtype=torch.bfloat16)}, "float32 or float64"),
        ({"kernel": torch.full((4, 4), torch.nan)}, "NaN"),
        ({"kernel": torch.eye(4) + torch.triu(torch.ones(4, 4))}, "not symmetric"),
        ({"targets": torch.tensor([1.0, -1.0, 1.0])}, r"targets must be \(4,\)"),
        ({"targets": torch.tensor([0.0, 1.0, 1.0, 0.0])}, r"2 \* y - 1"),
        ({"targets": torch.tensor([torch.nan, 1.0, 1.0, 1.0])}, "NaN"),
        ({"test": torch.ones(2, 4)}, r"test=\(kernel, targets\)"),
        ({"val": (torch.ones(2, 4), None)}, r"val=\(kernel, targets\)"),
        ({"test": (torch.ones(2, 3), torch.ones(2))}, r"kernel of test must be \(m, 4\)"),
        ({"val": (torch.ones(4, 2), torch.ones(2))}, "transpose"),
        ({"test": (torch.ones(2, 4, dtype=torch.float64), torch.ones(2))}, "dtype"),
        ({"test": (torch.ones(2, 4), torch.ones(2, 3))}, "number of outputs"),
        ({"test": (torch.ones(2, 4), torch.ones(3))}, "targets of test"),
        ({"eval_every": 0}, "at least 1 step"),
        ({"eval_every": [100]}, "from 0 to 20"),
        ({"eval_every": []}, "from 0 to 20"),
        ({"eval_every": True}, "whole number of steps"),
        ({"eval_every": 2.5}, "whole number of steps"),
        ({"eval_every": [1, 2.5]}, "whole number of steps"),
        ({"initial_coefficients": torch.zeros(3)}, "initial_coefficients"),
    ],
)
def test_rejects_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "kernel": torch.eye(4),
        "targets": torch.tensor([1.0, -1.0, 1.0, 1.0]),
        "optimizer": OptimizerConfig(),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        kernel_sgd(**(arguments | change))


def test_grid_rejects_bad_input() -> None:
    kernel, targets = torch.eye(4), torch.ones(2, 4)
    with pytest.raises(ValueError, match="sizes between 1 and 4"):
        kernel_sgd_grid(kernel, targets, [OptimizerConfig()], sizes=[5])
    with pytest.raises(TypeError, match="sizes must be whole numbers"):
        kernel_sgd_grid(kernel, targets, [OptimizerConfig()], sizes=[2.0])  # type: ignore[list-item]  # on purpose
    with pytest.raises(ValueError, match="at least one optimizer"):
        kernel_sgd_grid(kernel, targets, [])
    with pytest.raises(ValueError, match="from 0 to 20"):
        kernel_sgd_grid(kernel, targets, [OptimizerConfig(), OptimizerConfig(seed=1)], eval_every=[21])
    with pytest.raises(ValueError, match="2 label vectors"):
        kernel_sgd_grid(kernel, targets, [OptimizerConfig()], test=(kernel, targets[0]))


def test_torch_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        kernel_sgd(torch.eye(4), torch.ones(4), OptimizerConfig(lr=0.1, epochs=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
