"""A real MLflow server has every metric of metrics.jsonl once, whatever happens to the run or to the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.parent_death import guarded
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.metric_names import metric_names
from maestro_scale.training.distributed import free_port
from tests.testkit.runs import REPO, Trainer, metrics, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.root]
EVALUATE = REPO / "maestro_scale" / "evaluate.py"
TRACKED = ("--set", "tracking.enabled=true", "tracking.pictures_every=4")


class Server:
    """``mlflow server`` on a database, its artifacts in S3, which can be stopped and started again."""

    def __init__(self, folder: Path, s3: dict[str, str]) -> None:
        self.folder, self.port, self._s3 = folder, free_port(), s3
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it; returns once it responds."""
        store = f"sqlite:///{self.folder / 'mlflow.db'}"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", "s3://shards/mlflow", "--port", str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            env = {**os.environ, **self._s3, "MLFLOW_S3_ENDPOINT_URL": self._s3["AWS_ENDPOINT_URL"]}
            self._process = subprocess.Popen(
                guarded(command),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=env,
            )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2)
                return
            except (TimeoutError, urllib.error.URLError, ConnectionError):
                assert self._process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)
        pytest.fail("the MLflow server does not respond")

    def stop(self) -> None:
        """Kill it and its workers."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def server(ceph, tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("mlflow"), ceph.env)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def trainer(server, synthetic_shards, tmp_path) -> Trainer:
    return Trainer(
        write_recipe(tmp_path, synthetic_shards, workers=0), env={"MLFLOW_TRACKING_URI": server.uri}
    )


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
    documents = {"recipe.yaml", "environment.json", "metrics.jsonl", "report.md", "manifests", "images"}
    assert {a.path for a in stored.list_artifacts(run_id)} == documents
    pictures = [a.path for a in stored.list_artifacts(run_id, "images") if a.path.endswith(".png")]
    assert sorted(path.split("+")[2] for path in pictures) == ["4", "6"]

    host = socket.gethostname()
    memory = stored.get_metric_history(run_id, f"system/{host}/memory_gib")
    assert [m.step for m in memory] == [1, 2, 3, 4, 5, 6]
    assert all(0 < m.value < 10_000 for m in memory)
    info, lines = stored.get_run(run_id).info, metrics(run_dir)
    assert [m.timestamp for m in memory] == [round(1000 * line["time"]) for line in lines]
    assert info.start_time < memory[0].timestamp < memory[-1].timestamp <= info.end_time

    result = EvalResult(
        "treesatai_ts", "wf1", "knn", 0.5, {"Abies": 0.25, "Acer": None}, (0.4, 0.6), 9, checkpoint_step=6
    )
    result.write(tmp_path / "results.json")
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    try:
        checkpoint = run_dir / "checkpoints" / "step_00000006"
        nested = record_evaluation(checkpoint, result, tmp_path / "results.json")
        assert record_evaluation(checkpoint, result, tmp_path / "results.json") == nested
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    run = stored.get_run(nested)
    assert run.data.tags["mlflow.parentRunId"] == run_id
    assert run.data.metrics["eval/class/Abies"] == 0.25
    assert {a.path for a in stored.list_artifacts(nested)} == {"results.json", "report.html", "pictures"}
    assert [a.path for a in stored.list_artifacts(nested, "pictures")] == ["pictures/classes.png"]
    (point,) = stored.get_metric_history(run_id, "eval/treesatai_ts/knn/wf1")
    assert (point.step, point.value) == (6, 0.5)


def test_after_a_kill_and_a_resume(server, trainer, tmp_path):
    """Killed after the server received steps beyond the last checkpoint, which are then replayed."""
    run_dir, long = tmp_path / "run", ("train.steps=200", "checkpoint.every_steps=200")
    job = trainer.start(run_dir, 2, *TRACKED, *long)
    deadline, stored = time.monotonic() + 200, 0
    while stored < 5:
        assert time.monotonic() < deadline, job.output[-3000:]
        assert not any(p.poll() for p in job.processes), job.output[-3000:]
        time.sleep(0.05)
        if (run_dir / "tracking.json").exists():
            run_id = json.loads((run_dir / "tracking.json").read_text()).get("run_id")
            stored = len(client(server).get_metric_history(run_id, "loss/total")) if run_id else 0
    job.kill()
    assert not (run_dir / "latest").exists(), "a checkpoint came in between"
    before = metrics(run_dir)
    trainer.train(run_dir, 2, *TRACKED, *long)
    assert metrics(run_dir)[: len(before)] == before
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
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1, refused.stderr
    sent = sync(server.uri)
    assert sent.returncode == 0, sent.stderr
    assert "has all 6 lines and 2 more pictures" in sent.stdout
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"
    again = sync(server.uri.replace("127.0.0.1", "localhost") + "/")
    assert "0 more pictures" in again.stdout
    assert check_every_metric_is_there_once(server, run_dir) == "FINISHED"


PLANTED = {
    "environment": "plantedInTheEnvironment",
    "url": "plantedInTheUrl",
    "recipe": "hf_plantedInTheRecipe00",
    "section": "plantedInASection",
    "command": "plantedOnTheCommandLine",
}


def test_secrets_appear_nowhere(server, trainer, synthetic_shards, tmp_path):
    odd = tmp_path / f"shards?token={PLANTED['url']}"
    odd.symlink_to(synthetic_shards)
    text = trainer.recipe.read_text().replace(json.dumps(str(synthetic_shards)), json.dumps(str(odd)))
    section = f"\ndeepspeed: {{comet: {{enabled: false, api_key: {PLANTED['section']}}}, "
    assert "\ndeepspeed: {" in text
    text = text.replace("\ndeepspeed: {", section, 1)
    trainer.recipe.write_text(text.replace("name: tiny", f"name: tiny-{PLANTED['recipe']}"))
    trainer.env["SOME_API_KEY"] = PLANTED["environment"]
    run_dir = tmp_path / "run"
    secrets = [f"checkpoint.mirror={tmp_path}/mirror-{PLANTED['environment']}"]
    secrets += [
        f"deepspeed.comet.workspace={PLANTED['environment']}",
        f"deepspeed.other.api_key={PLANTED['command']}",
    ]
    job = trainer.start(run_dir, 1, *TRACKED, *secrets)
    assert job.wait(240) == 0, job.output[-3000:]
    asked = [f"--checkpoint={run_dir}", f"--out={tmp_path / 'out'}", "--mode=knn"]
    code, scored = Trainer(trainer.recipe, entry=EVALUATE, env=trainer.env).run(
        None, 1, *asked, "--set", "tracking.enabled=true", *secrets
    )
    assert code == 0, scored[-3000:]
    program, page = str(Path(sys.executable).parent / "maestro-scale"), str(tmp_path / "out" / "report.html")
    reported = subprocess.run(
        [program, "report", str(tmp_path / "out"), "--out", page], capture_output=True, text=True, timeout=120
    )
    assert reported.returncode == 0, reported.stderr
    code, complaint = trainer.run(
        tmp_path / "other", 1, "--set", f"data.mixture[0].split={PLANTED['recipe']}"
    )
    assert code == 2
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    experiment = client(server).get_run(run_id).info.experiment_id
    nested = client(server).search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len(nested) == 1
    fetched = tmp_path / "fetched"
    os.environ["MLFLOW_TRACKING_URI"] = server.uri
    try:
        for number, run in enumerate((run_id, nested[0].info.run_id)):
            client(server).download_artifacts(run, "", str(_made(fetched / str(number))))
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
    assert (fetched / "1" / "report.html").exists()
    seen = {"log": job.output.encode(), "complaint": complaint.encode(), "scored": scored.encode()}
    database, written = server.folder.glob("mlflow.db*"), (run_dir, fetched, tmp_path / "out")
    for path in (*database, server.folder / "server.log", *(f for x in written for f in x.rglob("*"))):
        if path.is_file():
            seen[str(path)] = path.read_bytes()
    assert any(name.endswith("recipe.yaml") for name in seen)
    for secret in PLANTED.values():
        assert [name for name, content in seen.items() if secret.encode() in content] == []


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_a_model_is_registered_and_loaded(server, trainer, tmp_path):
    run_dir = tmp_path / "run"
    trainer.train(run_dir, 1, *TRACKED)
    program = str(Path(sys.executable).parent / "maestro-scale")
    env = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}

    def export(*words: str) -> subprocess.CompletedProcess[str]:
        command = [program, "export", *words]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    for version in "12":
        done = export(str(run_dir), str(tmp_path / "model"), "--register", "tiny trees")
        assert done.returncode == 0, done.stderr
        assert f"load_model('models:/tiny trees/{version}')" in done.stdout
    code = LOADED.format(exported=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    version = client(server).get_model_version("tiny trees", "2")
    assert version.run_id == json.loads((run_dir / "tracking.json").read_text())["run_id"]
    (run_dir / "tracking.json").unlink()
    refused = export(str(run_dir), str(tmp_path / "model"), "--register", "tiny trees")
    assert refused.returncode == 2
    assert "was not tracked" in refused.stderr


def test_versions_of_one_step_stay_what_they_were(server, trainer, tmp_path):
    run_dir = tmp_path / "run"
    trainer.train(run_dir, 1, *TRACKED, "optim.ema=0.5")
    program = str(Path(sys.executable).parent / "maestro-scale")
    env = {**os.environ, "MLFLOW_TRACKING_URI": server.uri}
    for words in ([str(tmp_path / "raw")], [str(tmp_path / "ema"), "--ema"]):
        command = [program, "export", str(run_dir), *words, "--register", "versions"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    for version, kind in enumerate(("raw", "ema"), 1):
        client(server).get_model_version("versions", str(version))
        code = SAME.format(exported=str(tmp_path / kind), version=version)
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]


SAME = """
import torch
from maestro_scale import load_model
mine, theirs = load_model({exported!r}).state_dict(), load_model("models:/versions/{version}").state_dict()
assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
"""


LOADED = """
import mlflow.pyfunc, numpy as np, torch
from maestro_scale import load_model
from maestro_scale.interop.sources import ModelSource
mine, theirs = load_model({exported!r}), load_model("models:/tiny trees/2")
for (name, a), (other, b) in zip(mine.state_dict().items(), theirs.state_dict().items(), strict=True):
    assert name == other and torch.equal(a, b)
wrapped = mlflow.pyfunc.load_model("models:/tiny trees/2")
rng = np.random.default_rng(0)
inputs = dict(ref_date=np.full((2, 3), (2020, 180, 0), np.int16))
for s in mine.config.sensors:
    shape = (2, s.num_dates, len(s.bands), s.image_size, s.image_size)
    inputs[s.name] = rng.random(shape, np.float32)
    inputs[s.name + ".dates"] = np.full((2, s.num_dates, 3), (2020, 100, 10), np.int16)
assert set(inputs) == set(wrapped.metadata.signature.inputs.input_names())
vector = wrapped.predict(inputs)
assert vector.shape == (2, len(mine.config.sensors) * mine.config.size.width) and np.isfinite(vector).all()
"""
