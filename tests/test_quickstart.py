"""A small quickstart from the command line: every stage runs, and a second call repeats none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maestro_scale.evaluation.results import EvalResult


def quickstart(out: Path, *args: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "maestro-scale"
    command = [str(program), "quickstart", f"--out={out}", "--tiles=60", "--steps=8", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=out.parent)


@pytest.mark.slow
def test_quickstart(tmp_path):
    out = tmp_path / "with a space" / "quick"
    out.parent.mkdir()
    first = quickstart(out)
    assert first.returncode == 0, first.stdout + first.stderr[-4000:]
    for words in (
        "5/5",
        "pretrained",
        "untrained",
        "masked loss",
        "reconstruction:",
        "maestro-scale dashboard",
    ):
        assert words in first.stdout, first.stdout
    result = EvalResult.load(out / "results" / "pretrained" / "probe" / "results.json")
    assert (result.checkpoint_step, result.num_tiles, result.metric) == (8, 12, "wf1")
    assert EvalResult.load(out / "results" / "untrained" / "knn" / "results.json").checkpoint_step == 0
    steps = [
        json.loads(line)["step"] for line in (out / "runs/quickstart/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 8]
    assert (out / "runs" / "mlflow.db").exists()

    started = time.monotonic()
    again = quickstart(out)
    assert again.returncode == 0, again.stderr[-4000:]
    assert "already done" in again.stdout
    assert time.monotonic() - started < 60, "a stage ran again"

    other = quickstart(out, "--seed=1")
    assert other.returncode == 2
    assert "seed" in other.stderr
    assert "Traceback" not in other.stderr
