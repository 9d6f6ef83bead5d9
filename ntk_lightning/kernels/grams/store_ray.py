"""The missing blocks of a store, computed as Ray tasks."""

from __future__ import annotations

import logging
import os
from typing import Any

from torch import nn

from ntk_lightning.kernels.grams.store import BlockId, KernelStore
from ntk_lightning.progress import progress_bar

__all__ = ["compute_on_ray"]

_log = logging.getLogger(__name__)


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
