"""Grams on disk: computed once, block by block, by any number of processes.

Content names everything. A folder is named by a hash of the kernel (``kernel_key``). In it a block is one Zarr v3
array named by the hashes of its two groups of samples (dtype, shape and bytes), the smaller hash first, which is also
the order in which it is computed; its transpose is never stored. So a larger data set that begins with the same samples
finds all earlier full blocks, one folder serves any number of kernels and data sets, and no index has to be kept in
step with the blocks.

A block is written beside its place, flushed, and moved there by one rename: what has the final name is complete, and
processes need no locks. Its bytes are not compressed (Grams hardly shrink) and carry Zarr's crc32c checksum, checked on
every read.

Longer than 300 lines, since reading, writing and dividing the blocks rest on the same invariants, told above.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import shutil
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ntk_lightning.kernels.checks import check_inputs
from ntk_lightning.kernels.grams.kernel_key import describe, digest, kernel_key
from ntk_lightning.precision import at_least_float32
from ntk_lightning.progress import progress_bar

__all__ = ["BlockId", "KernelStore", "compute_on_ray"]

BlockId = tuple[int, int]

_log = logging.getLogger(__name__)
_STALE_SECONDS = 3600.0  # no write takes this long: a temporary folder of this age belongs to a killed process


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
        TypeError: The inputs are not floating point, or the kernel cannot be named.
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
        if block < 1:
            raise ValueError(f"block must be at least 1 sample, got {block}.")
        self.kernel, self.x, self.block = kernel, x.detach(), block
        self.folder = Path(folder).expanduser().resolve() / kernel_key(kernel)
        self._names = [digest(samples) for samples in self.x.split(block)]

    @property
    def block_ids(self) -> list[BlockId]:
        """Row and column, i <= j, of every block; block (i, j) starts at sample (i * block, j * block)."""
        sides = range(len(self._names))
        return [(i, j) for i in sides for j in sides[i:]]

    def missing(self) -> list[BlockId]:
        """List the blocks that are absent or damaged; reads every stored byte.

        Returns:
            Their ids.
        """
        return [block_id for block_id in self.block_ids if self._read(*self._ordered(block_id)) is None]

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
        self._prepare([block_id for block_id in self.block_ids if not self._path(*self._ordered(block_id)).is_dir()])

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
        """Make the folder, and check that these blocks can be written, before they are computed."""
        import zarr  # here and below: half a second that only stores need to spend
        from zarr.errors import ContainsGroupError

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "zarr.json").exists():
                with contextlib.suppress(ContainsGroupError):  # another process has just made it
                    zarr.create_group(self.folder, zarr_format=3, attributes={"kernel": describe(self.kernel)})
            probe = self._temporary()
            probe.mkdir()
            probe.rmdir()
            needed = sum(map(self._pairs, pending)) * at_least_float32(self.x.dtype).itemsize
            free = shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"{needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free")
        except OSError as error:
            raise self._cannot_write(error) from error
        for temporary in self.folder.glob(".*.partial"):
            with contextlib.suppress(FileNotFoundError):  # its process has just finished it
                if time.time() - temporary.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(temporary, ignore_errors=True)

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
        import zarr

        path = self._path(a, b)
        if not path.is_dir():
            return None
        try:
            array = zarr.open_array(path, mode="r", zarr_format=3)
            if array.shape != (self._side(a), self._side(b)) or array.dtype.name not in ("float32", "float64"):
                return None
            values = torch.from_numpy(array[:])
        except (FileNotFoundError, KeyError, TypeError, ValueError):  # a wrong checksum, lost or broken metadata
            return None
        return values if torch.isfinite(values).all() else None  # a lost chunk reads as its fill value, NaN

    def _write(self, a: int, b: int, values: Tensor) -> None:
        """Put a finished block in its place, unless another process was first."""
        import zarr
        from zarr.codecs import Crc32cCodec

        path, temporary = self._path(a, b), self._temporary()
        try:
            zarr.create_array(
                temporary,
                data=values.contiguous().numpy(),
                chunks=tuple(values.shape),
                compressors=[Crc32cCodec()],
                filters=None,
                fill_value=float("nan"),
                zarr_format=3,
                chunk_key_encoding={"name": "default", "separator": "."},
            )
            for part in (*temporary.iterdir(), temporary):
                _flush(part)
            if path.exists() and self._read(a, b) is None:
                warnings.warn(f"Block {path} was damaged: it has been computed again.", RuntimeWarning, stacklevel=2)
                shutil.rmtree(path)
            try:
                temporary.rename(path)
            except OSError:
                if not path.exists():
                    raise
            _flush(self.folder)
        except OSError as error:
            raise self._cannot_write(error) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _cannot_write(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"Cannot write kernel blocks in {self.folder}: {error.strerror or error}. Make room there or choose "
            "another folder; finished blocks are kept and the next run goes on from them",
        )

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
        return self.folder / f"{self._names[a]}-{self._names[b]}"

    def _temporary(self) -> Path:
        return self.folder / f".{uuid.uuid4().hex}.partial"

    def _parts(self, which: slice | Sequence[int] | Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], int]:
        """For each block that holds chosen samples: their places in the choice and in the block; and their number."""
        index = torch.arange(len(self.x))[which.cpu() if isinstance(which, Tensor) else which]
        if index.dim() != 1:
            raise ValueError(f"Rows and columns are slices, lists or one-dimensional indices, got {which!r}.")
        owner = index // self.block
        places = {int(k): (owner == k).nonzero()[:, 0] for k in owner.unique()}
        return {k: (place, index[place] - k * self.block) for k, place in places.items()}, len(index)


def compute_on_ray(
    store: KernelStore,
    *,
    address: str | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    progress: bool = True,
) -> None:
    """Compute a store's missing blocks as Ray tasks, one a block; in this process where Ray is not installed.

    Args:
        store: Its folder must lie where every node of the cluster sees it.
        address: The cluster's address; None starts Ray on this machine. A running connection is used as it is.
        num_cpus: Cores a task.
        num_gpus: GPUs a task; above 0, samples and kernel are moved to the task's GPU.
        progress: Show a progress bar.

    Raises:
        OSError: A block cannot be written; the finished ones are kept.
        RuntimeError: The tasks ended but blocks are missing: the nodes do not see the same folder.
    """
    try:
        import ray
    except ImportError:
        _log.warning("Ray is not installed (pip install ray): computing the blocks in this process.")
        store.compute(progress=progress)
        return
    pending = store.missing()
    store._prepare(pending)
    started = not ray.is_initialized()
    if started:
        ray.init(address=address or os.environ.get("RAY_ADDRESS", "local"))  # None would look for old clusters first
    threads = str(max(1, int(num_cpus)))
    options: dict[str, Any] = {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}},
    }
    try:
        task, shared = ray.remote(**options)(_compute_block), ray.put(store)
        running = {task.remote(shared, block_id, num_gpus > 0): block_id for block_id in pending}
        with progress_bar("kernel blocks", sum(map(store._pairs, pending)), "pairs", enabled=progress) as advance:
            while running:
                for done in ray.wait(list(running))[0]:
                    ray.get(done)
                    advance(store._pairs(running.pop(done)))
    finally:
        if started:
            ray.shutdown()
    if left := store.missing():
        raise RuntimeError(
            f"{len(left)} blocks are not in {store.folder} although their tasks ended: choose a folder that all nodes "
            "of the cluster share."
        )


def _compute_block(store: KernelStore, block_id: BlockId, on_gpu: bool) -> None:
    """One Ray task."""
    if on_gpu:
        store.x = store.x.cuda()
        if isinstance(store.kernel, nn.Module):
            store.kernel.cuda()
    store.compute([block_id], progress=False)


def _flush(path: Path) -> None:
    """Have the disk hold a file or folder; a power cut between cannot then undo what the caller relies on."""
    if os.name == "posix":  # elsewhere folders cannot be opened, and the checksum finds what was lost
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
