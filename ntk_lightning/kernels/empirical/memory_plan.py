"""A memory budget, and how a Gram matrix of gradient rows is divided to stay within it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.rows import Rows

__all__ = ["SLICE_COLUMNS", "Plan", "chunk_size", "divide", "parse_bytes"]

SLICE_COLUMNS = 2**13  # of rows, multiplied at once; those of bfloat16 are turned into float32 for it

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**31}  # on a CPU small tensors are faster: they stay in the cache and the heap
_BLOCK = 128


@dataclass(frozen=True)
class Plan:
    """Samples whose gradients are formed at once, are multiplied with a panel at once, and stay."""

    chunk: int
    block: int
    panel: int


def chunk_size(budget: int, rows: Rows, x: Inputs, kept: int = 0) -> tuple[int, int]:
    """Choose how many samples' gradients to form at once, in a quarter of a memory budget at most, by a trial.

    Args:
        budget: Bytes for everything besides inputs and results.
        rows: The rows' layout.
        x: Inputs (n, ...), of which the first is tried.
        kept: Bytes that are needed besides.

    Returns:
        Samples, at least 1, and the bytes that forming their gradients takes.

    Raises:
        ValueError: The budget does not suffice for one sample.
    """
    # What a chunk allocates is linear in its samples, one + (chunk - 1) * (two - one): chunks of 1 and 2 samples are
    # made to see the offset (weights in another layout, for example) and the slope.
    one = rows.workspace(x.first())
    if one + kept > budget:
        raise ValueError(
            f"memory={budget / 1e6:.1f}MB cannot hold the gradients needed at once: "
            f"it takes {(one + kept) / 1e6:.1f}MB at the least, and is faster with more."
        )
    if rows.one_by_one:
        return 1, one
    two = rows.workspace(x.first(2))
    limit = min(budget // 4, _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES["cuda"]))
    chunk = max(1, 1 + (limit - one) // (two - one))
    return chunk, one + (chunk - 1) * (two - one)


def divide(budget: int, rows: Rows, x: Inputs, others: int, half: bool) -> Plan:
    """Divide a memory budget for the Gram of x.

    Args:
        budget: Bytes for everything besides inputs and results.
        rows: The rows' layout.
        x: Inputs (n, ...) whose gradients stay, a panel of them at a time.
        others: How many other inputs are multiplied with every panel.
        half: Keep rows in bfloat16.

    Returns:
        The sizes: one panel of all samples where that fits, else the largest equal panels.

    Raises:
        ValueError: The budget cannot hold the gradients of one pair of samples.
    """
    n, item = len(x), rows.function.dtype.itemsize
    # One row; rows in bfloat16 also need a slice of it in float32 while it is multiplied, and those of outputs kept
    # apart a slice of it in another order.
    row = rows.width * (2 if half else item) + (half or rows.full) * item * min(rows.width, SLICE_COLUMNS)
    # One pair of samples of a block of the Gram: the product of each part, and the four temporaries of the one in work
    # (two factors, one slice's product, their sum), each for all pairs of outputs that are kept apart.
    pair = (4 + len(rows.parts)) * rows.groups * rows.partner.groups * item
    chunk, work = chunk_size(budget, rows, x, kept=2 * row + pair)
    free = budget - work - budget // 16  # a sixteenth for what allocators keep of freed memory
    # A block's rows take an eighth of what is free at most, the panel's rows and one block of the Gram the rest.
    block = max(1, min(_BLOCK, n, free // (8 * row)))
    if not others and n * (row + block * pair) <= free:
        return Plan(chunk, block, n)
    panel = max(1, min(n, (free - block * row) // (row + block * pair)))
    return Plan(chunk, block, -(-n // -(-n // panel)))  # as many panels, of equal size


def parse_bytes(memory: str | int) -> int:
    """Read an amount of memory.

    Args:
        memory: Bytes, or a number with a decimal or binary unit.

    Returns:
        The number of bytes.

    Raises:
        ValueError: It is not a positive amount.

    Example:
        >>> parse_bytes("4GB"), parse_bytes("1.5 MiB"), parse_bytes(4096)
        (4000000000, 1572864, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(memory).strip().upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if value < 1:
        raise ValueError(f'memory must be a number of bytes or a string such as "4GB" or "512MiB", got {memory!r}.')
    return value
