"""A proxy in front of an S3 server that injects faults into responses, on the level of sockets.

It reads a complete request, chooses a fault, forwards the request unless the fault prevents that, and sends the
response, or a damaged one. No object gets more than ``_MAX_IN_A_ROW`` faults in a row, so that retries must succeed.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

DELAY, CODE_500, CODE_503, RESET, CUT, FLIP, HANG = (
    "delay", "status 500", "status 503", "connection reset", "cut body", "flipped byte", "hang",
)  # fmt: skip
FAULTS = (DELAY, CODE_500, CODE_503, RESET, CUT, FLIP, HANG)
_MAX_IN_A_ROW = 2
_MAX_HANG_S = 45.0
_LINE_BYTES = 65_536


@dataclass(frozen=True)
class Request:
    """A complete HTTP request."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def object(self) -> str:
        """The path without the query."""
        return self.path.partition("?")[0]


def random_faults(
    rng: random.Random, rate: float, kinds: tuple[str, ...] = FAULTS, max_hangs: int = 1
) -> Callable[[Request], str | None]:
    """Chooses a fault for each request with probability ``rate``; at most ``max_hangs`` hangs, which take longest."""
    in_a_row: Counter[str] = Counter()
    hangs = [max_hangs]

    def choose(request: Request) -> str | None:
        if rng.random() >= rate or in_a_row[request.object] >= _MAX_IN_A_ROW:
            in_a_row[request.object] = 0
            return None
        kind = rng.choice(kinds)
        if kind == HANG:
            if not hangs[0]:
                return None
            hangs[0] -= 1
        # Only tar files have a checksum of their own in the manifest; TLS protects the other objects.
        if kind == FLIP and not (request.method == "GET" and request.object.endswith(".tar")):
            return None
        if kind == CUT and request.method != "GET":
            return None
        if kind != DELAY:
            in_a_row[request.object] += 1
        return kind

    return choose


class FaultyProxy:
    """Listens on a free port while the context is open. ``choose(request)``: the fault, or None; ``on_fault(kind)`` is
    called before each fault is sent."""

    def __init__(
        self,
        upstream_port: int,
        choose: Callable[[Request], str | None] = lambda request: None,
        on_fault: Callable[[str], None] = lambda kind: None,
        rng: random.Random | None = None,
    ) -> None:
        self.upstream_port, self.choose, self.on_fault = upstream_port, choose, on_fault
        self.num_requests = 0
        self._rng = rng or random.Random(0)
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self) -> FaultyProxy:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    @property
    def url(self) -> str:
        """Endpoint for clients."""
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        # Killed clients and timeouts are expected here.
        expected = contextlib.suppress(OSError, ValueError, http.client.HTTPException)
        with expected, connection, connection.makefile("rb") as stream:
            while not self._closed.is_set() and (request := _read_request(stream, connection)):
                with self._lock:
                    self.num_requests += 1
                    fault = self.choose(request)
                    number = self._rng.random()
                if not self._answer(connection, request, fault, number):
                    return

    def _answer(self, connection: socket.socket, request: Request, fault: str | None, number: float) -> bool:
        """Send the response; whether the connection stays open. ``number`` in [0, 1) sets time and place of a fault."""
        if fault == DELAY:
            self._closed.wait(0.05 + number)
        # Half of the requests that fail have taken effect: the client cannot know which.
        forwarded = fault in (None, DELAY, CUT, FLIP) or number < 0.5
        response = _forward(request, self.upstream_port) if forwarded else None
        if fault == CUT and (response is None or len(response[2]) < 2):
            fault = None  # nothing to cut
        if fault is not None:
            self.on_fault(fault)
        if fault in (CODE_500, CODE_503):
            connection.sendall(_head(int(fault[-3:]), {"content-length": "0"}))
        elif fault == RESET:
            # Linger of 0 s: close() sends RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault == HANG:
            _wait_for_close(connection, self._closed)
        else:
            assert response is not None
            status, headers, body = response
            if fault == FLIP and body:
                place = int(number * len(body))
                body = body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]
            sent = body[: max(1, int(number * len(body)))] if fault == CUT else body
            connection.sendall(_head(status, headers) + (b"" if request.method == "HEAD" else sent))
        return fault in (None, DELAY, FLIP, CODE_500, CODE_503)


def _read_request(stream: BinaryIO, connection: socket.socket) -> Request | None:
    line = stream.readline(_LINE_BYTES).decode("latin-1").split()
    if len(line) != 3:
        return None
    headers: dict[str, str] = {}
    while (text := stream.readline(_LINE_BYTES).decode("latin-1").strip()) != "":
        name, _, value = text.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get("transfer-encoding", "").lower() == "chunked":
        body = b""
        while (size := int(stream.readline(_LINE_BYTES).partition(b";")[0], 16)) > 0:
            body += stream.read(size)
            stream.readline(_LINE_BYTES)
        stream.readline(_LINE_BYTES)
    else:
        body = stream.read(int(headers.get("content-length") or 0))
    return Request(line[0], line[1], headers, body)


def _forward(request: Request, port: int) -> tuple[int, dict[str, str], bytes]:
    upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    dropped = ("expect", "connection", "transfer-encoding", "content-length")
    headers = {k: v for k, v in request.headers.items() if k not in dropped}
    upstream.request(request.method, request.path, request.body, headers)
    answer = upstream.getresponse()
    body = answer.read()
    upstream.close()
    kept = {
        k.lower(): v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection")
    }
    if request.method != "HEAD":
        kept["content-length"] = str(len(body))
    return answer.status, kept, body


def _head(status: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _wait_for_close(connection: socket.socket, closed: threading.Event) -> None:
    """Send nothing until the client gives up."""
    connection.settimeout(0.2)
    deadline = time.monotonic() + _MAX_HANG_S
    while time.monotonic() < deadline and not closed.is_set():
        try:
            if connection.recv(1, socket.MSG_PEEK) == b"":
                return
            time.sleep(0.2)
        except TimeoutError:
            continue
