r"""What the CPU and the CUDA kernel of convolutional networks share: which networks they run, and what lies around it.

The covariance K[p, p'] of a pair of images is a set of planes of fixed offset p' - p; no layer but
pooling mixes them (Novak et al., 2019, arXiv 1810.05148):

    3x3 convolution:  K[p, p'] <- weight_std^2 / 9 * sum over shifts s in {-1, 0, 1}^2 of K[p + s, p' + s] + bias_std^2,
    activation:       pointwise, given the variances of pixel p of one image and of pixel p' of the other,
    2x2 pooling:      K[q, q'] <- 1/16 * sum over a, b in {0, 1}^2 of K[2q + a, 2q' + b]: offsets mix.

Variances belong to one image, so they are computed once an image, from the few offsets that reach offset 0: for CUDA by
:func:`pixel_variances`, on the CPU by the compiled code itself.

Both backends, ``fused_cpu`` and ``fused_cuda``, have one function of the same signature,

    gram(layers, kind, x1, x2, advance) -> Tensor (n1, n2),

with ``layers`` from :func:`~ntk_lightning.kernels.infinite.lift.parse`, checked by :func:`unsupported`;
``kind`` "ntk" or "nngp"; checked images ``x1`` (n1, C, H, W) and ``x2`` (n2, C, H, W), or None for the symmetric
Gram of x1, of which one half is computed; ``advance`` to be called with the number of entries of the result just
finished. The result has the dtype and the device of x1. The CUDA kernel runs the levels of :func:`plan`, the CPU kernel
the operations of :mod:`~ntk_lightning.kernels.infinite.fused_cpu_program`, which are more: residual sums, strides,
filters and pooling windows of any size, normalizations. :func:`finish` turns what either gives into the kernel.

Longer than 300 lines for the formulas above, which both backends rest on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ntk_lightning.kernels.infinite.activations import ACTIVATIONS, Activation, dual_activation
from ntk_lightning.kernels.infinite.architecture import (
    Conv,
    Flatten,
    GlobalAvgPool,
    GlobalSumPool,
    Layer,
    Linear,
    Norm,
    Pool,
    Scale,
    Sum,
)
from ntk_lightning.kernels.infinite.fused_cpu_program import Head, Unsupported, read

__all__ = [
    "Convolution",
    "Plan",
    "finish",
    "near_duplicates",
    "needs_variances",
    "pixel_variances",
    "plan",
    "saturates",
    "unsupported",
    "window",
]

_VARIANCE_BLOCK_BYTES = 2**22
_DISTANCE_ROWS = 256


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution, K <- weight_variance * (sum over shifts of K) + bias_variance, and the activation after it."""

    weight_variance: float
    bias_variance: float
    activation: Activation | None


@dataclass(frozen=True)
class Plan:
    """A network in three parts: levels with 2x2 pooling between them, a mean over pixels, a head on vectors.

    ``flat`` says which mean: over equal pixels (``nn.Flatten``) where True, over all pairs of pixels (global average
    pooling) where False.
    """

    levels: tuple[tuple[Convolution, ...], ...]
    flat: bool
    head: tuple[Linear | Activation, ...]


def window(level: int, last: int) -> int:
    """Tell the largest offset at one level that reaches offset 0 at another.

    Args:
        level: Number of the level.
        last: Number of the later level.

    Returns:
        The offset in pixels of ``level``.

    Example:
        >>> [window(level, last=3) for level in range(4)]
        [7, 3, 1, 0]
    """
    return int(2 ** (last - level) - 1)


def unsupported(layers: Sequence[Layer], shape: tuple[int, ...], backend: str) -> str | None:
    """Tell why the layers cannot run on a compiled backend.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.lift.parse`, with shapes checked.
        shape: Spatial shape of the inputs: (H, W) in pixels, () for vectors.
        backend: "cpu" or "cuda".

    Returns:
        A clause about the network that names the obstacle, or None where there is none.

    Example:
        >>> unsupported([Linear(1.0, 0.0)], (), "cpu")
        'its inputs are vectors, not images'
    """
    if not shape:
        return "its inputs are vectors, not images"
    if backend == "cpu":
        try:
            read(layers, shape)
        except Unsupported as obstacle:
            return str(obstacle)
        return None
    if len(shape) != 2:
        return "its inputs are sequences, not images"
    flat = False
    previous: Layer | None = None
    for layer in layers:
        match layer:
            case Activation(name) if name not in ACTIVATIONS or backend not in ACTIVATIONS[name].compiled:
                return f"the {backend} kernel does not have the activation {name}"
            case Pool() if previous is None:
                return "it pools the images: pool them before"
            case Pool(2, 2) if not flat and any(side % 2 for side in shape):
                return "its pooling leaves out pixels at the border"
            case Conv(kernel_size=3, pad=1, stride=1, circular=False, gradient=None, axes=2) if not flat:
                pass
            case Pool(kernel_size=2, stride=2, pad=0, divisor=None, axes=2) if not flat:
                pass
            case Activation() if not flat and not isinstance(previous, Conv):
                return f"in it {layer} does not directly follow a convolution"
            case GlobalAvgPool() | Flatten():
                flat = True
            case Activation():
                pass
            case Linear(gradient=None) if flat:
                pass
            case _:
                return f"{layer} is neither a 3x3 convolution with 'same' padding and stride 1 nor 2x2 pooling"
        shape = tuple(side // 2 for side in shape) if isinstance(layer, Pool) else shape
        previous = layer
    return None if any(isinstance(layer, Conv) for layer in layers) else "it has no convolution"


def plan(layers: Sequence[Layer]) -> Plan:
    """Translate layers that :func:`unsupported` accepts.

    Args:
        layers: From :func:`ntk_lightning.kernels.infinite.lift.parse`.

    Returns:
        The same network as levels, mean and head.

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import MyrtleCNN
        >>> [len(level) for level in plan(parse(MyrtleCNN(depth=5))).levels]
        [2, 1, 1]
    """
    end = next(i for i, layer in enumerate(layers) if isinstance(layer, GlobalAvgPool | Flatten))
    levels: list[list[Convolution]] = [[]]
    for layer in layers[:end]:
        match layer:
            case Conv():
                levels[-1].append(Convolution((layer.weight_std / 3) ** 2, layer.bias_std**2, None))
            case Activation():
                last = levels[-1].pop()
                levels[-1].append(Convolution(last.weight_variance, last.bias_variance, layer))
            case Pool():
                levels.append([])
    head = tuple(layer for layer in layers[end:] if isinstance(layer, Linear | Activation))
    return Plan(tuple(map(tuple, levels)), isinstance(layers[end], Flatten), head)


def finish(
    head: Sequence[Head],
    kind: str,
    nngp: Tensor,
    ntk: Tensor,
    variance1: Tensor | None = None,
    variance2: Tensor | None = None,
) -> Tensor:
    """Apply the head of a network to the covariances of its vectors.

    Args:
        head: From :func:`plan`.
        kind: "ntk" or "nngp".
        nngp: NNGP after the mean over pixels, (n1, n2).
        ntk: NTK at the same place, (n1, n2).
        variance1: NNGP there of each input with itself, (n1,); needed where the head has an activation.
        variance2: The same of the second inputs, (n2,).

    Returns:
        The kernel at the network's output, (n1, n2).

    Example:
        >>> finish([Linear(weight_std=2.0, bias_std=1.0)], "ntk", torch.ones(1, 2), torch.ones(1, 2))
        tensor([[9., 9.]])
    """
    variances = [torch.zeros(()) if v is None else v for v in (variance1, variance2)]
    for layer in head:
        match layer:
            case Linear(weight_std, bias_std):
                own = None if layer.gradient is None else layer.gradient[0] * nngp + layer.gradient[1]
                nngp, *variances = (weight_std**2 * k + bias_std**2 for k in (nngp, *variances))
                ntk = weight_std**2 * ntk + (nngp if own is None else own)
            case Scale(factor):
                nngp, ntk, *variances = (factor**2 * k for k in (nngp, ntk, *variances))
            case Norm(eps):
                scale = (variances[0][:, None] + eps).rsqrt() * (variances[1] + eps).rsqrt()
                nngp, variances = nngp * scale, [v / (v + eps) for v in variances]
                ntk = ntk * scale
            case Activation():
                nngp, derivative = dual_activation(layer, nngp, variances[0][:, None], variances[1])
                ntk, variances = ntk * derivative, [dual_activation(layer, v, v, v)[0] for v in variances]
    return ntk if kind == "ntk" else nngp


def needs_variances(head: Sequence[Head]) -> bool:
    """Tell whether :func:`finish` needs the variances.

    Args:
        head: Of the network.

    Returns:
        Whether an activation or a normalization stands in it.

    Example:
        >>> needs_variances([Linear(1.0, 0.0), Activation("relu")])
        True
    """
    return any(isinstance(layer, Activation | Norm) for layer in head)


def near_duplicates(x1: Tensor, x2: Tensor, distance: float) -> Iterator[tuple[int, Tensor]]:
    """Find pairs of almost but not quite equal images, whose NTK float32 does not hold: it needs sqrt(1 - correlation).

    Args:
        x1: Images (n1, C, H, W).
        x2: Images (n2, C, H, W).
        distance: Of two images, each scaled to length one, below which they are almost equal.

    Yields:
        Each index of x1 that has such images in x2, with their indices (k,).

    Example:
        >>> x = torch.tensor([1.0, 2.0, 2.001])[:, None, None, None] * torch.eye(2)
        >>> x[2, 0, 0, 1] = 0.01
        >>> [(i, near.tolist()) for i, near in near_duplicates(x[:1], x, 0.1)]
        [(0, [1, 2])]
    """
    unit1, unit2 = (F.normalize(x.flatten(1)) for x in (x1, x2))
    for start in range(0, len(x1), _DISTANCE_ROWS):
        block = unit1[start : start + _DISTANCE_ROWS]
        near = torch.cdist(block, unit2, compute_mode="donot_use_mm_for_euclid_dist") < distance
        for row in near.any(1).nonzero()[:, 0].tolist():
            candidates = near[row].nonzero()[:, 0]
            different = (x2[candidates] != x1[start + row]).flatten(1).any(1)
            if different.any():
                yield start + row, candidates[different]


def saturates(layers: Sequence[Layer], x: Tensor) -> bool:
    """Tell whether images are so bright that float32 does not hold an activation's duals: an erf is nearly a step.

    Args:
        layers: Accepted by :func:`unsupported`.
        x: Images (n, C, H, W).

    Returns:
        Whether a bound on the variance before an activation, from the brightest pixel on, is above its limit.

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import Erf, NTKConv2d, NTKLinear
        >>> net = torch.nn.Sequential(NTKConv2d(1, 1, 3), Erf(), torch.nn.Flatten(), NTKLinear(4, 1))
        >>> [saturates(parse(net), scale * torch.ones(1, 1, 2, 2)) for scale in (1, 255)]
        [False, True]
    """
    return _largest_variance(layers, float(x.square().mean(1).max()), x[0, 0].numel()) == math.inf


def _largest_variance(layers: Sequence[Layer], bound: float, pixels: int) -> float:
    """A bound on the variances after layers; infinite where one is above the limit of an activation."""
    for layer in layers:
        match layer:
            case Conv():
                bound = layer.weight_std**2 * bound + layer.bias_std**2
            case Activation(name):
                row = ACTIVATIONS[name]
                if bound > row.float32_variance:
                    return math.inf
                bound = row.variance(bound, layer)
            case Norm():
                bound = pixels if layer.pixels else 1.0
            case Scale(factor):
                bound *= factor**2
            case Pool():
                size = math.prod(window.size for window in layer.windows)
                bound *= (size / (layer.divisor or size)) ** 2
            case Sum(body, shortcut):
                bound = _largest_variance(body, bound, pixels) + _largest_variance(shortcut, bound, pixels)
            case GlobalAvgPool() | GlobalSumPool() | Flatten():
                break
    return bound


def pixel_variances(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """Variance of every pixel before each activation of the levels (the head's are scalars; see :func:`finish`).

    Only the offsets that pooling carries to offset 0 are followed: {-1, 0, 1}^2 where one pool is still to come before
    an activation, {-3..3}^2 for two, {-7..7}^2 for three.

    Args:
        layers: Accepted by :func:`unsupported`.
        x: Images (n, C, H, W).

    Returns:
        For each activation in order the variances (n, H', W') in float64, on the device of x.

    Example:
        >>> from ntk_lightning.kernels.infinite.lift import parse
        >>> from ntk_lightning.networks import FiveLayerCNN
        >>> [tuple(v.shape) for v in pixel_variances(parse(FiveLayerCNN()), torch.ones(2, 3, 8, 8))]
        [(2, 8, 8), (2, 4, 4), (2, 2, 2), (2, 1, 1)]
    """
    network = plan(layers)
    active = [i for i, level in enumerate(network.levels) if any(convolution.activation for convolution in level)]
    if not active:
        return []
    offsets = 2 * window(0, active[-1]) + 1
    chunk = max(1, _VARIANCE_BLOCK_BYTES // (8 * offsets**2 * x[0, 0].numel()))
    blocks = [_pixel_variances(network, active[-1], images) for images in x.double().split(chunk)]
    return [torch.cat(variances) for variances in zip(*blocks, strict=True)]


def _pixel_variances(network: Plan, last: int, x: Tensor) -> list[Tensor]:
    r, (height, width) = window(0, last), x.shape[-2:]
    k = torch.einsum("nchw,ncuvhw->nuvhw", x, _shifted(x, r)) / x.shape[1]
    variances = []
    for level, convolutions in enumerate(network.levels[: last + 1]):
        inside = _shifted(k.new_ones(height, width), r)
        for convolution in convolutions:
            k = F.avg_pool2d(k.flatten(0, 2)[:, None], 3, 1, 1)[:, 0].unflatten(0, k.shape[:3])
            k = (9 * convolution.weight_variance * k + convolution.bias_variance) * inside
            if convolution.activation:
                variance = k[:, r, r].clamp_min(0)  # where pooling cancels, rounding may leave less
                variances.append(variance)
                k = (
                    dual_activation(convolution.activation, k, variance[:, None, None], _shifted(variance, r))[0]
                    * inside
                )
        if level < last:
            k = _pool(_pool(k, 1, 3), 2, 4) / 16
            r, height, width = r // 2, height // 2, width // 2
    return variances


def _shifted(image: Tensor, r: int) -> Tensor:
    """All shifts by at most r pixels, zeros entering: (..., H, W) -> (..., 2r+1, 2r+1, H, W)."""
    height, width = image.shape[-2:]
    return F.pad(image, (r, r, r, r)).unfold(-2, height, 1).unfold(-2, width, 1)


def _pool(k: Tensor, offset: int, pixel: int) -> Tensor:
    """Sum over pairs of pixels along one direction, given the dimensions of its offsets and of its pixels."""
    even, odd = (k.narrow(pixel, a, k.shape[pixel] - 1).movedim((offset, pixel), (0, 1))[:, ::2] for a in (0, 1))
    pooled = even[1::2] + odd[1::2] + even[2::2] + odd[:-2:2]
    return pooled.movedim((0, 1), (offset, pixel))
