"""SVHN: digit 0 is even in both formats, the training pool is balanced, broken files are refused.

Longer than 300 lines, for the small files in exactly the formats of the large ones.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fault_server import Fault, FaultServer, fault_server
from PIL import Image
from scipy.io import savemat
from test_cli import MAIN, OVERLAYS, arms, run, tiny

from ntk_lightning.datamodules import SVHNParity, svhn

SIZES = {"train": 70, "extra": 120, "test": 40}


def split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) and digits (n,), odd ones more often; the first pixel tells the digit."""
    rng = np.random.default_rng(SIZES[name])
    digits = rng.choice(10, SIZES[name], p=[0.06, 0.14] * 5)
    x = rng.integers(0, 256, (len(digits), 32, 32, 3), dtype=np.uint8)
    x[:, 0, 0, 0] = digits
    return x, digits


def matlab(x: np.ndarray, y: np.ndarray, compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, {"X": x, "y": y}, do_compression=compressed)
    return buffer.getvalue()


def mat_file(name: str) -> bytes:
    x, digits = split(name)
    return matlab(x.transpose(1, 2, 3, 0), np.where(digits == 0, 10, digits)[:, None].astype(np.uint8))


FILES = {f"{name}_32x32.mat": mat_file(name) for name in SIZES}


def parquet_folder(folder: Path) -> str:
    """Files of the hub's schema, "extra" in two of them, beside files of the hub's other configuration."""
    for name in SIZES:
        x, digits = split(name)
        pictures = []
        for image in x:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"image": pictures, "label": digits})
        count = 1 + (name == "extra")
        for i in range(count):
            piece = table.slice(i * len(table) // count, len(table) // count)
            (folder / "cropped_digits").mkdir(exist_ok=True)
            pq.write_table(piece, folder / "cropped_digits" / f"{name}-{i:05}-of-{count:05}.parquet", row_group_size=9)
        (folder / "full_numbers").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": pictures, "digits": digits}), folder / "full_numbers" / f"{name}.parquet")
    return str(folder)


def mat_folder(folder: Path) -> str:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("no_proxy", "*")
    for name in SIZES:
        monkeypatch.setitem(svhn.MD5, name, hashlib.md5(FILES[f"{name}_32x32.mat"]).hexdigest())
    with fault_server() as running:
        running.files.update(FILES)
        yield running


def check(data: SVHNParity) -> None:
    """The pools hold the right pixels: each one is an image of its split, in order, with the label of its digit."""
    test, (x, digits) = data.load(train=False), split("test")
    assert torch.equal(test.x, torch.from_numpy(x.transpose(0, 3, 1, 2)))
    assert torch.equal(test.y, torch.from_numpy(np.where(digits % 2, 1.0, -1.0)).float())

    pool = data.load(train=True)
    x, digits = (np.concatenate(arrays) for arrays in zip(split("train"), split("extra"), strict=True))
    places = {image.tobytes(): i for i, image in enumerate(x)}
    chosen = [places[image.tobytes()] for image in pool.x.movedim(1, -1).contiguous().numpy()]
    assert chosen == sorted(set(chosen))
    assert pool.y.tolist() == [1.0 if digits[i] % 2 else -1.0 for i in chosen]
    even = int((digits % 2 == 0).sum())
    assert even < len(digits) - even
    assert pool.y.tolist().count(-1.0) == pool.y.tolist().count(1.0) == even
    odd = [i for i in chosen if digits[i] % 2]
    assert odd != np.flatnonzero(digits % 2)[:even].tolist()  # drawn, not the first ones
    assert max(odd) >= SIZES["train"] > min(odd)


@pytest.mark.parametrize("folder_of", [mat_folder, parquet_folder])
def test_local_files_of_both_formats_give_a_balanced_pool(folder_of: object, tmp_path: Path) -> None:
    path = folder_of(tmp_path)  # type: ignore[operator]  # one of two functions
    data = SVHNParity(path, str(tmp_path / "cache"), n_train=30, n_test=20)
    data.prepare_data()
    check(data)
    data.setup()
    assert data.train_set is not None
    assert data.train_set.x.shape == (30, 3, 32, 32)
    assert data.train_set.x.dtype == torch.float32
    assert set(data.train_set.y.tolist()) == {-1.0, 1.0}


def test_both_formats_give_the_same_pool(tmp_path: Path) -> None:
    for name in ("mat", "parquet"):
        (tmp_path / name).mkdir()
    paths = mat_folder(tmp_path / "mat"), parquet_folder(tmp_path / "parquet")
    first, second = (SVHNParity(path, str(tmp_path / "cache")).load(train=True) for path in paths)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)


def test_files_are_downloaded_with_checksums_and_not_kept(server: FaultServer, tmp_path: Path) -> None:
    server.faults["extra_32x32.mat"] = [Fault(cut=100_000)]
    data = SVHNParity(cache=str(tmp_path), url=server.url, n_train=30, n_test=20)
    data.prepare_data()
    check(data)
    data.setup()
    assert len(server.requests) == 4
    assert server.sent == sum(map(len, FILES.values()))
    assert not list(tmp_path.rglob("*.mat"))


def test_a_wrong_checksum_is_refused_and_the_next_run_goes_on(server: FaultServer, tmp_path: Path) -> None:
    server.faults["extra_32x32.mat"] = [Fault(body=FILES["test_32x32.mat"])]
    data = SVHNParity(cache=str(tmp_path), url=server.url, keep_downloads=True)
    with pytest.raises(ValueError, match=r"extra_32x32\.mat came with the MD5 checksum \w+ instead of"):
        data.prepare_data()
    data.prepare_data()
    check(data)
    names = [name.removesuffix("_32x32.mat") for name, _ in server.requests]
    assert names == ["train", "extra", "extra", "test"]
    assert len(list(tmp_path.rglob("*.mat"))) == 3


def test_the_checksums_are_those_of_the_originals() -> None:
    assert svhn.MD5["train"] == "e26dedcc434d2e4c54c9b2d4a06d8373"
    assert svhn.MD5["test"] == "eb5a983be6a315427106f1b164d9cef3"
    assert svhn.MD5["extra"] == "a93ce644f1a588dc4d68dda5feec44a7"
    assert svhn.URL.startswith("https://")


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.array([[1], [2], [10], [3]], np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(FILES["extra_32x32.mat"][:-1000], "not a whole MATLAB file", id="cut off"),
        pytest.param(FILES["extra_32x32.mat"][:60], "not a whole MATLAB file", id="cut off in the header"),
        pytest.param(b"", "not a whole MATLAB file", id="empty"),
        pytest.param(b"<html>" * 100, "not a whole MATLAB file", id="a web page"),
        pytest.param(matlab(X, np.zeros((0, 1))), r"X must be uint8 \(32, 32, 3, 0\)", id="no labels"),
        pytest.param(matlab(X, Y.T), r"y must be \(n, 1\)", id="transposed labels"),
        pytest.param(matlab(X, Y % 10), "10 is digit 0", id="digit 0 as 0"),
        pytest.param(matlab(X[:16], Y), r"got uint8 \(16, 32, 3, 4\)", id="other size"),
        pytest.param(matlab(X.astype(float), Y), "got float64", id="other type"),
    ],
)
def test_broken_matlab_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = mat_folder(tmp_path)
    (tmp_path / "extra_32x32.mat").write_bytes(content)
    with pytest.raises(ValueError, match=rf"extra_32x32\.mat.*{message}") as raised:
        SVHNParity(path, str(tmp_path / "cache")).load(train=True)
    assert "\n" not in str(raised.value)


def test_labels_of_parquet_beyond_nine_are_refused(tmp_path: Path) -> None:
    path = parquet_folder(tmp_path)
    file = tmp_path / "cropped_digits" / "test-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, "label", pa.array([10] * len(table))), file)
    with pytest.raises(ValueError, match="digits from 0 to 9"):
        SVHNParity(path, str(tmp_path / "cache")).load(train=False)


def test_files_put_into_the_cache_by_hand_are_kept(server: FaultServer, tmp_path: Path) -> None:
    data = SVHNParity(cache=str(tmp_path), url=server.url)
    data.cache.mkdir()
    by_hand = data.cache / "extra_32x32.mat"
    by_hand.write_bytes(FILES[by_hand.name])
    data.prepare_data()
    check(data)
    assert list(tmp_path.rglob("*.mat")) == [by_hand]


def test_files_that_an_earlier_run_downloaded_are_not_kept(server: FaultServer, tmp_path: Path) -> None:
    server.faults["extra_32x32.mat"] = [Fault(status=404)]
    data = SVHNParity(cache=str(tmp_path), url=server.url)
    with pytest.raises(ConnectionError, match="404"):
        data.prepare_data()
    assert [file.name for file in tmp_path.rglob("*.mat")] == ["train_32x32.mat"]
    data.prepare_data()
    check(data)
    assert not [*tmp_path.rglob("*.mat"), *tmp_path.rglob("*.downloaded")]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def replace_pictures(file: Path, column: str, places: dict[int, object]) -> None:
    """Write other bytes into some rows of a parquet file."""
    table = pq.read_table(file)
    pictures = table[column].to_pylist()
    for row, content in places.items():
        pictures[row] = {"bytes": content, "path": None}
    pq.write_table(table.set_column(table.column_names.index(column), column, pa.array(pictures)), file)


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
BROKEN = [
    pytest.param(b"<html>", "cannot be read", id="junk"),
    pytest.param(png(NOISE)[:1500], "cannot be read", id="cut off"),
    pytest.param(png(NOISE)[:20], "cannot be read", id="cut off in the header"),
    pytest.param(b"", "cannot be read", id="empty"),
    pytest.param(None, "cannot be read", id="missing"),
    pytest.param(png(NOISE[:28]), "has 32x28 pixels: resize it to 32x32", id="another size"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN)
def test_a_broken_picture_is_named_by_its_row(content: object, message: str, tmp_path: Path) -> None:
    path = parquet_folder(tmp_path)
    file = tmp_path / "cropped_digits" / "test-00000-of-00001.parquet"
    replace_pictures(file, "image", {33: content})
    with pytest.raises(ValueError, match=rf"{file}: the picture in row 33 {message}") as raised:
        SVHNParity(path, str(tmp_path / "cache")).load(train=False)
    assert "\n" not in str(raised.value)


def test_a_grey_picture_among_coloured_ones_has_three_equal_channels(tmp_path: Path) -> None:
    path = parquet_folder(tmp_path)
    file = tmp_path / "cropped_digits" / "test-00000-of-00001.parquet"
    replace_pictures(file, "image", {5: png(NOISE[..., 0])})
    pool = SVHNParity(path, str(tmp_path / "cache")).load(train=False)
    assert torch.equal(pool.x[5], torch.from_numpy(NOISE[..., 0]).expand(3, 32, 32))
    assert torch.equal(pool.x[6], torch.from_numpy(split("test")[0][6].transpose(2, 0, 1)))


def test_a_batch_of_which_no_image_is_chosen_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svhn, "ROWS", 1)
    data = SVHNParity(parquet_folder(tmp_path), str(tmp_path / "cache"))
    data.prepare_data()
    check(data)


@pytest.mark.parametrize(("parity", "name"), [(1, "even"), (0, "odd")])
def test_digits_of_one_parity_are_refused(parity: int, name: str, tmp_path: Path) -> None:
    path = mat_folder(tmp_path)
    for split_name in ("train", "extra"):
        digits = np.full((4, 1), 2 - parity, np.uint8)
        (tmp_path / f"{split_name}_32x32.mat").write_bytes(matlab(X, digits))
    with pytest.raises(ValueError, match=f"have no {name} digit: give files of SVHN"):
        SVHNParity(path, str(tmp_path / "cache")).load(train=True)


def test_a_column_of_other_things_than_pictures_is_refused(tmp_path: Path) -> None:
    path = parquet_folder(tmp_path)
    file = tmp_path / "cropped_digits" / "test-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "image", pa.array([b"x"] * len(table))), file)
    with pytest.raises(ValueError, match="column image is binary instead of struct"):
        SVHNParity(path, str(tmp_path / "cache")).load(train=False)


def test_a_missing_split_is_named_at_once(tmp_path: Path) -> None:
    path = mat_folder(tmp_path)
    (tmp_path / "extra_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither extra_32x32\.mat nor a parquet file with 'extra'"):
        SVHNParity(path)


def test_too_few_samples_are_said_to_be(tmp_path: Path) -> None:
    data = SVHNParity(mat_folder(tmp_path), str(tmp_path / "cache"), n_train=20, n_test=41)
    with pytest.raises(ValueError, match="n_test = 41, but SVHNParity has 40 such samples: ask for fewer"):
        data.setup()


def test_the_overlay_trains_on_local_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NTK_LIGHTNING_CACHE", str(tmp_path / "cache"))
    changes = {"data": {"init_args": {"n_train": 16, "n_test": 12, "fresh": 8, "path": mat_folder(tmp_path)}}}
    extra = (f"--trainer.default_root_dir={tmp_path}",)
    cli = run(MAIN, OVERLAYS / "svhn.yaml", OVERLAYS / "linearized.yaml", tiny(tmp_path, changes), extra=extra)
    assert cli.datamodule.train_set.x.shape == (16, 3, 32, 32)
    assert arms(tmp_path / "comparison.csv") == [("linearized network", 16)]
