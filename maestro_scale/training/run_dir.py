"""The run directory: resolved recipe, environment and metrics of a run, as plain files.

``recipe.yaml`` (resolved), ``environment.json``, ``manifests/``, ``metrics.jsonl``, ``audit/rankNNNNN.jsonl``,
``skipped/rankNNNNN.jsonl``, ``checkpoints/``; after a hang the stacks, ``hang/rankNNNNN.txt``.
"""

from __future__ import annotations

import json
import math
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.output_folder import check_output
from maestro_scale.recipe import Recipe
from maestro_scale.secrets_filter import scrub_command, scrub_tree

PACKAGES = ("maestro-scale", "torch", "deepspeed", "numpy", "safetensors", "mlflow", "webdataset", "s3fs")


OUTCOME = "outcome.json"
LOCK = ".lock"


class RunDirError(MaestroError):
    """The run directory cannot be used; the message says why and what to do."""


class JsonLines:
    """An append-only file of JSON lines; a line that a kill left incomplete is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Drop every line past ``step``, and an incomplete one."""
        if not self.path.exists():
            return
        untrusted.check_regular(self.path)
        lines = self.path.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) == len(lines):
            return
        try:
            write_atomically(self.path, "".join(line + "\n" for line in kept))
        except OSError as error:
            raise self._unwritable(error) from None

    def append(self, record: dict[str, Any]) -> None:
        """Append a line with one write. RunDirError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> RunDirError:
        return RunDirError(
            f"{self.path} cannot be written: {error.strerror or error}; free space, then resume with the same command"
        )

    def read(self) -> list[dict[str, Any]]:
        """Every complete line."""
        if not self.path.exists():
            return []
        # NaN: files of earlier revisions have it
        records = untrusted.read_json_lines(self.path, allow_nan=True)
        return [record for record in records if isinstance(record, dict) and type(record.get("step")) is int]


def finite(number: float) -> float | None:
    """The number, or None for NaN and infinities, which JSON does not have."""
    return number if math.isfinite(number) else None


def lock(run_dir: Path) -> FileLock:
    """Lock a run directory for this process (rank 0). RunDirError where another run has locked it,
    OutputError where it holds something else."""
    check_output(run_dir, "a run")
    held = FileLock(run_dir / LOCK)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=0)
    except Timeout:
        raise RunDirError(
            f"{run_dir} is in use by another run; wait for it, stop it (touch {run_dir}/STOP) or use another directory"
        ) from None
    except OSError as error:
        raise RunDirError(f"cannot use {run_dir} as run directory: {error.strerror or error}") from None
    return held


def environment() -> dict[str, Any]:
    """Versions, git revision, host and command of this process. Holds no environment variables: they hold secrets."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": scrub_command(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "git_revision": git_revision(),
        "versions": versions,
    }


def write_run_files(run_dir: Path, recipe: Recipe, **more: Any) -> None:
    """Write ``recipe.yaml`` and ``environment.json`` (with ``more``) to a run directory, without secrets."""
    write_atomically(run_dir / "recipe.yaml", recipe.to_redacted_yaml())
    write_atomically(
        run_dir / "environment.json", json.dumps(scrub_tree({**environment(), **more}), indent=1)
    )


def manifest_path(run_dir: Path, number: int, dataset: str) -> Path:
    """Path of the copied manifest of the ``number``-th dataset of the mixture."""
    return run_dir / "manifests" / f"{number}-{dataset}.json"


def check_files(run_dir: Path) -> None:
    """RunDirError if something beside the checkpoints is neither a file nor a folder: a pipe would never end."""
    for folder, folders, names in os.walk(run_dir):
        if Path(folder) == run_dir and "checkpoints" in folders:
            folders.remove("checkpoints")
        for path in (Path(folder, name) for name in sorted(names)):
            if path.exists() and not path.is_file():
                raise RunDirError(
                    f"{path}: is not a regular file; remove it, or copy the run directory again"
                )


def has_same_recipe(run_dir: Path, recipe: Recipe) -> bool:
    """Whether the run in a directory was last started with this recipe."""
    path = run_dir / "recipe.yaml"
    return path.exists() and path.read_text() == recipe.to_redacted_yaml()


def git_revision() -> str | None:
    """Commit of the checkout this package runs from, with ``+`` where files are changed; None outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *args], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_outcome(run_dir: Path, reason: str, why: str, step: int) -> None:
    """Write ``outcome.json``, which the SLURM scripts read: ``done``, or ``stopped`` and by what, after ``step``."""
    write_atomically(run_dir / OUTCOME, json.dumps({"reason": reason, "why": why, "step": step}))


def has_finished(run_dir: Path) -> bool:
    """Whether the last start of a run reached its last step, by ``outcome.json``."""
    try:
        outcome = untrusted.read_record(run_dir / OUTCOME)
    except (OSError, ValueError):
        return False
    return outcome.get("reason") == "done"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file's content atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(
        f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"
    )  # others may write the same
    fresh.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(fresh, path)


_TORN = 2**62


def _step_of(line: str) -> int:
    try:
        return untrusted.field_of(untrusted.load_json(line, allow_nan=True), int, "step")
    except untrusted.InputError:
        return _TORN
