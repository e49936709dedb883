"""MLflow gets every metric once and no secret, and never blocks the training. The stores are real."""

import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestro_scale.tracking.mlflow_run import (
    DatasetInput,
    MlflowRun,
    RunLockedError,
    RunMetadata,
    StepMetrics,
)
from maestro_scale.tracking.mlflow_tracker import FlushPolicy, MlflowTracker
from maestro_scale.tracking.run_times import RunEnd

SECRET = "hunter2-correct-horse"
TIMEOUT_S = 120  # creating the database takes seconds, more on a busy machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs that share one store, because creating the database takes seconds."""
    return tmp_path_factory.mktemp("project") / "runs"


@pytest.fixture
def run_dir(runs, request, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = runs / request.node.name
    folder.mkdir(parents=True)
    return folder


def start(run_dir, params=None, tags=None, artifacts=(), datasets=(), history=tuple):
    return MlflowTracker.start(
        RunMetadata(run_dir, "maestro", run_dir.name, params or {}, tags or {}, artifacts, datasets, history)
    )


class Store:
    """Reads the store of a run directory as another program would."""

    def __init__(self, run_dir: Path) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
        self.id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
        self.run = self.client.get_run(self.id)

    def steps(self, name="loss"):
        return [m.step for m in sorted(self.client.get_metric_history(self.id, name), key=lambda m: m.step)]

    def artifacts(self, folder=None):
        return {a.path for a in self.client.list_artifacts(self.id, folder)}


def sent(run_dir: Path) -> list[int]:
    """Steps in the store so far."""
    path = run_dir / "tracking.json"
    return Store(run_dir).steps() if path.exists() and "run_id" in json.loads(path.read_text()) else []


def draw(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (4, 4)).save(path)


def wait_until(condition):
    """Wait for the background thread; fails after 30 s."""
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("the condition was not true within 30 s")


def test_a_run_is_stored_completely(run_dir):
    (run_dir / "recipe.yaml").write_text("name: tiny\n")
    draw(run_dir / "step_00000010.png")
    tracker = start(
        run_dir,
        params={"optim.base_lr": 3e-4, **{f"p{i}": i for i in range(250)}, "long": "x" * 7000},
        tags={"size": "tiny"},
        artifacts=[run_dir / "recipe.yaml", run_dir / "not_there.json"],
        datasets=[DatasetInput("treesatai_ts", "a" * 64, "s3://bucket/treesatai_ts")],
    )
    for step in range(1, 21):
        tracker.log(step, {"loss": 1 / step, "loss/s2": None if step == 3 else 0.5, "odd|name": math.nan})
    for _ in range(2):  # the second time after a resume
        tracker.log_picture(10, run_dir / "step_00000010.png")
    tracker.finish("done", TIMEOUT_S)

    store = Store(run_dir)
    assert store.run.info.status == "FINISHED"
    assert store.run.info.run_name == run_dir.name
    assert store.steps() == list(range(1, 21))
    assert store.steps("loss/s2") == [s for s in range(1, 21) if s != 3]
    assert store.steps("odd_name") == list(range(1, 21))
    params = store.run.data.params
    assert params["optim.base_lr"] == "0.0003"
    assert params["p249"] == "249"
    assert len(params["long"]) == 6000
    assert store.run.data.tags["size"] == "tiny"
    assert store.run.data.tags["data/treesatai_ts/manifest_sha256"] == "a" * 64
    (read,) = store.run.inputs.dataset_inputs
    assert read.dataset.name == "treesatai_ts"
    assert store.artifacts() == {"recipe.yaml", "images"}
    (picture,) = [p for p in store.artifacts("images") if p.endswith(".png")]
    mark = picture.removeprefix("images/reconstruction")[0]  # % in MLflow 3.10
    assert picture.startswith(f"images/reconstruction{mark}step{mark}10{mark}timestamp{mark}")
    assert store.run.data.tags["mlflow.loggedImages"] == "True"
    assert (run_dir.parent / "mlartifacts").is_dir()


def test_replayed_steps_are_stored_once(run_dir):
    killed = start(run_dir, params={"train.steps": 10})
    for step in range(1, 11):
        killed.log(step, {"loss": step})
    wait_until(lambda: len(sent(run_dir)) == 10)
    first = Store(run_dir).id
    killed._run.detach()  # as the kernel releases the lock of a killed process

    # The checkpoint was at step 6, so 7 to 10 are replayed; the resumed run has more steps.
    resumed = start(run_dir, params={"train.steps": 15})
    for step in range(7, 16):
        resumed.log(step, {"loss": step, "lr": 0.1})
    resumed.finish("stopped", TIMEOUT_S)
    store = Store(run_dir)
    assert store.id == first
    assert store.steps() == list(range(1, 16))
    assert store.steps("lr") == list(range(7, 16))
    assert store.run.info.status == "KILLED"
    assert store.run.data.params["train.steps"] == "10"
    assert store.run.data.tags["changed/train.steps"] == "15"
    again = start(run_dir, params={"train.steps": 10})
    again.finish("done", TIMEOUT_S)
    assert "changed/train.steps" not in Store(run_dir).run.data.tags


CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from maestro_scale.tracking.mlflow_run import RunMetadata
from maestro_scale.tracking.mlflow_tracker import MlflowTracker
run_dir = Path(sys.argv[1])
begin = time.perf_counter()
tracker = MlflowTracker.start(RunMetadata(run_dir, "maestro", run_dir.name, {}, {}))
assert time.perf_counter() - begin < 1, "start waited for mlflow"
with (run_dir / "metrics.jsonl").open("a") as file:
    for step in range(1, 31):
        file.write(json.dumps({"step": step, "loss": step / 10}) + "\\n")
        file.flush()
        tracker.log(step, {"loss": step / 10})
        while step == 15 and not (run_dir / "tracking.json").exists():
            time.sleep(0.05)
        time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""


def read_history(run_dir):
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        yield StepMetrics(record.pop("step"), 1000, record)


def test_records_lost_from_the_queue_by_sigkill_are_sent_by_the_next_process(run_dir):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(run_dir)], env=env, capture_output=True, timeout=120
    )
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    resumed = start(run_dir, history=lambda: read_history(run_dir))
    for step in range(25, 41):
        resumed.log(step, {"loss": step / 10})
    resumed.finish("done", TIMEOUT_S)
    assert Store(run_dir).steps() == list(range(1, 41))


def test_an_outage_leaves_no_gap(run_dir, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    down, real = [], MlflowClient.log_batch

    def log_batch(self, *args, **named):
        if down:
            raise ConnectionError("the server is away")
        return real(self, *args, **named)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    logged = []
    tracker = start(run_dir, history=lambda: list(logged))
    tracker._policy = FlushPolicy(flush_s=0.02, retry_s=0.1)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 61):
            if step == 21:
                wait_until(lambda: len(sent(run_dir)) == 20)
                down.append(True)
            if step == 41:
                wait_until(lambda: caplog.records)
                down.clear()
            logged.append(StepMetrics(step, 1000, {"loss": 1.0}))
            tracker.log(step, {"loss": 1.0})
            time.sleep(0.01)
        tracker.finish("done", TIMEOUT_S)
    assert Store(run_dir).steps() == list(range(1, 61))
    (record,) = [r for r in caplog.records if "metrics" in r.getMessage().split("(")[0]]
    assert "the server is away" in record.getMessage()


def test_an_unreachable_server_costs_one_warning(run_dir, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{SECRET}@127.0.0.1:9")
    begin = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        tracker = start(run_dir)
        for step in range(1, 501):
            tracker.log(step, {"loss": 1.0})
        assert time.perf_counter() - begin < 2
        tracker.finish("done")
    assert time.perf_counter() - begin < 15
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("maestro_scale")]
    assert len(ours) == 1
    assert ours[0].startswith("MLflow at http://127.0.0.1:9 did not accept metrics")
    assert SECRET not in caplog.text
    assert not (run_dir / "tracking.json").exists()


def test_a_failing_store_is_retried_after_the_interval():
    tried = []

    def open_run(warn):
        tried.append(time.monotonic())
        raise ConnectionError("away")

    tracker = MlflowTracker(open_run, "the store", FlushPolicy(flush_s=0.01, retry_s=0.5)).start_thread()
    while len(tried) < 3:
        tracker.log(len(tried), {"loss": 1.0})
        time.sleep(0.01)
    tracker.finish("done")
    assert all(after - before >= 0.5 for before, after in itertools.pairwise(tried[:3]))


class SlowRun:
    """A store that is slow, and records what it received."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s, self.steps, self.closed, self.num_backfills = wait_s, [], None, 0

    def send(self, metrics):
        metrics = list(metrics)
        time.sleep(self.wait_s if metrics else 0)
        self.steps += [m.step for m in metrics]

    def log_picture(self, step: int, path: Path) -> None:
        raise OSError("no space left")

    def backfill(self) -> None:
        self.num_backfills += 1

    def close(self, end: RunEnd) -> None:
        self.closed = end.reason

    def detach(self) -> None:
        pass


def test_a_slow_store_does_not_slow_the_caller_and_the_queue_is_bounded(caplog):
    run = SlowRun(0.3)
    tracker = MlflowTracker(
        lambda warn: run, "the store", FlushPolicy(flush_s=0.01, capacity=50)
    ).start_thread()
    begin = time.perf_counter()
    for step in range(1, 2001):
        tracker.log(step, {"loss": 1.0})
    assert time.perf_counter() - begin < 2  # 40 batches of 0.3 s would be 12
    tracker.finish("stopped")
    assert len(run.steps) < 2000
    assert run.num_backfills == 1
    assert run.closed == "stopped"
    assert caplog.text.count("the queue of 50 records is full") == 1


def test_a_store_that_is_unavailable_at_the_end_is_retried_until_the_deadline(monkeypatch):
    run, away = SlowRun(0), []

    def open_run(warn):
        if away:
            away.pop()
            raise ConnectionError("away")
        return run

    tracker = MlflowTracker(open_run, "the store", FlushPolicy(flush_s=0.01, retry_s=60)).start_thread()
    tracker.log(1, {"loss": 1.0})
    wait_until(lambda: run.steps == [1])
    away += [1, 2]
    monkeypatch.setattr(
        run, "send", lambda metrics: (_ for _ in ()).throw(ConnectionError("away")) if away else None
    )
    tracker.log(2, {"loss": 1.0})
    wait_until(lambda: tracker._run is None)
    tracker.finish("done", wait_s=20)
    assert run.closed == "done"


def test_finish_stops_at_the_timeout():
    tracker = MlflowTracker(lambda warn: SlowRun(30), "the store", FlushPolicy(flush_s=0.01)).start_thread()
    tracker.log(1, {"loss": 1.0})
    begin = time.perf_counter()
    tracker.finish("done", wait_s=0.3)
    assert time.perf_counter() - begin < 5
    with pytest.raises(ValueError, match="'over' must be one of done, stopped, failed"):
        tracker.finish("over")


def test_metrics_are_stored_if_artifacts_cannot_be(run_dir, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    def refuse(*_args, **_named):
        raise PermissionError("bucket says no")

    monkeypatch.setattr(MlflowClient, "log_image", refuse)
    draw(run_dir / "1.png")
    tracker = start(run_dir)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
        tracker.log_picture(step, run_dir / "1.png")
    tracker.finish("done", TIMEOUT_S)
    assert Store(run_dir).steps() == [1, 2, 3]
    assert caplog.text.count("bucket says no") == 1


def test_a_run_that_was_deleted_from_the_store_is_created_again(run_dir):
    for number in range(2):
        tracker = start(run_dir)
        tracker.log(1, {"loss": 1.0})
        tracker.finish("failed", TIMEOUT_S)
        store = Store(run_dir)
        assert store.run.info.status == "FAILED"
        if number == 0:
            first = store.id
            store.client.delete_run(first)
    assert store.id != first


def test_a_directory_has_one_run_per_store_whatever_its_address(run_dir, monkeypatch, tmp_path):
    def send(steps):
        tracker = start(run_dir)
        for step in steps:
            tracker.log(step, {"loss": 1.0})
        tracker.finish("done", TIMEOUT_S)

    send([1, 2])
    first = Store(run_dir).id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    send([1, 2, 3])
    elsewhere = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{run_dir.parent}/../{run_dir.parent.name}/mlflow.db"
    )
    send([3, 4])
    store = Store(run_dir)
    assert (store.id, store.steps()) == (first, [1, 2, 3, 4])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    send([4])
    assert json.loads((run_dir / "tracking.json").read_text())["run_id"] == elsewhere


def test_two_processes_do_not_send_the_same_run_to_the_same_store(run_dir):
    def open_run(warn=lambda *_: None):
        return MlflowRun.open(RunMetadata(run_dir, "maestro", run_dir.name, {}, {}), warn)

    first = open_run()
    with pytest.raises(RunLockedError, match="another process is sending"):
        open_run()
    first.close(RunEnd("done", 5))
    open_run().close(RunEnd("done", 5))


def test_no_secret_reaches_the_store(run_dir, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    url = f"s3://AKIAABCDEFGHIJKLMNOP:{SECRET}@bucket/treesatai_ts"
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(f'name: tiny\ndata:\n  shards: "{url}"\n  secret_key: other-{SECRET[::-1]}\nlr: 0.1\n')
    environment = run_dir / "environment.json"
    environment.write_text(json.dumps({"command": f"train.py --set data.shards={url}"}))
    tracker = start(
        run_dir,
        params={"data.mixture[0].shards": url, "data.s3.secret_key": SECRET[::-1], "note": f"key={SECRET}"},
        tags={"command": f"--set x={SECRET}"},
        artifacts=[recipe, environment],
        datasets=[DatasetInput("treesatai_ts", "b" * 64, url)],
    )
    tracker.log(1, {"loss": 1.0})
    tracker.finish("done", TIMEOUT_S)

    params = Store(run_dir).run.data.params
    assert params["data.mixture[0].shards".replace("[", "_").replace("]", "_")] == "s3://bucket/treesatai_ts"
    everything = [p for p in run_dir.parent.rglob("*") if p.is_file() and p not in (recipe, environment)]
    assert any(p.name == "recipe.yaml" for p in everything)
    for path in everything:
        content = path.read_bytes()
        for secret in (SECRET, SECRET[::-1], "AKIAABCDEFGHIJKLMNOP"):
            assert secret.encode() not in content, path


def test_metrics_keep_the_time_of_their_measurement():
    run = SlowRun(0)
    times = []
    run.send = lambda metrics: times.extend(m.time_ms for m in metrics)
    tracker = MlflowTracker(lambda warn: run, "the store", FlushPolicy(flush_s=0.2)).start_thread()
    before = time.time() * 1000
    tracker.log(1, {"loss": 1.0})
    time.sleep(0.05)
    tracker.log(2, {"loss": 1.0})
    tracker.log(3, {"loss": 1.0}, time_s=12.5)
    tracker.finish("done")
    assert times.pop() == 12500
    assert before - 1 <= times[0] <= times[1] - 40
    assert StepMetrics(1, 2, {}).step == 1
