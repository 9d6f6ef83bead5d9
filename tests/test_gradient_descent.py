"""Closed forms of full-batch descent and flow against explicit steps and the matrix exponential."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ntk_lightning.optim import OptimizerConfig, critical_learning_rate
from ntk_lightning.solvers import gradient_descent, gradient_flow, kernel_sgd

N, M = 40, 15
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Gram of N training points, kernel of M test points, labels of all (float64)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N + M, 60, generator=generator, dtype=torch.float64) / 60**0.5
    kernel = features @ features[:N].T
    return kernel[:N], kernel[N:], torch.randn(N + M, generator=generator, dtype=torch.float64).sign()


def explicit_steps(kernel: Tensor, targets: Tensor, lr: float, momentum: float, count: int) -> list[Tensor]:
    coefficients = [torch.zeros_like(targets)]
    velocity = torch.zeros_like(targets)
    for _ in range(count):
        velocity = momentum * velocity + 2 / targets.numel() * (kernel @ coefficients[-1] - targets)
        coefficients.append(coefficients[-1] - lr * velocity)
    return coefficients


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("outputs", [0, 3])
def test_equals_ten_thousand_explicit_steps(
    problem: tuple[Tensor, Tensor, Tensor], momentum: float, outputs: int
) -> None:
    kernel, test_kernel, labels = problem
    if outputs:
        labels = torch.nn.functional.one_hot(torch.arange(N + M) * 7 % 11 % 3, 3).double()
    lr = 0.95 * max(outputs, 1) * critical_learning_rate(kernel, momentum=momentum)
    expected = explicit_steps(kernel, labels[:N], lr, momentum, 10_000)
    steps = [0, 1, 2, 3, 10, 100, 777, 4096, 10_000]
    config = OptimizerConfig(lr=lr, momentum=momentum)
    sets = {"test": (test_kernel, labels[N:])}
    fit = gradient_descent(kernel, labels[:N], config, steps, **sets)
    assert fit.steps.tolist() == steps
    for i, step in enumerate(steps):
        one = gradient_descent(kernel, labels[:N], config, [step])
        torch.testing.assert_close(one.coefficients, expected[step], rtol=1e-9, atol=1e-9)
        test, train = test_kernel @ expected[step], kernel @ expected[step]
        assert abs(fit.curves["test"].losses[i] - (test - labels[N:]).square().mean()) < 1e-9
        assert abs(fit.curves["train"].losses[i] - (train - labels[:N]).square().mean()) < 1e-9
        if not outputs:
            assert fit.curves["test"].errors[i] == (test.sign() != labels[N:]).double().mean()


def test_double_and_complex_roots_and_singular_kernels() -> None:
    momentum, lr, n = 0.81, 0.3, 6
    s = torch.tensor([0.0, 1e-18, (1 - momentum**0.5) ** 2, 0.5, (1 + momentum**0.5) ** 2, 3.6], dtype=torch.float64)
    kernel, targets = torch.diag(s * n / (2 * lr)), torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)
    for count in (5, 1000):
        fit = gradient_descent(kernel, targets, OptimizerConfig(lr=lr, momentum=momentum), [count])
        expected = explicit_steps(kernel, targets, lr, momentum, count)[-1]
        torch.testing.assert_close(fit.coefficients, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_equals_full_batch_sgd(problem: tuple[Tensor, Tensor, Tensor], device: str) -> None:
    kernel, _, labels = (tensor.to(device) for tensor in problem)
    config = OptimizerConfig(lr=1.0, momentum=0.9, full_batch=True, epochs=30)
    fit = gradient_descent(kernel, labels[:N], config)
    assert fit.steps[0] == 1
    assert fit.steps[-1] == 30
    sgd = kernel_sgd(kernel, labels[:N], config, eval_every=fit.steps.tolist(), evaluate_train=True)
    torch.testing.assert_close(fit.coefficients, sgd.coefficients, rtol=0, atol=1e-11)
    torch.testing.assert_close(fit.curves["train"].losses, sgd.curves["train"].losses, rtol=0, atol=1e-12)


@pytest.mark.parametrize("total", [1, 7, 50_000_001])
def test_default_steps_end_at_the_last(problem: tuple[Tensor, Tensor, Tensor], total: int) -> None:
    kernel, _, labels = problem
    steps = gradient_descent(kernel, labels[:N], OptimizerConfig(lr=0.1, momentum=0, steps=total)).steps.tolist()
    assert (steps[0], steps[-1]) == (1, total)
    assert len(steps) <= 100


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_diverges_above_the_critical_rate(problem: tuple[Tensor, Tensor, Tensor], momentum: float) -> None:
    kernel, test_kernel, labels = problem
    config = OptimizerConfig(lr=1.05 * critical_learning_rate(kernel, momentum=momentum), momentum=momentum)
    sets = {"test": (test_kernel, labels[N:])}
    with pytest.warns(UserWarning, match=r"is 1\.05 times the critical"):
        fit = gradient_descent(kernel, labels[:N], config, [1, 10**6], **sets)
    assert fit.diverged
    assert fit.curves["test"].errors[0] < 1
    assert fit.last_error == 1


@pytest.mark.parametrize("device", DEVICES)
def test_flow_equals_the_matrix_exponential(problem: tuple[Tensor, Tensor, Tensor], device: str) -> None:
    kernel, test_kernel, labels = problem
    times = [0.0, 0.5, 20.0, 3000.0]
    sets = {"test": (test_kernel.to(device), labels[N:])}
    fit = gradient_flow(kernel.to(device), labels[:N], times, **sets)
    assert fit.steps.tolist() == times
    for i, time in enumerate(times):
        train = labels[:N] - torch.matrix_exp(-2 * time / N * kernel) @ labels[:N]
        coefficients = torch.linalg.solve(kernel, train)
        assert abs(fit.curves["train"].losses[i] - (train - labels[:N]).square().mean()) < 1e-10
        assert abs(fit.curves["test"].losses[i] - (test_kernel @ coefficients - labels[N:]).square().mean()) < 1e-9


def test_flow_is_the_limit_of_small_steps_even_on_a_singular_kernel() -> None:
    kernel = torch.ones(3, 3, dtype=torch.float64)
    targets = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    flow = gradient_flow(kernel, targets, [2.0]).coefficients
    steps = gradient_descent(kernel, targets, OptimizerConfig(lr=2e-6, momentum=0), [10**6]).coefficients
    torch.testing.assert_close(steps, flow, rtol=0, atol=1e-5)
    double = gradient_flow(kernel, targets, [2.0], eigensystem=torch.linalg.eigh(kernel)).coefficients
    assert torch.equal(double, flow)


def test_rejects_bad_input() -> None:
    kernel, targets, config = torch.eye(3), torch.ones(3), OptimizerConfig()
    for steps in ([], [-1], [1.5]):
        with pytest.raises(ValueError, match="steps must be"):
            gradient_descent(kernel, targets, config, steps)
    for times in ([], [-1.0], [torch.inf]):
        with pytest.raises(ValueError, match="times must be"):
            gradient_flow(kernel, targets, times)
    with pytest.raises(TypeError, match=r"steps must be a list .*: write \[5\]"):
        gradient_descent(kernel, targets, config, 5)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"times must be a list .*: write \[1.5\]"):
        gradient_flow(kernel, targets, 1.5)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="eigensystem"):
        gradient_flow(kernel, targets, [1.0], eigensystem=(torch.ones(2), torch.eye(2)))
    with pytest.raises(TypeError, match=r"test=\(kernel, targets\)"):
        gradient_descent(kernel, targets, config, test=kernel)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match="-1 or"):
        gradient_flow(kernel, 0 * targets, [1.0])
