"""Trees of tensors keep their form, token ids stay integers, and sizes that differ are refused."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType
from typing import Any

import pytest
import torch

from ntk_lightning.datamodules import Samples
from ntk_lightning.pytrees import concatenate, count_samples, map_tensors, named_tensors, take_samples, to_device

Pair = namedtuple("Pair", "a b")


def tree() -> Any:  # noqa: ANN401
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    return Pair([tokens, "text"], UserDict(mask=torch.tensor([1.0, 0.0, 1.0]), scale=2.5, flag=None))


def test_a_tree_keeps_its_form_and_what_is_no_tensor() -> None:
    doubled = map_tensors(lambda tensor: 2 * tensor, tree())
    assert type(doubled) is Pair
    assert type(doubled.a) is list
    assert doubled.a[0].tolist() == [[2, 4], [6, 8], [10, 12]]
    assert doubled.a[1] == "text"
    assert type(doubled.b) is UserDict
    assert doubled.b["mask"].tolist() == [2.0, 0.0, 2.0]
    assert (doubled.b["scale"], doubled.b["flag"]) == (2.5, None)
    assert [name for name, _ in named_tensors(tree())] == ["[0][0]", "[1]['mask']"]


@pytest.mark.parametrize(
    ("mapping", "kind"),
    [
        (OrderedDict(x=torch.ones(2)), OrderedDict),
        (UserDict(x=torch.ones(2)), UserDict),
        (MappingProxyType({"x": torch.ones(2)}), MappingProxyType),
        (defaultdict(list, x=torch.ones(2)), dict),  # cannot be made from its entries
    ],
)
def test_a_mapping_keeps_its_type_where_it_can(mapping: Any, kind: type) -> None:  # noqa: ANN401
    halved = map_tensors(lambda tensor: tensor / 2, mapping)
    assert type(halved) is kind
    assert halved["x"].tolist() == [0.5, 0.5]
    assert mapping["x"].tolist() == [1.0, 1.0]


def test_samples_are_taken_by_slice_and_by_position() -> None:
    first = take_samples(tree(), slice(2))
    assert first.a[0].tolist() == [[1, 2], [3, 4]]
    assert first.b["mask"].tolist() == [1.0, 0.0]
    picked = take_samples(tree(), torch.tensor([2, 0]))
    assert picked.a[0].tolist() == [[5, 6], [1, 2]]


def test_only_floating_point_tensors_are_cast() -> None:
    cast = to_device(tree(), "cpu", torch.float64)
    assert cast.a[0].dtype == torch.int64
    assert cast.b["mask"].dtype == torch.float64
    same = tree()
    assert to_device(same, "cpu").a[0] is same.a[0]
    assert to_device(torch.tensor([True]), dtype=torch.float16).dtype == torch.bool


def test_samples_of_trees_move_and_are_counted() -> None:
    samples = Samples(tree(), torch.tensor([0, 1, 1])).to("meta", torch.float16)
    assert len(samples) == 3
    assert {(tensor.device.type, tensor.dtype) for _, tensor in named_tensors(samples.x)} == {
        ("meta", torch.int64),
        ("meta", torch.float16),
    }
    last = Samples(tree(), torch.tensor([0, 1, 1])).take(slice(2, None))
    assert (last.x.a[0].tolist(), last.y.tolist()) == ([[5, 6]], [1])


def test_trees_are_joined() -> None:
    joined = concatenate([take_samples(tree(), slice(1)), take_samples(tree(), slice(1, None))])
    assert joined.a[0].tolist() == tree().a[0].tolist()
    assert joined.b["mask"].tolist() == [1.0, 0.0, 1.0]
    assert type(joined) is Pair


def test_trees_that_differ_are_not_joined() -> None:
    with pytest.raises(ValueError, match=r"Tensors at \['x'\] of shapes \(1, 2\) and \(1, 3\)"):
        concatenate([{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}])
    with pytest.raises(ValueError, match="differ in form"):
        concatenate([{"x": torch.ones(1)}, {"z": torch.ones(1)}])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"\['a'\]: \(2,\), \['b'\]: \(3,\)"),
        ([torch.tensor(1.0)], r"at \[0\] has no dimension"),
        (torch.tensor(1.0), "The tensor has no dimension"),
        ({"text": ["a", "b"]}, "There is no tensor in inputs of type dict"),
    ],
)
def test_trees_without_a_number_of_samples_are_refused(bad: Any, message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        count_samples(bad)
