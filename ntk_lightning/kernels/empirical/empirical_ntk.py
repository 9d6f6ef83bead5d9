"""The empirical NTK: inner products of a network's parameter gradients, within a memory budget.

Longer than 300 lines for the documentation of one class's calls; gradients, trial and memory budget have own files.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.checks import check_finite, check_inputs
from ntk_lightning.kernels.empirical.derivatives import differentiable_attention
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.memory_plan import Plan, choose_plan, chunk_size, divide, parse_bytes
from ntk_lightning.kernels.empirical.network_function import NetworkFunction
from ntk_lightning.kernels.empirical.network_state import copy_network, preserved
from ntk_lightning.kernels.empirical.products import multiply
from ntk_lightning.kernels.empirical.rows import Rows
from ntk_lightning.kernels.empirical.sample_independence import check_modes
from ntk_lightning.kernels.empirical.trial import choose_rows
from ntk_lightning.kernels.grams.distributed import distributed_cross, distributed_gram, swap
from ntk_lightning.precision import at_least_float32, own_precision
from ntk_lightning.progress import progress_bar

__all__ = ["EmpiricalNTK"]

Features = Literal["float32", "tf32", "bfloat16"]
Arguments = Any  # of a network: a tensor, a tuple or list, or a mapping

_DIVERGED = "if the network has diverged, lower the learning rate, else compute in float64"


class EmpiricalNTK(nn.Module):
    """Empirical NTK K_w(x, x') = <grad_w f(w, x), grad_w f(w, x')> at the network's current weights, copied.

    Jacot et al. (2018, arXiv 1806.07572). With C outputs it is the normalized trace, the mean over outputs c of
    <grad f_c(x), grad f_c(x')>. Parameters with ``requires_grad=False`` take no part, and every layer stays in the mode
    (training or not) in which it is copied. A complex parameter counts as its real and its imaginary part.

    Inputs are one tensor of any dtype, called as net(x); a tuple or list, net(*x); or a mapping, net(**x), such as a
    transformers ``BatchEncoding``. An element of a tuple may be a mapping: ({...},) is net({...}). Every tensor has the
    n samples first; what is no tensor is passed on as it is. Gradients are those of reverse mode, one sample at a time:
    by ``torch.func.vmap`` for many samples at once where that can be done, else by a loop, which the log then says.

    Args:
        net: Maps (n, ...) to (n,) or (n, C), or to what ``output`` takes. Later changes of it do not reach this kernel.
        memory: Budget for all that a call allocates besides inputs and result: bytes, or a string as "4GB" or "512MiB".
            With less than the gradients of all samples, some are computed more than once.
        dtype: Precision to compute in, or None for the widest of the parameters' and the floating-point inputs', at
            least float32. Floating-point inputs are cast to it, others are not.
        features: "float32" keeps gradients in their precision. "tf32" lets a GPU round while it computes and multiplies
            them; "bfloat16" keeps them in half the memory. See :meth:`features_error`.
        output: The one output to differentiate, or None for all; or a function of what the network returns to (n,) or
            (n, C), such as ``lambda out: out.logits[:, -1]``.
        full: Return all products of outputs, (n1, n2, C, C), instead of the normalized trace.
        output2: A second function g of the same weights, for the kernel <grad f(x), grad g(x')> with f of ``output``:
            the blocks of physics-informed networks, for example. It is not symmetric.

    Raises:
        ValueError: An argument is malformed, or the network has nothing to differentiate.

    Example:
        >>> kernel = EmpiricalNTK(nn.Linear(2, 1, bias=False))
        >>> kernel(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
        >>> embedding = EmpiricalNTK(nn.Embedding(9, 1), output=lambda out: out.sum(1))
        >>> embedding(torch.tensor([[1, 2, 2], [2, 3, 4]]))
        tensor([[5., 2.],
                [2., 3.]])
    """

    output2: int | Callable[[Any], Tensor] | None = None

    def __init__(
        self,
        net: nn.Module,
        *,
        memory: str | int = "4GB",
        dtype: torch.dtype | None = None,
        features: Features = "float32",
        output: int | Callable[[Any], Tensor] | None = None,
        full: bool = False,
        output2: int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if features not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f'features must be "float32", "tf32" or "bfloat16", got {features!r}.')
        for o in (output, output2):
            if o is not None and not callable(o) and (isinstance(o, bool) or not isinstance(o, int)):
                raise ValueError(f"output must be None, a whole number or a function of what net returns, got {o!r}.")
        if full and (isinstance(output, int) or isinstance(output2, int)):
            raise ValueError("full=True returns all outputs and output=... one: choose.")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {dtype}.")
        self.trainable = tuple(name for name, parameter in net.named_parameters() if parameter.requires_grad)
        if not self.trainable:
            raise ValueError(
                "The network has no parameter with requires_grad=True, so its NTK is empty: unfreeze some."
            )
        self.net = copy_network(net)
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self.memory, self.dtype, self.features, self.output, self.full = (
            parse_bytes(memory),
            dtype,
            features,
            output,
            full,
        )
        if output2 is not None:  # else it is no attribute, and no part of what names this kernel in a store
            self.output2 = output2

    def train(self, mode: bool = True) -> Self:
        """Set this module's own flag; the copied network keeps the modes in which it was copied.

        Args:
            mode: The flag.

        Returns:
            This kernel.
        """
        self.training = mode
        return self

    def forward(self, x1: Arguments, x2: Arguments | None = None, *, progress: bool = False) -> Tensor:
        """Compute the Gram matrix.

        Args:
            x1: Inputs (n1, ...).
            x2: Inputs (n2, ...), or None for the symmetric Gram of x1, of which one half is computed.
            progress: Show a progress bar.

        Returns:
            The kernel of all pairs, (n1, n2), or (n1, n2, C, C) with ``full``.

        Raises:
            TypeError: Inputs hold no tensor, or differ in structure.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x1, x2) as (rows, inputs):
            return self._kernels(rows, inputs, progress)[0]

    def per_layer(self, x1: Arguments, x2: Arguments | None = None, *, progress: bool = False) -> dict[str, Tensor]:
        """Compute the kernel of every module that has trainable parameters of its own, in one pass.

        The kernel is a sum over parameters, K = sum_l <grad_{w_l} f(x), grad_{w_l} f(x')>, so these sum to it. A
        parameter that several modules share counts once, for the first of them.

        Args:
            x1: Inputs (n1, ...).
            x2: Inputs (n2, ...), or None for the symmetric kernels of x1.
            progress: Show a progress bar.

        Returns:
            For each module, by its name in ``net.named_modules()``, what ``kernel(x1, x2)`` would return if all other
            parameters were frozen.

        Raises:
            TypeError: Inputs hold no tensor, or differ in structure.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
            >>> kernel, x = EmpiricalNTK(net), torch.eye(2)
            >>> kernels = kernel.per_layer(x)
            >>> list(kernels), torch.allclose(sum(kernels.values()), kernel(x))
            (['0', '2'], True)
        """
        with self._computing(x1, x2, per_layer=True) as (rows, inputs):
            kernels = self._kernels(rows, inputs, progress)
        return {part.name: kernel for part, kernel in zip(rows.parts, kernels, strict=True)}

    def gram_and_cross(self, x_train: Arguments, *x_tests: Arguments, progress: bool = False) -> tuple[Tensor, ...]:
        """Compute the Gram of a training set and the kernels of test sets with it, from one set of gradients.

        Args:
            x_train: Inputs (n, ...).
            *x_tests: Any number of inputs (m, ...).
            progress: Show a progress bar.

        Returns:
            The training Gram (n, n), then for each test set the kernel (m, n).

        Raises:
            TypeError: Inputs hold no tensor, or differ in structure.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x_train, *x_tests) as (rows, (x_train, *tests)):
            if rows.partner is not rows:
                return tuple(self._kernels(rows, [x, x_train], progress)[0] for x in (x_train, *tests))
            gram = _empty(rows, x_train, x_train)
            crosses = [_empty(rows, x, x_train) for x in tests]
            self._panels(rows, x_train, gram, list(zip(tests, crosses, strict=True)), progress)
            kernels = gram[0], *(cross[0] for cross in crosses)
            for kernel in kernels:
                check_finite(kernel, _DIVERGED)
        return kernels

    def diag(self, x: Arguments) -> Tensor:
        """Compute the kernel of every input with itself.

        Args:
            x: Inputs (n, ...).

        Returns:
            The diagonal of the Gram of x, (n,), or (n, C, C) with ``full``.

        Raises:
            TypeError: The inputs hold no tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        with self._computing(x) as (rows, (x,)):
            chunk = chunk_size(self.memory, rows, x)[0]
            makers = {rows, rows.partner}
            space = {r: rows.cotangents.new_empty(min(chunk, len(x)), r.width) for r in makers}
            values = []
            for part in x.split(chunk):
                filled = {r: space[r][: len(part)] for r in makers}
                for maker, out in filled.items():
                    maker.fill(out, part)
                values += rows.contract(filled[rows], filled[rows.partner], "equal")
            diagonal = torch.cat(values)
        check_finite(diagonal, _DIVERGED, "kernel's diagonal entry", sides=1)
        return diagonal

    def matvec(self, x: Arguments, v: Tensor, x2: Arguments | None = None) -> Tensor:
        """Multiply the kernel with vectors without forming it: K(x2, x) v = J(x2) (J(x)^T v), without gradient rows.

        All k vectors go together. Chains (``nn.Sequential``, ``Residual``) of the package's and PyTorch's usual layers
        take one forward and one backward pass for both factors. Of other networks J(x)^T v is a vector-Jacobian
        product, and J(x2) d a Jacobian-vector product in forward mode where that gives the derivative of reverse mode,
        else two passes of reverse mode.

        Args:
            x: Inputs (n, ...).
            v: Vector (n,) or vectors (n, k) to multiply K(., x) with; with ``full``, (n, C) over samples and outputs.
            x2: Inputs (m, ...) of the rows, or None for x.

        Returns:
            The product, (m,) or (m, k); with ``full``, (m, C).

        Raises:
            TypeError: Inputs hold no tensor, or differ in structure.
            ValueError: Inputs or v are malformed, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients, or v, are not finite.
        """
        with self._computing(x, x2) as (rows, inputs):
            outputs = len(rows.partner.cotangents)
            if len(v) != len(inputs[0]) or v.dim() not in (1, 2) or (self.full and v.shape[1:] != (outputs,)):
                raise ValueError(
                    f"v must be {f'(n, {outputs})' if self.full else '(n,) or (n, k)'} with n = {len(inputs[0])}, "
                    f"got {tuple(v.shape)}."
                )
            product = multiply(rows, inputs, v.to(rows.cotangents), self.memory)
        check_finite(product, f"check v; {_DIVERGED}", "product's entry", sides=1)
        return product

    def extra_repr(self) -> str:
        """Show what the values depend on beside the network; processes that compute one Gram compare it."""
        settings = {
            name: getattr(self, name) for name in ("dtype", "features", "output", "output2", "full", "trainable")
        }
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())

    def sharded(self, x1: Arguments, x2: Arguments | None = None, *, progress: bool = False) -> Tensor:
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
            TypeError: Inputs hold no tensor, or differ in structure.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
            FloatingPointError: The network's outputs or gradients are not finite.
        """
        left: Any = Inputs.of(x1)  # has the length, the slices and the device of a tensor
        if x2 is None and self.output2 is None:
            return distributed_gram(self, left, progress=progress)
        return distributed_cross(self, left, cast(Any, Inputs.of(x1 if x2 is None else x2)), progress=progress)

    def features_error(self, x: Arguments) -> float:
        """Report what reduced ``features`` cost in accuracy, on a few inputs.

        Args:
            x: Inputs (n, ...); 64 are enough.

        Returns:
            The largest deviation of an entry of their Gram from that of float32 features, over the largest entry.

        Raises:
            TypeError: The inputs hold no tensor.
            ValueError: Inputs are malformed or lie elsewhere than the kernel, the network mixes samples or draws random
                numbers, or the memory budget is too small.
        """
        exact = copy.copy(self)
        exact.features = "float32"
        expected = exact(x)
        return float((self(x) - expected).abs().max() / expected.abs().max())

    @contextmanager
    def _computing(self, *sets: Arguments | None, per_layer: bool = False) -> Iterator[tuple[Rows, list[Inputs]]]:
        """Check and cast the inputs and lay out the gradients, in the precision and autograd mode that they need."""
        inputs = [Inputs.of(x) for x in sets if x is not None]
        check_inputs(inputs[0])
        for other in inputs[1:]:
            check_inputs(inputs[0], other)
        device, dtype = inputs[0].device, self.dtype or self._widest(inputs[0])
        for tensor in itertools.chain(self.net.parameters(), self.net.buffers()):
            if tensor.device != device:
                raise ValueError(
                    f"The kernel is on {tensor.device}, the inputs are on {device}: call kernel.to(x.device)."
                )
        if self.features != "float32" and dtype == torch.float64:
            raise ValueError(f"features={self.features!r} is for float32 inputs, got {dtype}: use one or the other.")
        if self.features == "tf32" and device.type != "cuda":
            raise ValueError(f'features="tf32" needs a CUDA device, the inputs are on {device}: use "float32".')
        check_modes(self.net)
        rounding: Literal["tf32", "ieee"] = "tf32" if self.features == "tf32" else "ieee"
        function = NetworkFunction(self.net, self.trainable, self.output, self.full, dtype, device)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            own_precision(device.type, rounding),
            differentiable_attention(),
            preserved(self.net),
        ):
            inputs = [x.cast(dtype) for x in inputs]
            rows = choose_rows(function, inputs, per_layer, dense=self.output2 is not None)
            if self.output2 is not None:
                second = replace(function, output=self.output2)
                rows.partner = choose_rows(second, inputs, per_layer, dense=True)
                if not self.full and len(rows.cotangents) != len(rows.partner.cotangents):
                    raise ValueError("output and output2 have different numbers of outputs: use full=True.")
            yield rows, inputs

    def _widest(self, x: Inputs) -> torch.dtype:
        """The widest precision of the parameters and the floating-point inputs, at least float32."""
        tensors = itertools.chain(self.net.parameters(), x.leaves)
        dtypes = (tensor.real.dtype for tensor in tensors if tensor.is_floating_point() or tensor.is_complex())
        return torch.float64 if any(at_least_float32(d) == torch.float64 for d in dtypes) else torch.float32

    def _kernels(self, rows: Rows, inputs: list[Inputs], progress: bool) -> list[Tensor]:
        """The kernel of one or two sets of inputs, part by part."""
        x1, x2 = inputs[0], inputs[-1]
        out = _empty(rows, x1, x2)
        if rows.partner is not rows:
            self._panels(rows, x2, None, [(x1, out)], progress)
        elif len(inputs) == 1:
            self._panels(rows, x1, out, [], progress)
        elif len(x1) < len(x2):  # the smaller set is more likely to fit, and the other is read once a panel
            self._panels(rows, x1, None, [(x2, list(map(swap, out)))], progress)
        else:
            self._panels(rows, x2, None, [(x1, out)], progress)
        for kernel in out:
            check_finite(kernel, _DIVERGED)
        return out

    def _panels(
        self,
        rows: Rows,
        x: Inputs,
        grams: list[Tensor] | None,
        crosses: Sequence[tuple[Inputs, list[Tensor]]],
        progress: bool,
    ) -> None:
        """Fill the Grams of x, and for every (x', out) the kernels of x' with x, one panel of gradients of x at a time.

        Gradients of a panel stay; all others are made anew for every panel, one block at a time. The Gram of panels P1
        to P3 of two blocks each is filled in this order, and its lower half is the transpose:

                 P1    P2    P3
            P1 | 1 1 | 3 4 | 5 6      1, 2: each block of P1 with itself and what is right of it in P1
               |   2 | 3 4 | 5 6      3 to 6: blocks of P2 and P3, made anew, with all of P1
            P2 |     | 7 7 | ...      7: the first block of P2 with all of P2, and so on
        """
        n, half = len(x), self.features == "bfloat16"
        kept = torch.bfloat16 if half else rows.function.dtype
        num_others = sum(len(other) for other, _ in crosses)
        for maker in {rows, rows.partner}:
            maker.kept = kept
        if rows.partner is rows:
            rows, plan = choose_plan(self.memory, rows, x, num_others, half, gram=grams is not None)
        else:
            plans = [divide(self.memory, r, x, num_others, half) for r in (rows, rows.partner)]
            plan = min(plans, key=lambda p: (p.panel, p.chunk))
        rows.scratch = plan.scratch
        if plan.together:
            self._together(rows, plan, x, grams, crosses, progress)
            return
        panel_rows = torch.empty(plan.panel, rows.partner.width, dtype=kept, device=x.device)
        block_size = plan.block if crosses or plan.panel < n else 0
        block_rows = torch.empty(block_size, rows.width, dtype=kept, device=x.device)
        starts = range(0, n, plan.panel)
        total = sum((n - s if grams is not None else min(plan.panel, n - s)) + num_others for s in starts)
        with progress_bar("empirical NTK", total, "samples", enabled=progress) as advance:

            def fill(out: Tensor, inputs: Inputs, maker: Rows = rows) -> Tensor:
                for i in range(0, len(inputs), plan.chunk):
                    part = inputs[i : i + plan.chunk]
                    maker.fill(out[i : i + len(part)], part)
                    advance(len(part))
                return out[: len(inputs)]

            for start in starts:
                stop = min(start + plan.panel, n)
                panel = fill(panel_rows, x[start:stop], rows.partner)
                if grams is not None:
                    for i in range(start, stop, plan.block):  # within the panel: the block and all to its right
                        j = min(i + plan.block, stop)
                        products = rows.contract(panel[i - start : j - start], panel[i - start :])
                        for gram, product in zip(grams, products, strict=True):
                            square = product[:, : j - i]
                            square.copy_((square + swap(square)) / 2)
                            gram[i:j, i:stop] = product
                            gram[j:stop, i:j] = swap(product[:, j - i :])
                    for i in range(stop, n, plan.block):  # later panels' samples with this panel
                        j = min(i + plan.block, n)
                        products = rows.contract(fill(block_rows, x[i:j]), panel)
                        for gram, product in zip(grams, products, strict=True):
                            gram[i:j, start:stop] = product
                            gram[start:stop, i:j] = swap(product)
                for other, outs in crosses:
                    for i in range(0, len(other), plan.block):
                        block = fill(block_rows, other[i : i + plan.block])
                        for out, product in zip(outs, rows.contract(block, panel), strict=True):
                            out[i : i + len(block), start:stop] = product

    def _together(
        self,
        rows: Rows,
        plan: Plan,
        x: Inputs,
        grams: list[Tensor] | None,
        crosses: Sequence[tuple[Inputs, list[Tensor]]],
        progress: bool,
    ) -> None:
        """Fill the same from rows that hold layers' inputs and cotangents, all of them at once."""
        # The rows of x come first, so that their gradients, which multiply all others, are formed once.
        parts, results = [x, *(other for other, _ in crosses)], [grams, *(out for _, out in crosses)]
        kept = torch.empty(sum(map(len, parts)), rows.width, dtype=rows.kept, device=x.device)
        with progress_bar("empirical NTK", len(kept), "samples", enabled=progress) as advance:
            start = 0
            for part in itertools.chain.from_iterable(part.split(plan.chunk) for part in parts):
                rows.fill(kept[start : start + len(part)], part)
                start += len(part)
                advance(len(part))
        n = len(x)
        for k, product in enumerate(rows.contract(kept if grams is not None else kept[n:], kept[:n])):
            pieces = product.split([n, *map(len, parts[1:])] if grams is not None else list(map(len, parts[1:])))
            for out, piece in zip(results if grams is not None else results[1:], pieces, strict=True):
                assert out is not None
                out[k].copy_(piece)
            if grams is not None:
                grams[k].copy_((grams[k] + swap(grams[k])) / 2)


def _empty(rows: Rows, x1: Inputs, x2: Inputs) -> list[Tensor]:
    """Kernels to be filled, (n1, n2) or (n1, n2, C, C), one a part."""
    outputs = (len(rows.cotangents), len(rows.partner.cotangents)) if rows.full else ()
    return [rows.cotangents.new_empty(len(x1), len(x2), *outputs) for _ in rows.parts]
