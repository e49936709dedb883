"""A real MLflow server: every metric of metrics.jsonl is there once, whatever happens to the run or to the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.metric_names import metric_names
from tests.testkit.runs import Trainer, free_port, metrics, write_recipe

pytestmark = pytest.mark.slow
TRACKED = ("--set", "tracking.enabled=true", "tracking.pictures_every=4")


class Server:
    """``mlflow server`` on a database and an artifact folder, which can be stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns once it answers."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except (TimeoutError, urllib.error.URLError, ConnectionError):
                assert self._process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)
        pytest.fail("the MLflow server does not answer")

    def stop(self) -> None:
        """Kill it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def trainer(server, synthetic_shards, tmp_path) -> Trainer:
    return Trainer(write_recipe(tmp_path, synthetic_shards), env={"MLFLOW_TRACKING_URI": server.uri})


def client(server):
    from mlflow.tracking import MlflowClient

    return MlflowClient(server.uri)


def check_every_metric_is_there_once(server, run_dir: Path) -> str:
    """Compare the store with metrics.jsonl, number by number; returns the run's status."""
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    expected = {
        (name, line["step"]): value
        for line in metrics(run_dir)
        for name, value in metric_names(line, mixture=False).items()
        if value is not None
    }
    assert len({step for _, step in expected}) == len(metrics(run_dir))
    run = client(server).get_run(run_id)
    stored = [
        (k, m.step, m.value) for k in run.data.metrics for m in client(server).get_metric_history(run_id, k)
    ]
    assert set(Counter((k, s) for k, s, _ in stored).values()) == {1}
    assert {(k, s): v for k, s, v in stored} == pytest.approx(expected)
    return run.info.status


def test_a_run_and_its_evaluation(server, trainer, tmp_path):
    run_dir = tmp_path / "run"
    trainer.train(run_dir, 2, *TRACKED)
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    stored = client(server)
    assert {a.path for a in stored.list_artifacts(run_id)} >= {"recipe.yaml", "metrics.jsonl", "pictures"}
    pictures = [a.path for a in stored.list_artifacts(run_id, "pictures")]
    assert pictures == ["pictures/step_00000004.png", "pictures/step_00000006.png"]

    result = EvalResult(
        "treesatai_ts", "wf1", "knn", 0.5, {"Abies": 0.25, "Acer": None}, (0.4, 0.6), 9, checkpoint_step=6
    )
    result.write(tmp_path / "results.json")
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    try:
        nested = record_evaluation(
            run_dir / "checkpoints" / "step_00000006", result, tmp_path / "results.json"
        )
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    run = stored.get_run(nested)
    assert run.data.tags["mlflow.parentRunId"] == run_id
    assert run.data.metrics["eval/class/Abies"] == 0.25
    (point,) = stored.get_metric_history(run_id, "eval/treesatai_ts/knn/wf1")
    assert (point.step, point.value) == (6, 0.5)


def test_after_a_kill_and_a_resume(server, trainer, tmp_path):
    run_dir = tmp_path / "run"
    trainer.kill_at(run_dir, 2, 4, *TRACKED, "train.steps=12")
    trainer.train(run_dir, 2, *TRACKED, "train.steps=12")
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"


def test_the_server_is_away_for_the_middle_of_the_run(server, trainer, tmp_path):
    run_dir, steps = tmp_path / "run", 60
    job = trainer.start(run_dir, 2, *TRACKED, f"train.steps={steps}", "checkpoint.every_steps=60")

    def reach(step: int) -> None:
        deadline = time.monotonic() + 200
        while not any(m["step"] >= step for m in metrics(run_dir)):
            assert time.monotonic() < deadline
            assert not any(p.poll() for p in job.processes), job.output[-3000:]
            time.sleep(0.01)

    reach(steps // 3)
    server.stop()
    reach(2 * steps // 3)
    for process in job.processes:  # starting the server takes longer than the last third of so small a run
        os.kill(process.pid, signal.SIGSTOP)
    server.start()
    for process in job.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert job.wait(200) == 0, job.output[-3000:]
    assert [m["step"] for m in metrics(run_dir)] == list(range(1, steps + 1))
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"


def test_a_run_without_network_is_sent_later(server, trainer, tmp_path):
    run_dir = tmp_path / "run"
    offline = Trainer(trainer.recipe, env={"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"})
    offline.train(run_dir, 1, *TRACKED)
    assert not (run_dir / "tracking.json").exists()
    program = str(Path(sys.executable).parent / "maestro-scale")

    def sync(uri: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "MLFLOW_TRACKING_URI": uri}
        return subprocess.run(
            [program, "sync", str(run_dir)], env=env, capture_output=True, text=True, timeout=120
        )

    refused = sync(f"http://127.0.0.1:{free_port()}")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1, refused.stderr
    sent = sync(server.uri)
    assert sent.returncode == 0, sent.stderr
    assert "has all 6 lines and 2 more pictures" in sent.stdout
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"
    again = sync(server.uri)
    assert "0 more pictures" in again.stdout
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"
