"""Ridge regression against a dense float64 solve."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ntk_lightning.solvers import gradient_flow, ridge

N, M = 300, 40
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Gram with quickly falling eigenvalues, kernel of M test points, labels of all (float64)."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(N + M, 6, generator=generator, dtype=torch.float64)
    kernel = torch.exp(-torch.cdist(points, points[:N]).square() / 20)
    return kernel[:N], kernel[N:], (points[:, 0] * points[:, 1]).sign()


def dense(kernel: Tensor, targets: Tensor, regularization: float) -> Tensor:
    return torch.linalg.solve(
        kernel + len(kernel) * regularization * torch.eye(len(kernel), dtype=kernel.dtype), targets
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["cholesky", "cg", "matvec"])
@pytest.mark.parametrize("outputs", [0, 3])
def test_equals_a_dense_solve(problem: tuple[Tensor, Tensor, Tensor], method: str, outputs: int, device: str) -> None:
    kernel, test_kernel, labels = (tensor.to(device) for tensor in problem)
    if outputs:
        labels = torch.nn.functional.one_hot(
            torch.arange(N + M, device=device) % 3, 4
        ).double()  # the last class is absent
    expected = dense(kernel, labels[:N], 1e-5)
    operator = kernel if method != "matvec" else lambda vector: kernel @ vector
    how = "cg" if method == "matvec" else method
    sets = {"test": (test_kernel, labels[N:])}
    fit = ridge(operator, labels[:N], 1e-5, method=how, rank=60, **sets)
    torch.testing.assert_close(fit.coefficients, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert fit.method == how
    assert fit.residual < 1e-9
    predictions = test_kernel @ expected
    wrong = predictions.argmax(1) != labels[N:].argmax(1) if outputs else predictions.sign() != labels[N:]
    assert fit.test_error == wrong.double().mean()
    assert fit.test_loss == pytest.approx(float((predictions - labels[N:]).square().mean()), rel=1e-6)
    assert torch.equal(fit.predict(test_kernel), test_kernel @ fit.coefficients)


def test_condition_numbers(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, _, labels = problem
    expected = float(torch.linalg.cond(kernel + N * 1e-6 * torch.eye(N, dtype=torch.float64)))
    assert ridge(kernel, labels[:N], 1e-6).condition_number == pytest.approx(expected, rel=0.05)
    bound = ridge(kernel, labels[:N], 1e-6, method="cg").condition_number
    assert 0.95 * expected < bound < 1.2 * expected


def test_preconditioner_saves_iterations(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, _, labels = problem
    plain, preconditioned = (ridge(kernel, labels[:N], 1e-6, method="cg", rank=rank) for rank in (0, 150))
    assert preconditioned.iterations < plain.iterations / 4
    torch.testing.assert_close(preconditioned.predict(kernel), plain.predict(kernel), rtol=0, atol=1e-6)


def test_regularization_is_per_sample(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """The minimum of mean (f - y)^2 + reg a'Ka has a zero gradient."""
    kernel, _, labels = problem
    coefficients = ridge(kernel, labels[:N], 1e-3).coefficients.requires_grad_()
    predictions = kernel @ coefficients
    objective = (predictions - labels[:N]).square().mean() + 1e-3 * coefficients @ predictions
    objective.backward()
    assert coefficients.grad is not None
    assert coefficients.grad.abs().max() < 1e-12


def test_without_regularization_is_the_end_of_gradient_flow() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(20, 60, generator=generator, dtype=torch.float64)
    kernel, labels = features @ features.T, torch.randn(20, generator=generator, dtype=torch.float64).sign()
    flow = gradient_flow(kernel, labels, [1e6]).coefficients
    torch.testing.assert_close(ridge(kernel, labels).coefficients, flow, rtol=1e-9, atol=0)


def test_float32_gram(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, test_kernel, labels = problem
    exact = test_kernel @ dense(kernel, labels[:N], 1e-4)
    for method in ("cholesky", "cg"):
        fit = ridge(kernel.float(), labels[:N], 1e-4, method=method)
        assert fit.residual < 1e-9
        assert (fit.predict(test_kernel) - exact).abs().max() < 1e-3


def test_function_that_computes_in_float32(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, test_kernel, labels = problem
    single = kernel.float()
    fit = ridge(lambda vector: single @ vector.float(), labels[:N], 1e-2)
    assert fit.residual <= 2e-5
    exact = test_kernel @ dense(kernel, labels[:N], 1e-2)
    assert (fit.predict(test_kernel) - exact).abs().max() < 1e-4


def test_reports_a_kernel_that_is_not_positive_definite(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, _, labels = problem
    bad = kernel - 0.01 * torch.eye(N, dtype=torch.float64)
    smallest = float(torch.linalg.eigvalsh(bad)[0])
    with pytest.raises(ValueError, match=f"smallest eigenvalue of K is {smallest:.3e}.*regularization >"):
        ridge(bad, labels[:N], 1e-6)
    assert ridge(bad, labels[:N], 1.1 * -smallest / N).residual < 1e-9
    for rank in (0, N):
        assert ridge(bad, labels[:N], 1.1 * -smallest / N, method="cg", rank=rank).residual < 1e-9
        with pytest.raises(ValueError, match=r"not positive definite: .* at most -"):
            ridge(bad, labels[:N], 1e-6, method="cg", rank=rank)


def test_without_regularization_cg_claims_no_condition_number(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, _, labels = problem
    with pytest.warns(UserWarning, match=r"condition number not bounded without regularization\): raise"):
        fit = ridge(kernel, labels[:N], method="cg", max_iterations=3, rank=10)
    assert fit.condition_number == float("inf")


def test_warns_when_the_residual_is_missed(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    kernel, _, labels = problem
    with pytest.warns(UserWarning, match=r"not 1\.0e-10, after 3 iterations"):
        fit = ridge(kernel, labels[:N], 1e-6, method="cg", max_iterations=3, rank=10)
    expected = (kernel + N * 1e-6 * torch.eye(N, dtype=torch.float64)) @ fit.coefficients - labels[:N]
    assert fit.residual == pytest.approx(float(expected.norm() / labels[:N].norm()), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"regularization": -1.0}, "regularization"),
        ({"regularization": float("nan")}, "regularization"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"method": "lu"}, "method must be"),
        ({"kernel": lambda vector: vector, "method": "cholesky"}, "needs the Gram"),
        ({"targets": torch.ones(3)}, r"targets must be \(4,\)"),
        ({"test": (torch.ones(2, 4), torch.ones(3))}, r"targets of test must be \(2,\)"),
        ({"kernel": torch.ones(3, 4)}, "square"),
    ],
)
def test_rejects_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"kernel": torch.eye(4), "targets": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        ridge(**(arguments | change))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda v: None, TypeError, r"must return K @ v, a floating-point tensor, got NoneType"),
        (lambda v: v.long(), TypeError, "got torch.int64"),
        (lambda v: v[:3], ValueError, r"map v \(4,\) to K @ v, got \(3,\)"),
        (lambda v: v[:, None], ValueError, r"got \(4, 1\)"),
        (lambda v: v * float("nan"), ValueError, "NaN or infinite"),
    ],
)
def test_a_function_that_gives_no_product_is_refused(
    function: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ridge(function, torch.ones(4), 0.1)
