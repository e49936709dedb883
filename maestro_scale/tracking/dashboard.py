"""Starts MLflow's pages on the store that runs are in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from maestro_scale.errors import MaestroError
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_tracker import configure_mlflow

_GRACE_S = 5.0  # that a server has to end by itself


class DashboardError(MaestroError):
    """There is no store to show; the message says where it was looked for."""


def dashboard(runs: Path, host: str, port: int) -> int:
    """Serve the store of ``runs`` until interrupted or terminated; returns the server's exit code.

    Where ``MLFLOW_TRACKING_URI`` names a server, its address is printed and nothing is started. DashboardError where
    there is no store.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        print(f"the runs are tracked by a server: {scrub(uri)}")
        return 0
    if not uri:
        store = runs.resolve() / "mlflow.db"
        if not store.exists():
            raise DashboardError(
                f"{store} is not there: point RUNS at the folder that holds the run directories"
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
    """Run a server until it ends, or this process is to end: then with all that it has started, which would keep the
    port."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, interrupt)
    server = None
    try:
        server = subprocess.Popen(command, start_new_session=True)  # a group of its own, to be ended as one
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(ending, signal.SIG_IGN)
        if server is not None:
            _end_group(server)


def _end_group(server: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # when the last of them is gone
        for ending in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(server.pid, ending)
            deadline = time.monotonic() + _GRACE_S
            while time.monotonic() < deadline:
                server.poll()
                os.killpg(server.pid, 0)
                time.sleep(0.05)
