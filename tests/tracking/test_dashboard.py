"""maestro-scale dashboard: the store it serves, and no process left after it exits."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestro_scale.tracking.dashboard import DashboardError, dashboard
from maestro_scale.training.distributed import free_port

PROGRAM = str(Path(sys.executable).parent / "maestro-scale")


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_with_the_command(tmp_path, ending):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").touch()
    port, env = free_port(), {**os.environ, "MLFLOW_TRACKING_URI": ""}  # empty counts as not set
    command = [PROGRAM, "dashboard", "runs", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_until(lambda: listens(port), 120)
        process.send_signal(ending)
        assert process.wait(30) == 0
        assert not listens(port)
    finally:
        process.kill()
    first_line = (tmp_path / "log").read_text().splitlines()[0]
    assert first_line.startswith(f"http://127.0.0.1:{port} shows sqlite:///{tmp_path}/runs/mlflow.db")
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))  # the port is free again


def test_without_a_store(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with pytest.raises(DashboardError, match=f"{tmp_path}/mlflow.db does not exist"):
        dashboard(tmp_path, "127.0.0.1", 5000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:planted@host:5000")
    assert dashboard(tmp_path, "127.0.0.1", 5000) == 0
    assert capsys.readouterr().out == "the runs are tracked by a server: http://host:5000\n"
