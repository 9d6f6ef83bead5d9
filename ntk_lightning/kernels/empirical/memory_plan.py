"""A memory budget, and how a Gram matrix of gradient rows is divided to stay within it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ntk_lightning.kernels.empirical.inner_products import SLICE_COLUMNS
from ntk_lightning.kernels.empirical.inputs import Inputs
from ntk_lightning.kernels.empirical.rows import Rows

__all__ = ["Plan", "choose_plan", "chunk_size", "divide", "parse_bytes"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**31}  # on a CPU small tensors are faster: they stay in the cache and the heap
_BLOCK = 128
_SCRATCH = 2**25  # of temporaries of products, where the budget has them


@dataclass(frozen=True)
class Plan:
    """How a Gram is divided.

    Args:
        chunk: Samples whose gradients are formed at once.
        block: Samples that are multiplied with a panel at once.
        panel: Samples that stay.
        scratch: Bytes for temporaries of their products.
        together: All samples stay, those of all inputs, and are multiplied in one go.
    """

    chunk: int
    block: int
    panel: int
    scratch: int
    together: bool = False


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
    n = len(x)
    row, pair = _row_and_pair(rows, half)
    least = rows.least_scratch(2)
    chunk, work = chunk_size(budget, rows, x, kept=2 * row + pair + least)
    spare = budget - work - budget // 16  # a sixteenth for what allocators keep of freed memory
    scratch = max(least, min(_SCRATCH, spare // 8)) if least else 0
    free = spare - scratch
    # A block's rows take an eighth of what is free at most, the panel's rows and one block of the Gram the rest.
    block = max(1, min(_BLOCK, n, free // (8 * row)))
    if not others and n * (row + block * pair) <= free:
        return Plan(chunk, block, n, scratch)
    panel = max(1, min(n, (free - block * row) // (row + block * pair)))
    return Plan(chunk, block, _even(n, panel), scratch)


def choose_plan(budget: int, rows: Rows, x: Inputs, others: int, half: bool, gram: bool) -> tuple[Rows, Plan]:
    """Choose whether a row keeps its gradients, or layers' inputs and cotangents, of which more fit in the memory.

    Where the gradients of all samples do not fit, they are formed again for every panel. From inputs and cotangents
    they are formed when they are multiplied: once, where those of all samples fit, else once for every other panel.

    Args:
        budget: Bytes for everything besides inputs and results.
        rows: Rows of gradients.
        x: Inputs (n, ...) whose Gram, or kernels with others, are computed.
        others: How many other inputs are multiplied with them.
        half: Keep rows in bfloat16.
        gram: Whether the Gram of x is wanted.

    Returns:
        The rows and the plan of the fewest passes and gradients.

    Raises:
        ValueError: The budget holds neither.
    """
    n = len(x)

    def passes(panel: int) -> int:
        """Samples that are passed through the network: of x those of later panels again for each, and all others."""
        panels = -(-n // panel)
        return (n * (panels + 1) // 2 if gram else n) + panels * others

    plan = refused = None
    try:
        plan = divide(budget, rows, x, others, half)
    except ValueError as error:
        refused = error
    if plan is None or plan.panel < n:
        kept = rows.layer_by_layer()
        other = None if kept is None else _divide_kept(budget, kept, x, others, half)
        if kept is not None and other is not None:
            if other.together:
                formed = n + others
            else:
                panels = -(-n // other.panel)
                formed = (n * panels if gram else n * -(-others // other.panel)) + others * panels
            if plan is None or passes(other.panel) + formed < 2 * passes(plan.panel):
                return kept, other
    if plan is None:
        assert refused is not None
        raise refused
    return rows, plan


def _divide_kept(budget: int, rows: Rows, x: Inputs, others: int, half: bool) -> Plan | None:
    """Divide a memory budget for rows of inputs and cotangents: all together if they fit, else in equal panels."""
    n = len(x)
    row, pair = _row_and_pair(rows, half)
    available = budget - budget // 16
    try:
        chunk, work = chunk_size(budget, rows, x, kept=2 * row + pair)
    except ValueError:
        return None

    def spare(kept: int, pairs: int) -> int:
        """Bytes left for products, beside what allocators may keep of the memory in which the rows were made."""
        left = available - kept * row - pairs * pair - work
        return left if left >= rows.least_scratch(kept) else 0

    if scratch := spare(n + others, (n + others) * n):
        return Plan(chunk, n, n, scratch, together=True)
    panel = next((p for p in _halvings(n) if spare(2 * p, p * p)), 0)
    return Plan(chunk, panel, panel, spare(2 * panel, panel * panel)) if panel else None


def _halvings(n: int) -> list[int]:
    """Sizes of 2, 3, 4, 5, 6, 8, ... equal panels of n."""
    counts, count = [], 2
    while count <= n:
        counts.append(-(-n // count))
        count += max(1, count // 4)
    return counts


def _even(n: int, most: int) -> int:
    """The size of as many panels as the largest would make, of equal size."""
    return -(-n // -(-n // most))


def _row_and_pair(rows: Rows, half: bool) -> tuple[int, int]:
    """Bytes of a row, and of a pair of samples while it is multiplied."""
    item = rows.function.dtype.itemsize
    # One row; rows in bfloat16 also need a slice of it in float32 while it is multiplied, and those of outputs or
    # positions kept apart a slice of it in another order.
    copied = half or rows.full or rows.least_scratch(2) > 0
    row = rows.width * (2 if half else item) + copied * item * min(rows.width, SLICE_COLUMNS)
    # One pair of samples of a block of the Gram: the product of each part, and the four temporaries of the one in work
    # (two factors, one slice's product, their sum), each for all pairs of outputs that are kept apart.
    return row, (4 + len(rows.parts)) * rows.groups * rows.partner.groups * item


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
