"""Processes that are forked from one that has imported torch and DeepSpeed: 5 s of processor time less for each rank.

The server is a process without threads that never computes. A forked process leads a session, has its own
environment, folder, arguments and output, and runs a script as ``python script …`` would.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Read when Python starts or libraries are imported: with other values than the server's, a new process is needed.
_AT_IMPORT = (
    "PYTHON",
    "LD_",
    "OMP_",
    "MKL_",
    "DS_",
    "TORCH",
    "CUDA",
    "MALLOC",
    "HOME",
    "XDG_",
    "MPL",
    "COVERAGE",
)
_MAX_MESSAGE = 1 << 20
DISABLE = "MAESTRO_TEST_FORK"
"""Set to 0: every process starts from nothing, as users' do."""


class ForkedProcess:
    """As much of ``subprocess.Popen`` as the tests use."""

    def __init__(self, pid: int, server: Server) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.exit_code(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class Server:
    """The client's side of the server, which ends with the process that started it."""

    def __init__(self) -> None:
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())], env=self.env, pass_fds=[other.fileno()]
            )
        self._exit_codes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._receive()  # it has imported everything
        atexit.register(self._process.kill)

    def suits(self, command: Sequence[str], env: Mapping[str, str]) -> bool:
        """Whether a command would run as in a process of its own."""
        names = {n for n in (*env, *self.env) if n.startswith(_AT_IMPORT)} - {"PYTHONPATH"}
        return (
            len(command) > 1
            and command[0] == sys.executable
            and not command[1].startswith("-")
            and all(env.get(name) == self.env.get(name) for name in names)
            # Of other folders, it could name other modules than those that are imported.
            and set(_folders(env)) <= {*sys.path, *_folders(self.env)}
        )

    def start(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        output: int,
        errors: int | None = None,
    ) -> ForkedProcess:
        """Run ``command`` with its output to the file descriptor ``output``, its errors to ``errors``, by default the
        same."""
        message = json.dumps({"args": command[1:], "env": dict(env), "cwd": str(cwd)}).encode()
        with self._lock:
            socket.send_fds(self._socket, [message], [output, output if errors is None else errors])
            while "pid" not in (answer := self._receive()):
                self._note(answer)
            # Of an earlier process with this number: Linux begins anew after 32,768.
            self._exit_codes.pop(answer["pid"], None)
        return ForkedProcess(answer["pid"], self)

    def exit_code(self, pid: int) -> int | None:
        """As ``Popen.poll``."""
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._note(self._receive(socket.MSG_DONTWAIT))
            return self._exit_codes.get(pid)

    def _note(self, message: dict[str, int]) -> None:
        self._exit_codes[message["ended"]] = message["code"]

    def _receive(self, flags: int = 0) -> dict[str, int]:
        message = self._socket.recv(_MAX_MESSAGE, flags)
        assert message, "the server of forked processes has ended"
        return json.loads(message)


def _folders(env: Mapping[str, str]) -> list[str]:
    """Those of PYTHONPATH."""
    return [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]


_server: list[Server] = []


def server() -> Server | None:
    """The server of this process, started at the first call; None if it is disabled."""
    if os.environ.get(DISABLE) == "0":
        return None
    if not _server:
        _server.append(Server())
    return _server[0]


def _preload() -> None:
    from maestro_scale.training.deepspeed_import import import_deepspeed

    import_deepspeed()
    import maestro_scale.evaluation.in_loop
    import maestro_scale.evaluation.run
    import maestro_scale.tracking.observers
    import maestro_scale.training.run  # noqa: F401

    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, (
        f"{threads} threads: a forked process could wait for a lock that none of them releases"
    )


def _serve(fd: int) -> NoReturn:
    client = socket.socket(fileno=fd)
    _preload()
    gc.freeze()  # DeepSpeed collects garbage often, which would visit all that was imported
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    _send(client, {"ready": os.getpid()})
    waiting = selectors.DefaultSelector()
    waiting.register(client, selectors.EVENT_READ)
    waiting.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is woken:
                woken.recv(4096)
                _report_ended(client)
                continue
            message, fds, _, _ = socket.recv_fds(client, _MAX_MESSAGE, 2)
            if not message:
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                for end in (client, woken, wake):
                    end.close()
                waiting.close()
                _become(json.loads(message), fds)
            for fd in fds:
                os.close(fd)
            _send(client, {"pid": pid})


def _report_ended(client: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _send(client, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})


def _send(client: socket.socket, message: dict[str, int]) -> None:
    try:
        client.send(json.dumps(message).encode())
    except OSError:
        os._exit(0)  # the tests have ended


def _become(request: dict[str, Any], outputs: Sequence[int]) -> NoReturn:
    """Run the requested script in this forked process."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, output in zip((1, 2), outputs, strict=True):
        os.dup2(output, fd)
    for output in outputs:
        os.close(output)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["args"]
    sys.path[:1] = [str(Path(sys.argv[0]).parent), *_folders(os.environ)]
    code = _exit_code(lambda: runpy.run_path(sys.argv[0], run_name="__main__"))
    threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does at its end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(script: Callable[[], object]) -> int:
    try:
        script()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    _serve(int(sys.argv[1]))
