"""Evaluations that a store did not take, noted in the run directory until ``maestro-scale sync`` sends them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from maestro_scale.training.run_dir import write_atomically

OUTBOX_FILE = "unsent_evaluations.jsonl"
_LOCK_TIMEOUT_S = 10.0  # for another process that notes something; Timeout, when it is over, is an OSError


@dataclass(frozen=True)
class PendingEvaluation:
    """A results.json by its absolute path, and the tags that tell where it was made."""

    results: Path
    tags: Mapping[str, str]


def add_pending(run_dir: Path, evaluation: PendingEvaluation) -> None:
    """Have it sent later; one of the same path is replaced. OSError where the directory does not take it."""
    with _outbox_lock(run_dir):
        _write(run_dir, [*_others(run_dir, evaluation), evaluation])


def remove_pending(run_dir: Path, evaluation: PendingEvaluation) -> None:
    """It need not be sent any more."""
    with _outbox_lock(run_dir):
        _write(run_dir, _others(run_dir, evaluation))


def list_pending(run_dir: Path) -> list[PendingEvaluation]:
    """What is to be sent, in order."""
    path = run_dir / OUTBOX_FILE
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [PendingEvaluation(Path(r["results"]), r["tags"]) for r in records]


def _others(run_dir: Path, evaluation: PendingEvaluation) -> list[PendingEvaluation]:
    return [u for u in list_pending(run_dir) if u.results != evaluation.results]


def _write(run_dir: Path, evaluations: list[PendingEvaluation]) -> None:
    lines = [json.dumps({"results": str(u.results), "tags": dict(u.tags)}) + "\n" for u in evaluations]
    if lines:
        write_atomically(run_dir / OUTBOX_FILE, "".join(lines))
    else:
        (run_dir / OUTBOX_FILE).unlink(missing_ok=True)


def _outbox_lock(run_dir: Path) -> FileLock:
    return FileLock(run_dir / ".unsent.lock", timeout=_LOCK_TIMEOUT_S)
