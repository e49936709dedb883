"""The ``dashboard`` command: serves the MLflow UI on a run folder's tracking store."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from maestro_scale.errors import MaestroError
from maestro_scale.parent_death import guarded
from maestro_scale.secrets_filter import scrub
from maestro_scale.tracking.mlflow_tracker import configure_mlflow, error_summary
from maestro_scale.tracking.store import connect, relocate, sqlite_path
from maestro_scale.tracking.views import RUNS, write_views

log = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT_S = 5.0  # between SIGTERM and SIGKILL
_POLL_S = 0.3
_ANSWER_S = 10.0  # of one attempt
_SERVER_ENV = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # jobs of its pages for language models
    "GUNICORN_CMD_ARGS": "--timeout 600",  # of MLflow 3.0: a busy machine takes longer than 30 s to import it
}
_OPENER = build_opener(ProxyHandler({}))  # the server is on this machine


class DashboardError(MaestroError):
    """There is no tracking store; the message says where it was expected."""


def dashboard(runs: Path, host: str, port: int) -> int:
    """Serve the store of ``runs`` until interrupted or terminated, or until the parent process has ended; returns the
    server's exit code.

    Its address is printed once it answers, with a link to the table of runs. If ``MLFLOW_TRACKING_URI`` is the address
    of a server, it is printed and no server is started. Raises DashboardError if there is no store or the port is in
    use.
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
    _check_port(host, port)
    configure_mlflow()
    if (path := sqlite_path(uri)) is not None and path.exists():
        relocate(path)  # before the server reads it
    address = f"http://{host}:{port}"
    print(f"MLflow starts on {scrub(uri)}", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    # More than one worker is started by a supervisor that restarts those that are not up within seconds.
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    return _serve(command, address, uri)


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        raise DashboardError(
            f"--host {host} --port {port}: {error.strerror or error}; choose another port"
        ) from None


def _serve(command: list[str], address: str, uri: str) -> int:
    """Run a server until it exits or this process is asked to stop; returns the exit code.

    MLflow starts workers that would survive it and keep the port, so the whole process group is terminated; the guard
    does that if this process is killed.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    # nohup ignores SIGHUP: such a dashboard outlives its shell.
    parent = None if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else os.getppid()
    for stop_signal in (signal.SIGTERM, signal.SIGHUP):
        if stop_signal != signal.SIGHUP or parent is not None:
            signal.signal(stop_signal, interrupt)
    server = None
    try:
        server = subprocess.Popen(
            guarded(command), stdin=subprocess.PIPE, start_new_session=True, env={**_SERVER_ENV, **os.environ}
        )
        link = _runs_link(address, uri)  # while the server starts
        announced = False
        while server.poll() is None:
            if parent is not None and parent > 1 and os.getppid() != parent:
                return 0
            if not announced and _answers(address):
                announced = True
                print(f"{address} shows {scrub(uri)}; stop it with Ctrl-C", flush=True)
                if link:
                    print(f"the table of the runs: {link}", flush=True)
            time.sleep(_POLL_S)
        return server.returncode
    except KeyboardInterrupt:
        return 0
    finally:
        # A second Ctrl-C must not interrupt the shutdown and leave the workers running.
        for stop_signal in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(stop_signal, signal.SIG_IGN)
        if server is not None:
            _terminate_group(server)


def _answers(address: str) -> bool:
    try:
        with _OPENER.open(f"{address}/health", timeout=_ANSWER_S):
            return True
    except (OSError, HTTPException):
        return False


def _runs_link(address: str, uri: str) -> str:
    """A link to the table of the experiment with the newest run, whose saved views are written; empty without one."""
    try:
        client = connect(uri)
        experiments = {e.experiment_id for e in client.search_experiments()}
        newest = client.search_runs(list(experiments), max_results=1, order_by=["attributes.start_time DESC"])
        if not newest:
            return ""
        experiment = newest[0].info.experiment_id
        for other in experiments - {experiment}:
            write_views(client, other)
        (view,) = (v for v in write_views(client, experiment) if v.id == RUNS)
    except Exception as error:  # noqa: BLE001 - MLflow raises any type; the pages work without views
        log.warning("the saved views of %s were not written: %s", scrub(uri), error_summary(error))
        return ""
    return view.link(address, experiment)


def _terminate_group(server: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # raised by killpg once the last process has exited
        for stop_signal in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(server.pid, stop_signal)
            deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S
            while time.monotonic() < deadline:
                server.poll()  # reaps the server, else its zombie keeps the group alive
                os.killpg(server.pid, 0)
                time.sleep(0.05)
