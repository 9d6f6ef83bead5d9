"""The infinite-width kernel of a network, whatever computes it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ntk_lightning.kernels import reference
from ntk_lightning.kernels.inputs import check_inputs
from ntk_lightning.kernels.layers import Layer, check_shape, parse
from ntk_lightning.progress import progress_bar

__all__ = ["InfiniteNTK"]

Kind = Literal["ntk", "nngp"]
Backend = Literal["auto", "reference", "cpu", "cuda"]

_REFERENCE_BLOCK_BYTES = 2**27


class InfiniteNTK:
    """Infinite-width limit of a network's NTK at initialization, or of its output covariance (NNGP).

    Jacot et al. (2018, arXiv 1806.07572); for convolutions Arora et al. (2019, arXiv 1904.11955). The network gives the
    architecture only: its width and weights do not matter.

    Args:
        net: ``nn.Sequential`` of this package's layers and the supported layers of ``torch.nn``.
        kind: "ntk" or "nngp".
        backend: What computes it. "reference" is plain PyTorch on any device, for every supported architecture; "auto"
            takes the fastest that supports the architecture on the inputs' device, and says which.

    Raises:
        TypeError: The network has a layer without a closed form.
        ValueError: Its layers have no closed form in their order, or an argument is unknown.

    Example:
        >>> from ntk_lightning.networks import MLP
        >>> InfiniteNTK(MLP(width=1, depth=1, in_features=2), kind="nngp")(torch.eye(2, dtype=torch.float64))
        tensor([[1.0000, 0.3183],
                [0.3183, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, net: nn.Module, kind: Kind = "ntk", backend: Backend = "auto") -> None:
        if kind not in ("ntk", "nngp"):
            raise ValueError(f'kind must be "ntk" or "nngp", got {kind!r}.')
        if backend not in ("auto", "reference", "cpu", "cuda"):
            raise ValueError(f'backend must be "auto", "reference", "cpu" or "cuda", got {backend!r}.')
        self.layers: tuple[Layer, ...] = parse(net)
        self.kind: Kind = kind
        self.backend: Backend = backend

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix.

        Args:
            x1: Inputs (n1, d) or images (n1, C, H, W); their dtype is the precision.
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1, of which one half is computed.
            progress: Show a progress bar.

        Returns:
            The kernel of all pairs, (n1, n2).

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or do not fit the network.
        """
        self.check(x1, x2)
        return self._reference_gram(x1, x2, progress)

    def diag(self, x: Tensor) -> Tensor:
        """Compute the kernel of every input with itself.

        Args:
            x: Inputs (n, d) or (n, C, H, W).

        Returns:
            The diagonal of the Gram of x, (n,).

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: Inputs are malformed or do not fit the network.
        """
        self.check(x, None)
        return torch.cat([self._reference_block(sample, sample)[:, 0] for sample in x.split(1)])

    def check(self, x1: Tensor, x2: Tensor | None = None) -> None:
        """Check inputs without computing anything.

        Args:
            x1: Inputs (n1, d) or (n1, C, H, W).
            x2: Inputs (n2, ...), or None.

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or do not fit the network.
        """
        check_inputs(x1, x2)
        if x1.dim() not in (2, 4):
            raise ValueError(f"Inputs must be (n, features) or (n, C, H, W), got {tuple(x1.shape)}.")
        if check_shape(self.layers, tuple(x1.shape[2:])):
            raise ValueError("The network's output still has pixels: end it in nn.Flatten and NTKLinear.")

    def _reference_block(self, x1: Tensor, x2: Tensor) -> Tensor:
        nngp, ntk = reference.gram(self.layers, x1, x2)
        return ntk if self.kind == "ntk" else nngp

    def _reference_gram(self, x1: Tensor, x2: Tensor | None, progress: bool) -> Tensor:
        symmetric, x2 = x2 is None, x1 if x2 is None else x2
        pixels = x1[0, 0].numel() if x1.dim() == 4 else 1
        side = max(1, int((_REFERENCE_BLOCK_BYTES / (pixels**2 * x1.element_size())) ** 0.5))
        out = x1.new_empty(len(x1), len(x2))
        with progress_bar("infinite NTK", out.numel(), "pairs", enabled=progress) as advance:
            for i in range(0, len(x1), side):
                for j in range(i if symmetric else 0, len(x2), side):
                    block = self._reference_block(x1[i : i + side], x2[j : j + side])
                    out[i : i + side, j : j + side] = block
                    if symmetric and i != j:
                        out[j : j + side, i : i + side] = block.T
                    advance(block.numel() * (1 + (symmetric and i != j)))
        return out
