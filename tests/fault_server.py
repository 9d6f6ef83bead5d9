"""A web server on the loopback address that fails in chosen ways."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What is wrong with the replies for one path.

    ``status`` is sent instead of the file; ``cut`` bytes of a body are sent before the connection ends; ``stall`` keeps
    it open then; ``length`` is added to Content-Length; ``whole`` ignores ranges; ``shift`` is added to the start in
    Content-Range; ``blind`` ignores If-Range; ``body`` is sent instead of the file; ``location`` redirects.
    """

    status: int = 0
    cut: int | None = None
    stall: bool = False
    length: int | None = 0
    whole: bool = False
    shift: int = 0
    blind: bool = False
    body: bytes | None = None
    location: str = ""


@dataclass
class FaultServer:
    """Serves ``files`` by path.

    ``faults`` of a path are those of its first, second, ... request, after which all is well; ``hashes`` of a path are
    sent with the file, one x-goog-hash each; ``requests`` has the path and the Range of each one, ``sent`` counts the
    bytes of their bodies.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=dict)
    version: str = '"v1"'
    requests: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    def heal(self) -> None:
        """Forget all faults, and the requests so far."""
        self.faults.clear()
        self.requests.clear()
        self.sent = 0


def handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            asked = self.headers.get("Range", "")
            earlier = sum(name == path for name, _ in server.requests)
            server.requests.append((path, asked))
            fault = dict(enumerate(server.faults.get(path, []))).get(earlier, Fault())
            if fault.status or fault.location or path not in server.files:
                self.send_response(fault.status or (302 if fault.location else 404))
                self.send_header("Location", fault.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_file(server.files[path] if fault.body is None else fault.body, asked, fault)

        def send_file(self, body: bytes, asked: str, fault: Fault) -> None:
            found = re.fullmatch(r"bytes=(\d+)-", asked)
            same = fault.blind or self.headers.get("If-Range", server.version) == server.version
            start = int(found[1]) if found and same and not fault.whole else None
            if start is not None and start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            piece = body[start or 0 :]
            server.sent += len(piece[: fault.cut])
            self.send_response(200 if start is None else 206)
            if start is not None:
                self.send_header("Content-Range", f"bytes {start + fault.shift}-{len(body) - 1}/{len(body)}")
            if server.version:
                self.send_header("ETag", server.version)
            for value in server.hashes.get(self.path.lstrip("/"), []):
                self.send_header("x-goog-hash", value)
            if fault.length is not None:
                self.send_header("Content-Length", str(len(piece) + fault.length))
            self.end_headers()
            with suppress(ConnectionError):  # the client may have seen enough
                self.wfile.write(piece[: fault.cut])
            if fault.stall:
                self.wfile.flush()
                server.closing.wait(30)

    return Handler


@contextmanager
def fault_server() -> Iterator[FaultServer]:
    """Run a server on a free port while the body runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as http:
        http.daemon_threads = True
        server = FaultServer(f"http://127.0.0.1:{http.server_address[1]}")
        http.RequestHandlerClass = handler(server)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            http.shutdown()
            thread.join()
