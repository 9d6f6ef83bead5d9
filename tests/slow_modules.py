"""Networks that torch.func.vmap refuses, each with inputs for it, and their Jacobians by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import jacobian, relative
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

__all__ = ["SLOW", "D", "Packed", "Recurrent", "jacobian", "relative"]

D = torch.float64


class Recurrent(nn.Module):
    """A recurrent layer and a readout of its last step."""

    def __init__(self, cell: type[nn.RNNBase], **options: Any) -> None:  # noqa: ANN401 - passed on
        super().__init__()
        self.rnn = cell(3, 4, batch_first=True, **options)
        self.out = nn.Linear(4 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class Packed(nn.Module):
    """An LSTM of sequences of several lengths, as (x, lengths)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.out(self.rnn(packed)[1][0][0])


class Checkpointed(nn.Module):
    """A hidden layer that is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.c, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.c(checkpoint(lambda h: self.b(h).tanh(), self.a(x), use_reentrant=self.reentrant))


class Filled(nn.Linear):
    """Writes its outputs into a fresh tensor."""

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), self.out_features + 1, dtype=x.dtype)
        out[:, :-1] = super().forward(x).tanh()
        return out


class Counting(nn.Linear):
    """Counts its calls in a buffer, and depends on the number."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x) * self.calls.clone()
        self.calls += 1
        return out


class Branching(nn.Linear):
    """Takes a step size from the sample, as a number of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (x[0, 0].item() if len(x) == 1 else x[:, :1])


class _OldClip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        return grad * (ctx.saved_tensors[0] > 0)


class OldFunction(nn.Linear):
    """A torch.autograd.Function without setup_context."""

    def forward(self, x: Tensor) -> Tensor:
        return _OldClip.apply(super().forward(x)) * x[:, :1]


class Complex(nn.Module):
    """Complex weights, real outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.v = nn.Parameter(torch.randn(4, 2, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.w.dtype) @ self.w).abs().square() @ self.v


class Numpy(nn.Linear):
    """Leaves torch on the way, for a scale that is no function of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.from_numpy(x.detach().numpy().copy()).sum(1, keepdim=True)


def scripted() -> nn.Module:
    return torch.jit.trace(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.ones(2, 3))


Make = Callable[[], nn.Module]

SLOW: dict[str, tuple[Make, tuple[int, ...]]] = {
    "lstm": (lambda: Recurrent(nn.LSTM), (5, 3)),
    "lstm of two layers and directions": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), (5, 3)),
    "gru": (lambda: Recurrent(nn.GRU), (5, 3)),
    "rnn": (lambda: Recurrent(nn.RNN), (5, 3)),
    "checkpoint": (lambda: Checkpointed(False), (3,)),
    "reentrant checkpoint": (lambda: Checkpointed(True), (3,)),
    "in-place write": (lambda: Filled(3, 4), (3,)),
    "counter in a buffer": (lambda: Counting(3, 2), (3,)),
    "number of the sample": (lambda: Branching(3, 2), (3,)),
    "function of the old form": (lambda: OldFunction(3, 2), (3,)),
    "complex weights": (Complex, (3,)),
    "numpy": (lambda: Numpy(3, 2), (3,)),
    "scripted": (scripted, (3,)),
}
