"""An HTTP proxy between client and S3 server that delays, truncates, corrupts and refuses responses on demand."""

from __future__ import annotations

import http.client
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def reset(port: int) -> None:
    """Empty a moto server: all servers of one process share their buckets."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")
    urllib.request.urlopen(request, timeout=30).close()


@dataclass
class Fault:
    """Fault of the response to one request. ``status`` 0: the response of the server."""

    status: int = 0
    cut: bool = False  # half the body, then the connection is closed
    flip: bool = False
    hang_s: float = 0.0


@dataclass
class Proxy:
    """An HTTP proxy on a port of its own. ``faults(method, path, n)``: the fault of the n-th request that it
    saw.
    """

    upstream_port: int
    faults: Callable[[str, str, int], Fault | None] = lambda method, path, n: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> Proxy:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                proxy._answer(self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # killed clients and timeouts are expected here
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            self.requests.append((handler.command, handler.path))
            fault = self.faults(handler.command, handler.path, len(self.requests) - 1) or Fault()
        self._stop.wait(fault.hang_s)
        if fault.status:
            handler.send_response(fault.status)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.upstream_port)
        headers = dict(handler.headers.items())
        upstream.request(handler.command, handler.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if fault.flip and content:
            content = content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]
        if fault.cut:
            content = content[: len(content) // 2]
            handler.close_connection = True
        if handler.command != "HEAD":
            handler.wfile.write(content)
