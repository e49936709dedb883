"""The tracking store is created once, and nothing that happens to it loses a metric or ends the caller."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from testkit.hostile import NAMES
from testkit.tracked import finished_run

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.tracking import store
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.mlflow_run import MlflowRun, RunMetadata, StepMetrics
from maestro_scale.tracking.mlflow_tracker import FlushPolicy, MlflowTracker, configure_mlflow
from maestro_scale.tracking.outbox import list_pending
from maestro_scale.tracking.run_times import RunEnd
from maestro_scale.tracking.store import DeletedExperimentError, connect
from maestro_scale.tracking.sync import SyncError, sync

TIMEOUT_S = 60.0
RESTORE = r"`MLFLOW_TRACKING_URI=sqlite:///\S+mlflow.db mlflow experiments restore --experiment-id \d+`"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory) -> Path:
    """A store without runs, which takes seconds to create."""
    configure_mlflow()
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture
def runs(empty_store, tmp_path, monkeypatch) -> Path:
    """A folder for run directories, with a store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    shutil.copy(empty_store, tmp_path / "runs" / "mlflow.db")
    return tmp_path / "runs"


class Training:
    """A run with a tracker, as a training: every metric is in its history first."""

    def __init__(self, run_dir: Path, experiment: str = "maestro") -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir, self.history = run_dir, []
        self.tracker = MlflowTracker.start(
            RunMetadata(run_dir, experiment, run_dir.name, {}, {}, history=lambda: list(self.history))
        )
        self.tracker._policy = FlushPolicy(flush_s=0.02, retry_s=0.1)

    def log(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.history.append(StepMetrics(step, 1000 * step, {"loss": step / 10}))
            self.tracker.log(step, {"loss": step / 10})

    def log_until(self, condition) -> None:
        """Train on: the tracker connects again when there is something to send."""

        def reached() -> bool:
            self.log(len(self.history) + 1, len(self.history) + 1)
            return condition()

        wait_until(reached)

    def stored(self) -> list[int]:
        try:
            run_id = json.loads((self.run_dir / "tracking.json").read_text())["run_id"]
        except (OSError, KeyError):
            return []
        found = client(self.run_dir).get_metric_history(run_id, "loss")
        assert all(m.value == m.step / 10 for m in found)
        return sorted(m.step for m in found)

    def finish(self) -> None:
        self.tracker.finish("done", TIMEOUT_S)


def client(run_dir: Path):
    return connect(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


CHILDREN = """
import os, sys, time
from pathlib import Path
from maestro_scale.tracking.mlflow_tracker import MlflowTracker, configure_mlflow
from maestro_scale.tracking.mlflow_run import RunMetadata, StepMetrics
configure_mlflow()
import mlflow.store.tracking.sqlalchemy_store  # once, before the processes are forked
history = [StepMetrics(step, 1000, {"loss": step / 10}) for step in range(1, 21)]
runs = Path(sys.argv[1])
children = []
for number in range(4):
    if (child := os.fork()) == 0:
        run_dir = runs / f"run{number}"
        run_dir.mkdir(parents=True)
        while len(list(runs.glob("run*"))) < 4:  # all start together
            time.sleep(0.001)
        tracker = MlflowTracker.start(RunMetadata(run_dir, "maestro", run_dir.name, {}, {}, history=lambda: history))
        for step, metrics in ((h.step, h.metrics) for h in history):
            tracker.log(step, metrics)
        tracker.finish("done", 120)
        sys.stderr.flush()
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.slow
def test_runs_that_create_the_store_together_are_all_tracked(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    runs = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "-c", CHILDREN, str(runs)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "did not accept" not in done.stderr
    stored = client(runs / "run0")
    found = stored.search_runs([e.experiment_id for e in stored.search_experiments()])
    assert sorted(r.info.run_name for r in found) == [f"run{i}" for i in range(4)]
    for run in found:
        assert [m.step for m in stored.get_metric_history(run.info.run_id, "loss")] == list(range(1, 21))
    assert [p.name for p in runs.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("missing", ["locks", "links", "nothing"])
def test_a_store_is_published_complete_by_the_first(tmp_path, monkeypatch, empty_store, missing):
    """Threads instead of processes, and a template instead of migrations: which of them comes first is in the file."""
    created = []

    def create(path: Path) -> None:
        shutil.copy(empty_store, path)
        time.sleep(0.1)
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE creator (name)")
            database.execute("INSERT INTO creator VALUES (?)", (threading.current_thread().name,))
        created.append(path)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(store, "_create_tables", create)
    monkeypatch.setattr(
        store.socket, "gethostname", lambda: threading.current_thread().name
    )  # as on four nodes
    if missing == "locks":
        monkeypatch.setattr(store, "file_lock", refuse)
    if missing == "links":
        monkeypatch.setattr(store.os, "link", refuse)
    path = tmp_path / "deep" / "mlflow.db"
    path.parent.mkdir()
    path.touch()  # of a process that was killed before the first table
    threads = [threading.Thread(target=store._create_sqlite, args=(path,), name=f"t{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    with sqlite3.connect(path) as database:
        assert len(database.execute("SELECT * FROM creator").fetchall()) == 1
    assert (
        len(created) == {"locks": 4, "links": 2, "nothing": 1}[missing]
    )  # links: one elsewhere, one in place
    assert [p.name for p in path.parent.iterdir()] == ["mlflow.db"]


def test_the_holder_of_the_lock_may_be_stopped(tmp_path, monkeypatch, empty_store):
    monkeypatch.setattr(store, "_CREATE_WAIT_S", 0.3)
    monkeypatch.setattr(store, "_create_tables", lambda path: shutil.copy(empty_store, path))
    stale = tmp_path / ".mlflow.db.node-1.new"
    stale.touch()
    os.utime(stale, (0, 0))
    with store.file_lock(tmp_path / ".mlflow.db.lock"):
        store._create_sqlite(tmp_path / "mlflow.db")
    assert [p.name for p in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_deleted_experiment_is_named_and_loses_no_metric(runs, caplog):
    training = Training(runs / "run", "forests")
    training.log(1, 10)
    wait_until(lambda: training.stored() == list(range(1, 11)))
    experiment = client(training.run_dir).get_experiment_by_name("forests").experiment_id
    client(training.run_dir).delete_experiment(experiment)
    with caplog.at_level(logging.WARNING):
        training.log_until(lambda: "was deleted" in caplog.text)
        training.finish()
    (named,) = [r.getMessage() for r in caplog.records if "was deleted" in r.getMessage()]
    assert "training continues, metrics.jsonl has every metric, `maestro-scale sync" in named
    assert re.search(
        rf"the experiment 'forests' was deleted: restore it with {RESTORE}, or set another tracking.experiment",
        named,
    )
    other = Training(runs / "run2", "grassland")  # of another experiment
    other.log(1, 3)
    other.finish()
    assert other.stored() == [1, 2, 3]
    client(training.run_dir).restore_experiment(experiment)
    resumed = Training(training.run_dir, "forests")
    resumed.history[:] = training.history
    last = len(training.history) + 2
    resumed.log(last - 1, last)
    resumed.finish()
    assert resumed.stored() == list(range(1, last + 1))
    assert len(client(training.run_dir).search_runs([experiment])) == 1


def test_a_run_of_a_deleted_experiment_is_sent_after_its_restoration(runs, tmp_path, caplog):
    run_dir = finished_run(runs / "run")
    sync(run_dir)
    experiment = client(run_dir).get_experiment_by_name("maestro").experiment_id
    client(run_dir).delete_experiment(experiment)
    result = EvalResult("treesatai_ts", "wf1", "knn", 0.5, {"Abies": 0.5}, (0.4, 0.6), 9, checkpoint_step=1)
    result.write(tmp_path / "results.json")
    with caplog.at_level(logging.WARNING):
        assert record_evaluation(run_dir, result, tmp_path / "results.json") is None
    assert "the experiment 'maestro' was deleted: restore it with" in caplog.text
    with pytest.raises(SyncError, match=rf"the experiment 'maestro' was deleted: restore it with {RESTORE}"):
        sync(run_dir)
    assert len(list_pending(run_dir)) == 1
    client(run_dir).restore_experiment(experiment)
    assert sync(run_dir).num_evaluations == 1
    assert len(client(run_dir).search_runs([experiment])) == 2


def test_the_restore_command_restores_it(runs, monkeypatch):
    from mlflow.experiments import commands

    def open_run() -> MlflowRun:
        return MlflowRun.open(RunMetadata(runs / "run", "forests", "run", {}, {}), lambda *_: None)

    (runs / "run").mkdir()
    open_run().close(RunEnd("done", 5))
    experiment = client(runs / "run").get_experiment_by_name("forests")
    client(runs / "run").delete_experiment(experiment.experiment_id)
    with pytest.raises(DeletedExperimentError) as error:
        open_run()
    assignment, *words = shlex.split(str(error.value).split("`")[1])
    monkeypatch.setenv(*assignment.split("=", 1))
    assert words[:2] == ["mlflow", "experiments"]
    done = CliRunner().invoke(commands, words[2:])
    assert done.exit_code == 0, done.output
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    open_run().close(RunEnd("done", 5))


def test_a_run_that_is_deleted_while_it_trains_is_created_again_with_every_metric(runs):
    training = Training(runs / "run")
    training.log(1, 10)
    wait_until(lambda: training.stored() == list(range(1, 11)))
    run_id = json.loads((training.run_dir / "tracking.json").read_text())["run_id"]
    client(training.run_dir).delete_run(run_id)
    training.log_until(
        lambda: json.loads((training.run_dir / "tracking.json").read_text())["run_id"] != run_id
    )
    training.finish()
    assert training.stored() == list(range(1, len(training.history) + 1))


def test_a_full_disk_loses_no_metric(runs, caplog):
    training = Training(runs / "run")
    training.log(1, 10)
    wait_until(lambda: training.stored() == list(range(1, 11)))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with caplog.at_level(logging.WARNING):
        # A write beyond this size fails, as on a full disk. The metrics below need more pages.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        try:
            training.log(11, 400)
            wait_until(lambda: "did not accept metrics" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        training.log(401, 410)
        training.finish()
    assert training.stored() == list(range(1, 411))
    assert "Traceback" not in caplog.text


def test_a_locked_database_loses_no_metric(runs, caplog):
    training = Training(runs / "run")
    training.log(1, 10)
    wait_until(lambda: training.stored() == list(range(1, 11)))
    with caplog.at_level(logging.WARNING):
        with sqlite3.connect(runs / "mlflow.db", isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            begin = time.perf_counter()
            training.log(11, 100)
            assert time.perf_counter() - begin < 1
            time.sleep(1)
            other.execute("ROLLBACK")
        training.finish()
    assert training.stored() == list(range(1, 101))
    assert caplog.text.count("did not accept metrics") <= 1


def test_an_evaluation_with_hostile_names_is_recorded(runs, tmp_path):
    run_dir = finished_run(runs / "run")
    sync(run_dir)
    result = EvalResult(
        NAMES[0],
        "wf1",
        "knn",
        0.5,
        {name: (i + 1) / 100 for i, name in enumerate(NAMES)},
        (0.4, 0.6),
        9,
        splits={"test": NAMES},
        encoder="\x1b[2J",
        scores=dict.fromkeys(NAMES, 0.25),
        chosen=dict.fromkeys(NAMES, 1.0),
        checkpoint_step=1,
    )
    result.write(tmp_path / "results.json")
    run_id = record_evaluation(run_dir, result, tmp_path / "results.json")
    assert run_id is not None
    run = client(run_dir).get_run(run_id)
    of_classes = {k: v for k, v in run.data.metrics.items() if k.startswith("eval/class/")}
    assert sorted(of_classes.values()) == [(i + 1) / 100 for i in range(len(NAMES))]
    parent = client(run_dir).get_run(json.loads((run_dir / "tracking.json").read_text())["run_id"])
    assert parent.data.metrics["eval/_/_/x/knn/wf1"] == 0.5
    assert {a.path for a in client(run_dir).list_artifacts(run_id)} == {
        "results.json",
        "report.html",
        "pictures",
    }
