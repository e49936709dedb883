"""Two writers whose requests to one S3 server are let through in a given order."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_IDLE_S = 0.25  # a writer without a request for so long waits for something
_REPEATED = 6  # requests for the same object in a row: the writer waits for it to change


@dataclass
class Scenario:
    """How the proxy treats the writers; ``a`` and ``b`` are the two.

    conditions: "kept"; "ignored", as by some stores: the headers are removed; "refused": 501.
    late: seconds that the clock of the store has advanced for ``b``, which sees the leases of ``a`` as so old.
    """

    conditions: str = "kept"
    late: float = 0.0


@dataclass
class Schedule:
    """Lets one request through at a time: ``first`` of ``a``, ``then`` of ``b``, ``back`` of ``a``, the rest of ``b``.

    A writer that has ended, or waits for the other, leaves its turn to the other one.
    """

    first: int
    then: int = 10**6
    back: int = 10**6
    turn: str = "a"
    counts: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})
    ended: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._busy = False
        self._asked = time.monotonic()
        self._last: dict[str, tuple[str, int]] = {}
        self._choose()

    def enter(self, writer: str, path: str) -> None:
        """Wait for the turn of a request."""
        with self._changed:
            while self._busy or (self.turn != writer and not self._other_is_idle(writer)):
                self._changed.wait(0.02)
            self._busy = True
            known, times = self._last.get(writer, ("", 0))
            self._last[writer] = (path, times + 1 if path == known else 1)

    def leave(self, writer: str) -> None:
        """The request is answered."""
        with self._changed:
            self._busy = False
            self.counts[writer] += 1
            self._choose()
            self._asked = time.monotonic()
            self._changed.notify_all()

    def end(self, writer: str) -> None:
        with self._changed:
            self.ended.add(writer)
            self._choose()
            self._changed.notify_all()

    def _other_is_idle(self, writer: str) -> bool:
        return self.turn in self.ended or time.monotonic() - self._asked > _IDLE_S

    def _choose(self) -> None:
        if self.counts["a"] < self.first:
            turn = "a"
        elif self.counts["b"] < self.then:
            turn = "b"
        else:
            turn = "a" if self.counts["a"] < self.first + self.back else "b"
        other = "b" if turn == "a" else "a"
        if self._last.get(turn, ("", 0))[1] >= _REPEATED:
            # It waits, so the other one runs next.
            del self._last[turn]
            self.first, self.then = (
                (self.counts["a"], 10**6) if turn == "a" else (self.first, self.counts["b"])
            )
            turn = other
        elif turn in self.ended:
            turn = other
        self.turn = turn


class Interleaver:
    """An S3 endpoint for each writer; their requests are forwarded in the order of a schedule."""

    def __init__(self, upstream_port: int) -> None:
        self._upstream = upstream_port
        self.scenario = Scenario()
        self.schedule: Schedule | None = None
        self.manifests: list[bytes] = []
        self.log: list[tuple[str, str, str, int]] = []
        self._servers = {writer: self._serve(writer) for writer in ("a", "b")}

    def endpoint(self, writer: str) -> str:
        return f"http://127.0.0.1:{self._servers[writer].server_address[1]}"

    def close(self) -> None:
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def run(
        self, scenario: Scenario, schedule: Schedule, writers: dict[str, Callable[[], object]]
    ) -> dict[str, object]:
        """Run both writers: the result of each, or its exception."""
        self.scenario, self.schedule = scenario, schedule
        self.manifests.clear()
        self.log.clear()
        results: dict[str, object] = {}

        def write(writer: str) -> None:
            try:
                results[writer] = writers[writer]()
            except Exception as error:  # noqa: BLE001 - the test looks at it
                results[writer] = error
            finally:
                schedule.end(writer)

        threads = [threading.Thread(target=write, args=(w,), name=w) for w in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a writer hangs"
        self.schedule = None
        return results

    def _serve(self, writer: str) -> ThreadingHTTPServer:
        interleaver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                interleaver._answer(writer, self)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def _answer(self, writer: str, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = dict(handler.headers.items())
        schedule = self.schedule
        if schedule is not None:
            schedule.enter(writer, handler.path)
        status, answer, content = self._forward(handler, headers, body)
        self.log.append((writer, handler.command, handler.path.split("?")[0].rpartition("/")[2], status))
        if handler.command == "PUT" and handler.path.endswith("/manifest.json") and status == 200:
            self.manifests.append(body)
        late = self.scenario.late if writer == "b" else 0.0
        handler.send_response_only(status)
        handler.send_header("Date", formatdate(time.time() + late, usegmt=True))
        for name, value in answer:
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                handler.send_header(name, value)
        length = dict(answer).get("Content-Length") if handler.command == "HEAD" else str(len(content))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content)
        if schedule is not None:
            schedule.leave(writer)

    def _forward(
        self, handler: BaseHTTPRequestHandler, headers: dict[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        conditions = {n for n in headers if n.lower() in ("if-match", "if-none-match")}
        if conditions and self.scenario.conditions == "refused":
            return 501, [], b"<Error><Code>NotImplemented</Code></Error>"
        if self.scenario.conditions == "ignored":
            headers = {n: v for n, v in headers.items() if n not in conditions}
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream)
        upstream.request(handler.command, handler.path, body, headers)
        response = upstream.getresponse()
        content = response.read()
        upstream.close()
        return response.status, response.getheaders(), content


def shards_of(manifest: bytes) -> list[tuple[str, str, str]]:
    """(split, path, sha256) of every shard."""
    return [(s["split"], s["path"], s["sha256"]) for s in json.loads(manifest)["shards"]]
