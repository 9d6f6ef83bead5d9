"""Two groups of classes as the two labels, and subsets that have every class equally often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_cifar5m import archives, folder_of, part
from test_datamodules import png

from ntk_lightning.datamodules import CIFAR5mBinary, CIFAR10Binary, TensorData
from ntk_lightning.datamodules.balanced import interleave
from ntk_lightning.optim import OptimizerConfig
from ntk_lightning.studies.build import build
from ntk_lightning.studies.cell_config import Cell

ANIMALS, VEHICLES = [2, 3, 4, 5, 6, 7], [0, 1, 8, 9]


def number_of(image: torch.Tensor) -> int:
    """Every image of the folder below is of one colour: its number."""
    return int(image[0, 0, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training images, 12 a class, and 40 test images of CIFAR-10's schema."""
    path = tmp_path_factory.mktemp("cifar")
    for split, n in (("train", 120), ("test", 40)):
        pictures = [{"bytes": png(np.full((32, 32, 3), i, np.uint8)), "path": None} for i in range(n)]
        labels = [(7 * i) % 10 for i in range(n)]
        pq.write_table(pa.table({"img": pictures, "label": labels}), path / f"{split}-0.parquet")
    return path


def test_groups_of_classes_are_labels_and_keep_their_classes(folder: Path) -> None:
    pool = CIFAR10Binary(str(folder), [VEHICLES, ANIMALS]).load(train=True)  # type: ignore[arg-type]  # a list, as in YAML
    assert len(pool) == 120
    assert pool.classes is not None
    for image, y, number in zip(pool.x, pool.y.tolist(), pool.classes.tolist(), strict=True):
        assert number == 7 * number_of(image) % 10
        assert y == (1.0 if number in ANIMALS else -1.0)
    some = CIFAR10Binary(str(folder), ([3, 5], 9)).load(train=False)
    assert {(7 * number_of(x) % 10, y) for x, y in zip(some.x, some.y.tolist(), strict=True)} == {
        (3, -1.0),
        (5, -1.0),
        (9, 1.0),
    }


def test_groups_of_one_are_the_two_classes(folder: Path) -> None:
    single, group = (CIFAR10Binary(str(folder), classes).load(train=True) for classes in ((5, 7), ([5], [7])))
    assert torch.equal(single.x, group.x)
    assert torch.equal(single.y, group.y)


@pytest.mark.parametrize("n", [2, 10, 24, 48, 96])
def test_balanced_subsets_have_every_class_of_a_label_equally_often(n: int, folder: Path) -> None:
    order: dict[int, list[int]] = {}
    for size in (n, 96):  # 48 vehicles and 72 animals: 96 images at most
        kwargs: dict[str, Any] = {"n_train": size, "n_test": 40, "normalize": False, "balanced": True, "subset_seed": 3}
        data = CIFAR10Binary(str(folder), (ANIMALS, VEHICLES), **kwargs)
        data.setup()
        assert data.train_set is not None
        order[size] = [number_of(image) for image in data.train_set.x]
    assert order[n] == order[96][:n]  # nested
    classes = Counter(7 * number % 10 for number in order[n])
    for group in (ANIMALS, VEHICLES):
        counts = [classes[number] for number in group]
        assert sum(counts) == n // 2
        assert max(counts) - min(counts) <= 1
    plain = CIFAR10Binary(str(folder), (ANIMALS, VEHICLES), n_train=96, n_test=40, normalize=False, subset_seed=3)
    plain.setup()
    assert plain.train_set is not None
    assert plain.train_set.y.mean() != 0  # what the option is for


def test_balanced_validation_and_fresh_samples_are_balanced_and_disjoint() -> None:
    x = torch.arange(100.0).reshape(100, 1, 1, 1)
    y = torch.where(torch.arange(100) < 30, 1.0, -1.0)
    data = TensorData((x, y), (x, y), n_train=20, n_val=10, fresh=30, n_statistics=100, normalize=False, balanced=True)
    data.setup()
    seen: set[float] = set()
    for split, n in (("train", 20), ("val", 10), ("fresh", 30)):
        samples = getattr(data, f"{split}_set")
        assert samples.y.sum() == 0
        values = set(samples.x.flatten().tolist())
        assert len(values) == n
        assert not values & seen
        seen |= values
    with pytest.raises(
        ValueError, match=r"fresh of balanced subsets = 61, but TensorData has 60 such samples: ask for"
    ):
        TensorData((x, y), (x, y), n_train=61, balanced=True).setup()


def test_an_order_is_interleaved_as_by_dealing_out_stacks() -> None:
    rng = np.random.default_rng(1)
    order, strata = rng.permutation(50), rng.choice(4, 50, p=[0.5, 0.3, 0.15, 0.05])
    stacks: dict[int, list[int]] = {}
    for position in order.tolist():
        stacks.setdefault(int(strata[position]), []).append(position)
    place = {position: i for i, position in enumerate(order.tolist())}
    dealt: list[int] = []
    while any(stacks.values()):
        tops = [stack.pop(0) for stack in stacks.values() if stack]
        dealt += sorted(tops, key=place.__getitem__)
    assert interleave(torch.from_numpy(order), torch.from_numpy(strata)).tolist() == dealt


def test_an_option_that_is_not_given_leaves_the_order() -> None:
    x, y = torch.arange(12.0).reshape(12, 1, 1, 1), torch.tensor([-1.0, 1.0]).repeat(6)
    data = TensorData((x, y), (x, y), normalize=False)
    data.setup()
    expected = np.random.default_rng(np.random.SeedSequence((0, 0x5EED))).permutation(12)
    assert data.train_set is not None
    assert data.train_set.x.flatten().tolist() == expected.tolist()


def test_cifar5m_keeps_groups_apart_from_two_classes_in_its_cache(tmp_path: Path) -> None:
    path, cache = folder_of(archives(), tmp_path / "parts"), str(tmp_path / "cache")
    CIFAR5mBinary(path, cache).prepare_data()
    pool = CIFAR5mBinary(path, cache, (ANIMALS, VEHICLES)).load(train=True)
    numbers = np.concatenate([part(i)[1] for i in range(5)])
    assert pool.classes is not None
    assert pool.classes.tolist() == numbers.tolist()
    assert pool.y.tolist() == [1.0 if number in VEHICLES else -1.0 for number in numbers]
    assert torch.equal(pool.x, torch.from_numpy(np.concatenate([part(i)[0] for i in range(5)])).movedim(-1, 1))
    pair = CIFAR5mBinary(path, cache).load(train=True)
    assert pair.classes is None
    assert len(pair) == int(np.isin(numbers, [5, 7]).sum())


def test_yaml_gives_two_classes_or_groups(folder: Path) -> None:
    for classes in ([5, 7], [[5], [7]], [ANIMALS, VEHICLES], [[3, 5], 7]):
        arguments = {"path": str(folder), "classes": classes, "n_train": 4, "n_test": 4, "balanced": True}
        data = {"class_path": "ntk_lightning.datamodules.CIFAR10Binary", "init_args": arguments}
        net = {"class_path": "ntk_lightning.networks.MyrtleCNN", "init_args": {"width": 2, "in_channels": 3}}
        made, _ = build(Cell("network", 4, 2, 0, OptimizerConfig(), data=data, net=net))
        made.setup()
        assert list(made.classes) == classes  # type: ignore[attr-defined]  # of this class


@pytest.mark.parametrize(
    "classes",
    [(5, 5), (5, 12), (5,), ([], 5), ([2, 3], [3, 4]), ([2, 2], [3]), ("dog", "horse"), ([1], [2], [3]), ([1.5], [2])],
)
def test_other_choices_of_classes_are_refused(classes: Any, folder: Path) -> None:  # noqa: ANN401 - wrong on purpose
    for make in (lambda: CIFAR10Binary(str(folder), classes), lambda: CIFAR5mBinary(str(folder), classes=classes)):
        with pytest.raises(ValueError, match="must be two different class numbers from 0 to 9, or two groups of such"):
            make()


def test_a_group_without_images_of_a_class_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.filter(np.isin(table["label"].to_numpy(), [5, 7])), tmp_path / file.name)
    CIFAR10Binary(str(tmp_path)).load(train=True)
    with pytest.raises(
        ValueError, match=r"train-0.parquet has no sample of the classes \[0, 1, 2, 3, 4, 6, 8, 9\]: give"
    ):
        CIFAR10Binary(str(tmp_path), (ANIMALS, VEHICLES)).load(train=True)
