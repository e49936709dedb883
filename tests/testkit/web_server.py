"""A local HTTP server with range requests, which Python's own does not answer."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """``url`` of the folder; ``sent``: bytes of all answers so far by path."""

    url: str
    sent: dict[str, int] = field(default_factory=dict)


@contextmanager
def serve(folder: Path) -> Iterator[Served]:
    """Serve the files of a folder."""
    served = Served("")

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = Path(self.translate_path(self.path))
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            start, stop = 0, len(content)
            wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                start = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
                stop = min(len(content), int(wanted[2]) + 1) if wanted[1] and wanted[2] else len(content)
            if start >= len(content) and wanted:
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(stop - start))
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            self.end_headers()
            if body:
                name = self.path.split("?")[0].lstrip("/")
                served.sent[name] = served.sent.get(name, 0) + stop - start
                self.wfile.write(content[start:stop])

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients may close a connection before the answer ends
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
