"""Evaluations that a store did not take, noted in the run directory until ``maestro-scale sync`` sends them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from maestro_scale.training.run_dir import write_atomically

UNSENT_FILE = "unsent_evaluations.jsonl"
_PATIENCE_S = 10.0  # for another process that notes something; Timeout, when it is over, is an OSError


@dataclass(frozen=True)
class Unsent:
    """A results.json by its absolute path, and the tags that tell where it was made."""

    results: Path
    tags: Mapping[str, str]


def note(run_dir: Path, evaluation: Unsent) -> None:
    """Have it sent later; one of the same path is replaced. OSError where the directory does not take it."""
    with _held(run_dir):
        _write(run_dir, [*_others(run_dir, evaluation), evaluation])


def drop(run_dir: Path, evaluation: Unsent) -> None:
    """It need not be sent any more."""
    with _held(run_dir):
        _write(run_dir, _others(run_dir, evaluation))


def unsent(run_dir: Path) -> list[Unsent]:
    """What is to be sent, in order."""
    path = run_dir / UNSENT_FILE
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [Unsent(Path(r["results"]), r["tags"]) for r in records]


def _others(run_dir: Path, evaluation: Unsent) -> list[Unsent]:
    return [u for u in unsent(run_dir) if u.results != evaluation.results]


def _write(run_dir: Path, evaluations: list[Unsent]) -> None:
    lines = [json.dumps({"results": str(u.results), "tags": dict(u.tags)}) + "\n" for u in evaluations]
    if lines:
        write_atomically(run_dir / UNSENT_FILE, "".join(lines))
    else:
        (run_dir / UNSENT_FILE).unlink(missing_ok=True)


def _held(run_dir: Path) -> FileLock:
    return FileLock(run_dir / ".unsent.lock", timeout=_PATIENCE_S)
