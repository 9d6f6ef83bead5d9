"""What an empirical NTK differentiates: some outputs of a network, in some of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NetworkFunction", "Output", "select_output"]

Output = int | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class NetworkFunction:
    """Outputs of a network as a function of its trainable parameters.

    Args:
        net: Any network.
        trainable: Names of the parameters to differentiate in.
        output: Which outputs: all, one by its index, or a function of what the network returns.
        full: Keep products of different outputs apart, instead of the mean of those of equal ones.
        dtype: Precision to compute in.
        device: Where the parameters are.
    """

    net: nn.Module
    trainable: tuple[str, ...]
    output: Output
    full: bool
    dtype: torch.dtype
    device: torch.device

    def select(self, returned: Any, n: int = 1) -> Tensor:  # noqa: ANN401 - whatever the network returns
        """All outputs (n,) or (n, C) out of what the network returns for n samples, before an index chooses one."""
        return select_output(self.output, returned, n)

    def cotangents(self, num_outputs: int) -> Tensor:
        """Make the vectors u of the vector-Jacobian products u^T J that a row of gradients consists of.

        Args:
            num_outputs: C.

        Returns:
            One-hot vectors (C, C), or (1, C) for one output, scaled so that rows multiply to the kernel.

        Raises:
            ValueError: There is no such output.
        """
        one_hot = torch.eye(num_outputs, dtype=self.dtype, device=self.device)
        if isinstance(self.output, int):
            if not 0 <= self.output < num_outputs:
                raise ValueError(
                    f"output must be one of the network's {num_outputs}, 0 to {num_outputs - 1}; got {self.output}."
                )
            return one_hot[self.output : self.output + 1]
        # The normalized trace is 1/C sum_c <grad f_c(x), grad f_c(x')>: with every gradient divided by sqrt(C) it is
        # the plain inner product of two rows that hold the gradients of all outputs side by side.
        return one_hot if self.full else one_hot / num_outputs**0.5


def select_output(output: Output, returned: Any, n: int) -> Tensor:  # noqa: ANN401 - whatever the network returns
    """Take the outputs to differentiate out of what a network returns.

    Args:
        output: None, an index, which is not applied here, or a function of what the network returns.
        returned: By the network, for n samples.
        n: How many samples.

    Returns:
        Outputs (n,) or (n, C).

    Raises:
        ValueError: They are something else.
    """
    out = output(returned) if callable(output) else returned
    if isinstance(out, Tensor) and out.dim() == 0 and n == 1:  # (1, 1) without its dimensions of size 1, by squeeze()
        out = out.reshape(1)
    if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != n or out.numel() == 0:
        got = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        sample = "one sample" if n == 1 else f"{n} samples"
        what = "output=... must map what the network returns" if callable(output) else "The network must map (n, ...)"
        advice = "" if callable(output) else "; choose by output=..., such as output=lambda out: out.logits[:, -1]"
        raise ValueError(f"{what} to (n,) or (n, outputs); {sample} gave {got}{advice}.")
    if not out.is_floating_point():
        raise ValueError(
            f"The outputs are {out.dtype}, which have no gradient: give real ones by output=..., such as "
            "output=lambda out: out.abs()."
        )
    return out
