"""maestro-scale dashboard: the store it serves, and no process left after it exits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from maestro_scale.parent_death import guarded
from maestro_scale.tracking.dashboard import DashboardError, dashboard
from maestro_scale.training.distributed import free_port
from tests.testkit.runs import REPO

SERVER = """
import http.server, signal, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
if __name__ == "__main__" and sys.argv[1] == "ui":
    port = sys.argv[sys.argv.index("--port") + 1]
    worker = [sys.executable, __file__, "worker", sys.argv[sys.argv.index("--backend-store-uri") + 1], port]
    sys.exit(subprocess.call(worker))
if __name__ == "__main__":
    HANG
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[3])), Handler).serve_forever()
"""


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def processes_of(folder: Path) -> list[int]:
    """Processes with this folder in their command line: the server and its workers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "server"),
    [
        (signal.SIGTERM, "mlflow"),
        (signal.SIGKILL, "mlflow"),
        (signal.SIGINT, "quick"),
        (signal.SIGHUP, "quick"),
        (signal.SIGKILL, "hanging"),
    ],
)
def test_the_server_ends_with_the_command(tmp_path, ending, server):
    """SIGHUP: the terminal was closed. After SIGKILL the command itself can do nothing."""
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "mlflow.db").touch()
    if server != "mlflow":
        # A server with a worker in its group, in place of mlflow, which takes ten seconds to start.
        hang = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if server == "hanging" else "pass"
        (tmp_path / "mlflow.py").write_text(SERVER.replace("HANG", hang))
    port = free_port()
    env = {
        **os.environ,
        "MLFLOW_TRACKING_URI": "",
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}",
    }  # empty: not set
    command = [sys.executable, "-m", "maestro_scale.cli", "dashboard", str(runs), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell's background job ignores SIGINT, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        deadline = time.monotonic() + 240
        while " shows " not in (tmp_path / "log").read_text():
            running = process.poll() is None
            assert running, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        assert listens(port)
        process.send_signal(ending)
        assert process.wait(120) == (-ending if ending == signal.SIGKILL else 0)
        if process.returncode == 0:
            assert not listens(port)
        wait_until(lambda: not listens(port) and not processes_of(runs), 15)
    finally:
        process.kill()
        for pid in processes_of(runs):
            os.kill(pid, signal.SIGKILL)
    assert (
        f"http://127.0.0.1:{port} shows sqlite:///{tmp_path}/runs/mlflow.db;"
        in (tmp_path / "log").read_text()
    )
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))  # the port is free again


@pytest.mark.parametrize("code", [0, 3])
def test_the_exit_code_is_that_of_the_server(code):
    command = guarded([sys.executable, "-c", f"import sys; sys.exit({code})"])
    with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
        assert server.wait(30) == code


@pytest.mark.parametrize("stop", ["close", "terminate"])
def test_a_guard_ends_no_process_of_its_parents_group(stop):
    """Without a session of its own."""
    command = guarded([sys.executable, "-c", "import time; time.sleep(600)"])
    other = subprocess.Popen(["sleep", "600"])
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE) as server:
            assert server.stdin is not None
            time.sleep(0.2)
            server.terminate() if stop == "terminate" else server.stdin.close()
            assert server.wait(30) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
@pytest.mark.parametrize("ignored", [False, True])
def test_it_ends_with_its_parent_unless_hangups_are_ignored(tmp_path, ignored):
    """A script that starts it in a session of its own; the second as under nohup."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    (tmp_path / "mlflow.py").write_text(SERVER.replace("HANG", "pass"))
    port, log = free_port(), tmp_path / "log"
    env = {**os.environ, "MLFLOW_TRACKING_URI": "", "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"}
    words = [
        sys.executable,
        "-m",
        "maestro_scale.cli",
        "dashboard",
        str(tmp_path / "runs"),
        "--port",
        str(port),
    ]
    script = f"""
import signal, subprocess, sys, time
{"signal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else ""}
with open({str(log)!r}, "wb") as log:
    subprocess.Popen({words!r}, stdout=log, stderr=log, start_new_session=True)
while b" shows " not in open({str(log)!r}, "rb").read():
    time.sleep(0.1)
"""
    try:
        subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, timeout=120, check=True)
        if ignored:
            time.sleep(1)
            assert listens(port)
        else:
            wait_until(lambda: not listens(port) and not processes_of(tmp_path / "runs"), 30)
    finally:
        for pid in processes_of(tmp_path / "runs"):
            os.kill(pid, signal.SIGKILL)


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    (tmp_path / "mlflow.db").touch()
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(DashboardError, match=f"--port {port}: Address already in use; choose another"):
            dashboard(tmp_path, "127.0.0.1", port)


def test_without_a_store(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(DashboardError, match=f"{tmp_path}/mlflow.db does not exist"):
        dashboard(tmp_path, "127.0.0.1", 5000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted@host:5000")
    assert dashboard(tmp_path, "127.0.0.1", 5000) == 0
    assert capsys.readouterr().out == "the runs are tracked by a server: http://host:5000\n"
