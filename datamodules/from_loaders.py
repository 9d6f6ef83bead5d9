"""The first samples of any loader, read without a trace: what kernels of a user's own run are computed on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler

from ntk_lightning.datamodules.batches import BatchLoader
from ntk_lightning.datamodules.samples import Batch, Samples
from ntk_lightning.datamodules.unpack import Unpack, unpack_batch, unpack_samples
from ntk_lightning.pytrees import concatenate
from ntk_lightning.random_state import fixed_seed
from ntk_lightning.whole_number import check_size

__all__ = ["choose_loader", "first_samples", "named_loaders"]

_SEED = 0x5EED  # of random transforms: the same samples on every process and at every call


def first_samples(loader: object, count: int, unpack: Unpack | None = None, *, fewer: bool = False) -> Samples:
    """Read the first samples of a loader's data set, in the order of their indices, through its ``collate_fn``.

    Nothing is drawn from the loader, its sampler or its workers, and every random state is put back: training on the
    same loader goes on as if nothing had been read. Random transforms get a fixed seed. What is read is

    - of a loader that collates samples: the first of the data set, collated in one call, so that padding gives one
      length. Of a ``SubsetRandomSampler`` the first of its indices; any other sampler orders the whole data set.
    - of a loader with ``batch_size=None`` and of any other iterable: its first items, each a batch, as a training
      step gets them, joined. An item whose target is a single number is one sample.
    - of a stream, an ``IterableDataset`` or an iterable that is no sequence: the first of a copy.

    Args:
        loader: A ``DataLoader``, a loader of ``ntk_lightning.datamodules``, a collection that holds exactly one, or an
            iterable of batches that can be iterated over again.
        count: Number n of samples.
        unpack: Function of a collated batch to (inputs, targets); by default
            :func:`ntk_lightning.datamodules.unpack.unpack_batch`.
        fewer: Take what there is where the data set has fewer samples, instead of an error.

    Returns:
        Inputs and targets of n samples, on the device that the loader gives.

    Raises:
        TypeError: The data set has no length, a stream cannot be copied, or the loader is an iterator.
        ValueError: There are fewer samples, they cannot be joined, or a batch has no targets or different sizes.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(6.0), torch.arange(6))
        >>> first_samples(DataLoader(data, batch_size=2, shuffle=True), 3)
        Samples(x=tensor([0., 1., 2.]), y=tensor([0, 1, 2]))
    """
    check_size("count", count, 1)
    unpack = unpack or unpack_batch
    loader = choose_loader(loader) if _is_collection(loader) else loader
    if isinstance(loader, BatchLoader):
        own = loader.samples.take(slice(_enough(len(loader.samples), count, fewer, "The loader's data set")))
        return unpack_samples(Batch(own.x, own.y, torch.arange(len(own)), len(own)), unpack)
    owners: list[object] = [loader.collate_fn] if isinstance(loader, DataLoader) else []
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        owners.append(loader.dataset)  # a stream is copied instead, and begins where its generator is
    try:
        with fixed_seed(_SEED, *owners):
            if not isinstance(loader, DataLoader):
                return _join(_iterate(loader), count, unpack, fewer, "The loader")
            if loader.batch_sampler is None:
                return _join(_items(loader, count), count, unpack, fewer, _name(loader.dataset))
            return _collate(loader, count, unpack, fewer)
    except Exception as error:
        error.add_note("A kernel reads the first samples of this loader in the main process, without worker_init_fn.")
        raise


def choose_loader(loaders: object, which: int | str | None = None) -> object:
    """Choose one of a run's loaders.

    Args:
        loaders: What a Trainer takes: one loader, lists, tuples and mappings of loaders, or a ``CombinedLoader``.
        which: Its number in order, or its name; None where there is exactly one.

    Returns:
        The loader.

    Raises:
        ValueError: There is no such loader, or there are several and none is chosen.

    Example:
        >>> choose_loader({"clean": [1], "noisy": range(3)}, "noisy")
        range(0, 3)
    """
    named = named_loaders(loaders)
    names = ", ".join(repr(name) for name, _ in named)
    if which is None and len(named) == 1:
        return named[0][1]
    if which is None:
        found = f"there are {len(named)} ({names})" if named else "there is none"
        raise ValueError(f"A kernel is computed on the samples of one loader, and {found}: choose or give one.")
    if isinstance(which, int) and 0 <= which < len(named):
        return named[which][1]
    for name, loader in named:
        if name == which:
            return loader
    raise ValueError(f"There is no loader {which!r}: choose one of {names}, or by number from 0 to {len(named) - 1}.")


def named_loaders(loaders: object, name: str = "") -> list[tuple[str, Any]]:
    """List a run's loaders in the order in which Lightning numbers them.

    Args:
        loaders: As of :func:`choose_loader`.
        name: Of the collection itself.

    Returns:
        Names, which are keys and numbers joined by "/", and loaders.

    Example:
        >>> [name for name, _ in named_loaders({"a": [range(2), range(3)], "b": range(4)})]
        ['a/0', 'a/1', 'b']
    """
    if _is_combined(loaders):
        loaders = cast(Any, loaders).iterables
    if isinstance(loaders, Mapping):
        parts: Iterable[tuple[Any, Any]] = loaders.items()
    elif isinstance(loaders, (list, tuple)):
        parts = enumerate(loaders)
    else:
        return [] if loaders is None else [(name or "0", loaders)]
    prefix = f"{name}/" if name else ""
    return [found for key, part in parts for found in named_loaders(part, f"{prefix}{key}")]


def _collate(loader: DataLoader[Any], count: int, unpack: Unpack, fewer: bool) -> Samples:
    """Read samples as torch's fetchers do, and collate all of them in one call."""
    data, name = loader.dataset, _name(loader.dataset)
    if isinstance(data, IterableDataset):
        samples = list(islice(_copy(data), count))
        _enough(len(samples), count, fewer, name)
    else:
        index = _indices(loader)
        index = index[: _enough(len(index), count, fewer, name)]
        together = getattr(data, "__getitems__", None)
        samples = together(index) if together else [data[i] for i in index]
    try:
        batch = loader.collate_fn(samples)
    except Exception as error:
        raise ValueError(
            f"collate_fn cannot make one batch of the first {len(samples)} samples of {name}: {error} Bring them "
            "to one size in the data set, or pad them in collate_fn."
        ) from error
    read = unpack_samples(batch, unpack)
    if len(read) != len(samples):
        raise ValueError(
            f"collate_fn makes {len(read)} samples of the first {len(samples)} of {name}: a kernel needs one for one."
        )
    return read


def _items(loader: DataLoader[Any], count: int) -> Iterator[Any]:
    """Read items without automatic collation: ``collate_fn`` converts each."""
    data: Any = loader.dataset
    if isinstance(data, IterableDataset):
        yield from map(loader.collate_fn, _copy(data))
    elif isinstance(loader.sampler, BatchSampler):  # the data set is asked for many indices at a time
        yield from (loader.collate_fn(data[part]) for part in [_indices(loader)[:count]] if part)
    else:
        yield from (loader.collate_fn(data[i]) for i in _indices(loader))


def _iterate(loader: object) -> Iterator[Any]:
    """Iterate over batches, without a trace in what gives them."""
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        what = "an iterator, which reading would use up" if isinstance(loader, Iterator) else "no loader"
        raise TypeError(
            f"{type(loader).__name__} is {what}: give a DataLoader, or an iterable of batches that can be iterated "
            "over again."
        )
    return iter(loader if isinstance(loader, Sequence) else _copy(loader))


def _join(items: Iterator[Any], count: int, unpack: Unpack, fewer: bool, name: str) -> Samples:
    """Join batches until there are enough samples."""
    parts: list[Samples] = []
    have = 0
    for item in items:
        parts.append(unpack_samples(item, unpack))
        have += len(parts[-1])
        if have >= count:
            break
    n = _enough(have, count, fewer, name)
    return Samples(concatenate([part.x for part in parts]), concatenate([part.y for part in parts])).take(slice(n))


def _indices(loader: DataLoader[Any]) -> list[int]:
    """List the indices of the data set that the loader gives, in increasing order."""
    data: Any = loader.dataset
    try:
        length = len(data)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            f"{_name(data)} has no length, so its first samples are not known: give it __len__, or make it an "
            "IterableDataset."
        ) from error
    outer = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    sampler = getattr(outer, "sampler", loader.sampler)
    if isinstance(sampler, DistributedSampler):  # Lightning's gives a rank its share of another sampler
        sampler = getattr(sampler.dataset, "_sampler", sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return sorted({int(i) for i in sampler.indices})
    return list(range(length))


def _copy(stream: Any) -> Any:  # noqa: ANN401 - any iterable
    """Copy what is iterated over, so that its state stays."""
    try:
        return copy.deepcopy(stream)
    except Exception as error:
        raise TypeError(
            f"{_name(stream)} cannot be copied ({error}), and reading its first samples would take them from the "
            "training: open files and make generators in its __iter__."
        ) from error


def _enough(have: int, count: int, fewer: bool, name: str) -> int:
    """Give the number of samples to take, or say how many there are."""
    if not have:
        raise ValueError(f"{name} has no samples: give one that is not empty.")
    if have < count and not fewer:
        raise ValueError(f"{name} has {have} samples, fewer than the {count} asked for: ask for at most {have}.")
    return min(have, count)


def _name(data: object) -> str:
    return f"The data set {type(data).__name__}"


def _is_combined(loaders: object) -> bool:
    """Tell a ``CombinedLoader``, of ``lightning`` or ``pytorch_lightning``."""
    return hasattr(loaders, "iterables") and hasattr(loaders, "flattened")


def _is_collection(loaders: object) -> bool:
    """Tell a collection of loaders; a list of anything else is one loader, of batches."""
    if isinstance(loaders, (list, tuple)):
        return bool(loaders) and all(isinstance(part, (DataLoader, BatchLoader)) for part in loaders)
    return isinstance(loaders, Mapping) or _is_combined(loaders)
