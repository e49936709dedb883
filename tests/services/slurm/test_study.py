"""A study as an array: a task per cell, then the result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from services.slurm.cluster import REPO, Submitted
from testkit.studies import write_study

pytestmark = [pytest.mark.root, pytest.mark.slow]


def test_the_cells_of_a_study_as_an_array(cluster, synthetic_shards, tmp_path):
    path = write_study(tmp_path, synthetic_shards)
    root = tmp_path / "root of it"
    words = ["study", str(path), "--root", str(root)]
    env = {**os.environ, "MAESTRO_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}
    submitted = subprocess.run(
        [sys.executable, "-m", "maestro_scale.cli", *words, "--slurm", "--limit", "2"],
        capture_output=True,
        text=True,
        env=env,
        cwd=REPO,
        timeout=120,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stderr
    names = submitted.stdout.split()
    assert "of 2 cells" in submitted.stdout
    report = Submitted(names[names.index("job") + 1], Path("/dev/null"))
    logs = lambda: "".join(p.read_text(errors="replace") for p in (root / "slurm").glob("*.log"))  # noqa: E731
    assert report.end(500) == "COMPLETED", logs()
    assert len(list((root / "cells").glob("*/evaluations/*/knn/results.json"))) == 2, logs()
    assert "patch-none" in (root / "studies" / "tiny-cpu" / "study.md").read_text()
