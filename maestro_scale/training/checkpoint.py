"""Checkpoints that are whole or not there: staged, listed with sizes and hashes, committed by one rename.

Layout: ``checkpoints/step_00001234/`` holds DeepSpeed's sharded state under ``state/`` and ``COMMIT.json``, which
names every file with its size and sha256. A directory without a valid COMMIT.json is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.training.distributed import World

COMMIT = "COMMIT.json"
TAG = "state"
_STAGING = ".staging"
_STEP = re.compile(r"step_\d{8,}")


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another run; the message says which and what to do."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. ``samples`` (consumed) fixes the place in the data; the others follow the optimizer."""

    samples: int = 0
    step: int = 0
    skipped_steps: int = 0


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, run_dir: Path, world: World, keep: int) -> None:
        self.dir = run_dir / "checkpoints"
        self._world = world
        self._keep = keep

    def save(self, engine: Any, position: Position, identity: dict[str, Any]) -> Path:
        """Write, then commit, on all ranks together. ``identity`` is checked on resume.

        A kill at any moment leaves the previous checkpoint and, at worst, a staging directory that is swept later.
        """
        final = self.dir / f"step_{position.step:08d}"
        staging = self.dir / f"{_STAGING}_{final.name}"
        if self._world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        self._world.barrier()
        engine.save_checkpoint(
            str(staging), tag=TAG, client_state={"position": vars(position)}, save_latest=False
        )
        self._world.barrier()
        if self._world.is_main:
            self._commit(staging, final, position, identity)
            self._prune()
        self._world.barrier()
        return final

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, or None if there is none; and what is wrong with newer ones, in words."""
        return _newest(self.dir)

    def load(self, engine: Any, path: Path, identity: dict[str, Any]) -> Position:
        """Load on all ranks together and return where the run stood.

        Raises CheckpointError where the checkpoint belongs to another model, dataset or seed.
        """
        theirs, ours = _flat(json.loads((path / COMMIT).read_text())["identity"]), _flat(identity)
        different = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        if different:
            lines = [f"{k}: checkpoint {theirs.get(k)!r}, now {ours.get(k)!r}" for k in different]
            raise CheckpointError(
                f"{path} does not fit this run: {'; '.join(lines)}. Go on with what it was made with, or use another "
                "--run-dir"
            )
        loaded, state = engine.load_checkpoint(str(path), tag=TAG)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found no state under {path / TAG}")
        return Position(**state["position"])

    def _commit(self, staging: Path, final: Path, position: Position, identity: dict[str, Any]) -> None:
        files = {
            str(p.relative_to(staging)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
            for p in sorted(staging.rglob("*"))
            if p.is_file()
        }
        record = {
            "position": vars(position),
            "identity": identity,
            "files": files,
        }
        (staging / COMMIT).write_text(json.dumps(record, indent=1))
        for path in [*staging.rglob("*"), staging]:
            _fsync(path)
        if (
            final.exists()
        ):  # damaged, or left by a run that was rewound: set aside, so that a kill loses neither
            os.replace(final, self.dir / f"{_STAGING}_replaced_{final.name}")
        os.replace(staging, final)
        _fsync(self.dir)

    def _prune(self) -> None:
        for old in _committed(self.dir)[: -self._keep]:
            (old / COMMIT).unlink()  # first, so that a kill half-way leaves no checkpoint that looks whole
            shutil.rmtree(old)
        for stray in self.dir.iterdir():  # what a kill left behind
            torn = _STEP.fullmatch(stray.name) and not (stray / COMMIT).exists()
            if torn or stray.name.startswith(_STAGING):  # nothing that is not ours
                shutil.rmtree(stray, ignore_errors=True)


def newest(run_dir: Path) -> Path:
    """The newest whole checkpoint of a run; CheckpointError if there is none."""
    path, problems = _newest(run_dir / "checkpoints")
    if path is None:
        raise CheckpointError(f"{run_dir} holds no whole checkpoint{': ' + problems[0] if problems else ''}")
    return path


def load_position(path: Path) -> Position:
    """Where the run stood at a committed checkpoint."""
    return Position(**json.loads((path / COMMIT).read_text())["position"])


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    problems = []
    for path in reversed(_committed(folder)):
        problem = check(path)
        if problem is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def _committed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    steps = (p for p in folder.iterdir() if _STEP.fullmatch(p.name))
    return sorted((p for p in steps if (p / COMMIT).exists()), key=lambda p: int(p.name[5:]))


def check(path: Path, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Sizes always; contents only with ``hashes``."""
    try:
        files = json.loads((path / COMMIT).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable {COMMIT} ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if hashes and _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written (sha256)"
    return None


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts and lists -> {dotted name: plain value}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {prefix: value}
    return {k: v for name, inner in items for k, v in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
