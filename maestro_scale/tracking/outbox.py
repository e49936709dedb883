"""Evaluations that MLflow did not accept, kept in the run directory until ``maestro-scale sync`` sends them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from maestro_scale import untrusted
from maestro_scale.training.run_dir import write_atomically

OUTBOX_FILE = "unsent_evaluations.jsonl"
# Evaluations of an array job may add entries at the same time. filelock's Timeout is an OSError.
_LOCK_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class PendingEvaluation:
    """A results.json that was not sent.

    ``results``: its absolute path; ``tags``: where it was computed, which is not known any more when it is sent.
    """

    results: Path
    tags: Mapping[str, str]


@dataclass(frozen=True)
class _Record:
    """A line of the file."""

    results: str
    tags: Mapping[str, str]


def add_pending(run_dir: Path, evaluation: PendingEvaluation) -> None:
    """Add an evaluation; it replaces one with the same path. Raises OSError if the directory is not writable."""
    with _outbox_lock(run_dir):
        _write(run_dir, [*_others(run_dir, evaluation), evaluation])


def remove_pending(run_dir: Path, evaluation: PendingEvaluation) -> None:
    """Remove an evaluation: it was sent, or cannot be read any more."""
    with _outbox_lock(run_dir):
        _write(run_dir, _others(run_dir, evaluation))


def list_pending(run_dir: Path) -> list[PendingEvaluation]:
    """All evaluations that are still to be sent, oldest first."""
    path = run_dir / OUTBOX_FILE
    records = (
        [untrusted.from_builtins(_Record, r) for r in untrusted.read_json_lines(path)]
        if path.exists()
        else []
    )
    return [PendingEvaluation(Path(r.results), r.tags) for r in records]


def _others(run_dir: Path, evaluation: PendingEvaluation) -> list[PendingEvaluation]:
    return [e for e in list_pending(run_dir) if e.results != evaluation.results]


def _write(run_dir: Path, evaluations: list[PendingEvaluation]) -> None:
    lines = [json.dumps({"results": str(e.results), "tags": dict(e.tags)}) + "\n" for e in evaluations]
    if lines:
        write_atomically(run_dir / OUTBOX_FILE, "".join(lines))
    else:
        (run_dir / OUTBOX_FILE).unlink(missing_ok=True)


def _outbox_lock(run_dir: Path) -> FileLock:
    return FileLock(run_dir / ".unsent.lock", timeout=_LOCK_TIMEOUT_S)
