"""CIFAR-5m is filtered part by part into one file, in bounded memory, and a killed preparation goes on.

Longer than 300 lines, for the small files in exactly the format of the large ones.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_server import Fault, FaultServer, fault_server
from test_cli import MAIN, OVERLAYS, arms, run, tiny
from tiny import file_size_limit

from ntk_lightning.datamodules import CIFAR5mBinary, cifar5m

N = 60  # images a part


def part(i: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Images and class numbers of part i; the first pixels hold the number of the part and of the image."""
    rng = np.random.default_rng(i)
    x = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = i, np.arange(n)
    return x, rng.integers(0, 10, n)


def archive(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


def archives(prefix: str = "") -> dict[str, bytes]:
    """All six files, every other one compressed."""
    named = {f"{prefix}part{i}.npz": part(i) for i in range(6)}
    return {name: archive(bool(i % 2), X=x, Y=y) for i, (name, (x, y)) in enumerate(named.items())}


def folder_of(files: dict[str, bytes], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)


def expected(parts: range, classes: tuple[int, int] = (5, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [part(i) for i in parts]
    x, y = np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])
    rows = np.isin(y, classes)
    labels = np.where(y[rows] == classes[1], 1.0, -1.0).astype(np.float32)
    return torch.from_numpy(x[rows].transpose(0, 3, 1, 2)), torch.from_numpy(labels)


def check(data: CIFAR5mBinary, classes: tuple[int, int] = (5, 7)) -> None:
    for train, parts in ((True, range(5)), (False, range(5, 6))):
        samples, (x, y) = data.load(train), expected(parts, classes)
        assert torch.equal(samples.x, x)
        assert torch.equal(samples.y, y)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("no_proxy", "*")
    with fault_server() as running:
        running.files.update(archives())
        yield running


@pytest.mark.parametrize("prefix", ["", "cifar5m_"])
@pytest.mark.parametrize("classes", [(5, 7), (3, 0)])
def test_two_classes_of_local_parts_in_order(prefix: str, classes: tuple[int, int], tmp_path: Path) -> None:
    path = folder_of(archives(prefix), tmp_path / "parts")
    data = CIFAR5mBinary(path, str(tmp_path / "cache"), classes, n_train=20, n_test=6)
    assert not (tmp_path / "cache").exists()
    data.prepare_data()
    check(data, classes)
    data.setup()
    assert data.train_set is not None
    assert data.train_set.x.shape == (20, 3, 32, 32)
    assert data.train_set.x.dtype == torch.float32
    assert set(data.train_set.y.tolist()) == {-1.0, 1.0}


def test_parts_are_downloaded_once_and_not_kept(server: FaultServer, tmp_path: Path) -> None:
    server.faults["part3.npz"] = [Fault(cut=10_000)]
    data = CIFAR5mBinary(cache=str(tmp_path), url=server.url, n_train=20, n_test=6)
    data.prepare_data()
    check(data)
    assert server.sent == sum(map(len, server.files.values()))
    assert not list(tmp_path.rglob("*.npz"))
    again = CIFAR5mBinary(cache=str(tmp_path), url=server.url, n_train=20, n_test=6)
    again.setup()
    assert len(server.requests) == 7


def test_downloads_may_be_kept_for_other_classes(server: FaultServer, tmp_path: Path) -> None:
    for classes in ((5, 7), (0, 1)):
        data = CIFAR5mBinary(None, str(tmp_path), classes, keep_downloads=True, url=server.url)
        data.prepare_data()
        check(data, classes)
    assert len(server.requests) == 6


def test_a_part_that_was_cut_is_not_taken_up_from_another_address(server: FaultServer, tmp_path: Path) -> None:
    server.faults["part0.npz"] = [Fault(cut=10_000), Fault(status=404)]
    with pytest.raises(ConnectionError, match="404"):
        CIFAR5mBinary(cache=str(tmp_path), url=server.url).prepare_data()
    server.files = {f"mirror/{name}": content for name, content in server.files.items()}
    data = CIFAR5mBinary(cache=str(tmp_path), url=f"{server.url}/mirror")
    data.prepare_data()
    check(data)
    assert server.requests[2] == ("mirror/part0.npz", "")


def test_a_part_put_where_the_error_says_is_used_and_kept(server: FaultServer, tmp_path: Path) -> None:
    server.faults["part0.npz"] = [Fault(status=404)]
    data = CIFAR5mBinary(cache=str(tmp_path), url=server.url)
    with pytest.raises(ConnectionError, match="404") as raised:
        data.prepare_data()
    place = re.search(r"put the file at (\S+) by hand", str(raised.value))
    assert place is not None
    Path(place[1]).write_bytes(b"not the right one")
    with pytest.raises(ValueError, match=r"not a whole part of CIFAR-5m .*: delete it or get it again"):
        data.prepare_data()
    Path(place[1]).write_bytes(server.files["part0.npz"])
    data.prepare_data()
    check(data)
    assert [file.name for file in tmp_path.rglob("*.npz")] == [Path(place[1]).name]
    assert [name for name, _ in server.requests].count("part0.npz") == 1


def test_parts_put_into_the_cache_by_hand_need_no_network(tmp_path: Path) -> None:
    folder_of(archives(), tmp_path / "cifar5m")
    data = CIFAR5mBinary(cache=str(tmp_path))
    data.prepare_data()
    check(data)
    assert len(list(tmp_path.rglob("*.npz"))) == 6


def test_a_killed_preparation_goes_on_with_the_part_it_was_at(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = CIFAR5mBinary(cache=str(tmp_path), url=server.url)
    read = cifar5m.read_part

    def killed(file: Path, classes: tuple[int, int]) -> Iterator[Any]:
        for x, y in read(file, classes):
            if file.name.startswith("part2"):
                yield x[:3], y[:3]
                raise KeyboardInterrupt
            yield x, y

    monkeypatch.setattr(cifar5m, "read_part", killed)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    (state,) = tmp_path.rglob("train*.json")
    assert list(json.loads(state.read_text())) == ["part0", "part1"]
    monkeypatch.setattr(cifar5m, "read_part", read)
    server.heal()
    data.prepare_data()
    check(data)
    assert [name for name, _ in server.requests] == [f"part{i}.npz" for i in (3, 4, 5)]
    assert not [*tmp_path.rglob("*.npz"), *tmp_path.rglob("*.downloaded")]


@pytest.mark.parametrize("missing", [100, 10_000])  # bytes; the last ones of a file may wait in a buffer
def test_a_full_disk_keeps_the_finished_parts(missing: int, tmp_path: Path) -> None:
    data = CIFAR5mBinary(folder_of(archives(), tmp_path), str(tmp_path / "cache"))
    with (
        file_size_limit(len(expected(range(3))[1]) * 3072 - missing),
        pytest.raises(OSError, match=r"Cannot write .*images: File too large. Make room there") as raised,
    ):
        data.prepare_data()
    assert raised.value.errno == errno.EFBIG
    (state,) = tmp_path.rglob("train*.json")
    assert list(json.loads(state.read_text())) == ["part0", "part1"]
    for name in ("part0.npz", "part1.npz"):  # not read again: the same size and date, but no archive
        times = (tmp_path / name).stat()
        (tmp_path / name).write_bytes(bytes(times.st_size))
        os.utime(tmp_path / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    data.prepare_data()
    check(data)


def test_preparations_at_once_wait_for_each_other(tmp_path: Path) -> None:
    path = folder_of(archives(), tmp_path)
    threads = [
        threading.Thread(target=CIFAR5mBinary(path, str(tmp_path / "cache")).prepare_data, name=str(i))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(CIFAR5mBinary(path, str(tmp_path / "cache")))


def test_an_image_can_be_changed_without_changing_the_cache(tmp_path: Path) -> None:
    data = CIFAR5mBinary(folder_of(archives(), tmp_path), str(tmp_path / "cache"))
    data.load(train=False).x.zero_()
    check(data)


def test_a_replaced_file_is_filtered_again(tmp_path: Path) -> None:
    path = folder_of(archives(), tmp_path)
    before = CIFAR5mBinary(path, str(tmp_path / "cache")).load(train=False)
    x, y = part(8, 3 * N)
    (tmp_path / "part5.npz").write_bytes(archive(X=x, Y=y))
    after = CIFAR5mBinary(path, str(tmp_path / "cache")).load(train=False)
    assert len(after) > len(before)


X, Y = part(0)


def flipped(position: float) -> bytes:
    """An archive with one wrong byte among the pixels."""
    data = bytearray(archive(X=X, Y=Y))
    data[int(len(data) * position)] ^= 1
    return bytes(data)


def with_member(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(archive(X=X, Y=Y)[:-5000], "not a zip file", id="cut off"),
        pytest.param(b"", "not a zip file", id="empty"),
        pytest.param(flipped(0.5), "Bad CRC-32", id="one wrong bit"),
        pytest.param(archive(X=X, Y=Y.astype(object)), "pickled objects, which are never loaded", id="pickled labels"),
        pytest.param(archive(X=X.astype(object), Y=Y), "pickled objects, which are never loaded", id="pickled images"),
        pytest.param(archive(X=X), "no item named 'Y.npy'", id="no labels"),
        pytest.param(archive(X=X, Y=Y[:-1]), r"instead of uint8 \(59, 32, 32, 3\)", id="fewer labels"),
        pytest.param(archive(X=X.astype(np.float32), Y=Y), "X is float32", id="images of floats"),
        pytest.param(archive(X=X, Y=Y.astype(float)), "Y is float64", id="labels of floats"),
        pytest.param(archive(X=np.asfortranarray(X), Y=Y), "Fortran order", id="Fortran order"),
        pytest.param(with_member("../Y.npy", b"escape"), "no item named 'Y.npy'", id="a path that escapes"),
        pytest.param(with_member("Y.npy", b"not an array"), "magic string", id="not an array"),
    ],
)
def test_broken_archives_are_refused_and_the_next_run_goes_on(
    content: bytes, message: str, server: FaultServer, tmp_path: Path
) -> None:
    server.files["part4.npz"], whole = content or b"x", server.files["part4.npz"]
    data = CIFAR5mBinary(cache=str(tmp_path), url=server.url)
    with pytest.raises(ValueError, match=rf"part4-\w+\.npz is not a whole part of CIFAR-5m .*{message}"):
        data.prepare_data()
    server.heal()
    server.files["part4.npz"] = whole
    data.prepare_data()
    check(data)
    assert [name for name, _ in server.requests] == ["part4.npz", "part5.npz"]
    assert all(file.is_relative_to(tmp_path / "cifar5m") for file in tmp_path.rglob("*.*"))


def test_a_missing_part_is_named_at_once(tmp_path: Path) -> None:
    path = folder_of(archives(), tmp_path)
    (tmp_path / "part2.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no part2\.npz .* or leave path out"):
        CIFAR5mBinary(path)


@pytest.mark.parametrize("classes", [(5, 5), (5, 10), (-1, 3)])
def test_classes_that_do_not_exist_are_refused(classes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="two different class numbers from 0 to 9"):
        CIFAR5mBinary(classes=classes)


def test_too_few_samples_are_said_to_be(tmp_path: Path) -> None:
    data = CIFAR5mBinary(folder_of(archives(), tmp_path), str(tmp_path / "cache"), n_train=500, n_test=5)
    with pytest.raises(ValueError, match=r"n_train \+ n_val \+ fresh = 500, but CIFAR5mBinary has \d+ such samples"):
        data.setup()


def test_a_class_without_images_and_a_shortened_cache_are_refused(tmp_path: Path) -> None:
    parts = {name: archive(X=X, Y=np.zeros_like(Y)) for name in archives()}
    with pytest.raises(ValueError, match="has no image"):
        CIFAR5mBinary(folder_of(parts, tmp_path / "none"), str(tmp_path / "cache")).load(train=True)
    data = CIFAR5mBinary(folder_of(archives(), tmp_path / "some"), str(tmp_path / "other"))
    data.prepare_data()
    (images,) = (tmp_path / "other").rglob("test*.images")
    images.write_bytes(b"")
    with pytest.raises(ValueError, match="is shorter than it was written: delete"):
        data.load(train=False)


MEASURE = r"""
import re, sys
import numpy as np
from ntk_lightning.datamodules import CIFAR5mBinary

def peak():  # of this process; ru_maxrss would begin at that of the process that started it
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024

folder, before = sys.argv[1], peak()
data = CIFAR5mBinary(folder, folder + "/cache", n_train=100, n_test=20)
data.prepare_data()
filtering = peak() - before
data.setup()
setup = peak() - before
np.load(folder + "/part0.npz", allow_pickle=False)["X"].sum()
print(filtering, setup, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_far_below_the_size_of_a_part(tmp_path: Path) -> None:
    n = 24_000  # 70 MiB of pixels, half of them chosen
    x, y = np.zeros((n, 32, 32, 3), np.uint8), np.arange(n) % 4 + 4
    x[:, 0, 0] = np.arange(n)[:, None] % 251
    (tmp_path / "part0.npz").write_bytes(archive(X=x, Y=y))
    for i in range(1, 6):
        (tmp_path / f"part{i}.npz").write_bytes(archive(True, X=x[:100], Y=y[:100]))
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    filtering, setup, whole = map(float, printed.stdout.split())
    assert filtering < 25  # MiB: batches of 3 MiB and their chosen rows
    assert setup < 60  # counts pages of the mapped file too, which the system takes back when it needs them
    assert whole > 65  # the measure sees a part that is loaded as a whole


def test_the_overlay_trains_on_local_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTK_LIGHTNING_CACHE", str(tmp_path / "cache"))
    path = folder_of(archives(), tmp_path / "parts")
    changes = {"data": {"init_args": {"n_train": 16, "n_test": 6, "fresh": 8, "path": path}}}
    extra = (f"--trainer.default_root_dir={tmp_path}",)
    cli = run(MAIN, OVERLAYS / "cifar5m.yaml", OVERLAYS / "linearized.yaml", tiny(tmp_path, changes), extra=extra)
    assert cli.datamodule.train_set.x.shape == (16, 3, 32, 32)
    assert arms(tmp_path / "comparison.csv") == [("linearized network", 16)]
