"""Emulated object store for benchmarks: serves GET and HEAD of S3 from a folder, with delay and rate per connection.

It runs in a separate process, so that it does not share the interpreter lock with the reader. Writes and listings are
refused: datasets are written to the folder beforehand. ``GET /_requests`` returns the requests since the previous such
call: their number by method, and the time of the first one for a shard (time.monotonic, which is the same in all
processes).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

_PIECE_BYTES = 256 * 1024
_SHARDS = ".tar"


@contextmanager
def serve(folder: Path, delay_s: float, bytes_per_s: float) -> Iterator[str]:
    """Context manager: URL of a store whose buckets are the folders in ``folder``."""
    context = multiprocessing.get_context("spawn")
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end, folder, delay_s, bytes_per_s), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{parent_end.recv()}"
    finally:
        process.terminate()
        process.join()


@dataclass(frozen=True)
class Requests:
    """Requests since the last call of :func:`requests_since`. ``first``: time.monotonic of the first for a shard."""

    get: int
    head: int
    first: float | None

    @property
    def total(self) -> int:
        """All of them."""
        return self.get + self.head


def requests_since(store: str) -> Requests:
    """The requests since the last call of this function."""
    with urlopen(f"{store}/_requests") as answer:
        return Requests(**json.load(answer))


def _serve(pipe: Connection, folder: Path, delay_s: float, bytes_per_s: float) -> None:
    first: list[float] = []
    counts: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Small writes are sent at once: the only delay is the configured one.
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            if self.path == "/_requests":
                found = {"get": counts["GET"], "head": counts["HEAD"], "first": first[0] if first else None}
                first.clear()
                counts.clear()
                self._send_json(json.dumps(found).encode())
                return
            counts[self.command] += 1
            if with_body and self.path.endswith(_SHARDS):
                first.append(time.monotonic())
            time.sleep(delay_s)
            path = folder / unquote(urlsplit(self.path).path).lstrip("/")
            if not path.is_file():
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            size = path.stat().st_size
            requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(requested[1]) if requested else 0
            stop = min(int(requested[2]) + 1, size) if requested and requested[2] else size
            self.send_response(206 if requested else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{hashlib.md5(str(path).encode()).hexdigest()}"')
            self.send_header("Last-Modified", "Mon, 02 Nov 2026 00:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            if requested:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            if with_body:
                self._send(path, start, stop)

        def _send_json(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _send(self, path: Path, start: int, stop: int) -> None:
            began = time.monotonic()
            with open(path, "rb") as file:
                file.seek(start)
                sent = 0
                while sent < stop - start:
                    piece = file.read(min(_PIECE_BYTES, stop - start - sent))
                    sent += len(piece)
                    time.sleep(max(0.0, began + sent / bytes_per_s - time.monotonic()))
                    self.wfile.write(piece)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pipe.send(server.server_address[1])
    server.serve_forever()
