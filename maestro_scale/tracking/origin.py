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
        "git_revision": environment.get("git_revision"),
        "host": environment.get("host"),
        "slurm_job": environment.get("slurm_job"),
        # Shown by the MLflow UI in its own columns.
        "mlflow.user": psutil.Process().username(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": _program(environment.get("command")),
        "mlflow.source.git.commit": environment.get("git_revision"),
    }
    return {k: str(v) for k, v in tags.items() if v}


def _program(command: object) -> str:
    """File name of the program in a shell command line; empty if it is not one."""
    try:
        return Path(shlex.split(command)[0]).name if isinstance(command, str) else ""
    except (ValueError, IndexError):  # an open quotation, an empty line
        return ""
