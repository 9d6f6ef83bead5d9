"""Kernels of many finite networks at initialization: what an infinite-width kernel is checked against."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn.parameter import is_lazy

from ntk_lightning.kernels.checks import check_finite, check_inputs
from ntk_lightning.kernels.empirical.empirical_ntk import EmpiricalNTK
from ntk_lightning.kernels.empirical.memory_plan import parse_bytes
from ntk_lightning.kernels.empirical.network_state import Weights, copy_network, functional_call, usable
from ntk_lightning.kernels.empirical.sample_independence import agree, check_modes
from ntk_lightning.kernels.empirical.standard_layers import is_standard
from ntk_lightning.networks.widen import redraw, widened
from ntk_lightning.precision import at_least_float32, own_precision
from ntk_lightning.whole_number import check_size, is_whole

__all__ = ["monte_carlo"]

_log = logging.getLogger(__name__)


def monte_carlo(
    net: nn.Module,
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    kind: Literal["ntk", "nngp"] = "ntk",
    seeds: int | Iterable[int] = 32,
    width_factor: int = 1,
    memory: str | int = "1GB",
) -> tuple[Tensor, Tensor]:
    """Mean kernel of finite networks at initialization, and its standard error.

    With f_s the network with weights drawn by seed s, of S seeds, and C outputs, the kernels are

        K_s(x, x') = 1/C sum_c <grad f_sc(x), grad f_sc(x')>  (NTK)  or  1/C sum_c f_sc(x) f_sc(x')  (NNGP),

    and the results are their mean over s, and their standard deviation over sqrt(S). At growing width the mean
    approaches the kernel k of :class:`~ntk_lightning.kernels.InfiniteNTK`, to about 1 / width (Novak et al., 2019,
    arXiv 1810.05148): (mean - k) / error should be a few at most.

    Every parameter is drawn by ``reset_parameters`` of the module that owns it, or of one that contains it. An
    initialization that a network does elsewhere, in its constructor say, is not seen.

    Args:
        net: Maps (n, ...) to (n,) or (n, C). It is left as it is. Frozen parameters are drawn, but not differentiated.
            Dropout in training mode draws a mask for every network and sample.
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...), or None for x1.
        kind: ``"ntk"`` or ``"nngp"``.
        seeds: How many networks, with seeds 0, 1, ...; or the seeds. A seed gives the same weights on every device.
        width_factor: Makes all hidden layers that many times wider.
        memory: Budget for the gradients of networks that are computed at once: bytes, or a string as "4GB".

    Returns:
        Mean and standard error, both (n1, n2), float64 for float64 inputs, else float32.

    Raises:
        TypeError: Inputs are not floating-point tensors, or a seed or factor is not a whole number.
        ValueError: Fewer than two seeds or one out of range, an unknown kind, a layer whose initialization or width is
            not known, no parameter to differentiate, or the network mixes samples or gives something else than outputs.
        FloatingPointError: An output or gradient is not finite.

    Example:
        >>> from ntk_lightning.networks import NTKLinear
        >>> mean, error = monte_carlo(NTKLinear(2, 1, weight_std=1.0), torch.eye(2), seeds=4)
        >>> mean, error.max()
        (tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]]), tensor(0.))
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net must be an nn.Module, got {net!r}.")
    check_inputs(x1, x2)
    check_size("width_factor", width_factor, 1)
    numbers = _check_seeds(seeds)
    if kind not in ("ntk", "nngp"):
        raise ValueError(f'kind must be "ntk" or "nngp", got {kind!r}.')
    budget = parse_bytes(memory)
    if any(is_lazy(parameter) for parameter in net.parameters()):
        raise ValueError("The sizes of some layers are not known yet: run the network once on a batch.")
    if kind == "ntk" and not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("The network has no parameter with requires_grad=True, so its NTK is empty: unfreeze some.")
    if any(parameter.is_complex() for parameter in net.parameters()):
        raise TypeError("The network has complex parameters: use EmpiricalNTK of several networks.")
    check_modes(net, dropout=False)
    dtype = at_least_float32(x1.dtype)
    with torch.inference_mode(False), torch.no_grad(), own_precision(x1.device.type), _seeded(x1.device, numbers[0]):
        x1, x2 = usable(x1, dtype), None if x2 is None else usable(x2, dtype)
        # weights are drawn on the CPU, whose generator gives the same on every machine
        made = widened(copy_network(net).to("cpu", dtype), x1[:1].cpu(), width_factor)
        kernels = torch.cat(list(_Ensemble(made, x1, x2, kind == "ntk", budget).kernels(numbers)))  # (S, n1, n2)
    check_finite(kernels, "check the scales of the network's layers, or compute in float64", "kernel of seed", sides=1)
    return kernels.mean(0), kernels.std(0) / math.sqrt(len(numbers))


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The same masks of dropout at every call, and torch's generators as they were after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _check_seeds(seeds: object) -> list[int]:
    """The seeds as a list."""
    if isinstance(seeds, Iterable) and not isinstance(seeds, str):
        numbers = list(seeds)
    else:
        check_size("seeds", seeds, 2)
        numbers = list(range(seeds if is_whole(seeds) else 0))
    if not all(is_whole(seed) for seed in numbers):
        raise TypeError(f"seeds must be how many, or whole numbers, got {seeds!r}.")
    if not all(0 <= seed < 2**63 for seed in numbers):
        raise ValueError(f"seeds must be at least 0 and less than 2^63, got {seeds!r}.")
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(f"seeds must be at least two different ones, got {seeds!r}: one has no standard error.")
    return [int(seed) for seed in numbers]


@dataclass(frozen=True)
class _Ensemble:
    """Networks of one architecture, drawn by seeds.

    Args:
        net: On the CPU; its weights are drawn anew for every seed.
        x1: Inputs (n1, ...).
        x2: Inputs (n2, ...), or None for x1.
        ntk: Whether the kernel is the NTK, else the NNGP.
        budget: Bytes for what is computed at once.
    """

    net: nn.Module
    x1: Tensor
    x2: Tensor | None
    ntk: bool
    budget: int

    def kernels(self, seeds: list[int]) -> Iterator[Tensor]:
        """Kernels (s, n1, n2), of as many seeds at once as the budget holds."""
        chunk = min(len(seeds), self.budget // max(self._nbytes(), 1))
        masks = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in self.net.modules())
        # with masks there is nothing to compare with: no two calls give the same
        if chunk and not masks and not is_standard(self.net) and not self._vmap_is_right(seeds[0]):
            chunk = 0
        for start in range(0, len(seeds), max(chunk, 1)):
            yield self._together(seeds[start : start + chunk]) if chunk else self._alone(seeds[start])[None]

    def _nbytes(self) -> int:
        """What one network needs: its weights, and for the NTK its gradients and as much again while they are made."""
        size = sum(p.numel() for p in self.net.parameters() if p.requires_grad or not self.ntk)
        rows = 1
        if self.ntk:
            with torch.no_grad():
                outputs = _outputs(self.net(self.x1[:1].cpu()), 1)
            rows = 2 * outputs.numel() * len(self._all_inputs())
        return self.x1.element_size() * size * (rows + 1)

    def _together(self, seeds: list[int]) -> Tensor:
        """Kernels (s, n1, n2) by one vmap over the seeds."""
        states = []
        for seed in seeds:
            redraw(self.net, seed)
            tensors = itertools.chain(self.net.named_parameters(), self.net.named_buffers())
            states.append({name: tensor.detach().clone() for name, tensor in tensors})
        stacked = {name: torch.stack([state[name] for state in states]).to(self.x1.device) for name in states[0]}
        names = {name for name, parameter in self.net.named_parameters() if parameter.requires_grad}
        trained = {name: value for name, value in stacked.items() if name in names}
        frozen = {name: value for name, value in stacked.items() if name not in names}
        try:
            kernels: Tensor = vmap(self._ntk if self.ntk else self._nngp, randomness="different")(trained, frozen)
        except RuntimeError as error:
            if "randomness" in str(error):
                raise ValueError(
                    f"vmap cannot draw this network's masks: call net.eval(). Its words: {error}"
                ) from error
            raise
        return kernels

    def _outputs(self, trained: Weights, frozen: Weights, x: Tensor) -> Tensor:
        """Outputs (n, C)."""
        return _outputs(functional_call(self.net, {**trained, **frozen}, (x,)), len(x))

    def _nngp(self, trained: Weights, frozen: Weights) -> Tensor:
        return self._pair(self._outputs(trained, frozen, self._all_inputs())[..., None])

    def _ntk(self, trained: Weights, frozen: Weights) -> Tensor:
        jacobian = jacrev(lambda trained, one: self._outputs(trained, frozen, one[None])[0])
        gradients = vmap(jacobian, (None, 0), randomness="different")(trained, self._all_inputs())
        return torch.stack([self._pair(g) for g in gradients.values()]).sum(0)

    def _all_inputs(self) -> Tensor:
        return self.x1 if self.x2 is None else torch.cat([self.x1, self.x2])

    def _pair(self, rows: Tensor) -> Tensor:
        """Mean over outputs of the inner products of rows (n, C, ...) of all inputs, (n1, n2)."""
        rows = rows.reshape(*rows.shape[:2], -1)
        left, right = rows[: len(self.x1)], rows[0 if self.x2 is None else len(self.x1) :]
        return torch.einsum("icp,jcp->ij", left, right) / rows.shape[1]

    def _alone(self, seed: int) -> Tensor:
        """Kernel (n1, n2) of one seed, by the package's empirical kernel."""
        redraw(self.net, seed)
        net = copy_network(self.net).to(self.x1.device)
        if self.ntk:
            kernel: Tensor = EmpiricalNTK(net, memory=self.budget)(self.x1, self.x2)
            return kernel
        state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        return self._nngp(state, {})

    def _vmap_is_right(self, seed: int) -> bool:
        """Whether vmap can do this network, and gives what plain autograd does."""
        expected = self._alone(seed)
        try:
            found = self._together([seed])[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever torch.func cannot transform, in whatever way it says so
            _log.info("The networks of %s are computed one by one: %s", type(self.net).__name__, error)
            return False
        return agree(found, expected, 1e-10, 1e-3)


def _outputs(returned: object, n: int) -> Tensor:
    """What a network returns for n samples, as (n, C)."""
    if isinstance(returned, Tensor) and returned.dim() == 0 and n == 1:  # (1, 1) without its dimensions, by squeeze()
        returned = returned.reshape(1)
    if not isinstance(returned, Tensor) or returned.dim() not in (1, 2) or len(returned) != n:
        got = f"shape {tuple(returned.shape)}" if isinstance(returned, Tensor) else type(returned).__name__
        raise ValueError(
            f"The network must map (n, ...) to (n,) or (n, outputs), {n} samples gave {got}: wrap it in a module that "
            "selects the outputs."
        )
    return returned.reshape(n, -1)
