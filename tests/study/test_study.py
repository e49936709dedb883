"""A tiny study end to end: killed and continued, it has the results of an unkilled one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testkit.studies import write_study
from typer.testing import CliRunner

from maestro_scale.cli import app
from maestro_scale.evaluation.results import EvalResult

pytestmark = pytest.mark.slow


def start(path: Path, root: Path) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    words = ["study", str(path), "--root", str(root), "--jobs", "1", "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "maestro_scale.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def results(root: Path) -> dict[str, EvalResult]:
    found = (root / "cells").glob("*/evaluations/*/*/results.json")
    return {str(p.relative_to(root / "cells")): EvalResult.load(p) for p in found}


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_study_killed_and_continued_has_the_results_of_an_unkilled_one(synthetic_shards, tmp_path):
    from mlflow.tracking import MlflowClient

    path = write_study(tmp_path, synthetic_shards)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(path, killed)
    wait_for(killed, "cells/*/checkpoints/step_*", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert results(killed) == {}
    again = start(path, killed)  # meets the end of the first one's training: it waits for the lock
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    alone = start(path, whole)
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, output
    first, second = results(whole), results(killed)
    assert len(first) == 2
    assert first.keys() == second.keys()
    for name, result in first.items():
        other = second[name]
        assert (result.value, result.per_class, result.weights) == (
            other.value,
            other.per_class,
            other.weights,
        )
        assert result.checkpoint_step == other.checkpoint_step == 6
    for root in (whole, killed):
        page = (root / "studies" / "tiny-cpu" / "study.md").read_text()
        assert "patch-none" in page
    tables = [
        (root / "studies" / "tiny-cpu" / "study.md").read_text().split("## Cost")[0]
        for root in (whole, killed)
    ]
    assert tables[0] == tables[1]
    # Nothing is left to do, and MLflow has every run once.
    last = CliRunner().invoke(app, ["study", str(path), "--root", str(killed)])
    assert "2 cells, 2 finished" in last.output
    client = MlflowClient(f"sqlite:///{killed / 'cells' / 'mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = {r.info.run_id: r for r in client.search_runs([experiment.experiment_id])}
    parents = [r.data.tags.get("mlflow.parentRunId") for r in runs.values()]
    (study,) = (r for r in runs.values() if r.info.run_name == "tiny-cpu")
    cells = [r for r in runs.values() if r.data.tags.get("mlflow.parentRunId") == study.info.run_id]
    assert len(runs) == 5
    assert sorted(r.data.tags["tiny-cpu/target"] for r in cells) == ["none", "patch"]
    assert sorted(parents.count(r.info.run_id) for r in cells) == [1, 1]
    assert all(r.info.status == "FINISHED" for r in runs.values())
