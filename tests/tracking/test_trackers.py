"""TensorBoard and trackers of other packages beside MLflow: what they get, and that their errors do not end a run."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from testkit.runs import REPO
from testkit.tracked import finished_run

from maestro_scale.recipe import load_recipe
from maestro_scale.tracking.observers import TrackingObserver
from maestro_scale.tracking.tracker import TrackerError
from maestro_scale.training.observer import RunInfo

RECORD = {"samples": 8, "skipped_steps": 0, "dataset": "treesatai_ts", "time": 1.7e9, "loss": 0.5, "lr": None}


def run_directory(folder: Path) -> Path:
    finished_run(folder)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **RECORD}) + "\n")
    return folder


def observer(*changes: str) -> TrackingObserver:
    return TrackingObserver(load_recipe(REPO / "recipes" / "vitt.yaml", ["tracking.enabled=false", *changes]))


class Recorder:
    """A tracker that fails at step 3."""

    def __init__(self, start) -> None:
        self.start, self.calls = start, []

    def log(self, step, metrics, time_s=None):
        if step == 3:
            raise ConnectionError("away")
        self.calls.append((step, metrics["loss/total"], time_s))

    def log_picture(self, step, path):
        self.calls.append((step, path))

    def finish(self, status):
        self.calls.append(status)


@pytest.fixture
def offered(monkeypatch):
    """Trackers of an installed package."""
    made: list[Recorder] = []

    def make(start):
        made.append(Recorder(start))
        return made[-1]

    points = [SimpleNamespace(name="mine", load=lambda: make)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points)
    return made


def test_a_plugin_gets_what_is_logged_until_it_fails(tmp_path, offered, caplog):
    tracked = observer("tracking.plugins=[mine]")
    run_dir = run_directory(tmp_path / "run")
    tracked.started(RunInfo(run_dir, 1, 9, 8))
    for step in (2, 3, 4):
        tracked.logged({"step": step, **RECORD})
    tracked.finished("done")
    (recorder,) = offered
    assert recorder.calls == [(2, 0.5, 1.7e9)]
    assert (recorder.start.step, recorder.start.params["model.size"]) == (1, "tiny")
    assert caplog.text.count("the tracker mine failed (ConnectionError: away)") == 1


def test_a_tracker_that_is_not_installed_is_named_before_the_run(offered, monkeypatch):
    with pytest.raises(TrackerError, match=r"tracker 'other' \(installed: mine\)"):
        observer("tracking.plugins=[other]")
    monkeypatch.setattr("maestro_scale.tracking.tensorboard_tracker.find_spec", lambda name: None)
    with pytest.raises(TrackerError, match=r"pip install 'maestro-scale\[tensorboard\]'"):
        observer("tracking.tensorboard=true")


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def test_tensorboard_has_metrics_and_pictures_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    from PIL import Image

    run_dir = run_directory(tmp_path / "run")
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(run_dir / "picture.png")
    for first, last in ((1, 4), (3, 5)):  # killed after step 4, resumed after step 2
        tracked = observer("tracking.tensorboard=true")
        tracked.started(RunInfo(run_dir, first - 1, 9, 8))
        for step in range(first, last + 1):
            tracked.logged({"step": step, **RECORD, "loss": step / 10})
        tracked._trackers[0].log_picture(last, run_dir / "picture.png")
        tracked.finished("stopped")
    read = events(run_dir / "tensorboard")
    scalars = read.Scalars("loss/total")
    assert [(s.step, round(s.value, 3), s.wall_time) for s in scalars] == [
        (step, step / 10, 1.7e9) for step in range(1, 6)
    ]
    assert "optim/lr" not in read.Tags()["scalars"]
    assert [(p.step, p.width, p.height) for p in read.Images("reconstruction")] == [(5, 6, 4)]
