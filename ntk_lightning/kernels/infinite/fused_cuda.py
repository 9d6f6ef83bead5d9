r"""Infinite-width kernels of convolutional networks on CUDA: offset planes in Triton.

With x' = x + dx and y' = y + dy (mod W, H) the covariance of a pair of images is K[dy, y, dx, x]; a zero-padded 3x3
convolution is a circular box filter over y and x that is cut where y, y', x or x' wraps. One launch runs one level
(all convolutions and activations between two poolings) of a block of pairs:

- A lane is one (pair, dy, dx) and walks down y. Its registers hold a chunk of x of the newest row and, for every
  convolution, the two rows it still needs, so no covariance of a level is ever stored, not even in shared memory: the
  filter over x is additions of registers, the one over y a recurrence. (As matrix products with band matrices the
  filter would be some 128 flops an entry instead of 6; through shared memory, six loads and two barriers a row.)
  Interior edges of chunks are computed twice, a column an edge and convolution: the first level of Myrtle-5 is 145,
  115 or 104 instructions an entry of sm_90 code in 68, 136 or 255 registers with chunks of 4, 8 or 16 columns.
- The lanes of one (pair, dy) are neighbours in a warp, so loads of the second image are contiguous, those of the first
  are broadcast, and pooling over x, which adds odd offsets to their even neighbours, is two warp shuffles.
- A level ends by storing its sums over x; the next one adds rows and neighbouring dy on loading. That is 2 MB a pair at
  32x32, written once and read once; no atomics, hence the same bits on every run.
- Images and standard deviations are extended circularly, so offsets never wrap and addresses are immediate.

Computing is in float32. An NTK needs sqrt(1 - r) of correlations r, so pairs of nearly equal, not equal images run in
float64, and so do images so bright that an ``Erf`` is nearly a step. Inputs in float64 raise: ``backend="auto"`` has to
take the reference for them. Import this module lazily: Triton exists on Linux only. The first Gram of an architecture
compiles for up to a minute or so; Triton keeps the result on disk. ``TRITON_INTERPRET=1`` runs the kernel on tensors in
main memory.

Longer than 300 lines, since the launches, their buffers and the second pass of close pairs share one plan.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ntk_lightning.kernels.infinite.activations import Activation
from ntk_lightning.kernels.infinite.architecture import Layer
from ntk_lightning.kernels.infinite.fused import Plan, finish, near_duplicates, pixel_variances, plan, saturates, window
from ntk_lightning.kernels.infinite.fused_cuda_triton import level

__all__ = ["Tiling", "compile_levels", "diag", "gram"]

_BATCH_PAIRS = 2**14
_NEAR = 5e-2  # distance of two images of unit norm below which float32 loses their correlations' distance from one
_DOUBLE_PAIRS = 2**8


@dataclass(frozen=True)
class Tiling:
    """How a level is spread over the device.

    Args:
        columns: Pixels of a row that one lane holds, at most; half as many in the levels that lie above the first: they
            have less work to fill the device with, and the time to compile grows faster than quadratically.
        warps: Warps of a program.
        workspace_bytes: Memory for the sums between levels; it sets how many pairs one launch takes.
    """

    columns: int = 8
    warps: int = 1
    workspace_bytes: int = 2**27


@dataclass(frozen=True)
class _Launch:
    """One level: the constants of its kernel and the shape of its output for one pair."""

    constants: dict[str, Any]
    shape: tuple[int, ...]


def gram(
    layers: Sequence[Layer],
    kind: str,
    x1: Tensor,
    x2: Tensor | None,
    advance: Callable[[int], None],
    tiling: Tiling = Tiling(),
) -> Tensor:
    """Compute the Gram matrix of images.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        x1: Images (n1, C, H, W), float32, on a CUDA device.
        x2: Images (n2, C, H, W), or None for the symmetric Gram of x1, of which one half is computed.
        advance: Called with the number of entries just finished.
        tiling: How to spread the work over the device.

    Returns:
        The kernel of all pairs, (n1, n2), float32.

    Raises:
        ValueError: The images are not float32, or not on a CUDA device.
    """
    work, symmetric = _Work(layers, kind, x1, tiling), x2 is None
    x2 = x1 if x2 is None else x2
    out = x1.new_empty(len(x1), len(x2))
    if saturates(layers, x1) or saturates(layers, x2):
        x1, x2 = x1.double(), x2.double()
    with torch.cuda.device_of(x1):
        tables1 = work.tables(x1)
        tables2 = tables1 if symmetric else work.tables(x2)
        variance1 = work.head_variances(tables1)
        variance2 = variance1 if symmetric else work.head_variances(tables2)
        rows = torch.arange(len(x1), device=x1.device)
        ends = (len(x2) - symmetric * rows).cumsum(0)  # of the rows, in the list of all pairs
        pairs = int(ends[-1])
        for begin in range(0, pairs, work.batch):
            index = torch.arange(begin, min(begin + work.batch, pairs), device=x1.device)
            i = torch.searchsorted(ends, index, right=True)
            j = len(x2) - ends[i] + index
            out[i, j] = work.kernel(tables1, tables2, variance1, variance2, i, j)
            if symmetric:
                out[j, i] = out[i, j]
            advance(len(index) + symmetric * int((i != j).sum()))  # waits for the device, so the progress is real
        for row, near in near_duplicates(x1, x2, _NEAR) if kind == "ntk" and x1.dtype == torch.float32 else ():
            near = near[near > row] if symmetric else near
            for part in near.split(_DOUBLE_PAIRS) if len(near) else ():
                tables1, tables2 = work.tables(x1[row : row + 1].double()), work.tables(x2[part].double())
                variance1, variance2 = work.head_variances(tables1), work.head_variances(tables2)
                j = torch.arange(len(part), device=x1.device)
                out[row, part] = work.kernel(tables1, tables2, variance1, variance2, 0 * j, j)
                if symmetric:
                    out[part, row] = out[row, part]
    return out


def diag(layers: Sequence[Layer], kind: str, x: Tensor, tiling: Tiling = Tiling()) -> Tensor:
    """Compute the kernel of every image with itself.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        x: Images (n, C, H, W), float32, on a CUDA device.
        tiling: How to spread the work over the device.

    Returns:
        The diagonal of the Gram of x, (n,), float32.

    Raises:
        ValueError: The images are not float32, or not on a CUDA device.
    """
    work = _Work(layers, kind, x, tiling)
    with torch.cuda.device_of(x):
        means = work.selves(work.tables(x.double() if saturates(layers, x) else x))
        nngp, ntk = means[:, :1], means[:, -1:]
        return finish(work.network.head, kind, nngp, ntk, nngp[:, 0], nngp)[:, 0].float()


def compile_levels(
    layers: Sequence[Layer],
    kind: str,
    shape: tuple[int, int, int],
    tiling: Tiling = Tiling(),
    double: bool = False,
    capability: int = 90,
) -> list[dict[str, int]]:
    """Compile the kernel of every level, without a device, and tell what it needs of one.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.infinite.fused.unsupported`.
        kind: "ntk" or "nngp".
        shape: (C, H, W) of the images.
        tiling: As for :func:`gram`.
        double: Compile what runs pairs of nearly equal images.
        capability: Compute capability of the device, times ten.

    Returns:
        For each level its "registers" a thread, "shared" memory in bytes and "spilled" bytes a thread.
    """
    types = dict.fromkeys(("left", "right", "below", "out"), "*fp64" if double else "*fp32")
    types |= dict.fromkeys(("index1", "index2"), "*i32") | dict.fromkeys(("first", "pairs"), "i32")
    aligned = {(position,): [["tt.divisibility", 16]] for position in range(6)}
    reports = []
    for launch in _launches(plan(layers), kind, shape, tiling):
        source = ASTSource(level, types | dict.fromkeys(launch.constants, "constexpr"), launch.constants, aligned)
        target = GPUTarget("cuda", capability, 32)
        kernel = triton.compile(source, target=target, options=_options(tiling))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            report = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
        reports.append(
            {"registers": usage["REG"], "shared": usage["SHARED"], "spilled": usage["STACK"] + usage["LOCAL"]}
        )
    return reports


def _options(tiling: Tiling) -> dict[str, Any]:
    return {"num_warps": tiling.warps, "num_stages": 1, "enable_fp_fusion": True}


class _Work:
    """A network at one size of images: its launches, and what runs them."""

    def __init__(self, layers: Sequence[Layer], kind: str, x: Tensor, tiling: Tiling) -> None:
        if x.dtype != torch.float32:
            raise ValueError(
                f'The CUDA kernel computes in float32, got {x.dtype}: use backend="reference" or .float().'
            )
        if not x.is_cuda and not triton.knobs.runtime.interpret:
            raise ValueError(f'backend="cuda" needs images on a CUDA device, got {x.device}: call .cuda() first.')
        self.layers, self.kind, self.network, self.tiling = layers, kind, plan(layers), tiling
        self.launches = _launches(self.network, kind, tuple(x.shape[1:]), tiling)
        self.batch = max(1, min(_BATCH_PAIRS, tiling.workspace_bytes // (4 * math.prod(self.launches[-1].shape))))
        self.head_is_active = any(isinstance(layer, Activation) for layer in self.network.head)

    def tables(self, x: Tensor) -> list[Tensor]:
        """For each level (n, PLANES, H, EXTENT): the images, then what the activations need of their variances."""
        variances, tables = iter(pixel_variances(self.layers, x)), list[Tensor]()
        for convolutions, launch in zip(self.network.levels, self.launches, strict=True):
            height, width = launch.constants["H"], launch.constants["W"]
            planes = [x.new_empty(len(x), 0, height, width) if tables else x]
            for convolution in convolutions:
                match convolution.activation:
                    case Activation("relu"):
                        deviation = next(variances).sqrt()
                        planes.append(torch.stack([deviation, torch.where(deviation > 0, 1 / deviation, 0)], 1))
                    case Activation("erf"):
                        planes.append((1 / (0.5 + next(variances))).sqrt()[:, None].expand(-1, 2, -1, -1))
                    case Activation("gelu"):
                        variance = next(variances)
                        planes.append(torch.stack([variance, (1 + variance).rsqrt()], 1))
                    case Activation(name):
                        raise NotImplementedError(f"The CUDA kernel has no activation {name!r}.")
            extent = launch.constants["CHUNKS"] * launch.constants["COLUMNS"] + 2 * len(convolutions) + width
            columns = (torch.arange(extent, device=x.device) - len(convolutions)) % width
            tables.append(torch.cat([plane.to(x.dtype) for plane in planes], 1)[..., columns].contiguous())
        return tables

    def means(self, tables1: list[Tensor], tables2: list[Tensor], index1: Tensor, index2: Tensor) -> Tensor:
        """NNGP, and NTK if asked for, of pairs of images after the mean over pixels, (pairs, 1 or 2) in float64."""
        pair_bytes = [4 * math.prod(launch.shape) for launch in self.launches[:-1]]
        block = max(1, min(len(index1), self.tiling.workspace_bytes // max(pair_bytes, default=1)))
        buffers = [tables1[0].new_empty(block, *launch.shape) for launch in self.launches[:-1]]
        buffers.append(tables1[0].new_empty(len(index1), *self.launches[-1].shape))
        indices = index1.int(), index2.int()
        for first in range(0, len(index1), block):
            pairs, below = min(block, len(index1) - first), buffers[0]
            for launch, left, right, out in zip(self.launches, tables1, tables2, buffers, strict=True):
                grid = triton.cdiv(pairs * launch.shape[0], launch.constants["GROUPS"]), launch.constants["CHUNKS"]
                arguments = left, right, below, out, *indices, first, pairs
                level[grid](*arguments, **launch.constants, **_options(self.tiling))
                below = out
        pixels = self.launches[-1].constants["H"] * self.launches[-1].constants["W"]
        means: Tensor = buffers[-1].double().sum((1, 2, 4)) / (pixels if self.network.flat else pixels**2)
        return means

    def selves(self, tables: list[Tensor]) -> Tensor:
        """The same as `means` of every image with itself."""
        same = torch.arange(len(tables[0]), device=tables[0].device)
        return torch.cat([self.means(tables, tables, i, i) for i in same.split(self.batch)])

    def head_variances(self, tables: list[Tensor]) -> Tensor:
        """NNGP of every image with itself before the head, (n,) in float64; zeros where the head does not need it."""
        return self.selves(tables)[:, 0] if self.head_is_active else tables[0].new_zeros(len(tables[0]))

    def kernel(
        self,
        tables1: list[Tensor],
        tables2: list[Tensor],
        variance1: Tensor,
        variance2: Tensor,
        index1: Tensor,
        index2: Tensor,
    ) -> Tensor:
        """The kernel of pairs of images, (pairs,) in float32."""
        means = self.means(tables1, tables2, index1, index2)
        nngp, ntk = means[:, :1], means[:, -1:]
        head = self.network.head
        return finish(head, self.kind, nngp, ntk, variance1[index1], variance2[index2, None])[:, 0].float()


def _launches(network: Plan, kind: str, shape: tuple[int, ...], tiling: Tiling) -> list[_Launch]:
    """Plan the levels."""
    channels, height, width = shape
    last, launches, below = len(network.levels) - 1, list[_Launch](), (1, 0)
    for number, convolutions in enumerate(network.levels):
        reach, next_reach = (window(n, last) if network.flat else None for n in (number, number + 1))
        dy, dx, next_dx = _offsets(height, reach), _offsets(width, reach), _offsets(width // 2, next_reach)
        pool, tensors = number < last, 1 + (kind == "ntk")
        columns = triton.cdiv(width, triton.cdiv(width, tiling.columns if number == 0 else max(2, tiling.columns // 2)))
        columns += pool * columns % 2
        chunks, lanes = triton.cdiv(width, columns), triton.next_power_of_2(dx[0])
        active = [convolution.activation is not None for convolution in convolutions]
        images = 0 if number else channels
        constants = {
            "WEIGHTS": tuple(convolution.weight_variance for convolution in convolutions),
            "BIASES": tuple(convolution.bias_variance for convolution in convolutions),
            "NAMES": tuple(
                convolution.activation.name if convolution.activation else "linear" for convolution in convolutions
            ),
            "SLOPES": tuple(
                convolution.activation.negative_slope if convolution.activation else 0.0 for convolution in convolutions
            ),
            "TABLES": tuple(images + 2 * sum(active[:s]) for s in range(len(convolutions))),
            "NTK": kind == "ntk",
            "POOL": pool,
            "CHANNELS": images,
            "PLANES": images + 2 * sum(active),
            **{"H": height, "W": width, "DY_COUNT": dy[0], "DY_RADIUS": dy[1], "DX_COUNT": dx[0], "DX_RADIUS": dx[1]},
            **{"BELOW_DY_COUNT": below[0], "BELOW_DY_RADIUS": below[1]},
            **{"NEXT_DX_COUNT": next_dx[0], "NEXT_DX_RADIUS": next_dx[1]},
            **{"COLUMNS": columns, "CHUNKS": chunks, "LANES": lanes, "GROUPS": max(1, 32 * tiling.warps // lanes)},
        }
        out = (height, width // 2, tensors, next_dx[0]) if pool else (chunks, tensors, dx[0])
        launches.append(_Launch(constants, (dy[0], *out)))
        height, width, below = height // 2, width // 2, dy
    return launches


def _offsets(side: int, reach: int | None) -> tuple[int, int]:
    """Number of offsets in one direction, and the radius where they are not all offsets of the circle."""
    return (side, 0) if reach is None or 2 * reach + 1 >= side else (2 * reach + 1, reach)
