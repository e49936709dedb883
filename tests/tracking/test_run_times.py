"""The times of a run in MLflow are those of its steps, also where it is sent later, and of its evaluations."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from testkit.tracked import finished_run

from maestro_scale.evaluation.results import EvalResult
from maestro_scale.tracking.evaluations import record_evaluation
from maestro_scale.tracking.run_times import RunEnd, line_times_ms, read_end, start_ms, write_end
from maestro_scale.tracking.sync import sync

START = 1.7e9  # seconds


def write_lines(run_dir: Path, lines: list[dict]) -> None:
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(path, (START + 100, START + 100))


def client(run_dir: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")


def run_of(run_dir: Path):
    return client(run_dir).get_run(json.loads((run_dir / "tracking.json").read_text())["run_id"])


def picture(run_dir: Path, step: int) -> None:
    from PIL import Image

    (run_dir / "pictures").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(run_dir / "pictures" / f"step_{step:08d}.png")


def pictures(run_dir: Path) -> list[Path]:
    """Files of the pictures, at the address in the store."""
    folder = Path(unquote(urlsplit(run_of(run_dir).info.artifact_uri).path)) / "images"
    return sorted(folder.glob("*.png"))


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run of three minutes that ended long ago, and was never sent."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir = finished_run(tmp_path / "runs" / "run")
    line = {"dataset": "treesatai_ts", "loss": 0.5, "samples_per_s": 1.0, "system/node/cpu": 0.5}
    write_lines(run_dir, [{"step": s, "time": START + 60 * s, **line} for s in (1, 2, 3)])
    environment = json.loads((run_dir / "environment.json").read_text()) | {"started": START}
    (run_dir / "environment.json").write_text(json.dumps(environment))
    (run_dir / "report.md").write_text("# tiny: done after 3 steps\n\nMAESTRO tiny.\n\n| a | b |\n|--|\n")
    write_end(run_dir, RunEnd("done", 1000 * int(START + 181)))
    return run_dir


def test_a_run_that_is_sent_later_has_its_own_times_and_its_copy_its_own_files(run_dir, tmp_path):
    picture(run_dir, 2)
    sync(run_dir)
    run = run_of(run_dir)
    assert (run.info.start_time, run.info.end_time) == (1000 * int(START), 1000 * int(START + 181))
    for name in ("loss/total", "brief/loss", "system/node/cpu"):
        history = client(run_dir).get_metric_history(run.info.run_id, name)
        assert [(m.step, m.timestamp / 1000 - START) for m in history] == [(1, 60), (2, 120), (3, 180)]
    assert run.data.tags["mlflow.note.content"] == "# tiny: done after 3 steps\n\nMAESTRO tiny."
    assert run.data.tags["run_dir"] == str(run_dir)

    result = EvalResult(
        "treesatai_ts",
        "wf1",
        "knn",
        0.5,
        {},
        (0.4, 0.6),
        9,
        seeds=(7,),
        timings={"fit_s": 40.0, "encode_s": 5.0},
    )
    result.write(tmp_path / "results.json")
    os.utime(tmp_path / "results.json", (START + 500, START + 500))
    nested = client(run_dir).get_run(record_evaluation(run_dir, result, tmp_path / "results.json"))
    assert (nested.info.start_time / 1000 - START, nested.info.end_time / 1000 - START) == (455, 500)
    assert nested.info.run_name == "treesatai_ts/knn at step 0, seed 7"
    assert run_of(run_dir).data.metrics["brief/score_treesatai_ts_knn_wf1"] == 0.5

    # What a user writes stays.
    client(run_dir).set_tag(run.info.run_id, "mlflow.note.content", "mine")
    sync(run_dir)
    assert run_of(run_dir).data.tags["mlflow.note.content"] == "mine"

    copy = tmp_path / "copy of runs" / "run"
    shutil.copytree(run_dir.parent, copy.parent)
    (path,) = pictures(run_dir)
    assert path.is_relative_to(run_dir.parent)
    picture(copy, 3)
    sync(copy)
    found = pictures(copy)
    assert len(found) == 2
    assert all(path.is_relative_to(copy.parent) for path in found)
    assert pictures(run_dir) == [path]
    assert run_of(copy).data.tags["run_dir"] == str(copy)
    moved = tmp_path / "moved"
    copy.parent.rename(moved)
    sync(moved / "run")
    assert len(pictures(moved / "run")) == 2
    assert all(path.is_relative_to(moved) for path in pictures(moved / "run"))


def test_lines_without_a_time_are_placed_by_their_speed(tmp_path):
    lines = [{"step": s, "step_s": 2.0} for s in (1, 5, 9)]
    write_lines(tmp_path, lines)
    file = tmp_path / "metrics.jsonl"
    assert [t / 1000 - START for t in line_times_ms(lines, file)] == [84, 92, 100]
    assert start_ms(tmp_path, lines) / 1000 - START == 82
    assert read_end(tmp_path, lines) == RunEnd("stopped", 1000 * int(START + 100))
    (tmp_path / "ended").write_text("failed")  # of an earlier revision
    assert read_end(tmp_path, lines).reason == "failed"
    lines.append({"step": 10, "step_s": 2.0, "time": START + 200})
    assert [t / 1000 - START for t in line_times_ms(lines, file)] == [182, 190, 198, 200]
    assert line_times_ms([{"step": 1, "time": "x"}, {"step": 2, "time": -1}], tmp_path / "none") == [0, 0]
