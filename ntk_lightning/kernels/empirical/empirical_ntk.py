"""The empirical NTK: inner products of a network's parameter gradients, within a memory budget.

Longer than 300 lines for the documentation of one class's calls; the gradients and the memory budget have own files.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from ntk_lightning.kernels.checks import check_finite, check_inputs
from ntk_lightning.kernels.empirical.gradients import GradientRows
from ntk_lightning.kernels.empirical.memory_plan import SLICE_COLUMNS, chunk_size, divide, parse_bytes
from ntk_lightning.kernels.grams.distributed import distributed_cross, distributed_gram, swap
from ntk_lightning.precision import at_least_float32, own_precision
from ntk_lightning.progress import progress_bar

__all__ = ["EmpiricalNTK"]

Features = Literal["float32", "tf32", "bfloat16"]

_DIVERGED = "if the network has diverged, lower the learning rate, else compute in float64"


class EmpiricalNTK(nn.Module):
    """Empirical NTK K_w(x, x') = <grad_w f(w, x), grad_w f(w, x')> at the network's current weights, copied.

    Jacot et al. (2018, arXiv 1806.07572). With C outputs it is the normalized trace, the mean over outputs c of
    <grad f_c(x), grad f_c(x')>. Parameters with ``requires_grad=False`` take no part, and every layer stays in the mode
    (training or not) in which it is copied. Inputs in float64 are computed in float64, all others in float32.

    Args:
        net: Maps (n, ...) to (n,) or (n, C). Later changes of it do not reach this kernel.
        memory: Budget for all that a call allocates besides inputs and result: bytes, or a string as "4GB" or "512MiB".
            With less than the gradients of all samples, some are computed more than once.
        dtype: Precision to cast inputs to, or None for theirs.
        features: "float32" keeps gradients in their precision. "tf32" lets a GPU round while it computes and multiplies
            them; "bfloat16" keeps them in half the memory. See :meth:`features_error`.
        output: The one output to differentiate, or None for all.
        full: Return all products of outputs, (n1, n2, C, C), instead of the normalized trace.

    Raises:
        ValueError: An argument is malformed, or the network has nothing to differentiate.

    Example:
        >>> kernel = EmpiricalNTK(nn.Linear(2, 1, bias=False))
        >>> kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        memory: str | int = "4GB",
        dtype: torch.dtype | None = None,
        features: Features = "float32",
        output: int | None = None,
        full: bool = False,
    ) -> None:
        super().__init__()
        if features not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f'features must be "float32", "tf32" or "bfloat16", got {features!r}.')
        if full and output is not None:
            raise ValueError("full=True returns all outputs and output=... one: choose.")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}.")
        self.trainable = tuple(name for name, parameter in net.named_parameters() if parameter.requires_grad)
        if not self.trainable:
            raise ValueError(
                "The network has no parameter with requires_grad=True, so its NTK is empty: unfreeze some."
            )
        with torch.inference_mode(False):
            self.net = copy.deepcopy(net).requires_grad_(False)
        self.memory, self.dtype, self.features, self.output, self.full = (
            parse_bytes(memory),
            dtype,
            features,
            output,
            full,
        )

    def train(self, mode: bool = True) -> Self:
        """Set this module's own flag; the copied network keeps the modes in which it was copied.

        Args:
            mode: The flag.

        Returns:
            This kernel.
        """
        self.training = mode
        return self

    def forward(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix.

        Args:
            x1: Inputs (n1, ...).
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1, of which one half is computed.
            progress: Show a progress bar.

        Returns:
            The kernel of all pairs, (n1, n2), or (n1, n2, C, C) with ``full``.

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x1, x2) as (rows, (x1, *others)):
            if not others:
                gram = _empty(rows, x1, x1)
                self._panels(rows, x1, gram, [], progress)
                check_finite(gram, _DIVERGED)
                return gram
            x2, out = others[0], _empty(rows, x1, others[0])
            if len(x1) < len(x2):  # the smaller set is more likely to fit, and the other passes by once a panel
                self._panels(rows, x1, None, [(x2, swap(out))], progress)
            else:
                self._panels(rows, x2, None, [(x1, out)], progress)
            check_finite(out, _DIVERGED)
            return out

    def gram_and_cross(self, x_train: Tensor, *x_tests: Tensor, progress: bool = False) -> tuple[Tensor, ...]:
        """Compute the Gram of a training set and the kernels of test sets with it, from one set of gradients.

        Args:
            x_train: Inputs (n, ...).
            *x_tests: Any number of inputs (m, ...).
            progress: Show a progress bar.

        Returns:
            The training Gram (n, n), then for each test set the kernel (m, n).

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x_train, *x_tests) as (rows, (x_train, *tests)):
            gram = _empty(rows, x_train, x_train)
            crosses = [_empty(rows, x, x_train) for x in tests]
            self._panels(rows, x_train, gram, list(zip(tests, crosses, strict=True)), progress)
            for kernel in (gram, *crosses):
                check_finite(kernel, _DIVERGED)
        return gram, *crosses

    def diag(self, x: Tensor) -> Tensor:
        """Compute the kernel of every input with itself.

        Args:
            x: Inputs (n, ...).

        Returns:
            The diagonal of the Gram of x, (n,), or (n, C, C) with ``full``.

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x) as (rows, (x,)):
            chunk = chunk_size(self.memory, rows, x)[0]
            features = x.new_empty(min(chunk, len(x)), rows.width)
            values = []
            for part in x.split(chunk):
                filled = features[: len(part)]
                rows.fill(filled, part)
                values.append(rows.contract(filled, filled, lambda a, b: (a * b).sum(1)))
            diagonal = torch.cat(values)
        check_finite(diagonal, _DIVERGED, "kernel's diagonal entry", sides=1)
        return diagonal

    def matvec(self, x: Tensor, v: Tensor, x2: Tensor | None = None) -> Tensor:
        """Multiply the kernel with vectors without forming it: K(x2, x) v = J(x2) (J(x)^T v), by vjp, then jvp.

        Args:
            x: Inputs (n, ...).
            v: Vector (n,) or vectors (n, k) to multiply K(., x) with; with ``full``, (n, C) over samples and outputs.
            x2: Inputs (m, ...) of the rows, or None for x.

        Returns:
            The product, (m,) or (m, k); with ``full``, (m, C).

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs or v are malformed, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients, or v, are not finite.
        """
        with self._computing(x, *([] if x2 is None else [x2])) as (rows, (x, *others)):
            outputs = len(rows.cotangents)
            if len(v) != len(x) or v.dim() not in (1, 2) or (self.full and v.shape[1:] != (outputs,)):
                raise ValueError(
                    f"v must be {f'(n, {outputs})' if self.full else '(n,) or (n, k)'} with n = {len(x)}, "
                    f"got {tuple(v.shape)}."
                )
            chunk, v = chunk_size(self.memory, rows, x)[0], v.to(x)
            columns = [v] if self.full else v.reshape(len(x), -1).T
            x2 = others[0] if others else x
            products = []
            for column in columns:
                product = v.new_zeros(len(x2), outputs) if self.full else v.new_zeros(len(x2))
                for c in rows.cotangents if not self.full else [None]:
                    direction = _pull(rows, x, column if c is None else column[:, None] * c, chunk)
                    pushed = torch.cat([_push(rows, part, direction) for part in x2.split(chunk)])
                    product += pushed if c is None else pushed @ c
                products.append(product)
            product = products[0] if self.full or v.dim() == 1 else torch.stack(products, 1)
        check_finite(product, f"check v; {_DIVERGED}", "product's entry", sides=1)
        return product

    def sharded(self, x1: Tensor, x2: Tensor | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix on all ranks of the default process group together.

        Every rank computes a block of equal area. Call it on every rank, with the same inputs and weights; an error on
        one rank ends the call on all, with one of its kind.

        Args:
            x1: Inputs (n1, ...).
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1.
            progress: Show a progress bar.

        Returns:
            What ``kernel(x1, x2)`` returns, to rounding.

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        if x2 is None:
            return distributed_gram(self, x1, progress=progress)
        return distributed_cross(self, x1, x2, progress=progress)

    def features_error(self, x: Tensor) -> float:
        """Report what reduced ``features`` cost in accuracy, on a few inputs.

        Args:
            x: Inputs (n, ...); 64 are enough.

        Returns:
            The largest deviation of an entry of their Gram from that of float32 features, over the largest entry.

        Raises:
            TypeError: The input is not a floating-point tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, or the memory budget is too small.
        """
        exact = copy.copy(self)
        exact.features = "float32"
        expected = exact(x)
        return float((self(x) - expected).abs().max() / expected.abs().max())

    @contextmanager
    def _computing(self, *inputs: Tensor | None) -> Iterator[tuple[GradientRows, list[Tensor]]]:
        """Check and cast the inputs and lay out the gradients, in the precision and autograd mode that they need."""
        x, *others = (x for x in inputs if x is not None)
        check_inputs(x)
        for other in others:
            check_inputs(x, other)
        dtype = self.dtype or at_least_float32(x.dtype)
        for tensor in itertools.chain(self.net.parameters(), self.net.buffers()):
            if tensor.device != x.device:
                raise ValueError(
                    f"The kernel is on {tensor.device}, the inputs are on {x.device}: call kernel.to(x.device)."
                )
        if self.features != "float32" and dtype == torch.float64:
            raise ValueError(f"features={self.features!r} is for float32 inputs, got {dtype}: use one or the other.")
        if self.features == "tf32" and x.device.type != "cuda":
            raise ValueError(f'features="tf32" needs a CUDA device, the inputs are on {x.device}: use "float32".')
        rounding: Literal["tf32", "ieee"] = "tf32" if self.features == "tf32" else "ieee"
        with torch.inference_mode(False), torch.no_grad(), own_precision(x.device.type, rounding):
            xs = [t.to(dtype).clone() if t.is_inference() else t.detach().to(dtype) for t in (x, *others)]
            yield GradientRows(self.net, self.trainable, xs[0][:1], self.output, self.full), xs

    def _panels(
        self,
        rows: GradientRows,
        x: Tensor,
        gram: Tensor | None,
        streams: Sequence[tuple[Tensor, Tensor]],
        progress: bool,
    ) -> None:
        """Fill the Gram of x, and for every (x', out) the kernel of x' with x, one panel of gradients of x at a time.

        Gradients of a panel stay; all others pass by in blocks, made anew for every panel.
        """
        n, passing, half = len(x), sum(len(other) for other, _ in streams), self.features == "bfloat16"
        plan, dtype = divide(self.memory, rows, x, passing, half), torch.bfloat16 if half else x.dtype
        panel_rows = x.new_empty(plan.panel, rows.width, dtype=dtype)
        block_rows = x.new_empty(plan.block if streams or plan.panel < n else 0, rows.width, dtype=dtype)
        starts = range(0, n, plan.panel)
        total = sum((n - s if gram is not None else min(plan.panel, n - s)) + passing for s in starts)
        with progress_bar("empirical NTK", total, "samples", enabled=progress) as advance:

            def fill(out: Tensor, inputs: Tensor) -> Tensor:
                for i in range(0, len(inputs), plan.chunk):
                    part = inputs[i : i + plan.chunk]
                    rows.fill(out[i : i + len(part)], part)
                    advance(len(part))
                return out[: len(inputs)]

            for start in starts:
                stop = min(start + plan.panel, n)
                panel = fill(panel_rows, x[start:stop])
                if gram is not None:
                    for i in range(start, stop, plan.block):
                        j = min(i + plan.block, stop)
                        product = rows.contract(panel[i - start : j - start], panel[i - start :], _matmul)
                        square = product[:, : j - i]
                        square.copy_((square + swap(square)) / 2)
                        gram[i:j, i:stop] = product
                        gram[j:stop, i:j] = swap(product[:, j - i :])
                    for i in range(stop, n, plan.block):
                        j = min(i + plan.block, n)
                        gram[i:j, start:stop] = rows.contract(fill(block_rows, x[i:j]), panel, _matmul)
                        gram[start:stop, i:j] = swap(gram[i:j, start:stop])
                for other, out in streams:
                    for i in range(0, len(other), plan.block):
                        block = fill(block_rows, other[i : i + plan.block])
                        out[i : i + len(block), start:stop] = rows.contract(block, panel, _matmul)


def _empty(rows: GradientRows, x1: Tensor, x2: Tensor) -> Tensor:
    outputs = (len(rows.cotangents),) * 2 if rows.full else ()
    return x1.new_empty(len(x1), len(x2), *outputs)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply a with b^T in float32 or better, in slices: one long sum of float32 products would lose two digits."""
    total = torch.zeros(len(a), len(b), dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    for left, right in zip(a.split(SLICE_COLUMNS, 1), b.split(SLICE_COLUMNS, 1), strict=True):
        total += left.to(total.dtype) @ right.to(total.dtype).T
    return total


def _pull(rows: GradientRows, x: Tensor, cotangent: Tensor, chunk: int) -> dict[str, Tensor]:
    """J(x)^T applied to cotangents (n, C) of the outputs, summed over chunks."""
    total = {name: torch.zeros_like(weight) for name, weight in rows.trainable.items()}
    for part, weights in zip(x.split(chunk), cotangent.split(chunk), strict=True):
        pull = vjp(lambda w, part=part: rows.predict(w, part), rows.trainable)[1]
        for name, gradient in pull(weights)[0].items():
            total[name] += gradient
    return total


def _push(rows: GradientRows, x: Tensor, direction: dict[str, Tensor]) -> Tensor:
    """J(x) applied to a direction of the weights, (n, C)."""
    pushed: Tensor = jvp(lambda weights: rows.predict(weights, x), (rows.trainable,), (direction,))[1]
    return pushed
