"""Inner products of rows, of all pairs or of equal ones: of gradients, or of what stands for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ntk_lightning.kernels.empirical.layer_gradients import ids_of, patch_entries, samples_at_once, write_gradients
from ntk_lightning.kernels.empirical.layer_rules import AffineLayer

__all__ = ["SLICE_COLUMNS", "Pairs", "by_factors", "by_kept", "least_kept_bytes", "multiply"]

Pairs = Literal["all", "equal"]

SLICE_COLUMNS = 2**13  # of rows, multiplied at once; those of bfloat16 are turned into float32 for it
_TRIANGLE_ROWS = 256
_KEPT_SLICES = 16  # a kept layer's gradients are formed in so many slices at most, each from the patches anew


def multiply(a: Tensor, b: Tensor, pairs: Pairs = "all") -> Tensor:
    """Multiply vectors in float32 or better.

    Args:
        a: (n, C, p).
        b: (m, C', p).
        pairs: All pairs of rows, or each row with the same of b.

    Returns:
        (n, m, C, C'), or (n, C, C').
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    if pairs == "equal":
        return a.to(dtype) @ b.to(dtype).mT
    (n, c), (m, c2) = a.shape[:2], b.shape[:2]
    total = torch.zeros(n * c, m * c2, dtype=dtype, device=a.device)
    size = max(1, SLICE_COLUMNS // max(c, c2))  # slices of p: one long sum of float32 products would lose two digits
    for left, right in zip(a.split(size, 2), b.split(size, 2), strict=True):
        total.addmm_(left.to(dtype).reshape(n * c, -1), right.to(dtype).reshape(m * c2, -1).T)
    return total.view(n, c, m, c2).transpose(1, 2)


def by_factors(
    layer: AffineLayer, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], groups: tuple[int, int], scratch: int,
    pairs: Pairs = "all",
) -> Tensor:  # fmt: skip
    """Multiply rows that hold a layer in factors, sum_pp' <g_p, g'_p'> <(s a_p, t), (s a'_p', t)>.

    Args:
        layer: The layer.
        a: Columns of n rows that hold its inputs, and those that hold its cotangents.
        b: Those of m rows.
        groups: Outputs that are kept apart, of a and of b.
        scratch: Bytes for temporaries of the products of all positions.
        pairs: All pairs of rows, or each row with the same of b.

    Returns:
        (n, m, C, C') or (n, C, C').
    """
    t = layer.positions
    (x, g), (x2, g2) = ((_vectors(x, t), _vectors(g, c * t)) for (x, g), c in zip((a, b), groups, strict=True))
    if t == 1 and not layer.embeds:
        return multiply(g, g2, pairs).mul_(multiply(x, x2, pairs))
    total = g.new_empty(len(g), *([len(g2)] if pairs == "all" else []), *groups, dtype=torch.float32)
    total = total.to(torch.promote_types(g.dtype, torch.float32))
    entries = 3 * t * t * groups[0] * groups[1] * total.element_size()  # of a pair: the two products, and their sum
    for i, j, out in _tiles(total, max(1, scratch // entries), pairs):
        if layer.embeds:
            ids, ids2 = ids_of(x[i]), ids_of(x2[j])
            if pairs == "all":
                ids, ids2 = ids[:, None], ids2[None]
            inputs = (ids[..., :, None] == ids2[..., None, :]).to(total.dtype)
        else:
            inputs = multiply(x[i], x2[j], pairs)  # (..., T, T)
        products = multiply(g[i], g2[j], pairs).unflatten(-1, (-1, t)).unflatten(-3, (-1, t))  # (..., C, T, C', T)
        out.copy_(products.mul_(inputs[..., None, :, None, :]).sum((-3, -1)))
    return total


def _vectors(columns: Tensor, count: int) -> Tensor:
    """Columns that hold vectors side by side, (n, count, p)."""
    vectors: Tensor = columns.unflatten(1, (count, columns.shape[1] // count))
    return vectors


def _tiles(total: Tensor, size: int, pairs: Pairs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of a and of b for so many pairs at once, and where their products go."""
    n, m = len(total), total.shape[1] if pairs == "all" else 1
    wide = min(m, size)
    high = max(1, size // wide)
    for i in range(0, n, high):
        rows = slice(i, min(i + high, n))
        if pairs == "equal":
            yield rows, rows, total[rows]
        else:
            for j in range(0, m, wide):
                columns = slice(j, min(j + wide, m))
                yield rows, columns, total[rows, columns]


def by_kept(
    layer: AffineLayer, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], groups: tuple[int, int], scratch: int
) -> Tensor:
    """Multiply rows that keep a layer's inputs and cotangents: form the gradients of all, a slice at a time.

    A slice is that of some channels of the output. Where b are the first rows of a, each gradient is formed once.

    Args:
        layer: The layer.
        a: Columns of n rows that hold its inputs, and those that hold its cotangents.
        b: Those of m rows.
        groups: Outputs that are kept apart, of a and of b.
        scratch: Bytes for gradients that are formed at once.

    Returns:
        (n, m, C, C').
    """
    same = a[0].data_ptr() == b[0].data_ptr() and len(a[0]) >= len(b[0])
    dtype = torch.promote_types(a[0].dtype, torch.float32)
    c = a[1].shape[1] // (layer.d_out * layer.positions)
    like = a[0].new_empty(0, dtype=dtype)
    item, rows = like.element_size(), len(a[0]) + (0 if same else len(b[0]))
    slices = -(-layer.d_out // max(1, (scratch - scratch // 4) // (rows * c * layer.num_inputs * item)))
    channels = -(-layer.d_out // slices)
    few = max(1, min(samples_at_once(layer, like), scratch // 4 // _sample_bytes(layer, c, item)))
    total = torch.zeros(len(a[0]), len(b[0]), *groups, dtype=dtype, device=a[0].device)
    for start in range(0, layer.d_out, channels):
        of_channels = slice(start, min(start + channels, layer.d_out))
        formed = _form(layer, *a, c, of_channels, few, dtype)
        others = [g[: len(b[0])] for g in formed] if same else _form(layer, *b, c, of_channels, few, dtype)
        for left, right in zip(formed, others, strict=True):
            left, right = (_vectors(g.flatten(1), k) for g, k in zip((left, right), groups, strict=True))
            if same:
                _add_triangle(total, left, right)
            else:
                total += multiply(left, right)
        del formed, others, left, right
    if same:  # the upper triangle of the square is that of the other order
        square = total[: len(b[0])]
        upper = torch.ones(square.shape[:2], dtype=torch.bool, device=square.device).triu_(1)
        square.copy_(torch.where(upper[..., None, None], square.permute(1, 0, 3, 2), square))
    return total


def _form(
    layer: AffineLayer, inputs: Tensor, cotangents: Tensor, c: int, channels: slice, few: int, dtype: torch.dtype
) -> list[Tensor]:
    """Gradients of d channels for C cotangents: (n, C d, d_in / blocks) for each block, and (n, C d) of the bias."""
    n, d = len(inputs), channels.stop - channels.start
    g = cotangents.unflatten(1, (c, layer.d_out, layer.positions))[:, :, channels]
    a = inputs.unflatten(1, layer.input_shape[1:])
    weight = None
    if layer.weight is not None:
        shape = (layer.blocks, n, c * d, layer.d_in // layer.blocks)
        weight = list(torch.empty(shape, dtype=dtype, device=a.device))
    bias = torch.empty(n, c * d, dtype=dtype, device=a.device) if layer.bias is not None else None
    for i in range(0, n, few):
        part = slice(i, i + few)
        write_gradients(
            layer,
            a[part].to(dtype),
            g[part].to(dtype).flatten(1, 2),
            None if weight is None else [w[part] for w in weight],
            None if bias is None else bias[part],
        )
    return [*(weight or []), *([] if bias is None else [bias])]


def least_kept_bytes(layer: AffineLayer, num_cotangents: int, item: int, n: int) -> int:
    """Bytes that ``by_kept`` needs for n rows, for slices that are not too thin."""
    c, channels = layer.count(num_cotangents), -(-layer.d_out // _KEPT_SLICES)
    return max(4 * _sample_bytes(layer, c, item), n * c * channels * layer.num_inputs * item * 4 // 3 + 1)


def _sample_bytes(layer: AffineLayer, c: int, item: int) -> int:
    """Bytes of what is made of one sample before its gradient: the padded input, the patches, the cotangents."""
    inputs, cotangents = layer.kept(1)
    return item * (2 * inputs + 2 * patch_entries(layer) + c * cotangents)  # twice for what the padding adds


def _add_triangle(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add products of rows a (n, C, p) with those b (m, C, p) that are the first of a, where j <= i."""
    for i in range(0, len(a), _TRIANGLE_ROWS):
        stop = min(i + _TRIANGLE_ROWS, len(a))
        total[i:stop, :stop] += multiply(a[i:stop], b[:stop])
