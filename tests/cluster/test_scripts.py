"""What the SLURM scripts do without a SLURM: fake commands in PATH stand for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from testkit.runs import REPO

from maestro_scale.training.run_dir import write_atomically


def fake(folder: Path, name: str, text: str) -> None:
    """A program ``name`` in ``folder``."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/usr/bin/env bash\n{text}\n")
    program.chmod(0o755)


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Without settings of a job, with the programs of ``folder`` first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MAESTRO_", "SLURM_"))}
    return {**kept, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **more}


@pytest.mark.parametrize(
    ("end", "warns"), [(timedelta(seconds=240), True), (timedelta(hours=1), False), (None, False)]
)
def test_a_time_limit_that_leaves_nothing_before_the_signal_is_told(tmp_path, end, warns):
    when = (datetime.now() + end).isoformat(timespec="seconds") if end else "Unknown"
    fake(tmp_path / "bin", "scontrol", f"echo '   StartTime=2026-01-01T00:00:00 EndTime={when} Deadline=N/A'")
    done = subprocess.run(
        ["bash", "-uc", ". slurm/env.sh; warn_short 180"],
        cwd=REPO,
        env=environment(tmp_path / "bin", MAESTRO_HOME=str(REPO), SLURM_JOB_ID="7"),
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0
    assert ("use a longer --time" in done.stdout) == warns
    assert ("and is asked to save and stop 180 s before" in done.stdout) == warns


@pytest.mark.slow
def test_a_training_that_starts_later_is_followed(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    fake(tmp_path / "bin", "sbatch", 'echo "$@" >>"$CALLS"; echo 7')
    env = environment(
        tmp_path / "bin",
        MAESTRO_FOLLOW_S="0.1",
        MAESTRO_PYTHON=sys.executable,
        MAESTRO_LOCAL=str(tmp_path / "local"),
        CALLS=str(tmp_path / "calls"),
    )
    (tmp_path / "local").mkdir()
    recipe = REPO / "tests" / "fixtures" / "evaluate.yaml"
    command = [
        "bash",
        str(REPO / "slurm" / "follow.sh"),
        str(run),
        "--recipes",
        str(recipe),
        "--modes",
        "knn",
    ]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert f"waiting for the training to start in {run}" in process.stdout.readline()
        time.sleep(0.3)
        assert process.poll() is None
        source = REPO / "tests" / "fixtures" / "run"
        shutil.copytree(source, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("recipe.yaml"))
        (checkpoint,) = (run / "checkpoints").glob("step_*")
        (run / "outcome.json").write_text('{"reason": "done"}')
        text = (source / "recipe.yaml").read_text()
        assert "keep_every: 0" in text
        step = int(checkpoint.name.removeprefix("step_"))
        # Last, and at once: the script waits for it.
        write_atomically(run / "recipe.yaml", text.replace("keep_every: 0", f"keep_every: {step}"))
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0, output
    array, report = (tmp_path / "calls").read_text().splitlines()
    out = run / "evaluations" / checkpoint.name
    assert "--array=0-0" in array
    assert f"--checkpoint {checkpoint} --out {out}" in array
    assert report.endswith("--report")
    assert (out / "submitted").exists()
