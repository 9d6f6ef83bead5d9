"""Grams on disk: computed once, block by block, by any number of processes.

Content names everything. A folder is named by a hash of the kernel (``kernel_key``). In it a block is one file, a
zipped Zarr array, named by the hashes of its two groups of samples (dtype, shape and bytes), the smaller hash first,
which is also the order in which it is computed; its transpose is never stored. So a larger data set that begins with
the same samples finds all earlier full blocks, one folder serves any number of kernels and data sets, and no index has
to be kept in step with the blocks. Version 0.1 stored a block as a folder of two files; these are read as they are.

A block is written beside its place, flushed, and renamed: what has the final name is complete, and processes need no
locks. Its checksums are compared at every read.
"""

from __future__ import annotations

import contextlib
import errno
import random
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ntk_lightning.atomic_files import atomic_write, remove_stale, writing
from ntk_lightning.kernels.checks import check_inputs
from ntk_lightning.kernels.grams.block_file import read_block, write_block
from ntk_lightning.kernels.grams.kernel_key import describe, digest, kernel_key
from ntk_lightning.precision import at_least_float32
from ntk_lightning.progress import progress_bar
from ntk_lightning.whole_number import check_size

__all__ = ["BlockId", "KernelStore"]

BlockId = tuple[int, int]

_ADVICE = "Make room there or choose another folder; finished blocks are kept and the next run goes on from them"


class KernelStore:
    """The Gram of all samples in a folder, of which blocks are computed when first asked for.

    A process that is killed loses the block it was computing, no other; the next one goes on from there. Several
    processes may work on one store at once.

    Args:
        folder: Where the stores of all kernels lie; made when the first block is written.
        kernel: Maps (n1, ...) and (n2, ...) to (n1, n2), or (n1, ...) alone to its symmetric Gram, always in the same
            precision. See ``kernel_key`` for what it must be. Neither it nor ``x`` may change afterwards.
        x: All samples (n, ...), training and test together; their dtype is part of the blocks' names.
        block: Samples a block's side. A kill loses at most one block's work; an empirical kernel forms its gradients
            anew for every block, so larger ones are faster.

    Raises:
        TypeError: The inputs are not floating point, ``block`` is no whole number, or the kernel cannot be named.
        ValueError: The inputs are malformed, or ``block`` is not positive.

    Example:
        >>> import tempfile
        >>> from ntk_lightning.kernels import InfiniteNTK
        >>> from ntk_lightning.networks import MLP
        >>> kernel = InfiniteNTK(MLP(width=1, depth=1, in_features=2), kind="nngp")
        >>> store = KernelStore(tempfile.mkdtemp(), kernel, torch.eye(2, dtype=torch.float64), block=1)
        >>> store.gram([0], slice(None), progress=False)
        tensor([[1.0000, 0.3183]], dtype=torch.float64)
        >>> store.missing()
        [(1, 1)]
    """

    def __init__(self, folder: str | Path, kernel: Callable[..., Tensor], x: Tensor, *, block: int = 256) -> None:
        check_inputs(x)
        check_size("block", block, 1)
        self.kernel, self.x, self.block = kernel, x.detach(), block
        self.folder = Path(folder).expanduser().resolve() / kernel_key(kernel)
        self._names = [digest(samples) for samples in self.x.split(block)]

    @property
    def block_ids(self) -> list[BlockId]:
        """Row and column, i <= j, of every block; block (i, j) starts at sample (i * block, j * block)."""
        sides = range(len(self._names))
        return [(i, j) for i in sides for j in sides[i:]]

    def has_blocks(self) -> bool:
        """Tell whether any block of the first samples is stored; reads no block."""
        return self.folder.is_dir() and any(self._names[0] in path.name for path in self.folder.iterdir())

    def missing(self) -> list[BlockId]:
        """List the blocks that are absent or damaged; reads every stored byte.

        Returns:
            Their ids.
        """
        return [block_id for block_id in self.block_ids if self._read(*self._ordered(block_id)) is None]

    def count_missing_pairs(self, block_ids: Iterable[BlockId]) -> int:
        """Count the pairs of blocks that are absent, without reading the others.

        Args:
            block_ids: Which.

        Returns:
            The number, with half of a block on the diagonal.
        """
        return sum(self._pairs(block_id) for block_id in block_ids if not self._stored(*self._ordered(block_id)))

    def gram(
        self,
        rows: slice | Sequence[int] | Tensor,
        cols: slice | Sequence[int] | Tensor | None = None,
        *,
        progress: bool = True,
    ) -> Tensor:
        """Cut a piece out of the Gram, computing those blocks it touches that are missing.

        Args:
            rows: Which n1 samples: a slice, indices or a mask.
            cols: Which n2 samples; None for those of the rows.
            progress: Show a progress bar while blocks are computed.

        Returns:
            The kernel of all pairs, (n1, n2), on the device of the samples.

        Raises:
            IndexError: An index is out of range.
            OSError: A block cannot be written; the finished ones are kept.
            ValueError: Rows or columns select no sample, or the kernel returned something else than finite pairs.
        """
        row_parts, num_rows = self._parts(rows)
        col_parts, num_cols = (row_parts, num_rows) if cols is None else self._parts(cols)
        out = None
        for (a, b), values in self._blocks({(min(i, j), max(i, j)) for i in row_parts for j in col_parts}, progress):
            if out is None:
                out = torch.empty(num_rows, num_cols, dtype=values.dtype, device=self.x.device)
            for row, col, piece in ((a, b, values), (b, a, values.T))[: 1 + (a != b)]:
                if row in row_parts and col in col_parts:
                    (to_rows, from_rows), (to_cols, from_cols) = row_parts[row], col_parts[col]
                    out[to_rows[:, None], to_cols] = piece[from_rows[:, None], from_cols].to(out.device)
        if out is None:
            raise ValueError("The rows or columns select no sample.")
        return out

    def compute(
        self,
        block_ids: Iterable[BlockId] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        progress: bool = True,
    ) -> None:
        """Compute those blocks that are missing.

        Workers with a rank get shares of equal cost, dealt out from all blocks, whatever is finished already. Without
        one, processes that run at the same time spread over the missing blocks, and seldom compute one twice.

        Args:
            block_ids: Which blocks; None for all.
            rank: Number of this worker.
            world_size: How many workers call this with the same blocks.
            progress: Show a progress bar, on rank zero.

        Raises:
            OSError: A block cannot be written; the finished ones are kept.
            ValueError: A block or rank does not exist, or the kernel returned something else than finite pairs.
        """
        known = self.block_ids
        chosen = set(known if block_ids is None else block_ids)
        if unknown := chosen.difference(known):
            raise ValueError(f"There is no block {min(unknown)}: ids are (i, j) with 0 <= i <= j < {len(self._names)}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size), got {rank=} and {world_size=}.")
        share = sorted(chosen, key=lambda block_id: (-self._pairs(block_id), block_id))[rank::world_size]
        for _ in self._blocks(share, progress and rank == 0):
            pass

    def check_folder(self) -> None:
        """Check, without computing anything, that the blocks which are not there yet can be written.

        Raises:
            OSError: The folder cannot be written, or its disk lacks the room.
        """
        self._prepare([block_id for block_id in self.block_ids if not self._stored(*self._ordered(block_id))])

    def _blocks(self, block_ids: Iterable[BlockId], progress: bool) -> Iterator[tuple[BlockId, Tensor]]:
        """Yield the blocks that are stored, then the others as they are computed; all as :meth:`_ordered` has them."""
        pending: deque[BlockId] = deque()
        for a, b in map(self._ordered, sorted(block_ids)):
            values = self._read(a, b)
            if values is None:
                pending.append((a, b))
            else:
                yield (a, b), values
        if not pending:
            return
        self._prepare(pending)
        # seeded by the system, so that processes part ways
        chance = random.Random()  # nosec B311
        pending.rotate(chance.randrange(len(pending)))
        with progress_bar("kernel blocks", sum(map(self._pairs, pending)), "pairs", enabled=progress) as advance:
            while pending:
                a, b = pending.popleft()
                values = self._read(a, b)
                if values is None:
                    values = self._compute(a, b)
                    self._write(a, b, values)
                else:  # another process is at work here: go on elsewhere
                    pending.rotate(chance.randrange(len(pending) + 1))
                advance(self._pairs((a, b)))
                yield (a, b), values

    def _prepare(self, pending: Collection[BlockId]) -> None:
        """Make the folder, and check that these blocks can be written, before any of them is computed."""
        import zarr  # half a second that only stores need to spend
        from zarr.errors import ContainsGroupError

        with writing(self.folder, _ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "zarr.json").exists():
                with contextlib.suppress(ContainsGroupError):  # another process has just made it
                    zarr.create_group(self.folder, zarr_format=3, attributes={"kernel": describe(self.kernel)})
            needed = sum(map(self._pairs, pending)) * at_least_float32(self.x.dtype).itemsize
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free")
            with tempfile.TemporaryFile(dir=self.folder):  # files can be made here
                pass
        remove_stale(self.folder)

    def _compute(self, a: int, b: int) -> Tensor:
        x1, x2 = (self.x[k * self.block : (k + 1) * self.block] for k in (a, b))
        values = (self.kernel(x1) if self._names[a] == self._names[b] else self.kernel(x1, x2)).detach().cpu()
        if values.shape != (len(x1), len(x2)) or values.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"The kernel returned {values.dtype} of shape {tuple(values.shape)} for {len(x1)} and {len(x2)} "
                "samples: it must return float32 or float64, one entry a pair."
            )
        if not torch.isfinite(values).all():
            i, j = torch.isfinite(values).logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"The kernel of samples {a * self.block + i} and {b * self.block + j} is {values[i, j]}: check these "
                "inputs, or compute in float64."
            )
        return values

    def _read(self, a: int, b: int) -> Tensor | None:
        """The stored block, or None where it is absent or damaged."""
        shape = self._side(a), self._side(b)
        values = read_block(self._path(a, b), shape)
        return read_block(self._folder_of_0_1(a, b), shape) if values is None else values

    def _write(self, a: int, b: int, values: Tensor) -> None:
        """Put a finished block in its place, unless another process was first."""
        path = self._path(a, b)
        if self._stored(a, b) and self._read(a, b) is None:
            warnings.warn(f"Block {path} was damaged: it has been computed again.", RuntimeWarning, stacklevel=2)
        with atomic_write(path, _ADVICE, keep=lambda _: self._read(a, b) is not None) as temporary:
            write_block(temporary, values)

    def _side(self, k: int) -> int:
        return min(self.block, len(self.x) - k * self.block)

    def _pairs(self, block_id: BlockId) -> int:
        """Pairs that are computed for a block: half of them on the diagonal."""
        i, j = block_id
        return self._side(i) * (self._side(i) + 1) // 2 if i == j else self._side(i) * self._side(j)

    def _ordered(self, block_id: BlockId) -> BlockId:
        """The two sides in the order in which they are computed and stored, whatever their order in x."""
        i, j = block_id
        return (i, j) if self._names[i] <= self._names[j] else (j, i)

    def _path(self, a: int, b: int) -> Path:
        return self.folder / f"{self._names[a]}-{self._names[b]}.zarr.zip"

    def _folder_of_0_1(self, a: int, b: int) -> Path:
        return self.folder / f"{self._names[a]}-{self._names[b]}"

    def _stored(self, a: int, b: int) -> bool:
        """Tell whether the block is there, damaged or not."""
        return self._path(a, b).exists() or self._folder_of_0_1(a, b).exists()

    def _parts(self, which: slice | Sequence[int] | Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], int]:
        """For each block that holds chosen samples: their places in the choice and in the block; and their number."""
        index = torch.arange(len(self.x))[which.cpu() if isinstance(which, Tensor) else which]
        if index.dim() != 1:
            raise ValueError(f"Rows and columns are slices, lists or one-dimensional indices, got {which!r}.")
        owner = index // self.block
        places = {int(k): (owner == k).nonzero()[:, 0] for k in owner.unique()}
        return {k: (place, index[place] - k * self.block) for k, place in places.items()}, len(index)
