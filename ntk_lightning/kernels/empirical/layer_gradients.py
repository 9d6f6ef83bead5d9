"""Gradients of affine layers, as one product a sample that is as wide as the cotangents of all outputs.

grad_W f_c = s sum_p g_cp a_p^T is [g_1 .. g_C] (C d_out, T) times the patches (T, d_in). Patches of a convolution of
stride 1 need not be written out for every pixel of the filter: unfolded along the rows of the image only, for the k_w
pixels of a row of the filter, the patches of the filter's row i are the same matrix from column i W' on (W' the
output's width), because its columns are the pixels of the padded image one row after another:

    unfolded (k_w channels, H_padded W'):   | row 0 | row 1 | row 2 | ... | row H_padded - 1 |
    patches of filter row 0:                 ------------------------->
    patches of filter row 1:                         ------------------------->

So the gradient is k_h products, each of d_in / k_h inputs, and k_h times less is written and read for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ntk_lightning.kernels.empirical.layer_rules import AffineLayer, Convolution

__all__ = ["cotangents_of", "factors_of", "ids_of", "patch_entries", "patches_of", "samples_at_once", "write_gradients"]

_PATCH_BYTES = {"cpu": 2**20, "cuda": 2**28}  # on a CPU they are multiplied while they are in its cache


def cotangents_of(layer: AffineLayer, g: Tensor) -> Tensor:
    """Bring the cotangents (n, C, ...) of a layer's outputs to the form (n, C, d_out, T), or those that stand for them.

    Args:
        layer: The layer.
        g: Of all outputs C.

    Returns:
        (n, C, d_out, T), or (n, 1, d_out, T) where one vector stands for all, u_o h_po = sum_c unit_co g_cpo.
    """
    n, c = g.shape[:2]
    shape = (layer.d_out, layer.positions)
    g = g.reshape(n, c, *shape) if layer.convolves else g.reshape(n, c, *shape[::-1]).mT
    return g if layer.unit is None else (g * layer.unit[..., None]).sum(1, keepdim=True)


def factors_of(layer: AffineLayer, a: Tensor, g: Tensor, full: bool) -> tuple[Tensor, Tensor]:
    """Lay out what multiplies to the kernel without the gradient.

    Args:
        layer: The layer.
        a: Its inputs, (n, ...).
        g: Cotangents of its outputs, (n, C, d_out, T).
        full: Keep outputs apart.

    Returns:
        (s a_p, t) of each position or the digits of its id, (n, T, num_inputs); and the cotangents, (n, T, C, d_out),
        with ``full`` (n, C, T, d_out).
    """
    g = g.mT if full else g.permute(0, 3, 1, 2)
    if layer.embeds:
        ids = a.reshape(len(a), -1)
        assert isinstance(layer.module, nn.Embedding)
        if layer.module.padding_idx is not None:  # its row of the weight has no gradient
            kept = (ids != layer.module.padding_idx)[..., None]
            g = g * (kept[:, None] if full else kept[..., None])
        return torch.stack([ids >> (8 * i) & 255 for i in range(layer.digits)], -1), g
    pieces = []
    if layer.weight is not None:
        pieces.append(torch.cat(patches_of(layer, a), -1) * layer.weight)
    if layer.bias is not None:
        pieces.append(g.new_full((len(a), layer.positions, 1), layer.bias))
    return torch.cat(pieces, -1), g


def ids_of(digits: Tensor) -> Tensor:
    """Ids (n, T) of digits (n, T, k) base 256."""
    return sum((digits[..., i].long() << (8 * i) for i in range(1, digits.shape[-1])), digits[..., 0].long())


def write_gradients(
    layer: AffineLayer, a: Tensor, g: Tensor, weight: Sequence[Tensor] | None, bias: Tensor | None
) -> None:
    """Write the gradients of n samples.

    Args:
        layer: The layer.
        a: Its inputs, (n, ...).
        g: Cotangents of some or all of its output's channels, (n, m, T).
        weight: Where the gradients of the weight go, (n, m, d_in / blocks) for each block, or None.
        bias: Where those of the bias go, (n, m), or None.
    """
    if bias is not None:
        bias.copy_(g.sum(-1).mul_(layer.bias or 0.0))
    if weight is None:
        return
    few, scale = samples_at_once(layer, a), layer.weight or 0.0
    space = _space_for_rows(layer, a[:few])
    for i in range(0, len(a), few):
        for patches, whole in zip(patches_of(layer, a[i : i + few], space), weight, strict=True):
            out, cotangents = whole[i : i + few], g[i : i + few]
            if out.dtype == g.dtype:
                torch.baddbmm(out, cotangents, patches, beta=0, alpha=scale, out=out)
            else:
                out.copy_(torch.bmm(cotangents, patches).mul_(scale))


def samples_at_once(layer: AffineLayer, a: Tensor) -> int:
    """Samples whose patches are written out at once, where inputs like a are."""
    most = _PATCH_BYTES["cpu" if a.device.type == "cpu" else "cuda"]
    return max(1, most // (patch_entries(layer) * a.element_size()))


def patch_entries(layer: AffineLayer) -> int:
    """Entries of one sample's patches, as they are written out."""
    if not layer.convolves:
        return layer.positions * layer.d_in
    return layer.positions * layer.d_in // layer.blocks  # and what the padding adds


def patches_of(layer: AffineLayer, a: Tensor, space: Tensor | None = None) -> list[Tensor]:
    """What the layer multiplies with its weight at every position.

    Args:
        layer: The layer.
        a: Its inputs, (n, ...).
        space: Of ``_space_for_rows``, to be used again.

    Returns:
        For each block of inputs (n, T, d_in / blocks).
    """
    if not isinstance(layer.module, Convolution):
        return [a.reshape(len(a), -1, layer.d_in)]
    conv, (height, width) = layer.module, layer.filter
    a = _image(a.reshape(len(a), *layer.input_shape[1:]))
    dilation = _pair(getattr(conv, "dilation", 1))
    if not layer.shifts:
        a = _padded(conv, a)
        return [F.unfold(a, (height, width), stride=_pair(conv.stride), dilation=dilation).mT]
    if width == 1:
        columns = _padded(conv, a)
    else:
        space = _space_for_rows(layer, a) if space is None else space
        assert space is not None
        columns = _unfolded(layer, a if conv.padding_mode == "zeros" else _padded(conv, a), space[: len(a)])
    across = columns.shape[-1]  # W'
    columns = columns.flatten(2)  # (n, k_w channels, H_padded W')
    starts = [dilation[0] * across * i for i in range(height)]
    return [columns[..., start : start + layer.positions].mT for start in starts]


def _space_for_rows(layer: AffineLayer, a: Tensor) -> Tensor | None:
    """Zeros for the inputs of a convolution unfolded along the rows, (n, k_w, channels, H_padded, W')."""
    if not isinstance(layer.module, Convolution) or not layer.shifts or layer.filter[1] == 1:
        return None
    height, width = ([1, *layer.input_shape[2:]])[-2:]
    (top, bottom), (left, right) = _margins(layer.module)
    across = width + left + right - _pair(getattr(layer.module, "dilation", 1))[1] * (layer.filter[1] - 1)
    return a.new_zeros(len(a), layer.filter[1], layer.input_shape[1], height + top + bottom, across)


def _unfolded(layer: AffineLayer, a: Tensor, space: Tensor) -> Tensor:
    """Write images (n, channels, H, W), shifted by each pixel of a row of the filter, between the zeros of a space."""
    conv = layer.module
    assert isinstance(conv, Convolution)
    (top, _), (left, _) = _margins(conv) if conv.padding_mode == "zeros" else ((0, 0), (0, 0))
    across, inner = space.shape[-1], slice(top, top + a.shape[-2])
    for j in range(layer.filter[1]):
        shift = _pair(getattr(conv, "dilation", 1))[1] * j - left  # column x of the space is column x + shift of a
        low, high = max(0, -shift), min(across, a.shape[-1] - shift)
        space[:, j, :, inner, low:high] = a[..., low + shift : high + shift]
    return space.flatten(1, 2)


def _image(a: Tensor) -> Tensor:
    """A sequence is an image of one row."""
    return a[:, :, None] if a.dim() == 3 else a


def _margins(conv: Convolution) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels that the convolution adds above and below the image, and on its left and right."""
    around: list[tuple[int, int]] = []
    if isinstance(conv, nn.Conv1d | nn.Conv2d):
        for axis, (size, dilation) in enumerate(zip(conv.kernel_size, conv.dilation, strict=True)):
            if conv.padding == "same":  # an even filter has one pixel more behind
                total = dilation * (size - 1)
                around.append((total // 2, total - total // 2))
            else:
                pixels = 0 if isinstance(conv.padding, str) else int(conv.padding[axis])
                around.append((pixels, pixels))
    else:
        around = [(pixels, pixels) for pixels in conv.pads]
    return ((0, 0), around[0]) if len(around) == 1 else (around[0], around[1])


def _padded(conv: Convolution, a: Tensor) -> Tensor:
    """The images with the pixels that the convolution adds around them."""
    around = [pixels for pair in reversed(_margins(conv)) for pixels in pair]
    if not any(around):
        return a
    if conv.padding_mode == "zeros":
        return F.pad(a, around)
    if a.shape[-2] == 1 and not any(around[2:]):  # along a row only
        return F.pad(a[:, :, 0], around[:2], mode=conv.padding_mode)[:, :, None]
    return F.pad(a, around, mode=conv.padding_mode)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a size along the rows, along both alike, or of each."""
    if isinstance(value, int):
        return value, value
    return (1, value[0]) if len(value) == 1 else (value[0], value[1])
