"""Where a run or an evaluation was made, as tags in MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def provenance_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Tags of what ``run_dir.environment()`` told when it was made; those that are not known are left out."""
    tags = {
        "git_revision": environment["git_revision"],
        "host": environment["host"],
        "slurm_job": environment.get("slurm_job"),
        # MLflow's own columns
        "mlflow.user": psutil.Process().username(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(shlex.split(environment["command"])[0]).name,
        "mlflow.source.git.commit": environment["git_revision"],
    }
    return {k: v for k, v in tags.items() if v}
