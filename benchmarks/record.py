"""Where and how each result was recorded: command, revision, versions, load. Written by the runner to "
"runs.json."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

from maestro_scale.training.run_dir import git_revision

_FILE = "runs.json"
_PACKAGES = ("torch", "numpy", "deepspeed", "s3fs", "zstandard")


@dataclass(frozen=True)
class Run:
    """One run of a benchmark. ``load``: of other processes at its start, over a minute; ``sha256``: of "
    "the result."""

    command: str
    revision: str
    seconds: float
    load: float
    cores: int
    processor: str
    versions: dict[str, str]
    sha256: str

    def described(self) -> str:
        """One sentence for the page."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            f"Revision {self.revision[:9]}, {self.cores} cores ({self.processor}), load {self.load:.1f} "
            f"before the run, "
            f"{self.seconds:.0f} s; {versions}."
        )


def write_run(folder: Path, name: str, command: str, seconds: float, load: float) -> None:
    """Add the run whose result is NAME.json in ``folder``."""
    versions = {"Python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    run = Run(
        command,
        git_revision() or "unknown",
        round(seconds, 1),
        round(load, 2),
        os.cpu_count() or 1,
        platform.machine(),
        versions,
        _sha256(folder / f"{name}.json"),
    )
    runs = _read(folder) | {name: asdict(run)}
    (folder / _FILE).write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")


def run_of(folder: Path, name: str) -> Run | None:
    """How the result of a benchmark was recorded; None if the runner did not write the present file."""
    entry = _read(folder).get(name)
    if entry is None or entry["sha256"] != _sha256(folder / f"{name}.json"):
        return None
    return Run(**entry)


def _read(folder: Path) -> dict[str, dict]:
    path = folder / _FILE
    return json.loads(path.read_text()) if path.exists() else {}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""
