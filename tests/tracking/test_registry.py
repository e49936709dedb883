"""The command printed by export --register loads the model from any folder; errors are one line."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version
from testkit.models import small_config
from testkit.tracked import finished_run

from maestro_scale import load_model
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.interop.export import ExportError, write_model
from maestro_scale.model.maestro import Maestro
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.registry import register
from maestro_scale.tracking.sync import sync


@pytest.fixture
def no_store(tmp_path, monkeypatch):
    """A working directory without a store, and none in the environment."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def result(folder: Path, mode: str, value: float) -> tuple[EvalResult, Path]:
    evaluated = EvalResult("treesatai_ts", "wf1", mode, value, {}, (0.1, 0.9), 9, checkpoint_step=1)
    evaluated.write(folder / mode / "results.json")
    return evaluated, folder / mode / "results.json"


def registered(run_dir: Path) -> dict[str, str]:
    """Scores of the newest version, after checks of what else is registered."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    version = client.get_model_version_by_alias("trees", "newest")
    assert sorted(version.aliases) == ["good", "newest"]
    assert (version.tags["size"], version.tags["step"]) == ("tiny", "1")
    scores = {k: v for k, v in version.tags.items() if k.startswith("eval/")}
    assert version.description.startswith("MAESTRO tiny on treesatai")
    for name, value in scores.items():
        score = name.removeprefix("eval/")
        assert f"| {score} | {value} |" in version.description
    return scores


@pytest.mark.slow
def test_the_printed_command_loads_the_model(tmp_path, no_store):
    run_dir = finished_run(tmp_path / "my runs" / "run")
    sync(run_dir)
    model = Maestro(small_config(norm="token", dataset="test", crop_m=60.0)).initialise(0)
    write_model(tmp_path / "model", model.state_dict(), model.config, {"step": 1})
    record_evaluation(run_dir, *result(tmp_path, "knn", 0.5))
    version = register(tmp_path / "model", "trees", run_dir, ["good"])
    assert registered(run_dir) == {"eval/treesatai_ts/knn/wf1": "0.5"}
    record_evaluation(run_dir, *result(tmp_path, "probe", 0.75))
    expected = {"eval/treesatai_ts/knn/wf1": "0.5", "eval/treesatai_ts/probe/wf1": "0.75"}
    assert registered(run_dir) == expected
    assert version.load_command.startswith("MLFLOW_TRACKING_URI=")
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        version.load_command, shell=True, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Before its release 3.15, MLflow opens a store for traces in the working directory whenever it saves a model.
    if Version(importlib.metadata.version("mlflow")) >= Version("3.15"):
        assert list(no_store.iterdir()) == []


def test_without_a_store_the_error_says_what_to_set(no_store):
    with pytest.raises(
        ExportError, match=r"^models:/trees/1: set MLFLOW_TRACKING_URI to the store"
    ) as raised:
        load_model("models:/trees/1")
    assert "\n" not in str(raised.value)
    assert list(no_store.iterdir()) == []


@pytest.mark.slow
def test_a_store_without_the_model_is_named(no_store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{no_store}/other.db")
    with pytest.raises(ExportError, match=r"cannot be fetched from sqlite:///.*other\.db"):
        load_model("models:/trees/1")
