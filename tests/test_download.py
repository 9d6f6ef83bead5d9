"""Every fault of a server ends in the right file or in one clear error, and a rerun fetches only what is missing."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import shutil
import socket
import threading
import urllib.request
from collections import namedtuple
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from fault_server import Fault, FaultServer, fault_server
from tiny import file_size_limit

from ntk_lightning.datamodules.cache import cache_folder
from ntk_lightning.datamodules.download import _SafeRedirects, download
from ntk_lightning.datamodules.image_file import ImageFile
from ntk_lightning.progress import is_rank_zero

BODY = np.random.default_rng(0).bytes(900_000)
OTHER = np.random.default_rng(1).bytes(900_000)
MD5 = hashlib.md5(BODY).hexdigest()
QUICK: dict[str, Any] = {"attempts": 3, "backoff": 0.01, "timeout": 0.5, "progress": False}
CUT = Fault(cut=300_000)
REST = "bytes=300000-"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    monkeypatch.setenv("no_proxy", "*")
    with fault_server() as running:
        running.files["file.bin"] = BODY
        yield running


def ranges(server: FaultServer) -> list[str]:
    return [asked for _, asked in server.requests]


@pytest.mark.parametrize(
    ("faults", "asked"),
    [
        pytest.param([], [""], id="no fault"),
        pytest.param([CUT], ["", REST], id="cut once"),
        pytest.param([CUT] * 9, ["", REST, "bytes=600000-"], id="cut again and again"),
        pytest.param([Fault(cut=300_000, stall=True)], ["", REST], id="stalls"),
        pytest.param([Fault(length=50)], ["", "bytes=900000-"], id="says that it is longer"),
        pytest.param([Fault(status=503)], ["", ""], id="503 once"),
        pytest.param([CUT, Fault(status=503)], ["", REST, REST], id="cut, then 503"),
        pytest.param([Fault(status=429), Fault(status=500)], ["", "", ""], id="429, then 500"),
        pytest.param([CUT, Fault(whole=True)], ["", REST], id="ignores the range"),
        pytest.param([CUT, Fault(shift=-7)], ["", REST, ""], id="sends another range"),
        pytest.param([CUT, Fault(status=416)], ["", REST, ""], id="refuses the range"),
        pytest.param([Fault(location="/file.bin")], ["", ""], id="redirects"),
        pytest.param([Fault(length=None)], ["", ""], id="does not say the length once"),
    ],
)
def test_a_passing_fault_ends_in_the_right_file(
    faults: list[Fault], asked: list[str], server: FaultServer, tmp_path: Path
) -> None:
    server.faults["file.bin"] = faults
    path = download(f"{server.url}/file.bin", tmp_path / "new" / "file.bin", md5=MD5, **QUICK)
    assert path.read_bytes() == BODY
    assert ranges(server) == asked
    assert sorted(file.name for file in path.parent.iterdir()) in (["file.bin"], ["file.bin", "file.bin.lock"])


@pytest.mark.parametrize(
    ("fault", "error", "message", "tries", "resumed"),
    [
        pytest.param(Fault(status=404), ConnectionError, "answered 404", 1, "", id="404"),
        pytest.param(Fault(status=403), ConnectionError, "answered 403", 1, "", id="403"),
        pytest.param(Fault(status=503), ConnectionError, "answered 503", 3, "", id="503"),
        pytest.param(Fault(cut=0), ConnectionError, "cut after 0 of 900,000", 3, "", id="cut at once"),
        pytest.param(
            Fault(cut=300_000, whole=True), ConnectionError, "cut after 300,000", 3, REST, id="cut, ignores the range"
        ),
        pytest.param(Fault(length=-400_000), ValueError, "MD5 checksum", 1, "", id="says that it is shorter"),
        pytest.param(Fault(length=None), ConnectionError, "did not say how long", 3, "", id="does not say the length"),
        pytest.param(Fault(body=OTHER), ValueError, f"instead of {MD5}", 1, "", id="other bytes"),
        pytest.param(Fault(body=b""), ConnectionError, "an empty file", 3, "", id="empty"),
        pytest.param(Fault(stall=True, cut=0), ConnectionError, "timed out", 3, "", id="stalls"),
        pytest.param(Fault(location="http://192.0.2.1/f"), ValueError, "not an https", 1, "", id="redirects to http"),
        pytest.param(Fault(location="/file.bin"), ConnectionError, "answered 302", 5, "", id="redirects in a circle"),
    ],
)
def test_a_lasting_fault_is_one_clear_error_and_a_rerun_resumes(
    fault: Fault, error: type[Exception], message: str, tries: int, resumed: str, server: FaultServer, tmp_path: Path
) -> None:
    path, url = tmp_path / "file.bin", f"{server.url}/file.bin"
    server.faults["file.bin"] = [fault] * 50
    with pytest.raises(error, match=message) as raised:
        download(url, path, md5=MD5, **QUICK)
    assert "\n" not in str(raised.value)
    assert len(server.requests) == tries
    assert not path.exists()
    server.heal()
    assert download(url, path, md5=MD5, **QUICK).read_bytes() == BODY
    assert ranges(server) == [resumed]
    assert server.sent == (600_000 if resumed else 900_000)


def cut_off(server: FaultServer, path: Path) -> None:
    """Leave 300,000 bytes of the file, as a killed process does."""
    server.faults["file.bin"] = [CUT]
    with pytest.raises(ConnectionError, match="cut after"):
        download(f"{server.url}/file.bin", path, **QUICK | {"attempts": 1})
    assert path.with_name("file.bin.partial").read_bytes() == BODY[:300_000]
    server.heal()


@pytest.mark.parametrize("fault", [Fault(), Fault(blind=True)], ids=["If-Range", "server without If-Range"])
def test_a_file_that_changed_meanwhile_is_fetched_as_a_whole(fault: Fault, server: FaultServer, tmp_path: Path) -> None:
    cut_off(server, tmp_path / "file.bin")
    server.files["file.bin"], server.version = OTHER, '"v2"'
    server.faults["file.bin"] = [fault]
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", **QUICK).read_bytes() == OTHER
    assert ranges(server)[0] == REST


@pytest.mark.parametrize("version", ["", 'W/"weak"'])
def test_without_a_strong_version_nothing_is_resumed(version: str, server: FaultServer, tmp_path: Path) -> None:
    server.version = version
    cut_off(server, tmp_path / "file.bin")
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", **QUICK).read_bytes() == BODY
    assert ranges(server) == [""]


def test_a_complete_partial_file_is_not_fetched_again(server: FaultServer, tmp_path: Path) -> None:
    cut_off(server, tmp_path / "file.bin")
    (tmp_path / "file.bin.partial").write_bytes(BODY)
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", md5=MD5, **QUICK).read_bytes() == BODY
    assert server.sent == 0


def test_a_full_disk_keeps_what_has_arrived(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    cut_off(server, path)
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage(1000))
        with pytest.raises(OSError, match=r"Cannot write .*MiB needed.*the next run goes on from it") as raised:
            download(f"{server.url}/file.bin", path, **QUICK)
    assert raised.value.errno == errno.ENOSPC
    server.heal()
    assert download(f"{server.url}/file.bin", path, **QUICK).read_bytes() == BODY
    assert ranges(server) == [REST]


@pytest.mark.parametrize("limit", [500_001, 899_900])  # bytes; the last ones of a file may wait in a buffer
def test_a_write_that_fails_is_one_clear_error_and_a_rerun_resumes(
    limit: int, server: FaultServer, tmp_path: Path
) -> None:
    url, path = f"{server.url}/file.bin", tmp_path / "file.bin"
    with file_size_limit(limit), pytest.raises(OSError, match=r"Cannot write .*the next run goes on from it"):
        download(url, path, md5=MD5, **QUICK)
    kept = path.with_name("file.bin.partial").stat().st_size
    assert 0 < kept <= limit
    server.heal()
    assert download(url, path, md5=MD5, **QUICK).read_bytes() == BODY
    assert ranges(server) == [f"bytes={kept}-"]


def test_a_folder_that_takes_no_lock_is_said_to_be(server: FaultServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.with_name("file.bin.lock").mkdir()
    with pytest.raises(OSError, match=r"Cannot write .*file\.bin: .*choose another cache folder"):
        download(f"{server.url}/file.bin", path, **QUICK)
    with pytest.raises(OSError, match=r"Cannot write .*choose another cache folder"), ImageFile(path).lock():
        pass
    below = path.with_name("regular") / "file.bin"
    below.parent.write_text("")
    with pytest.raises(OSError, match=r"Cannot write .*choose another cache folder"):
        download(f"{server.url}/file.bin", below, **QUICK)
    assert server.requests == []


def goog_hash(body: bytes) -> str:
    return f"md5={base64.b64encode(hashlib.md5(body).digest()).decode()}"


@pytest.mark.parametrize("others", [[], ["crc32c=n03x6A=="]], ids=["md5 alone", "md5 after crc32c"])
def test_a_checksum_that_the_server_sends_is_compared(others: list[str], server: FaultServer, tmp_path: Path) -> None:
    url, path = f"{server.url}/file.bin", tmp_path / "file.bin"
    server.hashes["file.bin"] = [*others, goog_hash(OTHER)]
    with pytest.raises(ValueError, match=rf"MD5 checksum {MD5} instead of {hashlib.md5(OTHER).hexdigest()}"):
        download(url, path, **QUICK)
    assert not path.exists()
    assert download(url, path, md5=MD5, **QUICK).read_bytes() == BODY  # the caller knows better
    path.unlink()
    server.hashes["file.bin"] = [",".join((*others, goog_hash(BODY)))]
    assert download(url, path, **QUICK).read_bytes() == BODY


def test_a_checksum_is_remembered_until_the_rest_has_come(server: FaultServer, tmp_path: Path) -> None:
    server.hashes["file.bin"] = [goog_hash(BODY)]
    cut_off(server, tmp_path / "file.bin")
    server.hashes.clear()
    (tmp_path / "file.bin.partial").write_bytes(OTHER)
    with pytest.raises(ValueError, match="MD5 checksum"):
        download(f"{server.url}/file.bin", tmp_path / "file.bin", **QUICK)
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin", **QUICK).read_bytes() == BODY


def test_without_a_network_the_error_names_the_address_and_a_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/file.bin"
        with pytest.raises(ConnectionError, match=rf"{url} .*put the file at {tmp_path}/file\.bin by hand"):
            download(url, tmp_path / "file.bin", **QUICK)


@pytest.mark.parametrize("url", ["http://192.0.2.1/file", "ftp://127.0.0.1/file", "file:///etc/hostname", "file"])
def test_addresses_without_encryption_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an https address"):
        download(url, tmp_path / "file", **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["http://127.0.0.1/file", "http://192.0.2.1/file"])
def test_no_redirect_leads_from_https_to_http(target: str) -> None:
    request = urllib.request.Request("https://192.0.2.1/file")
    with pytest.raises(ValueError, match="not an https address"):
        _SafeRedirects().redirect_request(request, io.BytesIO(), 302, "Found", HTTPMessage(), target)


def test_a_file_that_is_there_is_checked_and_never_replaced(server: FaultServer, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(BODY)
    assert download(f"{server.url}/file.bin", path, md5=MD5, **QUICK) == path
    path.write_bytes(OTHER)
    with pytest.raises(ValueError, match="delete it and run again"):
        download(f"{server.url}/file.bin", path, md5=MD5, **QUICK)
    assert path.read_bytes() == OTHER
    assert server.requests == []


def test_of_many_at_once_one_downloads(server: FaultServer, tmp_path: Path) -> None:
    server.faults["file.bin"] = [CUT]
    results: list[bytes] = []

    def work() -> None:
        results.append(download(f"{server.url}/file.bin", tmp_path / "file.bin", **QUICK).read_bytes())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 6
    assert ranges(server) == ["", REST]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("NTK_LIGHTNING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == Path.home() / ".cache" / "ntk_lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ntk_lightning"
    monkeypatch.setenv("NTK_LIGHTNING_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


LAUNCHED = "RANK", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK", "SLURM_PROCID"


@pytest.mark.parametrize("name", ["", *LAUNCHED])
def test_one_process_of_all_nodes_prints(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for other in LAUNCHED:
        monkeypatch.setenv(other, str(int(other == name)))
    assert is_rank_zero() is (not name)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert is_rank_zero()
    finally:
        dist.destroy_process_group()
    for other in LAUNCHED:
        monkeypatch.delenv(other)
    assert is_rank_zero()
