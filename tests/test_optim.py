"""The shared optimizer configuration and the critical learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import kernel_sgd

N = 60


@pytest.fixture
def kernel() -> Tensor:
    features = torch.randn(N, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 0.3 + features @ features.T / 90


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_equals_the_dense_eigenvalue(kernel: Tensor, momentum: float) -> None:
    expected = (1 + momentum) * N / float(torch.linalg.eigvalsh(kernel)[-1])
    assert critical_learning_rate(kernel, momentum=momentum) == pytest.approx(expected, rel=1e-6)
    assert critical_learning_rate(kernel.float(), momentum=momentum) == pytest.approx(expected, rel=1e-5)
    products = []

    def multiply(vector: Tensor) -> Tensor:
        products.append(vector.shape)
        return kernel @ vector

    assert critical_learning_rate(multiply, N, momentum) == pytest.approx(expected, rel=1e-6)
    assert set(products) == {(N,)}
    assert len(products) < 40


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_diverges_above_and_converges_below(kernel: Tensor, momentum: float) -> None:
    targets = torch.ones(N, dtype=torch.float64)
    targets[::3] = -1
    critical = critical_learning_rate(kernel, momentum=momentum)
    losses = {}
    for factor in (0.95, 1.05):
        config = OptimizerConfig(lr=factor * critical, momentum=momentum, full_batch=True, steps=800)
        if factor > 1:
            with pytest.warns(UserWarning, match="critical learning rate"):
                fit = kernel_sgd(kernel, targets, config, evaluate_train=True, eval_every=[1, 800])
        else:
            fit = kernel_sgd(kernel, targets, config, evaluate_train=True, eval_every=[1, 800])
        losses[factor] = fit.curves["train"].losses
    assert losses[0.95][-1] < 0.1 * losses[0.95][0]
    assert losses[1.05][-1] > 1e6 * losses[1.05][0]


def test_special_kernels() -> None:
    assert critical_learning_rate(torch.zeros(3, 3)) == float("inf")
    assert critical_learning_rate(torch.eye(5)) == pytest.approx(5)
    assert critical_learning_rate(torch.full((1, 1), 4.0)) == pytest.approx(0.25)
    assert critical_learning_rate(torch.diag(torch.tensor([1.0, -5.0, 2.0]))) == pytest.approx(1.5)


def test_critical_learning_rate_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="momentum"):
        critical_learning_rate(torch.eye(2), momentum=1.0)
    for bad in (torch.ones(2, 3), torch.ones(4)):
        with pytest.raises(ValueError, match="square"):
            critical_learning_rate(bad)
    with pytest.raises(ValueError, match="square"):
        critical_learning_rate(torch.eye(2), 3)
    with pytest.raises(ValueError, match="Pass n"):
        critical_learning_rate(lambda vector: vector)
    with pytest.raises(ValueError, match="not finite"):
        critical_learning_rate(torch.full((2, 2), torch.nan))
    with pytest.raises(RuntimeError, match="raise max_products"):
        critical_learning_rate(torch.diag(torch.linspace(0, 1, 100)), max_products=5)


def test_batches_are_reproducible_permutations() -> None:
    config = OptimizerConfig(batch_size=4, seed=3)
    first, again, later = config.batches(10, 0), config.batches(10, 0), config.batches(10, 1)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert torch.cat(first).sort().values.tolist() == list(range(10))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(torch.cat(first), torch.cat(later))
    assert not torch.equal(torch.cat(first), torch.cat(OptimizerConfig(batch_size=4, seed=4).batches(10, 0)))


def test_a_run_goes_through_epochs_and_stops_at_steps() -> None:
    config = OptimizerConfig(batch_size=4, epochs=3)
    assert config.total_steps(10) == 9
    expected = [batch for epoch in range(3) for batch in config.batches(10, epoch)]
    assert all(torch.equal(a, b) for a, b in zip(config.run_batches(10), expected, strict=True))
    cut = OptimizerConfig(batch_size=4, steps=7)
    assert all(torch.equal(a, b) for a, b in zip(cut.run_batches(10), expected[:7], strict=True))
    full = OptimizerConfig(full_batch=True, epochs=2)
    assert [len(batch) for batch in full.run_batches(10)] == [10, 10]
    with pytest.warns(DeprecationWarning, match="run_batches"):
        assert [len(batch) for batch in full.schedule(10)] == [10, 10]


def test_configures_plain_sgd_on_trainable_parameters() -> None:
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    optimizer = OptimizerConfig(lr=0.3, momentum=0.4).configure(net.parameters())
    (group,) = optimizer.param_groups
    assert group["params"] == [net.weight]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.4, 0, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("momentum", 1),
        ("momentum", -0.1),
        ("batch_size", 0),
        ("epochs", 0),
        ("steps", 0),
    ],
)
def test_config_rejects_values_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        OptimizerConfig(**{name: value})
