"""Files over HTTPS: a download goes on where the last one stopped, and is checked before it gets its name."""

from __future__ import annotations

import binascii
import errno
import hashlib
import http.client
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from ntk_lightning.atomic_files import SUFFIX, flush, publish, writing
from ntk_lightning.datamodules.cache import ADVICE, locked
from ntk_lightning.datamodules.image_file import key_of_files
from ntk_lightning.progress import progress_bar

__all__ = ["delete_temporary", "download", "download_temporary"]

_CHUNK = 1 << 18  # bytes
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RETRIED = (408, 425, 429)  # and all from 500 on


class _InterruptedTransfer(Exception):
    """Worth another try, from the bytes that have arrived."""


def download(
    url: str,
    path: str | Path,
    *,
    md5: str | None = None,
    attempts: int = 5,
    backoff: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> Path:
    """Download a file, unless it is there.

    What arrives is kept in ``<path>.partial``, also when the process is killed, and the next call asks for the missing
    bytes only (RFC 9110, range requests), or for the whole file where it has changed on the server meanwhile. Processes
    that want the same file wait for the first of them. A file with the final name is complete.

    Args:
        url: An https address; http is allowed on this machine's own loopback address only, also after redirects.
        path: Where the file goes. A file that lies there already is checked, not replaced.
        md5: Checksum in hexadecimal digits; by default the one that the server sends as ``x-goog-hash``, if it does.
        attempts: Failures in a row without a new byte before it gives up.
        backoff: Seconds before the second attempt, doubled for each one after it.
        timeout: Seconds without an answer that count as a failure.
        progress: Show a progress bar.

    Returns:
        The path.

    Raises:
        ConnectionError: The server cannot be reached, does not have the file or breaks off again and again.
        OSError: The file cannot be written; what has arrived is kept.
        ValueError: The address is not https, or the checksum is wrong.
    """
    _check_address(url)
    path = Path(path)
    with locked(path):
        if path.exists():
            if md5 is not None and (found := _md5(path)) != md5:
                raise ValueError(f"{path} has the MD5 checksum {found} instead of {md5}: delete it and run again.")
            return path
        partial = path.with_name(f"{path.name}{SUFFIX}")
        _fetch(url, partial, attempts, backoff, timeout, progress)
        expected = md5 or _known_version(partial)[1]
        if expected and (found := _md5(partial)) != expected:
            _discard(partial)
            raise ValueError(
                f"{url} came with the MD5 checksum {found} instead of {expected} and was deleted: run again for a "
                f"fresh copy, or put the right file at {path} by hand."
            )
        with writing(path, ADVICE):
            publish(partial, path)
            _version_file(partial).unlink(missing_ok=True)
    return path


def download_temporary(url: str, path: Path, md5: str | None = None) -> Path:
    """Download a file that :func:`delete_temporary` may delete, in this process or a later one.

    Args:
        url: As for :func:`download`.
        path: As for :func:`download`; beside it a mark is kept that tells the download from a file put there by hand.
        md5: As for :func:`download`.

    Returns:
        The path.
    """
    there = path.exists()
    download(url, path, md5=md5)
    if not there:
        with writing(path, ADVICE):
            _mark(path).write_text(key_of_files([path]))
    return path


def delete_temporary(path: Path) -> None:
    """Delete a file, unless it was put there by hand.

    Args:
        path: As given to :func:`download_temporary`.
    """
    mark = _mark(path)
    if mark.exists():
        if mark.read_text() == key_of_files([path]):
            path.unlink()
        mark.unlink()


def _mark(path: Path) -> Path:
    return path.with_name(f"{path.name}.downloaded")


def _fetch(url: str, partial: Path, attempts: int, backoff: float, timeout: float, progress: bool) -> None:
    """Try until the partial file is complete, or until ``attempts`` tries in a row brought nothing new."""
    furthest, failures = _size(partial), 0
    while True:
        try:
            return _attempt(url, partial, timeout, progress)
        except _InterruptedTransfer as error:
            reason = error
        failures = 1 if _size(partial) > furthest else failures + 1
        furthest = max(furthest, _size(partial))
        if failures >= attempts:
            raise _failure(url, partial, reason) from reason
        time.sleep(backoff * 2 ** (failures - 1))


def _attempt(url: str, partial: Path, timeout: float, progress: bool) -> None:
    validator = _known_version(partial)[0]
    offset = _size(partial) if validator else 0  # without one, the file on the server may be another by now
    request = urllib.request.Request(url)
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", validator)
    try:
        reply = urllib.request.build_opener(_SafeRedirects).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        answer = f"the server answered {error.code} {' '.join(error.reason.split())}"
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{offset}":
                return  # it was complete, and the process ended before it could be renamed
            if error.code == 416:
                _discard(partial)
            elif error.code < 500 and error.code not in _RETRIED:
                raise _failure(url, partial, answer) from error
            raise _InterruptedTransfer(answer) from error
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedTransfer(str(getattr(error, "reason", error)) or repr(error)) from error
    with reply:
        now = _validator(reply.headers)
        if reply.status == 206:
            total = _total_of_range(reply.headers, offset)
            if total is None or (now and now != validator):
                _discard(partial)
                raise _InterruptedTransfer("the server sent another part of the file than was asked for")
        else:
            total, offset = reply.length, 0
            if not total:
                raise _InterruptedTransfer("the server sent an empty file, or did not say how long it is")
            with writing(partial, ADVICE):
                partial.write_bytes(b"")
                _version_file(partial).write_text(f"{now}\n{_published_md5(reply.headers)}")
        with writing(partial, ADVICE):
            if (free := shutil.disk_usage(partial.parent).free) < total - offset:
                needed = f"{(total - offset) / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free"
                raise OSError(errno.ENOSPC, needed)
        with progress_bar(partial.stem, total, "bytes", enabled=progress) as advance:
            advance(offset)
            received = offset + _receive(reply, partial, total - offset, advance)
    if received < total:
        raise _InterruptedTransfer(f"the connection was cut after {received:,} of {total:,} bytes")


def _receive(reply: http.client.HTTPResponse, partial: Path, length: int, advance: Callable[[float], None]) -> int:
    """Append at most ``length`` bytes of the body to the file; return how many came."""
    left = length
    with writing(partial, ADVICE), partial.open("ab") as file:  # closing it writes too
        while left:
            try:
                data = reply.read1(min(_CHUNK, left))
            except (OSError, http.client.HTTPException) as error:
                raise _InterruptedTransfer(str(error) or repr(error)) from error
            if not data:
                break
            file.write(data)
            left -= len(data)
            advance(len(data))
    with writing(partial, ADVICE):
        flush(partial)
    return length - left


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Follow a redirect to an allowed address; none leads from https to http."""
        _check_address(newurl, local=urlsplit(req.full_url).scheme == "http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str, local: bool = True) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (local and parts.scheme == "http" and parts.hostname in _LOOPBACK):
        raise ValueError(f"{url} is not an https address: downloads are not made without encryption.")


def _validator(headers: http.client.HTTPMessage) -> str:
    """What If-Range compares: a strong ETag, or else the date of the last change; empty where there is neither."""
    etag = headers.get("ETag", "")
    return headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag


def _published_md5(headers: http.client.HTTPMessage) -> str:
    """The checksum in hexadecimal digits that Google's storage sends of a file as it lies there, or nothing."""
    hashes = ",".join(headers.get_all("x-goog-hash", []))
    found = re.search(r"\bmd5=([\w+/]{22}==)", hashes)
    if found is None or headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return ""
    return binascii.a2b_base64(found[1]).hex()


def _known_version(partial: Path) -> tuple[str, str]:
    """Validator and checksum that came with the first bytes of a partial file; empty where there was none."""
    stored = _version_file(partial)
    validator, _, md5 = stored.read_text().partition("\n") if stored.exists() else ("", "", "")
    return validator, md5


def _version_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _total_of_range(headers: http.client.HTTPMessage, offset: int) -> int | None:
    """The file's length where a reply brings everything from ``offset`` to the end, else None."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    if found is None:
        return None
    first, last, total = map(int, found.groups())
    return total if offset and (first, last + 1) == (offset, total) else None


def _failure(url: str, partial: Path, reason: object) -> ConnectionError:
    return ConnectionError(
        f"{url} could not be downloaded: {reason}. Check the address and the network and run again, which goes on "
        f"where this stopped, or put the file at {partial.with_suffix('')} by hand."
    )


def _discard(partial: Path) -> None:
    _version_file(partial).unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
