"""The empirical NTK: inner products of a network's parameter gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ntk_lightning.kernels.inputs import check_inputs
from ntk_lightning.progress import progress_bar

__all__ = ["EmpiricalNTK"]


class EmpiricalNTK(nn.Module):
    """Empirical NTK K_w(x, x') = <grad_w f(w, x), grad_w f(w, x')> at the network's current weights, copied.

    Jacot et al. (2018, arXiv 1806.07572). With C outputs it is the normalized trace, the mean over outputs of
    <grad f_c(x), grad f_c(x')>.

    Args:
        net: Maps (n, ...) to (n, num_outputs). Later changes of its weights do not reach this kernel.
        chunk_size: Samples whose gradients are formed at once.

    Example:
        >>> kernel = EmpiricalNTK(nn.Linear(2, 1, bias=False))
        >>> kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """

    def __init__(self, net: nn.Module, chunk_size: int = 128) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False)
        self.chunk_size = chunk_size

    def forward(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix.

        Args:
            x1: Inputs (n1, ...).
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1.
            progress: Show a progress bar.

        Returns:
            The kernel of all pairs, (n1, n2).

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed.
        """
        check_inputs(x1, x2)
        with progress_bar(
            "empirical NTK", len(x1) + (0 if x2 is None else len(x2)), "samples", enabled=progress
        ) as advance:
            features1 = torch.cat([self._features(chunk, advance) for chunk in x1.split(self.chunk_size)])
            if x2 is None:
                return features1 @ features1.T
            rows = [features1 @ self._features(chunk, advance).T for chunk in x2.split(self.chunk_size)]
        return torch.cat(rows, dim=1)

    def diag(self, x: Tensor) -> Tensor:
        """Compute the kernel of every input with itself.

        Args:
            x: Inputs (n, ...).

        Returns:
            The diagonal of the Gram of x, (n,).

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: Inputs are malformed.
        """
        check_inputs(x)
        return torch.cat([self._features(chunk, lambda _: None).square().sum(1) for chunk in x.split(self.chunk_size)])

    def _features(self, x: Tensor, advance: Callable[[float], None]) -> Tensor:
        """Gradients of all outputs, (n, num_outputs * P) / sqrt(num_outputs)."""
        parameters = dict(self.net.named_parameters())
        num_outputs = self.net(x[:1]).shape[-1]

        def output(parameters: dict[str, Tensor], sample: Tensor, c: int) -> Tensor:
            prediction: Tensor = functional_call(self.net, parameters, (sample[None],))[0, c]
            return prediction

        columns = []
        for c in range(num_outputs):
            gradients = vmap(grad(lambda p, s, c=c: output(p, s, c)), (None, 0))(parameters, x)
            columns += [g.flatten(1) for g in gradients.values()]
        advance(len(x))
        features: Tensor = torch.cat(columns, 1) / num_outputs**0.5
        return features
