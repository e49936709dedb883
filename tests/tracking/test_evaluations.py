"""Evaluations reach MLflow at once or with maestro-scale sync; otherwise a warning says that they are not recorded."""

from __future__ import annotations

import json
import logging
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from testkit.tracked import finished_run
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.outbox import OUTBOX_FILE

AWAY = "http://127.0.0.1:9"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """Directory of a finished run that was never sent."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("sys.argv", ["/somewhere/evaluate.py", "--mode", "knn"])
    return finished_run(tmp_path / "runs" / "run")


def result(folder: Path, mode: str, value: float) -> tuple[EvalResult, Path]:
    evaluated = EvalResult(
        "treesatai_ts", "wf1", mode, value, {"Abies": value}, (0.1, 0.9), 9, checkpoint_step=1
    )
    evaluated.write(folder / mode / "results.json")
    return evaluated, folder / mode / "results.json"


def sync(run_dir: Path) -> str:
    done = CliRunner().invoke(app, ["sync", str(run_dir)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def client(run_dir: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def nested(run_dir: Path) -> dict:
    stored = client(run_dir)
    parent = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    found = stored.search_runs(
        [stored.get_run(parent).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    return {run.data.tags["mode"]: run for run in found} | {"parent": stored.get_run(parent)}


@contextmanager
def within(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.slow
def test_an_evaluation_that_was_not_sent_is_sent_by_sync(run_dir, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with within(tmp_path), caplog.at_level(logging.WARNING):  # no store has the run yet
        assert (
            record_evaluation(run_dir / "checkpoints" / "step_00000001", *result(Path("out"), "knn", 0.5))
            is None
        )
    (record,) = caplog.records
    assert f"`maestro-scale sync {run_dir}` sends it" in record.getMessage()
    assert not (run_dir.parent / "mlflow.db").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert "and 1 more evaluations" in sync(run_dir)
    assert not (run_dir / OUTBOX_FILE).exists()

    caplog.clear()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    with caplog.at_level(logging.WARNING):
        assert record_evaluation(run_dir, *result(tmp_path, "probe", 0.6)) is None
        assert record_evaluation(run_dir, *result(tmp_path, "probe", 0.7)) is None  # the same path again
    assert [r.getMessage().startswith(f"MLflow at {AWAY} did not accept") for r in caplog.records] == [
        True,
        True,
    ]
    removed = result(tmp_path, "attentive", 0.8)
    record_evaluation(run_dir, *removed)
    removed[1].unlink()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    output = sync(run_dir)
    assert f"an evaluation was not sent: {removed[1]} does not exist" in output
    assert "and 1 more evaluations" in output
    assert "evaluations" not in sync(run_dir)

    runs = nested(run_dir)
    assert {mode: run.info.status for mode, run in runs.items()} == dict.fromkeys(
        ("knn", "probe", "parent"), "FINISHED"
    )
    assert runs["probe"].data.metrics["eval/wf1"] == 0.7
    assert runs["parent"].data.metrics["eval/treesatai_ts/knn/wf1"] == 0.5
    tags = runs["knn"].data.tags
    assert {k: tags[k] for k in ("dataset", "slurm_job", "mlflow.source.name", "mlflow.source.type")} == {
        "dataset": "treesatai_ts",
        "slurm_job": "77",  # of the evaluation, not of the sync
        "mlflow.source.name": "evaluate.py",
        "mlflow.source.type": "LOCAL",
    }
    for name in ("git_revision", "host", "mlflow.user"):
        assert tags[name] == runs["parent"].data.tags[name]


def test_an_incomplete_evaluation_is_replaced(run_dir, tmp_path, monkeypatch, caplog):
    from mlflow.tracking import MlflowClient

    sync(run_dir)
    with monkeypatch.context() as patch:
        patch.setattr(
            MlflowClient, "log_artifacts", lambda *_: (_ for _ in ()).throw(OSError("bucket is full"))
        )
        assert record_evaluation(run_dir, *result(tmp_path, "knn", 0.5)) is None
    assert "bucket is full" in caplog.text
    assert "and 1 more evaluations" in sync(run_dir)
    run = nested(run_dir)["knn"]
    assert run.info.status == "FINISHED"
    assert "pictures" in {a.path for a in client(run_dir).list_artifacts(run.info.run_id)}
    parent = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    assert len(client(run_dir).get_metric_history(parent, "eval/treesatai_ts/knn/wf1")) == 1


def test_an_unwritable_outbox_is_reported(run_dir, tmp_path, monkeypatch, caplog):
    (run_dir / OUTBOX_FILE).mkdir()  # not writable, also for root
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    record_evaluation(run_dir, *result(tmp_path, "knn", 0.5))
    (record,) = caplog.records
    assert f"sync cannot send it: the outbox in {run_dir} is not writable (" in record.getMessage()
    assert record.getMessage().endswith(f"{OUTBOX_FILE}: is not a regular file)")


def test_an_evaluation_without_a_run_is_reported_as_not_recorded(tmp_path, caplog):
    evaluated, path = result(tmp_path, "knn", 0.5)
    (tmp_path / "model").mkdir()
    assert record_evaluation(tmp_path / "model", evaluated, path) is None
    assert record_evaluation(None, evaluated, path) is None
    exported, baseline = (r.getMessage() for r in caplog.records)
    assert exported.startswith(f"{path} is not recorded in MLflow")
    assert exported.endswith(f"{tmp_path / 'model'} is not in a run directory")
    assert baseline.endswith("a baseline has no training run")
