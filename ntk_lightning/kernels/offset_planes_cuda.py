r"""Infinite-width kernels of convolutional networks on CUDA: offset planes in Triton.

With x' = x + dx and y' = y + dy (mod W, H) the covariance of a pair of images is K[dy, y, dx, x]; a zero-padded 3x3
convolution is a circular box filter over y and x that is cut where y, y', x or x' wraps. One launch runs one level
(all steps between two poolings) of a block of pairs:

- A lane is one (pair, dy, dx) and walks down y. Its registers hold a chunk of x of the newest row and, for every
  convolution, the two rows it still needs, so no covariance of a level is ever stored, not even in shared memory: the
  filter over x is additions of registers, the one over y a recurrence. (As matrix products with band matrices the
  filter would be some 128 flops an entry instead of 6; through shared memory, six loads and two barriers a row.)
  Interior edges of chunks are computed twice, a column an edge and convolution; wider chunks trade that for registers.
- The lanes of one (pair, dy) are neighbours in a warp, so loads of the second image are contiguous, those of the first
  are broadcast, and pooling over x, which adds odd offsets to their even neighbours, is two warp shuffles.
- A level ends by storing its sums over x; the next one adds rows and neighbouring dy on loading. That is 2 MB a pair at
  32x32, written once and read once; no atomics, hence the same bits on every run.
- Images and standard deviations are extended circularly, so offsets never wrap and addresses are immediate.

Computing is in float32. An NTK needs sqrt(1 - r) of correlations r, so pairs of nearly equal, not equal images run in
float64. Inputs in float64 raise: ``backend="auto"`` has to take the reference for them. Import this module lazily:
Triton exists on Linux only. ``TRITON_INTERPRET=1`` runs it on tensors in main memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ntk_lightning.kernels.layers import Activation, Layer
from ntk_lightning.kernels.offset_planes import Plan, finish, pixel_variances, plan

__all__ = ["Tiling", "compile_levels", "gram"]

_BATCH_PAIRS = 2**14
_NEAR = 1e-2  # distance of two images of unit norm below which float32 loses their correlations' distance from one
_DOUBLE_PAIRS = 2**8
_ARCCOS = tl.constexpr(  # arccos(a) / sqrt(1 - a) on [0, 1] to 2e-8, highest power first
    (
        *(-0.0012943975161761045, 0.006788052152842283, -0.017262041568756104, 0.03102188929915428),
        *(-0.05022600665688515, 0.08898942172527313, -0.21459971368312836, 1.5707963267948966),
    )
)
_ARCCOS_DOUBLE = tl.constexpr(  # to 2e-12
    (
        *(8.370320263805873e-05, -0.0006440717794519807, 0.0023363405579416695, -0.00543430347156163),
        *(0.009433357976546245, -0.013691464924659792, 0.018304556062840475, -0.024296108886088182),
        *(0.03367037510622571, -0.05079189407253996, 0.0890485816918372, -0.21460183588226064, 1.570796326792771),
    )
)


@dataclass(frozen=True)
class Tiling:
    """How a level is spread over the device.

    Args:
        columns: Pixels of a row that one lane holds, at most.
        warps: Warps of a program.
        workspace_bytes: Memory for the sums between levels; it sets how many pairs one launch takes.
    """

    columns: int = 8
    warps: int = 1
    workspace_bytes: int = 2**27


@triton.jit
def _arcsin_root(r, NAMES: tl.constexpr, S: tl.constexpr):
    """Compute arcsin(r) and sqrt(1 - r^2), with arccos(a) = sqrt(1 - a) * polynomial."""
    ARCCOS: tl.constexpr = _ARCCOS if r.dtype == tl.float32 else _ARCCOS_DOUBLE
    NOISE: tl.constexpr = 4e-7 if r.dtype == tl.float32 else 1e-15
    a = tl.abs(r)
    if NAMES[S] == "relu":
        gap = tl.where(a < 1 - NOISE, 1 - a, 0.0)  # the square root would blow up the rounding of r = 1
    else:
        gap = tl.maximum(1 - a, NOISE)  # divided by; this small by rounding only
    polynomial = ARCCOS[0]
    for n in tl.static_range(1, 8 if r.dtype == tl.float32 else 13):
        polynomial = ARCCOS[n] + a * polynomial
    arcsin = 1.5707963267948966 - tl.sqrt(gap) * polynomial
    return tl.where(r < 0, -arcsin, arcsin), tl.sqrt(gap * (1 + a))


@triton.jit
def _dual_activation(k, a, inverse1, inverse2, NAMES: tl.constexpr, SLOPES: tl.constexpr, S: tl.constexpr):
    """Compute E[phi(u) phi(v)] and E[phi'(u) phi'(v)]: reference.dual_activation given the tables of `_tables`."""
    inverse = inverse1 * inverse2
    arcsin, root = _arcsin_root(k * inverse, NAMES, S)
    if NAMES[S] == "relu":
        even: tl.constexpr = (1 - SLOPES[S]) * (1 - SLOPES[S]) / 4 * 0.6366197723675814
        odd: tl.constexpr = (1 + SLOPES[S]) * (1 + SLOPES[S]) / 4
        nngp = odd * k + even * (a * root + k * arcsin)
        derivative = odd + even * arcsin
    elif NAMES[S] == "erf":
        nngp = arcsin * 0.6366197723675814
        derivative = inverse / root * 0.6366197723675814
    else:
        orthant = 0.25 + arcsin * 0.15915494309189535
        density = inverse / root * 0.15915494309189535
        tilt = k * (inverse1 * inverse1 + inverse2 * inverse2)
        nngp = density * (a + k * (tilt - k)) + k * orthant
        derivative = orthant + density * (tilt + k * (inverse / root) * (inverse / root))
    return nngp, derivative


@triton.jit
def _box(row, sums, previous, links, keep, FIRST_LINK: tl.constexpr):
    """Take in a row and give the 3x3 sums of the one before it, two columns narrower, and the new state."""
    out, new_sums, new_previous = (), (), ()
    for k in tl.static_range(len(row) - 2):
        h = row[k + 1] + links[FIRST_LINK + k] * row[k] + links[FIRST_LINK + k + 1] * row[k + 2]
        out = out + (sums[k] + keep * h,)
        new_sums = new_sums + (h + keep * previous[k],)
        new_previous = new_previous + (h,)
    return out, new_sums, new_previous


@triton.jit
def _constant_row(value, WIDTH: tl.constexpr):
    """Repeat one tensor."""
    row = ()
    for _ in tl.static_range(WIDTH):
        row = row + (value,)
    return row


@triton.jit
def _image_row(image1, image2, CHANNELS: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr):
    """Mean over channels of the products of two rows of pixels."""
    row = ()
    for k in tl.static_range(WIDTH):
        total = tl.load(image1 + k) * tl.load(image2 + k)
        for channel in tl.static_range(1, CHANNELS):
            total += tl.load(image1 + channel * PLANE + k) * tl.load(image2 + channel * PLANE + k)
        row = row + (total * (1.0 / CHANNELS),)
    return row


@triton.jit
def _pooled_row(below, dy, y, start, H, W, STRIDE, DY_COUNT, STEPS, WIDTH: tl.constexpr):
    """Sum over the four (dy, y) of the level below that make a row of this one, divided by the entries of its pools."""
    row1 = below + ((dy + DY_COUNT) % DY_COUNT * 2 * H + 2 * y) * W * STRIDE
    row2 = below + ((dy + DY_COUNT + 1) % DY_COUNT * 2 * H + 2 * y) * W * STRIDE
    row3 = below + ((dy + DY_COUNT - 1) % DY_COUNT * 2 * H + 2 * y + 1) * W * STRIDE
    row = ()
    for k in tl.static_range(WIDTH):
        x = (start + k + (W - 1) * STEPS) % W * STRIDE
        total = tl.load(row1 + x) + tl.load(row1 + W * STRIDE + x) + tl.load(row2 + x) + tl.load(row3 + x)
        row = row + (total * 0.0625,)
    return row


@triton.jit(do_not_specialize=["first", "pairs"])
def _level(
    left,
    right,
    below,
    out,
    index1,
    index2,
    first,
    pairs,
    WEIGHTS: tl.constexpr,  # of the steps, like the next four
    BIASES: tl.constexpr,
    NAMES: tl.constexpr,
    SLOPES: tl.constexpr,
    TABLES: tl.constexpr,  # their first planes
    NTK: tl.constexpr,
    POOL: tl.constexpr,  # a level follows
    CHANNELS: tl.constexpr,  # of the images; 0 where a level lies below
    PLANES: tl.constexpr,  # rows of `left` and `right`: channels, then two tables an activation
    H: tl.constexpr,
    W: tl.constexpr,
    DY_COUNT: tl.constexpr,
    DY_RADIUS: tl.constexpr,
    DX_COUNT: tl.constexpr,
    DX_RADIUS: tl.constexpr,
    BELOW_DY_COUNT: tl.constexpr,
    BELOW_DY_RADIUS: tl.constexpr,
    NEXT_DX_COUNT: tl.constexpr,
    NEXT_DX_RADIUS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LANES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Run one level: GROUPS (pair, dy), all their dx, COLUMNS of x; indices beyond an end repeat the last, unstored."""
    STEPS: tl.constexpr = len(NAMES)
    TENSORS: tl.constexpr = 2 if NTK else 1
    EXTENT: tl.constexpr = CHUNKS * COLUMNS + 2 * STEPS + W
    PLANE: tl.constexpr = H * EXTENT
    STRIDE: tl.constexpr = TENSORS * DX_COUNT
    WIDTH: tl.constexpr = COLUMNS + 2 * STEPS
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    valid = (group < pairs * DY_COUNT) & (lane < DX_COUNT)
    group = tl.minimum(group, pairs * DY_COUNT - 1) + 0 * lane
    lane = tl.minimum(lane, DX_COUNT - 1) + 0 * group
    start = tl.program_id(1) * COLUMNS + 0 * lane
    pair, dy_index = group // DY_COUNT, group % DY_COUNT
    dy = (dy_index - DY_RADIUS + H) % H
    dx = (lane - DX_RADIUS + W) % W
    image1 = left + tl.load(index1 + first + pair).to(tl.int64) * (PLANES * PLANE) + start
    image2 = right + tl.load(index2 + first + pair).to(tl.int64) * (PLANES * PLANE) + start + dx
    below += pair.to(tl.int64) * (BELOW_DY_COUNT * 2 * H * W * STRIDE) + lane
    zero = tl.full((GROUPS, LANES), 0.0, left.dtype.element_ty)

    links = ()  # 0 between columns k and k + 1 where x or x' wraps, else 1
    for k in tl.static_range(WIDTH - 1):
        x = (start + k + 1 + (W - 1) * STEPS) % W
        links = links + (tl.where((x != 0) & ((x + dx) % W != 0), 1.0, 0.0),)
    states = ()  # of each step: of its NNGP, then of its NTK, the sum of the last two rows and the last one
    for s in tl.static_range(STEPS):
        rows = _constant_row(zero, WIDTH - 2 * s - 2)
        second = _constant_row(zero, WIDTH - 2 * s - 2 if NTK and (s > 0 or CHANNELS == 0) else 0)
        states = states + (rows, rows, second, second)
    total_nngp, total_ntk = zero, zero

    for t in range(H + STEPS):
        y = t % H
        if CHANNELS > 0:
            nngp = _image_row(image1 + y * EXTENT, image2 + (t + dy) % H * EXTENT, CHANNELS, PLANE, WIDTH)
            ntk = _constant_row(zero, WIDTH)
        else:
            e = 2 * (dy_index - DY_RADIUS) + BELOW_DY_RADIUS
            nngp = _pooled_row(below, e, y, start, H, W, STRIDE, BELOW_DY_COUNT, STEPS, WIDTH)
            ntk = nngp
            if NTK:
                ntk = _pooled_row(below + DX_COUNT, e, y, start, H, W, STRIDE, BELOW_DY_COUNT, STEPS, WIDTH)
        new_states = ()
        for s in tl.static_range(STEPS):
            y = t + STEPS * H - s  # of the row that comes in
            keep = tl.where((y % H != 0) & ((y + dy) % H != 0), 1.0, 0.0)
            boxed, sums, previous = _box(nngp, states[4 * s], states[4 * s + 1], links, keep, s)
            new_states = new_states + (sums, previous)
            nngp = ()
            for k in tl.static_range(len(boxed)):
                nngp = nngp + (WEIGHTS[s] * boxed[k] + BIASES[s],)
            if NTK and (s > 0 or CHANNELS == 0):
                boxed, sums, previous = _box(ntk, states[4 * s + 2], states[4 * s + 3], links, keep, s)
                new_states = new_states + (sums, previous)
                ntk = ()
                for k in tl.static_range(len(boxed)):
                    ntk = ntk + (WEIGHTS[s] * boxed[k] + nngp[k],)
            else:
                new_states = new_states + ((), ())
                ntk = nngp
            if NAMES[s] != "linear":
                row1 = image1 + TABLES[s] * PLANE + (y - 1) % H * EXTENT + s + 1
                row2 = image2 + TABLES[s] * PLANE + (y - 1 + dy) % H * EXTENT + s + 1
                new_nngp, new_ntk = (), ()
                for k in tl.static_range(len(boxed)):
                    a = tl.load(row1 + k) * tl.load(row2 + k)
                    inverse1, inverse2 = tl.load(row1 + PLANE + k), tl.load(row2 + PLANE + k)
                    value, derivative = _dual_activation(nngp[k], a, inverse1, inverse2, NAMES, SLOPES, s)
                    new_nngp = new_nngp + (value,)
                    new_ntk = new_ntk + (derivative * ntk[k],)
                nngp, ntk = new_nngp, new_ntk
        states = new_states

        row = t - STEPS + 0 * lane
        if POOL:
            OUT_STRIDE: tl.constexpr = TENSORS * NEXT_DX_COUNT
            next_dx = (dx // 2 + NEXT_DX_RADIUS) % (W // 2)
            target = out + (pair.to(tl.int64) * DY_COUNT + dy_index) * (H * (W // 2) * OUT_STRIDE) + next_dx
            stored = valid & (row >= 0) & (dx % 2 == 0) & (next_dx < NEXT_DX_COUNT)
            for k in tl.static_range(0, COLUMNS, 2):
                cell = target + (row * (W // 2) + (start + k) // 2) * OUT_STRIDE
                inside = stored & (start + k < W)
                tl.store(cell, _pool_x(nngp[k], nngp[k + 1], lane, DX_COUNT), mask=inside)
                if NTK:
                    tl.store(cell + NEXT_DX_COUNT, _pool_x(ntk[k], ntk[k + 1], lane, DX_COUNT), mask=inside)
        else:
            for k in tl.static_range(COLUMNS):
                inside = (row >= 0) & (start + k < W)
                total_nngp += tl.where(inside, nngp[k], 0.0)
                total_ntk += tl.where(inside, ntk[k], 0.0)

    if not POOL:
        target = out + ((first + pair).to(tl.int64) * DY_COUNT + dy_index) * (CHUNKS * STRIDE)
        target += tl.program_id(1) * STRIDE + lane
        tl.store(target, total_nngp, mask=valid)
        if NTK:
            tl.store(target + DX_COUNT, total_ntk, mask=valid)


@triton.jit
def _pool_x(a, b, lane, DX_COUNT: tl.constexpr):
    """Sum the 2x2 pixels (x, x') of a block, in the lanes of even dx: a at x even and b at x odd."""
    return a + b + tl.gather(a, (lane + 1) % DX_COUNT, 1) + tl.gather(b, (lane + DX_COUNT - 1) % DX_COUNT, 1)


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
    tiling: Tiling = Tiling(),  # noqa: B008 (immutable)
) -> Tensor:
    """Compute the Gram matrix of images.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.offset_planes.unsupported`.
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
    if x1.dtype != torch.float32:
        raise ValueError(f'The CUDA kernel computes in float32, got {x1.dtype}: use backend="reference" or .float().')
    if not x1.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f'backend="cuda" needs images on a CUDA device, got {x1.device}: call .cuda() first.')
    network, symmetric = plan(layers), x2 is None
    launches = _launches(network, kind, tuple(x1.shape[1:]), tiling)
    x2 = x1 if x2 is None else x2
    with torch.cuda.device_of(x1):
        tables1 = _tables(layers, network, launches, x1)
        tables2 = tables1 if symmetric else _tables(layers, network, launches, x2)
        variance1 = _variances(network, launches, tables1, len(x1), tiling)
        variance2 = _variances(network, launches, tables2, len(x2), tiling)
        unit1, unit2 = F.normalize(x1.flatten(1)), F.normalize(x2.flatten(1))
        out = x1.new_empty(len(x1), len(x2))
        rows = torch.arange(len(x1), device=x1.device)
        ends = (len(x2) - symmetric * rows).cumsum(0)  # of the rows, in the list of all pairs
        for index in torch.arange(int(ends[-1]), device=x1.device).split(_batch(launches, tiling)):
            i = torch.searchsorted(ends, index, right=True)
            j = len(x2) - ends[i] + index
            means = _means(network, launches, tables1, tables2, i, j, tiling)
            above, below = int(i[0]), int(i[-1]) + 1
            distances = torch.cdist(unit1[above:below], unit2, compute_mode="donot_use_mm_for_euclid_dist")
            near = distances[i - above, j]
            for part in ((near > 0) & (near < _NEAR)).nonzero()[:, 0].split(_DOUBLE_PAIRS):
                images = x1[i[part]].double(), x2[j[part]].double()
                doubles = [_tables(layers, network, launches, x) for x in images]
                same = torch.arange(len(part), device=x1.device)
                for mean, exact in zip(means, _means(network, launches, *doubles, same, same, tiling), strict=True):
                    mean[part] = exact
            columns = [mean[:, None] for mean in (means[0], means[-1])]
            result = finish(network.head, kind, *columns, variance1[i], variance2[j, None])[:, 0].float()
            out[i, j] = result
            if symmetric:
                out[j, i] = result
            advance(len(index) + symmetric * int((i != j).sum()))  # waits for the device, so the progress is real
    return out


def compile_levels(
    layers: Sequence[Layer], kind: str, shape: tuple[int, int, int], tiling: Tiling = Tiling(), capability: int = 90  # noqa: B008
) -> list[Any]:
    """Compile the kernel of every level without a device.

    Args:
        layers: Accepted by :func:`ntk_lightning.kernels.offset_planes.unsupported`.
        kind: "ntk" or "nngp".
        shape: (C, H, W) of the images.
        tiling: As for :func:`gram`.
        capability: Compute capability of the device, times ten.

    Returns:
        Triton's compiled kernels, with ``asm`` and ``metadata``.
    """
    types = dict.fromkeys(("left", "right", "below", "out"), "*fp32") | dict.fromkeys(("index1", "index2"), "*i32")
    types |= dict.fromkeys(("first", "pairs"), "i32")
    aligned = {(position,): [["tt.divisibility", 16]] for position in range(6)}
    return [
        triton.compile(
            ASTSource(_level, types | dict.fromkeys(launch.constants, "constexpr"), launch.constants, aligned),
            target=GPUTarget("cuda", capability, 32),
            options=_options(tiling),
        )
        for launch in _launches(plan(layers), kind, shape, tiling)
    ]


def _options(tiling: Tiling) -> dict[str, Any]:
    return {"num_warps": tiling.warps, "num_stages": 1, "enable_fp_fusion": True}


def _launches(network: Plan, kind: str, shape: tuple[int, ...], tiling: Tiling) -> list[_Launch]:
    channels, height, width = shape
    last, launches, below = len(network.levels) - 1, list[_Launch](), (1, 0)
    for number, steps in enumerate(network.levels):
        window, next_window = (network.window(n, last) if network.flat else None for n in (number, number + 1))
        dy, dx, next_dx = _offsets(height, window), _offsets(width, window), _offsets(width // 2, next_window)
        pool, tensors = number < last, 1 + (kind == "ntk")
        columns = triton.cdiv(width, triton.cdiv(width, tiling.columns))
        columns += pool * columns % 2
        chunks, lanes = triton.cdiv(width, columns), triton.next_power_of_2(dx[0])
        active = [step.activation is not None for step in steps]
        images = 0 if number else channels
        constants = {
            "WEIGHTS": tuple(step.weight_variance for step in steps),
            "BIASES": tuple(step.bias_variance for step in steps),
            "NAMES": tuple(step.activation.name if step.activation else "linear" for step in steps),
            "SLOPES": tuple(step.activation.negative_slope if step.activation else 0.0 for step in steps),
            "TABLES": tuple(images + 2 * sum(active[:s]) for s in range(len(steps))),
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


def _offsets(side: int, window: int | None) -> tuple[int, int]:
    """Number of offsets in one direction, and the radius where they are not all offsets of the circle."""
    return (side, 0) if window is None or 2 * window + 1 >= side else (2 * window + 1, window)


def _tables(layers: Sequence[Layer], network: Plan, launches: Sequence[_Launch], x: Tensor) -> list[Tensor]:
    """For each level (n, PLANES, H, EXTENT): the images, then what an activation needs of the variances of its pixels."""
    variances, tables = iter(pixel_variances(layers, x)), []
    for steps, launch in zip(network.levels, launches, strict=True):
        planes = [] if tables else [x]
        for step in steps:
            match step.activation:
                case Activation("relu"):
                    deviation = next(variances).sqrt()
                    planes.append(torch.stack([deviation, torch.where(deviation > 0, 1 / deviation, 0)], 1))
                case Activation("erf"):
                    planes.append((1 / (0.5 + next(variances))).sqrt()[:, None].expand(-1, 2, -1, -1))
                case Activation("gelu"):
                    variance = next(variances)
                    planes.append(torch.stack([variance, (1 + variance).rsqrt()], 1))
        height, width = launch.constants["H"], launch.constants["W"]
        extent = launch.constants["CHUNKS"] * launch.constants["COLUMNS"] + 2 * len(steps) + width
        columns = (torch.arange(extent, device=x.device) - len(steps)) % width
        table = torch.cat([x.new_empty(len(x), 0, height, width), *(plane.to(x.dtype) for plane in planes)], 1)
        tables.append(table[..., columns].contiguous())
    return tables


def _batch(launches: Sequence[_Launch], tiling: Tiling) -> int:
    """Pairs whose sums over the last level are kept at a time."""
    return max(1, min(_BATCH_PAIRS, tiling.workspace_bytes // (4 * math.prod(launches[-1].shape))))


def _variances(
    network: Plan, launches: Sequence[_Launch], tables: Sequence[Tensor], images: int, tiling: Tiling
) -> Tensor:
    """NNGP of every image with itself where the head begins, (images,), if the head has a use for it."""
    same = torch.arange(images, device=tables[0].device)
    if not any(isinstance(layer, Activation) for layer in network.head):
        return same.double()
    batches = same.split(_batch(launches, tiling))
    return torch.cat([_means(network, launches, tables, tables, i, i, tiling)[0] for i in batches])


def _means(
    network: Plan,
    launches: Sequence[_Launch],
    tables1: Sequence[Tensor],
    tables2: Sequence[Tensor],
    index1: Tensor,
    index2: Tensor,
    tiling: Tiling,
) -> tuple[Tensor, ...]:
    """NNGP, and NTK if asked for, of pairs of images after the mean over their pixels, each (pairs,) in float64."""
    sizes = [4 * math.prod(launch.shape) for launch in launches[:-1]]
    block = max(1, min(len(index1), tiling.workspace_bytes // max(sizes, default=1)))
    buffers = [tables1[0].new_empty(block, *launch.shape) for launch in launches[:-1]]
    buffers.append(tables1[0].new_empty(len(index1), *launches[-1].shape))
    indices = index1.int(), index2.int()
    for first in range(0, len(index1), block):
        pairs, below = min(block, len(index1) - first), buffers[0]
        for launch, left, right, out in zip(launches, tables1, tables2, buffers, strict=True):
            grid = triton.cdiv(pairs * launch.shape[0], launch.constants["GROUPS"]), launch.constants["CHUNKS"]
            arguments = left, right, below, out, *indices, first, pairs
            _level[grid](*arguments, **launch.constants, **_options(tiling))
            below = out
    pixels = launches[-1].constants["H"] * launches[-1].constants["W"]
    sums = buffers[-1].double().sum((1, 2, 4))
    return (sums / (pixels if network.flat else pixels**2)).unbind(1)
