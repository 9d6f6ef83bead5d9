"""The first samples of any loader by hand, every random state and the next epoch left as they were, clear errors.

Longer than 300 lines, since every kind of loader and every error has its case.
"""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from ntk_lightning.datamodules import Samples, TensorData
from ntk_lightning.datamodules.from_loaders import choose_loader, first_samples, named_loaders
from ntk_lightning.datamodules.unpack import unpack_batch

GLOBAL = np.random.default_rng(5)  # a script's own


def numbers(n: int = 10) -> TensorDataset:
    """Sample i is (10 i, i)."""
    return TensorDataset(10.0 * torch.arange(n), torch.arange(n))


def values(samples: Samples) -> tuple[Any, Any]:
    return samples.x.tolist(), samples.y.tolist()


class Stream(IterableDataset[tuple[Tensor, int]]):
    """Gives (10 i, i), and keeps how far it has been read."""

    def __init__(self, n: int) -> None:
        self.n, self.given = n, 0

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        while self.given < self.n:
            self.given += 1
            yield torch.tensor(10.0 * (self.given - 1)), self.given - 1


class Batched(Dataset[tuple[Tensor, Tensor]]):
    """Gives batches of 4 by number, or those of a list of indices."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        y = torch.tensor(index) if isinstance(index, list) else torch.arange(4 * index, 4 * index + 4)
        return 10.0 * y, y


class Recorded(Dataset[tuple[Tensor, int]]):
    """Keeps which samples were read, one at a time or together."""

    def __init__(self, together: bool) -> None:
        self.read: list[Any] = []
        if together:
            self.__getitems__ = lambda index: self.read.append(index) or [(torch.ones(1), i) for i in index]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read.append(index)
        return torch.ones(1), index


class Reiterable:
    """Iterates over batches again, each time from where its counter is."""

    def __init__(self) -> None:
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        for part in range(3):
            y = 100 * self.epoch + torch.arange(2 * part, 2 * part + 2)
            yield 10.0 * y, y


def subset_rank(sampler: Any) -> DistributedSamplerWrapper:  # noqa: ANN401
    return DistributedSamplerWrapper(sampler, num_replicas=2, rank=1)


def own_data() -> Any:  # noqa: ANN401
    y = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    pool = torch.arange(4.0)[:, None] * torch.tensor([[1.0, 9.0]]), y
    data = TensorData(pool, pool, n_train=4, n_test=2)
    data.setup()
    return data


FIRST = ([0.0, 10.0, 20.0], [0, 1, 2])

LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(numbers(), batch_size=4),
    "shuffled": lambda: DataLoader(numbers(), batch_size=2, shuffle=True),
    "batches smaller than the last": lambda: DataLoader(numbers(), batch_size=4, drop_last=True),
    "persistent workers": lambda: DataLoader(numbers(), num_workers=2, persistent_workers=True),
    "weighted": lambda: DataLoader(numbers(), sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "one rank's share": lambda: DataLoader(numbers(), sampler=DistributedSampler(numbers(), 2, 1)),
    "one rank's share of a sampler": lambda: DataLoader(numbers(), sampler=subset_rank(RandomSampler(range(10)))),
    "a batch sampler": lambda: DataLoader(numbers(), batch_sampler=[[9, 8], [7, 6]]),
    "an empty batch sampler": lambda: DataLoader(numbers(), batch_sampler=[]),
    "a subset": lambda: DataLoader(
        Subset(TensorDataset(torch.arange(-10.0, 90, 10), torch.arange(-1, 9)), [1, 2, 3, 4])
    ),
    "stream": lambda: DataLoader(Stream(100), batch_size=2),
    "endless stream with workers": lambda: DataLoader(Stream(10**12), batch_size=2, num_workers=2),
    "batches from the data set": lambda: DataLoader(Batched(), batch_size=None),
    "bulk reads": lambda: DataLoader(
        Batched(), batch_size=None, sampler=BatchSampler(SequentialSampler(range(3)), 2, False)
    ),
    "samples without collation": lambda: DataLoader(numbers(), batch_size=None, shuffle=True),
    "stream without collation": lambda: DataLoader(Stream(100), batch_size=None),
    "a list of batches": lambda: [
        (torch.tensor([0.0, 10.0]), torch.tensor([0, 1])),
        (torch.tensor([20.0]), torch.tensor([2])),
    ],
    "CombinedLoader of one": lambda: CombinedLoader({"a": DataLoader(numbers())}),
    "a list of one loader": lambda: [DataLoader(numbers())],
    "a dict of one loader": lambda: {"a": DataLoader(numbers())},
}


@pytest.mark.parametrize("case", LOADERS)
def test_first_samples_by_hand(case: str) -> None:
    loader = LOADERS[case]()
    assert values(first_samples(loader, 3)) == FIRST
    assert values(first_samples(loader, 3)) == FIRST


def test_a_sampler_of_a_subset_is_kept_to() -> None:
    held_out = SubsetRandomSampler([8, 3, 5, 9])
    wanted = ([30.0, 50.0, 80.0], [3, 5, 8])
    assert values(first_samples(DataLoader(numbers(), sampler=held_out), 3)) == wanted
    assert values(first_samples(DataLoader(numbers(), sampler=subset_rank(held_out)), 3)) == wanted
    batches = BatchSampler(held_out, 2, False)
    assert values(first_samples(DataLoader(numbers(), batch_sampler=batches), 3)) == wanted
    with pytest.raises(ValueError, match="has 4 samples, fewer than the 5 asked for"):
        first_samples(DataLoader(numbers(), sampler=held_out), 5)


def test_streams_and_iterables_stay_where_they_are() -> None:
    stream = Stream(100)
    first_samples(DataLoader(stream, batch_size=2), 5)
    assert stream.given == 0
    batches = Reiterable()
    assert values(first_samples(batches, 3)) == ([1000.0, 1010.0, 1020.0], [100, 101, 102])
    assert batches.epoch == 0


@pytest.mark.parametrize("together", [False, True])
def test_samples_are_read_once_as_torch_reads_them(together: bool) -> None:
    data = Recorded(together)
    assert first_samples(DataLoader(data, batch_size=2, shuffle=True), 4).y.tolist() == [0, 1, 2, 3]
    assert data.read == ([[0, 1, 2, 3]] if together else [0, 1, 2, 3])


def test_padding_gives_one_length() -> None:
    sentences = [torch.arange(1, length + 1) for length in (2, 5, 1)]

    def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        tokens = pad_sequence([sentence for sentence, _ in samples], batch_first=True)
        return {"input_ids": tokens, "attention_mask": tokens != 0, "labels": torch.tensor([y for _, y in samples])}

    data: Any = list(zip(sentences, (1, 0, 1), strict=True))
    read = first_samples(DataLoader(data, batch_size=1, collate_fn=collate), 3)
    assert read.x["input_ids"].tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]
    assert read.x["input_ids"].dtype == torch.int64
    assert read.x["attention_mask"].sum(1).tolist() == [2, 5, 1]
    assert list(read.x) == ["input_ids", "attention_mask"]
    assert read.y.tolist() == [1, 0, 1]


def test_the_package_s_own_loaders_give_their_samples() -> None:
    data = own_data()
    read = first_samples(data.train_dataloader(), 3)
    assert torch.equal(read.x, data.train_set.x[:3])
    assert torch.equal(read.y, data.train_set.y[:3])
    given = first_samples(data.train_dataloader(), 9, lambda batch: ((batch.x, batch.indices), batch.y), fewer=True)
    assert given.x[1].tolist() == [0, 1, 2, 3]


def test_a_function_of_the_batch_replaces_the_rules() -> None:
    def collate(samples: list[Any]) -> Any:  # noqa: ANN401
        x = torch.stack([x for x, _ in samples])
        return {"encoder": x, "length": len(x)}, (x / 10, None)  # pytorch-forecasting's form

    loader = DataLoader(numbers(), batch_size=3, collate_fn=collate)
    read = first_samples(loader, 4, lambda batch: ((batch[0],), batch[1][0]))
    assert read.x[0]["encoder"].tolist() == [0.0, 10.0, 20.0, 30.0]
    assert read.x[0]["length"] == 4
    assert read.y.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("key", ["labels", "label", "targets", "target", "y"])
def test_mappings_name_their_targets(key: str) -> None:
    x, y = unpack_batch(UserDict({"ids": torch.tensor([[7]]), key: torch.tensor([1])}))
    assert type(x) is UserDict
    assert dict(x) == {"ids": torch.tensor([[7]])}
    assert y.tolist() == [1]


def test_inputs_of_a_tuple_may_be_a_tree() -> None:
    x, y = unpack_batch([({"a": torch.ones(2)}, torch.zeros(2)), torch.tensor([1, 0]), torch.ones(2)])
    assert x[0]["a"].tolist() == [1, 1]
    assert y.tolist() == [1, 0]


def states() -> list[Any]:
    name, keys, *rest = np.random.get_state()
    return [
        torch.random.get_rng_state().tolist(),
        name,
        keys.tolist(),
        rest,
        random.getstate(),
        str(GLOBAL.bit_generator.state),
    ]


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every generator there is for each sample."""

    def __init__(self) -> None:
        self.torch_generator = torch.Generator().manual_seed(1)
        self.transforms = [np.random.default_rng(2), {"inner": (random.Random(3), np.random.RandomState(4))}]
        closed = torch.Generator().manual_seed(6)
        self.noise = lambda: torch.rand(1, generator=closed)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator, inner = self.transforms
        python, old = inner["inner"]
        drawn = [torch.rand(1).item(), np.random.rand(), random.random(), python.random(), old.rand()]
        drawn += [generator.random(), GLOBAL.random(), torch.rand(1, generator=self.torch_generator).item()]
        return torch.tensor([*drawn, self.noise().item(), float(index)]), index


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_leaves_no_trace_in_any_random_state(workers: int) -> None:
    def epochs(read: bool) -> tuple[list[Any], list[Any], Tensor]:
        global GLOBAL
        GLOBAL = np.random.default_rng(5)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        generator = torch.Generator().manual_seed(9)
        loader = DataLoader(Augmented(), batch_size=3, shuffle=True, num_workers=workers, generator=generator)
        first = [batch.tolist() for batch, _ in loader]
        before, order = states(), generator.get_state()
        if read:
            assert first_samples(loader, 5).x[:, -1].tolist() == [0, 1, 2, 3, 4]
            with pytest.raises(ValueError, match="has 8 samples"):
                first_samples(loader, 9)
            with pytest.raises(ZeroDivisionError):
                first_samples(loader, 5, lambda batch: 1 / 0)
            assert states() == before
            assert torch.equal(generator.get_state(), order)
        second = [batch.tolist() for batch, _ in loader]
        return [first, second], states(), generator.get_state()

    plain, with_reading = epochs(read=False), epochs(read=True)
    assert plain[0] == with_reading[0]
    assert plain[1] == with_reading[1]
    assert torch.equal(plain[2], with_reading[2])


def test_random_transforms_come_out_the_same_at_every_call() -> None:
    loader = DataLoader(Augmented(), batch_size=3, shuffle=True)
    read = first_samples(loader, 5)
    torch.rand(7)
    list(loader)
    GLOBAL.random()
    again = first_samples(loader, 5)
    assert torch.equal(read.x, again.x)
    assert len(set(read.x[:, :-1].flatten().tolist())) == 45  # one stream for each of nine generators


def test_collate_fn_s_own_generator_is_put_back() -> None:
    generator = torch.Generator().manual_seed(1)

    def collate(samples: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.rand(len(samples), generator=generator), torch.tensor([y for _, y in samples])

    before = generator.get_state()
    loader = DataLoader(numbers(), collate_fn=collate)
    read = first_samples(loader, 5)
    assert torch.equal(generator.get_state(), before)
    list(loader)
    assert torch.equal(first_samples(loader, 5).x, read.x)


class Lengthless(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class OnFile(IterableDataset[int]):
    def __init__(self, path: Path) -> None:
        self.file = path.open()

    def __iter__(self) -> Iterator[int]:
        return map(int, self.file)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "too few": (lambda: DataLoader(numbers(4)), ValueError, "TensorDataset has 4 samples, fewer than the 5 asked"),
    "stream ends early": (lambda: DataLoader(Stream(4)), ValueError, "Stream has 4 samples, fewer than the 5 asked"),
    "batches end early": (lambda: [next(iter(Reiterable()))], ValueError, "The loader has 2 samples, fewer than the 5"),
    "own ends early": (lambda: own_data().train_dataloader(), ValueError, "has 4 samples, fewer than the 5"),
    "empty": (lambda: DataLoader(numbers(0)), ValueError, "TensorDataset has no samples"),
    "empty bulk reads": (
        lambda: DataLoader(numbers(0), batch_size=None, sampler=BatchSampler(SequentialSampler([]), 2, False)),
        ValueError,
        "has no samples",
    ),
    "empty stream": (lambda: DataLoader(Stream(0)), ValueError, "Stream has no samples"),
    "empty list": (list, ValueError, "The loader has no samples"),
    "no loader": (lambda: None, TypeError, "NoneType is no loader"),
    "iterator": (lambda: iter(DataLoader(numbers())), TypeError, "an iterator, which reading would use up"),
    "exhausted generator": (lambda: (i for i in ()), TypeError, "generator is an iterator"),
    "no length": (lambda: DataLoader(Lengthless(), sampler=range(3)), TypeError, "Lengthless has no length"),
    "sizes differ": (
        lambda: DataLoader([(torch.ones(1 + i % 2), i) for i in range(6)]),
        ValueError,
        "cannot make one batch of the first 5 samples of The data set list: stack expects",
    ),
    "batches' sizes differ": (
        lambda: [(torch.ones(2, i), torch.ones(2)) for i in range(3)],
        ValueError,
        r"shapes \(2, 0\) and \(2, 1\) cannot be joined",
    ),
    "numbers differ": (
        lambda: [(torch.ones(2), torch.ones(3))],
        ValueError,
        "A batch has 2 inputs and 3 targets",
    ),
    "collate_fn drops samples": (
        lambda: DataLoader(numbers(), collate_fn=lambda s: (torch.ones(2), torch.ones(2))),
        ValueError,
        "makes 2 samples of the first 5",
    ),
    "no labels": (
        lambda: DataLoader([{"input_ids": torch.ones(1)}] * 6),
        ValueError,
        r"keys \['input_ids'\] has no targets: name them by one of labels, .* or give samples=",
    ),
    "two labels": (
        lambda: [{"y": torch.ones(6), "label": torch.ones(6), "x": torch.ones(6)}],
        ValueError,
        r"several targets, \['label', 'y'\]",
    ),
    "labels only": (lambda: [{"y": torch.ones(6)}], ValueError, "no tensor in inputs"),
    "inputs only": (lambda: DataLoader(torch.ones(6, 2)), ValueError, "type Tensor is neither"),
    "a tuple of one": (lambda: DataLoader(TensorDataset(torch.ones(6))), ValueError, "of length 1 is neither"),
    "targets are text": (
        lambda: DataLoader([(torch.ones(1), "cat")] * 6),
        TypeError,
        "targets of a batch must be a tensor, got (list|tuple): give samples=",
    ),
    "several loaders": (
        lambda: [DataLoader(numbers()), DataLoader(numbers())],
        ValueError,
        r"there are 2 \('0', '1'\): choose or give one",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_bad_loader_is_one_clear_error(case: str) -> None:
    make, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        first_samples(make(), 5)


def test_fewer_samples_are_taken_where_that_is_allowed() -> None:
    for loader in (
        DataLoader(numbers(3)),
        DataLoader(Stream(3), batch_size=2),
        DataLoader(numbers(3), batch_size=None),
    ):
        assert values(first_samples(loader, 5, fewer=True)) == FIRST
    with pytest.raises(ValueError, match="no samples"):
        first_samples(DataLoader(numbers(0)), 5, fewer=True)


def test_a_stream_that_cannot_be_copied_says_so(tmp_path: Path) -> None:
    (tmp_path / "numbers").write_text("1\n2\n")
    with pytest.raises(TypeError, match=r"OnFile cannot be copied .* make generators in its __iter__"):
        first_samples(DataLoader(OnFile(tmp_path / "numbers")), 1)


def test_errors_of_the_data_set_are_its_own_with_a_note() -> None:
    class Broken(Lengthless):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> int:
            raise OSError(f"no file {index}")

    with pytest.raises(OSError, match="no file 0") as caught:
        first_samples(DataLoader(Broken()), 1)
    assert any("without worker_init_fn" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_a_bad_count_is_refused(count: Any, error: type[Exception]) -> None:  # noqa: ANN401
    with pytest.raises(error, match="count must be"):
        first_samples(DataLoader(numbers()), count)


@pytest.mark.parametrize("pair", [lambda batch: batch[0], lambda batch: (1, 2, 3)])
def test_a_function_of_the_batch_must_give_a_pair(pair: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"samples= must give \(inputs, targets\)"):
        first_samples(DataLoader(numbers()), 2, pair)


def test_loaders_are_chosen_by_number_and_by_name() -> None:
    a, b, c = DataLoader(numbers(1)), DataLoader(numbers(2)), DataLoader(numbers(3))
    nested = {"clean": a, "noisy": [b, c]}
    assert [name for name, _ in named_loaders(nested)] == ["clean", "noisy/0", "noisy/1"]
    assert choose_loader(nested, "noisy/1") is c
    assert choose_loader(CombinedLoader(nested, "sequential"), 1) is b
    assert [loader for _, loader in named_loaders(nested)] == CombinedLoader(nested, "sequential").flattened
    assert choose_loader(a) is a
    assert choose_loader([a, b], 0) is a
    with pytest.raises(ValueError, match="There is no loader 'dirty': choose one of 'clean', 'noisy/0', 'noisy/1'"):
        choose_loader(nested, "dirty")
    with pytest.raises(ValueError, match="There is no loader 3"):
        choose_loader(nested, 3)
    with pytest.raises(ValueError, match="there is none"):
        choose_loader([])
