"""maestro-scale sync: the state of the store afterwards, also when it fails."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from testkit.tracked import finished_run

from maestro_scale.recipe import load_recipe
from maestro_scale.tracking.mlflow_run import tracking_uri
from maestro_scale.tracking.outbox import PendingEvaluation, add_pending, list_pending
from maestro_scale.tracking.run_file import store_lock
from maestro_scale.tracking.run_params import run_metadata
from maestro_scale.tracking.sync import SyncError, sync
from maestro_scale.training.run_dir import JsonLines
from maestro_scale.untrusted import InputError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run directory and a store that has the run, because creating the database takes seconds."""
    run_dir = finished_run(tmp_path_factory.mktemp("runs") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        sync(run_dir)
    return run_dir.parent


@pytest.fixture
def run_dir(made, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs" / "run"


def store(run_dir):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def status(run_dir):
    return store(run_dir).get_run(json.loads((run_dir / "tracking.json").read_text())["run_id"]).info.status


def test_a_sync_that_fails_leaves_a_finished_run_finished(run_dir, monkeypatch):
    from mlflow.tracking import MlflowClient

    assert status(run_dir) == "FINISHED"

    def refuse(*_):
        raise ConnectionError("gone again")

    monkeypatch.setattr(MlflowClient, "get_metric_history", refuse)
    with pytest.raises(SyncError, match="gone again"):
        sync(run_dir)
    assert status(run_dir) == "FINISHED"


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.jsonl", "environment.json", "pictures/step_2.png", "ended"]
)
def test_a_named_pipe_in_a_run_directory_is_an_error(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(SyncError, match=f"{name}: is not a regular file; remove it"):
        sync(tmp_path)


def test_a_run_is_not_resumed_from_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(InputError, match=r"metrics\.jsonl: is not a regular file"):
        JsonLines(tmp_path / "metrics.jsonl").rewind(3)


def test_evaluations_stay_pending_while_another_process_sends_the_run(run_dir):
    add_pending(run_dir, PendingEvaluation(run_dir / "results.json", {}))
    with (
        store_lock(run_dir, tracking_uri(run_dir)),
        pytest.raises(
            SyncError,
            match=r"another process is sending .*; run sync after that to send 1 pending evaluations",
        ),
    ):
        sync(run_dir)
    assert len(list_pending(run_dir)) == 1


def test_an_error_without_a_message_is_reported_by_its_type(run_dir, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(MlflowClient, "get_metric_history", lambda *_: (_ for _ in ()).throw(TimeoutError))
    with pytest.raises(SyncError, match=r"did not accept .*: TimeoutError"):
        sync(run_dir)


def test_the_tags_of_a_run(run_dir):
    environment = json.loads((run_dir / "environment.json").read_text())
    environment |= {
        "slurm_job": "77",
        "host": "node7",
        "git_revision": "abc+",
        "command": "train.py --x 'a b'",
    }
    (run_dir / "environment.json").write_text(json.dumps(environment))
    tags = run_metadata(load_recipe(run_dir / "recipe.yaml"), run_dir).tags
    assert tags.pop("mlflow.user")
    assert tags == {
        "run_dir": str(run_dir),
        "dataset": "treesatai_ts",
        "size": "tiny",
        "fusion": "group",
        "target": "patch_group",
        "git_revision": "abc+",
        "host": "node7",
        "slurm_job": "77",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": "train.py",
        "mlflow.source.git.commit": "abc+",
    }
