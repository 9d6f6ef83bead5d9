"""Grams on disk: the same bytes after kills, by any number of processes, and no finished block twice.

Longer than 300 lines, since kills, damage and concurrent writers are tried on one logged kernel.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from tiny import file_size_limit
from torch import Tensor, nn

from ntk_lightning.kernels import EmpiricalNTK, InfiniteNTK, kernel_key
from ntk_lightning.kernels.grams import store as store_module
from ntk_lightning.kernels.grams.store import BlockId, KernelStore
from ntk_lightning.kernels.grams.store_ray import compute_on_ray
from ntk_lightning.networks import MLP, MyrtleCNN, NTKLinear

DATA = Path(__file__).parent / "data"
PROCESSES = multiprocessing.get_context("forkserver")  # children start with the imports done, in milliseconds
PROCESSES.set_forkserver_preload(["ntk_lightning.kernels.grams.store"])


class LoggedKernel:
    """A linear kernel that appends "i j" (the first samples of both sides) and its process to a file at every call."""

    fingerprint = "linear"

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        self.log, self.seconds = log, seconds

    def __call__(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        x2 = x1 if x2 is None else x2
        line = f"{int(x1[0, 0])} {int(x2[0, 0])} {os.getpid()}\n".encode()
        descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line)
        os.close(descriptor)
        time.sleep(self.seconds)
        return x1 @ x2.T


def samples(n: int) -> Tensor:
    """Integers, so that sums are exact, with the sample's number first."""
    x = torch.randint(-9, 10, (n, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 0] = torch.arange(n)
    return x


def computed(log: Path, block: int) -> Counter[BlockId]:
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(tuple(sorted((int(i) // block, int(j) // block))) for i, j, _ in lines)


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but what killed writers left beside the blocks."""
    paths = (path for path in folder.rglob("*") if path.is_file() and ".partial" not in str(path))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def work(folder: Path, log: Path, n: int, block: int, seconds: float, barrier: Barrier | None = None) -> None:
    store = KernelStore(folder, LoggedKernel(log, seconds), samples(n), block=block)
    if barrier is not None:
        barrier.wait()
    store.compute(progress=False)


def die_before_rename(folder: Path, log: Path) -> None:
    os.link = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    work(folder, log, 10, 5, 0.0)


def block_files(store: KernelStore) -> list[Path]:
    return sorted(store.folder.glob("*.zarr.zip"))


def empirical(memory: str = "4GB") -> EmpiricalNTK:
    torch.manual_seed(1)
    return EmpiricalNTK(MLP(6, 2, 4, num_outputs=2).double(), memory=memory)


@pytest.mark.parametrize("make", [empirical, lambda: InfiniteNTK(MLP(1, 2, 4))])
@pytest.mark.parametrize("block", [3, 4, 100])
def test_pieces_are_slices_of_one_gram(tmp_path: Path, make: Callable[[], EmpiricalNTK], block: int) -> None:
    kernel, x = make(), samples(11) / 10 + 0.05
    gram = kernel(x)
    store = KernelStore(tmp_path, kernel, x, block=block)
    mask = torch.arange(11) % 3 == 0
    choices = [slice(None), slice(2, 9, 2), slice(-4, None), [10, 0, 7, 7], torch.tensor([5, 4]), mask]
    for rows in choices:
        for cols in (*choices, None):
            expected = gram[rows][:, rows if cols is None else cols]
            torch.testing.assert_close(store.gram(rows, cols, progress=False), expected, rtol=1e-12, atol=1e-12)
    assert store.missing() == []


def test_only_touched_blocks_are_computed_and_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    store = KernelStore(tmp_path, LoggedKernel(log), samples(20), block=5)
    store.gram(slice(0, 7), progress=False)
    store.gram(slice(0, 3), slice(15, 20), progress=False)
    store.gram([16], [2, 0], progress=False)
    store.compute([(2, 3)], progress=False)
    done = {(0, 0), (0, 1), (1, 1), (0, 3), (2, 3)}
    assert computed(log, 5) == dict.fromkeys(done, 1)
    assert store.missing() == [block for block in store.block_ids if block not in done]
    assert len(block_files(store)) == len(done)


def test_more_samples_and_another_order_reuse_the_blocks(tmp_path: Path) -> None:
    log, x = tmp_path / "log", samples(25)
    KernelStore(tmp_path, LoggedKernel(log), x[:15], block=5).compute(progress=False)
    assert computed(log, 5).total() == 6
    grown = KernelStore(tmp_path, LoggedKernel(log), x[:23], block=5)
    assert grown.missing() == [(i, j) for i, j in grown.block_ids if j >= 3]
    assert torch.equal(grown.gram(slice(None), progress=False), x[:23] @ x[:23].T)
    assert computed(log, 5).total() == 15
    order = torch.arange(25).view(5, 5)[[2, 0, 3, 1, 0]].flatten()
    moved = KernelStore(tmp_path, LoggedKernel(log), x[order], block=5)
    assert torch.equal(moved.gram(slice(None), progress=False), x[order] @ x[order].T)
    assert computed(log, 5).total() == 15


def test_what_changes_the_values_changes_the_key() -> None:
    torch.manual_seed(0)
    net = MLP(5, 1, 4)
    kernels = {
        "infinite": InfiniteNTK(net),
        "nngp": InfiniteNTK(net, kind="nngp"),
        "backend": InfiniteNTK(net, backend="reference"),
        "depth": InfiniteNTK(MLP(5, 2, 4)),
        "weight_std": InfiniteNTK(MLP(5, 1, 4, weight_std=2**0.5 + 1e-9)),
        "images": InfiniteNTK(MyrtleCNN(2)),
        "empirical": EmpiricalNTK(net),
        "output": EmpiricalNTK(net, output=0),
        "dtype": EmpiricalNTK(net, dtype=torch.float64),
        "features": EmpiricalNTK(net, features="bfloat16"),
        "full": EmpiricalNTK(net, full=True),
        "double": EmpiricalNTK(MLP(5, 1, 4).double()),
        "other weights": EmpiricalNTK(MLP(5, 1, 4)),
        "fingerprint": LoggedKernel(Path()),
        "other fingerprint": SimpleNamespace(fingerprint="linear"),
    }
    net[1].requires_grad_(False)
    kernels["frozen"] = EmpiricalNTK(net)
    net.requires_grad_()
    for change in ("weight", "scale", "activation", "mode"):
        kernel = EmpiricalNTK(net)
        if change == "weight":
            kernel.net[1].weight[2, 3] += 1e-6
        elif change == "scale":  # too small a change for repr(net) to show
            kernel.net[1].weight_std += 1e-9
        elif change == "activation":
            kernel.net[2] = nn.LeakyReLU()
        else:
            kernel.net.eval()
        kernels[change] = kernel
    assert len({kernel_key(kernel) for kernel in kernels.values()}) == len(kernels)


def test_a_module_or_parameter_used_again_changes_the_key() -> None:
    first, second, act = NTKLinear(4, 4), NTKLinear(4, 4), nn.ReLU()
    second.load_state_dict(first.state_dict())
    tied = NTKLinear(4, 4)
    tied.weight = first.weight
    nets = [(first, act), (first, act, act), (first, act, first), (first, act, second)]
    keys = [kernel_key(EmpiricalNTK(nn.Sequential(*net))) for net in nets]
    assert kernel_key(EmpiricalNTK(nn.Sequential(first, act, tied))) == keys[2]
    keys += [kernel_key(EmpiricalNTK(nn.Sequential(first, second, third))) for third in (first, second)]
    keys += [kernel_key(InfiniteNTK(nn.Sequential(first, act, second, *end, NTKLinear(4, 1)))) for end in ([], [act])]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_has_no_name(hook: str) -> None:
    net = MLP(5, 1, 4)
    handle = getattr(net[1], hook)(lambda *_: None)
    with pytest.raises(TypeError, match=r"net\.1' has forward hooks.*fingerprint"):
        kernel_key(EmpiricalNTK(net))
    handle.remove()
    kernel_key(EmpiricalNTK(net))


@pytest.mark.parametrize("make", [lambda: EmpiricalNTK(MLP(6, 2, 4)), lambda: InfiniteNTK(MLP(1, 2, 4))])
def test_samples_in_half_precision_are_stored_in_float32(
    tmp_path: Path, make: Callable[[], EmpiricalNTK], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, x = make(), samples(9).bfloat16() / 10
    gram = KernelStore(tmp_path, kernel, x, block=4).gram(slice(None), progress=False)
    assert gram.dtype == torch.float32
    torch.testing.assert_close(gram, kernel(x))
    free = 4 * (9 * 8 // 2)  # bytes, fewer than 45 entries of float32 and more than as many of bfloat16
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="needed"):
        KernelStore(tmp_path, kernel, x + 1, block=9).compute(progress=False)


def test_what_keeps_the_values_keeps_the_key() -> None:
    assert kernel_key(InfiniteNTK(MLP(3, 2, 4))) == kernel_key(InfiniteNTK(MLP(30, 2, 4)))
    assert kernel_key(empirical()) == kernel_key(empirical())
    assert kernel_key(empirical(memory="1GB")) == kernel_key(empirical())
    with PROCESSES.Pool(1) as pool:
        assert pool.apply(kernel_key, (empirical(),)) == kernel_key(empirical())


def test_other_data_dtype_or_shape_share_no_block(tmp_path: Path) -> None:
    x = samples(6)
    changed = x.clone()
    changed[0, 1] += 1e-9
    swapped = x.view(6, 2, 2).transpose(1, 2).reshape(6, 4)
    log = tmp_path / "log"
    for data in (x, changed, x.float(), swapped, -x):
        store = KernelStore(tmp_path, LoggedKernel(log), data, block=6)
        assert store.missing() == [(0, 0)]
        gram = store.gram(slice(None), progress=False)
        assert gram.dtype == data.dtype
        assert torch.equal(gram, data @ data.T)
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    KernelStore(tmp_path, LoggedKernel(log), zeros, block=6).compute(progress=False)
    for same_bytes in (zeros.view(6, 2, 2), torch.zeros(6, 8), zeros.view(3, 8)):
        assert KernelStore(tmp_path, LoggedKernel(log), same_bytes, block=6).missing() == [(0, 0)]


@pytest.mark.parametrize("attribute", [lambda x: x, object(), nn.ReLU().forward, [torch.Generator()]])
def test_a_kernel_without_a_name_is_refused(attribute: object) -> None:
    net = NTKLinear(4, 1)
    net.attribute = attribute
    with pytest.raises(TypeError, match=r"net\.attribute.*fingerprint"):
        kernel_key(nn.ModuleDict({"net": net}))
    with pytest.raises(TypeError, match="fingerprint"):
        kernel_key(lambda x: x)
    with pytest.raises(TypeError, match="must be a string"):
        kernel_key(SimpleNamespace(fingerprint=3))


def test_attributes_of_every_plain_type_are_named() -> None:
    values = [1, True, 1.0, "1", None, (1, 2), [1, [2]], {"a": 1}, {"a": 2}, torch.float32, torch.ones(2), torch.relu]
    keys = set()
    for value in [*values, torch.zeros(2), nn.functional.relu, nn.ReLU]:
        net = NTKLinear(4, 1)
        nn.init.ones_(net.weight)
        net.attribute = value
        keys.add(kernel_key(net))
    assert len(keys) == len(values) + 3


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, contents: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 1  # among the values of the chunk, which comes first
    path.write_bytes(content)


def flip_bit_inside(path: Path) -> None:
    contents = members(path)
    contents["c/0/0"] = bytes([contents["c/0/0"][0] ^ 1]) + contents["c/0/0"][1:]
    rewrite(path, contents)


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def truncate_metadata(path: Path) -> None:
    rewrite(path, members(path) | {"zarr.json": members(path)["zarr.json"][:100]})


def change_metadata(path: Path) -> None:
    metadata = json.loads(members(path)["zarr.json"])
    metadata["shape"] = [5, 10**9]
    rewrite(path, members(path) | {"zarr.json": json.dumps(metadata).encode()})


def plant_integers(path: Path) -> None:
    path.unlink()
    with zarr.storage.ZipStore(path, mode="w") as archive:
        zarr.create_array(archive, data=np.ones((5, 5), np.int64))


def lose_chunk(path: Path) -> None:
    rewrite(path, {"zarr.json": members(path)["zarr.json"]})


def lose_metadata(path: Path) -> None:
    rewrite(path, {"c/0/0": members(path)["c/0/0"]})


@pytest.mark.parametrize(
    "damage",
    [
        *(flip_bit, flip_bit_inside, truncate, empty, truncate_metadata, change_metadata),
        *(plant_integers, lose_chunk, lose_metadata),
    ],
)
def test_a_damaged_block_is_found_and_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    log = tmp_path / "log"
    store = KernelStore(tmp_path, LoggedKernel(log), samples(15), block=5)
    store.compute(progress=False)
    before = files(store.folder)
    damage(block_files(store)[2])
    (damaged,) = store.missing()
    assert files(store.folder) != before
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert torch.equal(store.gram(slice(None), progress=False), samples(15) @ samples(15).T)
    assert files(store.folder) == before
    assert computed(log, 5) == {block: 1 + (block == damaged) for block in store.block_ids}


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), samples(3))
    expected = store.gram(slice(None), progress=False)
    (file,) = block_files(store)
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        assert store.missing() or torch.equal(store.gram(slice(None)), expected)
    file.write_bytes(content)
    assert not store.missing()


def test_a_block_of_zeros_is_stored(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), torch.zeros(4, 2), block=2)
    store.compute(progress=False)
    assert store.missing() == []


def test_the_folder_tells_its_kernel(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, InfiniteNTK(MLP(1, 2, 4)), samples(3))
    store.compute(progress=False)
    lines = zarr.open_group(store.folder, mode="r").attrs["kernel"]
    assert "kind = ntk" in lines
    assert any("Activation(name='relu'" in line for line in lines)


def test_a_wrong_kernel_is_refused_and_what_was_finished_stays(tmp_path: Path) -> None:
    def kernel(x1: Tensor, x2: Tensor | None = None) -> Tensor:
        gram = x1 @ (x1 if x2 is None else x2).T
        gram[(x1[:, 0] == 7).nonzero()] = kernel.value
        return gram if kernel.value != 0 else gram[:, 0]

    kernel.fingerprint, kernel.value = "bad sample 7", float("nan")
    store = KernelStore(tmp_path, kernel, samples(10), block=5)
    store.compute([(0, 0)], progress=False)
    with pytest.raises(ValueError, match="samples 7 and 5 is nan"):
        store.compute([(1, 1)], progress=False)
    kernel.value = 0.0
    with pytest.raises(ValueError, match=r"shape \(5,\) for 5 and 5 samples"):
        store.compute([(1, 1)], progress=False)
    assert (0, 0) not in store.missing()
    assert len(block_files(store)) == 1


def test_a_failed_write_names_the_folder_and_keeps_what_was_finished(tmp_path: Path) -> None:
    log = tmp_path / "log"
    store = KernelStore(tmp_path, LoggedKernel(log), samples(40), block=20)
    store.compute([(0, 0)], progress=False)
    with file_size_limit(2000), pytest.raises(OSError, match=r"Cannot write .*finished blocks are kept") as error:
        store.compute(progress=False)
    assert str(store.folder) in str(error.value)
    assert store.missing() == [(0, 1), (1, 1)]
    assert not list(store.folder.glob(".*"))
    store.compute(progress=False)
    assert computed(log, 20)[0, 0] == 1


@pytest.mark.parametrize("reason", ["file", "full"])
def test_an_unusable_folder_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    log = tmp_path / "log"
    if reason == "file":
        (tmp_path / "store").write_text("in the way")
    else:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=99))
    store = KernelStore(tmp_path / "store", LoggedKernel(log), samples(10))
    with pytest.raises(OSError, match=f"Cannot write {store.folder}.*finished blocks are kept"):
        store.gram(slice(None), progress=False)
    assert computed(log, 256).total() == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda store: store.compute([(1, 0)]), ValueError, r"no block \(1, 0\)"),
        (lambda store: store.compute([(0, 9)]), ValueError, r"no block \(0, 9\)"),
        (lambda store: store.compute(rank=2, world_size=2), ValueError, "rank"),
        (lambda store: store.gram(3), ValueError, "one-dimensional"),
        (lambda store: store.gram([]), ValueError, "select no sample"),
        (lambda store: store.gram([0], slice(5, 5)), ValueError, "select no sample"),
        (lambda store: store.gram([99]), IndexError, "99"),
        (lambda store: KernelStore(".", store.kernel, store.x, block=0), ValueError, "block"),
        (lambda store: KernelStore(".", store.kernel, store.x * float("nan")), ValueError, "NaN"),
    ],
)
def test_wrong_arguments_are_told(
    tmp_path: Path, call: Callable[[KernelStore], None], error: type[Exception], message: str
) -> None:
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), samples(10), block=5)
    with pytest.raises(error, match=message):
        call(store)
    assert not (tmp_path / "log").exists()


def test_ranks_share_the_work_evenly(tmp_path: Path) -> None:
    logs = [tmp_path / f"log{rank}" for rank in range(3)]
    pairs = []
    for rank, log in enumerate(logs):
        store = KernelStore(tmp_path, LoggedKernel(log), samples(62), block=5)
        store.compute(rank=rank, world_size=3, progress=False)
        pairs.append(sum(25 if i != j else 15 for i, j in computed(log, 5)))
    assert sum((computed(log, 5) for log in logs), Counter()) == dict.fromkeys(store.block_ids, 1)
    assert max(pairs) - min(pairs) <= 25
    assert store.missing() == []


def test_progress_counts_the_computed_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    @contextmanager
    def bar(_: str, total: float, unit: str, *, enabled: bool) -> Iterator[Callable[[float], None]]:
        bars.append([total, unit, enabled, 0])
        yield lambda units: bars[-1].__setitem__(3, bars[-1][3] + units)

    monkeypatch.setattr(store_module, "progress_bar", bar)
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), samples(12), block=5)
    store.compute([(0, 0)])
    store.compute([(0, 0)])
    store.compute([(1, 1), (1, 2)], rank=1, world_size=2)
    store.gram(slice(None), progress=False)
    assert bars == [[15, "pairs", True, 15], [10, "pairs", False, 10], [53, "pairs", False, 53]]


@pytest.mark.ci
def test_ten_kills_end_with_the_same_bytes_and_no_finished_block_twice(tmp_path: Path) -> None:
    n, block, moment = 200, 10, random.Random(0)
    undisturbed, log = tmp_path / "undisturbed", tmp_path / "log"
    work(undisturbed, tmp_path / "other log", n, block, 0.0)
    store = KernelStore(tmp_path / "killed", LoggedKernel(log), samples(n), block=block)
    snapshots = []
    for _ in range(10):
        worker = PROCESSES.Process(target=work, args=(tmp_path / "killed", log, n, block, 0.004))
        calls = computed(log, block).total()
        worker.start()
        while worker.is_alive() and computed(log, block).total() == calls:
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.2))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL, "the worker ended before its kill: raise n"
        finished = set(store.block_ids) - set(store.missing())
        snapshots.append({block_id: computed(log, block)[block_id] for block_id in finished})
    assert len(snapshots[0]) < len(snapshots[-1]) < len(store.block_ids)
    store.compute(progress=False)
    assert files(tmp_path / "killed") == files(undisturbed)
    counts = computed(log, block)
    assert all(counts[block_id] == count for snapshot in snapshots for block_id, count in snapshot.items())
    assert set(counts) == set(store.block_ids)
    assert counts.total() <= len(store.block_ids) + 10  # the one block in work at each kill
    assert torch.equal(store.gram(slice(None), progress=False), samples(n) @ samples(n).T)


def test_a_kill_inside_a_write_leaves_nothing_that_counts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    worker = PROCESSES.Process(target=die_before_rename, args=(tmp_path, log))
    worker.start()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    store = KernelStore(tmp_path, LoggedKernel(log), samples(10), block=5)
    assert store.missing() == store.block_ids
    (left,) = store.folder.glob(".*.partial")
    store.compute([(0, 0)], progress=False)
    assert left.exists()  # it could belong to a living process
    os.utime(left, (0, 0))
    store.compute(progress=False)
    assert not left.exists()
    assert torch.equal(store.gram(slice(None), progress=False), samples(10) @ samples(10).T)


def stores_of_0_1() -> list[tuple[nn.Module, Tensor, int]]:
    """The kernels, samples and block sizes of tests/data/store_0.1.0."""

    def spread(net: nn.Module) -> nn.Module:
        for parameter in net.parameters():
            values = torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64)
            parameter.data.copy_(values.reshape(parameter.shape))
        return net.double()

    vectors = torch.arange(24, dtype=torch.float64).reshape(8, 3).sin()
    images = torch.arange(2 * 3 * 64, dtype=torch.float64).reshape(2, 3, 8, 8).sin()
    return [
        (InfiniteNTK(MLP(1, 2, 3, bias_std=0.5)), vectors, 4),
        (EmpiricalNTK(spread(MLP(4, 2, 3))), vectors, 4),
        (InfiniteNTK(MyrtleCNN(1)), images, 2),
        (EmpiricalNTK(spread(MyrtleCNN(2))), images, 2),
    ]


@pytest.mark.parametrize("number", range(4))
def test_a_store_of_version_0_1_is_read_and_nothing_is_computed_again(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DATA / "store_0.1.0", tmp_path / "store")
    before = files(tmp_path / "store")
    kernel, x, block = stores_of_0_1()[number]
    expected = kernel(x)
    monkeypatch.setattr(KernelStore, "_compute", None)
    store = KernelStore(tmp_path / "store", kernel, x, block=block)
    assert store.missing() == []
    # as exact as that version was where an input meets itself: its ReLU kernels were off by up to 5e-9
    torch.testing.assert_close(store.gram(slice(None), progress=False), expected, rtol=1e-8, atol=1e-12)
    assert files(tmp_path / "store") == before


def test_a_damaged_block_of_version_0_1_is_computed_again(tmp_path: Path) -> None:
    shutil.copytree(DATA / "store_0.1.0", tmp_path / "store")
    kernel, x, block = stores_of_0_1()[0]
    store = KernelStore(tmp_path / "store", kernel, x, block=block)
    chunk = next(store.folder.glob("*/c.0.0"))
    content = chunk.read_bytes()
    for damaged in (content[:-1], content[:5] + bytes([content[5] ^ 4]) + content[6:], None):
        chunk.unlink() if damaged is None else chunk.write_bytes(damaged)
        assert len(store.missing()) == 1
    with pytest.warns(RuntimeWarning, match="damaged"):
        torch.testing.assert_close(store.gram(slice(None), progress=False), kernel(x), rtol=1e-8, atol=1e-12)
    assert store.missing() == []


def test_a_block_is_one_file(tmp_path: Path) -> None:
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), samples(20), block=5)
    store.compute(progress=False)
    assert len(files(store.folder)) == len(store.block_ids) + 1  # and the kernel's description


def test_two_processes_share_one_store(tmp_path: Path) -> None:
    n, block, log = 130, 10, tmp_path / "log"
    work(tmp_path / "alone", tmp_path / "other log", n, block, 0.0)
    barrier = PROCESSES.Barrier(2)
    workers = [
        PROCESSES.Process(target=work, args=(tmp_path / "shared", log, n, block, 0.01, barrier)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert files(tmp_path / "shared") == files(tmp_path / "alone")
    assert len({line.split()[2] for line in log.read_text().splitlines()}) == 2
    counts = computed(log, block)
    assert max(counts.values()) <= 2
    assert counts.total() < 1.5 * len(counts)


def test_without_ray_the_blocks_are_computed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    store = KernelStore(tmp_path, LoggedKernel(tmp_path / "log"), samples(10), block=5)
    with caplog.at_level(logging.WARNING):
        compute_on_ray(store, progress=False)
    assert "Ray is not installed" in caplog.text
    assert store.missing() == []


def test_ray_tasks_fill_the_store(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    kernel, x = InfiniteNTK(MLP(1, 2, 4)), samples(12) / 10 + 0.05
    store = KernelStore(tmp_path, kernel, x, block=5)
    store.compute([(0, 1)], progress=False)
    compute_on_ray(store, progress=False)
    assert store.missing() == []
    torch.testing.assert_close(store.gram(slice(None), progress=False), kernel(x), rtol=1e-12, atol=1e-12)
