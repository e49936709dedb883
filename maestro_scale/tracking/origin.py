"""MLflow tags on the provenance of a run or evaluation: git revision, host, SLURM job, user, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil


def provenance_tags(environment: Mapping[str, Any]) -> dict[str, str]:
    """Tags from the result of ``run_dir.environment()``; unknown values are omitted."""
    tags = {
        "git_revision": environment["git_revision"],
        "host": environment["host"],
        "slurm_job": environment.get("slurm_job"),
        # Shown by the MLflow UI in its own columns.
        "mlflow.user": psutil.Process().username(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": Path(shlex.split(environment["command"])[0]).name,
        "mlflow.source.git.commit": environment["git_revision"],
    }
    return {k: v for k, v in tags.items() if v}
