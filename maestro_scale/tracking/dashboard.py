"""The ``dashboard`` command: serves the MLflow UI on a run folder's tracking store."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from maestro_scale.errors import MaestroError
from maestro_scale.parent_death import guarded
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_tracker import configure_mlflow

_SHUTDOWN_TIMEOUT_S = 5.0  # between SIGTERM and SIGKILL


class DashboardError(MaestroError):
    """There is no tracking store; the message says where it was expected."""


def dashboard(runs: Path, host: str, port: int) -> int:
    """Serve the store of ``runs`` until interrupted or terminated; returns the server's exit code.

    If ``MLFLOW_TRACKING_URI`` is the address of a server, it is printed and no server is started. Raises
    DashboardError if there is no store.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        print(f"the runs are tracked by a server: {scrub(uri)}")
        return 0
    if not uri:
        store = runs.resolve() / "mlflow.db"
        if not store.exists():
            raise DashboardError(
                f"{store} does not exist: set RUNS to the folder that holds the run directories"
            )
        uri = f"sqlite:///{store}"
    configure_mlflow()
    print(f"http://{host}:{port} shows {scrub(uri)}; stop it with Ctrl-C", flush=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "ui",
        "--backend-store-uri",
        uri,
        "--host",
        host,
        "--port",
        str(port),
    ]
    return _serve(command)


def _serve(command: list[str]) -> int:
    """Run a server until it exits or this process is asked to stop; returns the exit code.

    MLflow starts workers that would survive it and keep the port, so the whole process group is terminated; the guard
    does that if this process is killed.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for stop_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop_signal, interrupt)
    server = None
    try:
        server = subprocess.Popen(guarded(command), stdin=subprocess.PIPE, start_new_session=True)
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C must not interrupt the shutdown and leave the workers running.
        for stop_signal in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(stop_signal, signal.SIG_IGN)
        if server is not None:
            _terminate_group(server)


def _terminate_group(server: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # raised by killpg once the last process has exited
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(server.pid, stop_signal)
            deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
            while time.monotonic() < deadline:
                server.poll()  # reaps the server, else its zombie keeps the group alive
                os.killpg(server.pid, 0)
                time.sleep(0.05)
