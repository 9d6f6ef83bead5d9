"""The one slow and plain way to a network's kernel that tests hold every fast way against, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def flat(gradients: list[Tensor]) -> Tensor:
    """One real vector; a complex number counts as two."""
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).reshape(-1) for g in gradients])


def jacobian(
    net: nn.Module,
    samples: Tensor | Sequence[tuple[Any, ...]],
    output: Callable[[Any], Tensor] = lambda out: out,
    parameters: list[nn.Parameter] | None = None,
) -> Tensor:
    """Gradients (n, C, P) by one backward pass for every output of every sample, each from the same buffers."""
    # samples are (n, ...), or the n samples as the network's positional arguments, each a batch of one
    if isinstance(samples, Tensor):
        samples = [(sample[None].clone(),) for sample in samples]
    parameters = [p for p in net.parameters() if p.requires_grad] if parameters is None else parameters
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    rows = []
    for args in samples:
        outputs = output(net(*args)).reshape(-1)
        row = []
        for value in outputs:
            for p in net.parameters():
                p.grad = None
            value.backward(retain_graph=True)
            row.append(flat([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]))
        rows.append(torch.stack(row))
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])
    for p in net.parameters():
        p.grad = None
    return torch.stack(rows)


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest entry."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())


def dense(net: nn.Module, x1: Any, x2: Any) -> Tensor:  # noqa: ANN401 - as of jacobian
    """The kernel of all outputs, (n1, n2, C, C)."""
    return torch.einsum("iap,jbp->ijab", jacobian(net, x1), jacobian(net, x2))


def trace(kernel: Tensor) -> Tensor:
    """Its normalized trace, (n1, n2)."""
    return kernel.diagonal(dim1=-2, dim2=-1).mean(-1)


def close(actual: Tensor, expected: Tensor) -> None:
    """Compare two kernels in float64."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
