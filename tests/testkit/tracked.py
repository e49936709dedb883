"""A run directory of a finished run that was never sent to MLflow."""

from __future__ import annotations

import json
from pathlib import Path

from maestro_scale.recipe import load_recipe
from maestro_scale.training.run_dir import write_run_files
from testkit.runs import REPO


def finished_run(run_dir: Path) -> Path:
    """One step of ``recipes/vitt.yaml``, without weights; returns ``run_dir``."""
    write_run_files(run_dir, load_recipe(REPO / "recipes" / "vitt.yaml"))
    (run_dir / "checkpoints" / "step_00000001").mkdir(parents=True)
    line = {"step": 1, "dataset": "treesatai_ts", "loss": 0.5, "samples_per_s": 1.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run_dir / "ended").write_text("done")
    return run_dir
