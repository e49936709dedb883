"""Rounds of tracking: the MLflow server is killed and comes back while a run trains; no metric is lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from maestro_scale.tracking.metric_names import metric_names
from maestro_scale.training.distributed import free_port
from tests.chaos.compare import compare_runs
from tests.chaos.findings import WRONG, Finding
from tests.chaos.kills import last_step
from tests.chaos.processes import Start
from tests.chaos.round import Round
from tests.testkit.runs import REPO, metrics


def mlflow(r: Round) -> None:
    """The server is killed at a random step; in half of the rounds it comes back before the run ends, else ``sync``
    sends what is missing."""
    reference = r.site.training(2, 2).folder
    down, up = sorted(r.rng.sample(range(1, 23), 2))
    returns = r.rng.random() < 0.5
    server = Server(r)
    server.start()
    try:
        env = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
        recipe = r.site.recipe(r.folder)
        start = r.start(r.site.train(recipe, r.run_dir, 2, "tracking.enabled=true"), **env)
        _wait_for_step(r, start, down)
        server.stop()
        r.outcome.inject("MLflow server killed")
        if returns:
            _wait_for_step(r, start, up)
            server.start()
        if not r.must_succeed(start):
            return
        if not returns:
            server.start()
        r.must_succeed(r.start(r.site.command_line("sync", str(r.run_dir)), **env))
        r.found(compare_runs(r.run_dir, reference, exact=True))
        r.found(compare_store(server.database, r.run_dir))
    finally:
        server.stop()


def compare_store(database: Path, run_dir: Path) -> list[Finding]:
    """Every metric of metrics.jsonl is in the database once, with its value."""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    with sqlite3.connect(database) as store:
        rows = store.execute("SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run_id,)).fetchall()
    wanted = {
        (name, line["step"]): float(value)
        for line in metrics(run_dir)
        for name, value in metric_names(line, mixture=False).items()
        if value is not None
    }
    counts, stored = Counter((k, s) for k, s, _ in rows), {(k, s): v for k, s, v in rows}
    findings = [Finding(WRONG, f"MLflow has {key} {n} times") for key, n in counts.items() if n > 1]
    if lost := sorted(wanted.keys() - stored.keys()):
        findings.append(Finding(WRONG, f"MLflow lacks {len(lost)} metrics, e.g. {lost[0]}", len(lost)))
    wrong = [
        k
        for k in wanted.keys() & stored.keys()
        if abs(wanted[k] - stored[k]) > 1e-9 * max(1.0, abs(wanted[k]))
    ]
    return findings + [Finding(WRONG, f"MLflow has another value of {key}") for key in wrong[:3]]


class Server:
    """``mlflow server`` on a database in the round's folder."""

    def __init__(self, r: Round) -> None:
        self._folder, self._port = r.folder / "mlflow", free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._folder.mkdir()
        # Its jobs would leave a folder in /dev/shm when it is killed.
        self._env = r.site.environment(self._folder, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
        self.uri, self.database = f"http://127.0.0.1:{self._port}", self._folder / "mlflow.db"

    def start(self) -> None:
        """Start it; returns once it responds. RuntimeError if it does not."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.database}",
        ]
        command += [
            "--artifacts-destination",
            str(self._folder / "artifacts"),
            "--workers=1",
            f"--port={self._port}",
        ]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._env, cwd=REPO, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"the MLflow server does not respond, see {self._folder / 'server.log'}")

    def stop(self) -> None:
        """SIGKILL it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _wait_for_step(r: Round, start: Start, step: int) -> None:
    while start.running and last_step(r.run_dir) < step:
        time.sleep(0.01)
