"""Starts MLflow's pages on the store that runs are in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_tracker import quiet_mlflow


class DashboardError(Exception):
    """There is no store to show; the message says where it was looked for."""


def dashboard(runs: Path, host: str, port: int) -> int:
    """Serve the store of ``runs`` until interrupted; returns the server's exit code.

    Where ``MLFLOW_TRACKING_URI`` names a server, its address is printed and nothing is started. DashboardError where
    there is no store.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and uri.startswith("http"):
        print(f"the runs are tracked by a server: {scrub(uri)}")
        return 0
    if uri is None:
        store = runs.resolve() / "mlflow.db"
        if not store.exists():
            raise DashboardError(
                f"{store} is not there: point RUNS at the folder that holds the run directories"
            )
        uri = f"sqlite:///{store}"
    quiet_mlflow()
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
    try:
        return subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:
        return 0
