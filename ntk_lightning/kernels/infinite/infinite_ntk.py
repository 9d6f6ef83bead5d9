"""The infinite-width kernel of a network, whatever computes it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.checks import check_finite, check_inputs
from ntk_lightning.kernels.infinite import fused, reference
from ntk_lightning.kernels.infinite.architecture import Flatten, Layer
from ntk_lightning.kernels.infinite.lift import parse
from ntk_lightning.kernels.infinite.shapes import check_shape
from ntk_lightning.precision import at_least_float32, own_precision
from ntk_lightning.progress import progress_bar

__all__ = ["InfiniteNTK"]

Kind = Literal["ntk", "nngp"]
Backend = Literal["auto", "reference", "cpu", "cuda"]

_BLOCK_BYTES = {"cpu": 2**19, "cuda": 2**27}  # of the reference's covariances: in the cache; for all processors
_VARIANCES_BYTES = 2**30

_log = logging.getLogger(__name__)


class InfiniteNTK:
    """Infinite-width limit of a network's NTK at initialization, or of its output covariance (NNGP).

    Jacot et al. (2018, arXiv 1806.07572); for convolutions Arora et al. (2019, arXiv 1904.11955). The network gives the
    architecture only: its weights do not matter, which are random in the limit whatever the network holds, and all
    parameters of affine layers count as trained, those with ``requires_grad=False`` too. Nor does its width, but in
    the standard parameterization, that of plain ``nn.Linear`` and ``nn.Conv``, whose NTK grows with it (Sohl-Dickstein
    et al., 2020, arXiv 2001.07301). Gains of layer normalization are the constant 1. Dropout is that of the mode which
    the module is in.

    Inputs in float64 give a kernel in float64, all others one in float32. Correlations within a few rounding errors of
    1 count as 1, so equal inputs, and multiples of each other, are exact to rounding.

    Activations without a closed form, ``nn.Tanh`` or :class:`~ntk_lightning.networks.Pointwise` of any function, are
    integrated numerically by the reference. Their error is estimated; above 1e-8 of the kernel a warning tells it.

    Where inputs require gradients, outside of ``torch.no_grad()``, the kernel does too; "reference" computes it. The
    NTK of a ReLU network has kinks at equal inputs and multiples: there the gradient is the mean of both sides.

    Args:
        net: Any module whose ``forward`` is made of operations with a closed form, by ``torch.fx``: this package's
            layers and the supported ones of ``torch.nn``, sums, products and concatenations of independent branches,
            and their functions, compiled by ``torch.compile`` or not. As in PyTorch, sizes must fit.
        kind: "ntk" or "nngp".
        backend: What computes it. "reference" is plain PyTorch, in float64 on any device, for every supported
            architecture. "cpu" (float32 and float64) and "cuda" (float32) are compiled, for images and any sequence of
            3x3 convolutions with "same" padding, activations and 2x2 average pooling, then global average pooling or
            flatten, then linear layers and activations; they refuse inputs that require gradients. "auto" takes the
            fastest that supports the architecture on the inputs' device and in their precision, logs which, and
            :meth:`backend_for` tells it.

    Raises:
        TypeError: The network has an operation without a closed form, whose line the message names, or a layer with
            hooks, or uses weights twice.
        ValueError: Its operations have no closed form in their order, or layers do not fit each other, or an argument
            is unknown.

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
        check_shape(self.layers, None)
        self.kind: Kind = kind
        self.backend: Backend = backend
        self._logged: set[str] = set()

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix.

        Args:
            x1: Inputs (n1, d), sequences (n1, C, L) or images (n1, C, H, W).
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1, of which one half is computed. Equal inputs
                are the same samples for dropout.
            progress: Show a progress bar.

        Returns:
            The kernel of all pairs, (n1, n2).

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed, do not fit the network, or cannot run on the chosen backend, or a
                numerical integration does not converge.
            FloatingPointError: A covariance is too large for the inputs' precision.
        """
        self.check(x1, x2)
        backend = self.backend_for(x1, x2)
        x1, x2 = self._prepared(x1), None if x2 is None else self._prepared(x2)
        entries, title = len(x1) * len(x1 if x2 is None else x2), f"infinite {self.kind.upper()} ({backend})"
        with (
            own_precision(x1.device.type),
            progress_bar(title, entries, "pairs", enabled=progress) as advance,
        ):
            gram: Tensor = (
                self._reference_gram(x1, x2, advance)
                if backend == "reference"
                else _compiled(backend).gram(self.layers, self.kind, x1, x2, advance)
            )
        check_finite(gram, _overflow_advice(gram))
        return gram

    def diag(self, x: Tensor) -> Tensor:
        """Compute the kernel of every input with itself.

        Args:
            x: Inputs (n, d), (n, C, L) or (n, C, H, W).

        Returns:
            The diagonal of the Gram of x, (n,).

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: Inputs are malformed, do not fit the network, or cannot run on the chosen backend.
            FloatingPointError: A variance is too large for the inputs' precision.
        """
        self.check(x)
        backend, x = self.backend_for(x), self._prepared(x)
        with own_precision(x.device.type):
            diagonal: Tensor = (
                self._reference_diagonal(x)
                if backend == "reference"
                else _compiled(backend).diag(self.layers, self.kind, x)
            )
        check_finite(diagonal, _overflow_advice(diagonal), "kernel's diagonal entry", sides=1)
        return diagonal

    def backend_for(self, x: Tensor, x2: Tensor | None = None) -> str:
        """Tell what computes the kernel of such inputs.

        Args:
            x: Inputs (n, d), (n, C, L) or (n, C, H, W).
            x2: The second inputs, or None; they matter where gradients are asked for.

        Returns:
            "reference", "cpu" or "cuda".

        Raises:
            ValueError: The backend that was asked for cannot run this network on these inputs.
        """
        if self.backend == "reference":
            return "reference"
        native, obstacle = x.device.type, self._obstacle(x, x2)
        if self.backend != "auto":
            if self.backend != native:
                obstacle = f"its inputs are on {x.device}"
            if obstacle:
                raise ValueError(f'backend="{self.backend}" cannot run this network: {obstacle}. Use backend="auto".')
            return self.backend
        backend = "reference" if obstacle else native
        if backend not in self._logged:
            self._logged.add(backend)
            _log.info("InfiniteNTK runs on backend %r%s.", backend, f" because {obstacle}" if obstacle else "")
        return backend

    def _obstacle(self, x: Tensor, x2: Tensor | None) -> str | None:
        """Why the compiled backend of the inputs' device cannot run them."""
        if torch.is_grad_enabled() and (x.requires_grad or (x2 is not None and x2.requires_grad)):
            return "its inputs require gradients, which only the reference gives (call it in torch.no_grad() without)"
        if x.device.type not in ("cpu", "cuda"):
            return f"no compiled backend is for {x.device.type}"
        if x.device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if x.device.type == "cuda" and x.dtype == torch.float64:
            return f"its inputs are {x.dtype}"
        return fused.unsupported(self.layers, tuple(x.shape[2:]), x.device.type)

    def check(self, x1: Tensor, x2: Tensor | None = None) -> None:
        """Check inputs without computing anything.

        Args:
            x1: Inputs (n1, d), (n1, C, L) or (n1, C, H, W).
            x2: Inputs (n2, ...), or None.

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or do not fit the network.
        """
        check_inputs(x1, x2)
        if x1.dim() not in (2, 3, 4):
            raise ValueError(f"Inputs must be (n, features), (n, C, L) or (n, C, H, W), got {tuple(x1.shape)}.")
        if check_shape(self.layers, tuple(x1.shape[2:]), x1.shape[1]):
            raise ValueError("The network's output still has pixels: end it in nn.Flatten and NTKLinear.")

    def _prepared(self, x: Tensor) -> Tensor:
        """Inputs in the kernel's precision; as vectors where the network starts so, which costs the reference less."""
        return (x.flatten(1) if isinstance(self.layers[0], Flatten) else x).to(at_least_float32(x.dtype))

    def _reference_diagonal(self, x: Tensor) -> Tensor:
        network, device = reference.Network.of(self.layers, x), _reference_device(x)
        side = max(1, _block_entries(device) // network.entries())
        blocks = (block.to(device, torch.float64) for block in x.split(side))
        return torch.cat([reference.diagonal(network, block)[self.kind == "ntk"] for block in blocks]).to(x)

    def _reference_gram(self, x1: Tensor, x2: Tensor | None, advance: Callable[[float], None]) -> Tensor:
        symmetric, x2 = x2 is None, x1 if x2 is None else x2
        device, out = _reference_device(x1), x1.new_empty(len(x1), len(x2))
        network = reference.Network.of(self.layers, x1)
        side = max(1, int((_block_entries(device) / network.entries()) ** 0.5))
        rows = [block.to(device, torch.float64) for block in x1.split(side)]
        columns = rows if symmetric else [block.to(device, torch.float64) for block in x2.split(side)]
        same = symmetric or (x1.shape == x2.shape and torch.equal(x1, x2))
        most = sum(v.nbytes for v in reference.variances(network, rows[0]).values()) or 1

        @lru_cache(max(2, _VARIANCES_BYTES // most))  # of all blocks, but of attention on many inputs
        def own(blocks: int, number: int) -> reference.Variances:
            return reference.variances(network, (rows, columns)[blocks][number])

        for i, left in enumerate(rows):
            for j, right in enumerate(columns[i:] if symmetric else columns, i if symmetric else 0):
                own1, own2, ntk = own(0, i), own(0 if symmetric else 1, j), self.kind == "ntk"
                block = reference.pairs(network, left, right, own1, own2, ntk=ntk, same=same and i == j)[ntk]
                places = slice(i * side, i * side + len(left)), slice(j * side, j * side + len(right))
                if symmetric and i == j:
                    block = block.triu() + block.triu(1).T  # its two halves differ by rounding
                elif symmetric:
                    out[places[::-1]] = block.T
                out[places] = block
                advance(block.numel() * (1 + (symmetric and i != j)))
        return out


def _reference_device(x: Tensor) -> torch.device:
    """Where the reference computes: in float64, which MPS does not have."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _block_entries(device: torch.device) -> int:
    return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]) // torch.float64.itemsize


def _overflow_advice(kernel: Tensor) -> str:
    wider = "" if kernel.dtype == torch.float64 else "compute it in float64, or "
    return f"{wider}scale the inputs down"


def _compiled(backend: str) -> ModuleType:
    """The module of a compiled backend, imported when it is needed."""
    return importlib.import_module(f"ntk_lightning.kernels.infinite.fused_{backend}")
