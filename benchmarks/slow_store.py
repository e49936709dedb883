"""An object store for benchmarks: answers S3's GET and HEAD from a folder, after a delay, at a rate per connection.

A process of its own, so that serving does not take the interpreter of whoever reads. Writes and listings are
refused: the datasets are written to the folder beforehand. ``GET /_first`` answers when the first byte of a shard was
asked for since it was last asked (time.monotonic, the same in all processes).
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

_PIECE_BYTES = 256 * 1024
_SHARDS = (".tar", ".mds")


@contextmanager
def serve(folder: Path, delay_s: float, bytes_per_s: float) -> Iterator[str]:
    """The address of a store whose buckets are the folders in ``folder``, as long as the block lasts."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, folder, delay_s, bytes_per_s), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def asked_first(store: str) -> float | None:
    """When the first byte of a shard was asked for since this was last called, by time.monotonic; None: not at all."""
    with urlopen(f"{store}/_first") as answer:
        return json.load(answer)


def _serve(pipe: Connection, folder: Path, delay_s: float, bytes_per_s: float) -> None:
    first: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Small writes are sent at once: the delay is ours to choose.
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            if self.path == "/_first":
                self._tell(json.dumps(first[0] if first else None).encode())
                first.clear()
                return
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
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            stop = min(int(asked[2]) + 1, size) if asked and asked[2] else size
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("ETag", f'"{hashlib.md5(str(path).encode()).hexdigest()}"')
            self.send_header("Last-Modified", "Mon, 02 Nov 2026 00:00:00 GMT")
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
            self.end_headers()
            if with_body:
                self._send(path, start, stop)

        def _tell(self, body: bytes) -> None:
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
