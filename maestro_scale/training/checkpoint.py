"""Checkpoints that are whole or not there: staged, listed with sizes and hashes, committed by one rename.

Layout: ``checkpoints/step_00001234/`` holds the sharded state under ``state/`` and ``COMMIT.json``, which names every
file with its size and sha256. A directory without a valid COMMIT.json is never loaded. Every rank writes its own
part from a copy, in the background; between two later steps, when all are done, rank 0 commits.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_scale.interop.sharded_state import INDEX, StateReader, write_index, write_pieces
from maestro_scale.training.distributed import World
from maestro_scale.training.mirror import Mirror
from maestro_scale.training.state import TrainState

COMMIT = "COMMIT.json"
STATE = "state"
_STAGING = ".staging"
_STEP = re.compile(r"step_\d{8,}")


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or of another run; the message says which and what to do."""


@dataclass(frozen=True)
class Position:
    """Where a run stands. ``samples`` (consumed) fixes the place in the data; ``step`` counts optimizer steps,
    ``skipped_steps`` those of them that changed nothing."""

    samples: int = 0
    step: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ``keep``, and those of steps divisible by ``keep_every`` (0: none) for good."""

    keep: int
    keep_every: int = 0

    def superseded(self, steps: Iterable[int]) -> list[int]:
        """Of these steps, the ones whose checkpoints can go."""
        passing = [s for s in sorted(steps) if not (self.keep_every and s % self.keep_every == 0)]
        return passing[: -self.keep]


@dataclass(frozen=True)
class _Pending:
    staging: Path
    final: Path
    record: dict[str, Any]
    adam_step: int
    written: Future[None]


class Checkpoints:
    """The checkpoints of one run directory. All ranks call ``begin``, ``commit`` and ``finish`` together."""

    def __init__(
        self, run_dir: Path, world: World, retention: Retention, mirror: Mirror | None = None
    ) -> None:
        self.dir = run_dir / "checkpoints"
        self._world, self._retention, self._mirror = world, retention, mirror
        self._pending: _Pending | None = None
        self._writer = ThreadPoolExecutor(1, "maestro-checkpoint")

    @property
    def pending(self) -> bool:
        """Whether a checkpoint was begun and is not committed; the same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and not self._pending.written.done()

    def begin(
        self, state: TrainState, position: Position, identity: dict[str, Any], guard: dict[str, Any]
    ) -> None:
        """Copy the state and start to write it. ``identity`` is checked on resume, ``guard`` handed back.

        A kill at any moment leaves the previous checkpoint and, at worst, a staging directory that is swept later.
        """
        self.finish()
        final = self.dir / f"step_{position.step:08d}"
        staging = self.dir / f"{_STAGING}_{final.name}"
        if self._world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / STATE).mkdir(parents=True)
        self._world.barrier()
        pieces, adam_step = state.pieces(), state.holdings.adam_step
        record = {"position": vars(position), "guard": guard, "identity": identity}
        written = self._writer.submit(self._write, staging / STATE, pieces)
        self._pending = _Pending(staging, final, record, adam_step, written)

    def commit(self) -> None:
        """Publish the checkpoint under way, once no rank is ``busy``. CheckpointError where writing it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.written.result()
            if self._world.is_main:
                self._commit(pending)
                self._prune()
        except OSError as error:
            raise CheckpointError(
                f"{pending.final} cannot be written: {error.strerror or error}; the last whole checkpoint stays, and "
                "the same command resumes from it"
            ) from error
        if self._mirror is not None and self._world.is_main:
            self._mirror.send(pending.final, [p.name for p in _committed(self.dir)])

    def finish(self) -> None:
        """Wait for the checkpoint under way and publish it."""
        if self._pending is not None:
            self._pending.written.exception()
            self._world.barrier()
            self.commit()
            self._world.barrier()

    def close(self) -> None:
        """Publish what is under way and wait until it is mirrored."""
        self.finish()
        if self._mirror is not None:
            self._mirror.wait()

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint, or None if there is none; and what is wrong with newer ones, in words."""
        return _newest(self.dir)

    def soundest(self) -> tuple[Path | None, list[str]]:
        """As ``latest``, of checkpoints whose contents are what was written; all ranks together, each reads a share."""
        problems = []
        for path in reversed(_committed(self.dir)):
            mine = check(path) or check(path, hashes=True, share=(self._world.rank, self._world.size))
            problem = next(filter(None, self._world.gather(mine)), None)
            if problem is None:
                return path, problems
            problems.append(f"{path.name}: {problem}")
        return None, problems

    def fetch(self) -> Path | None:
        """The newest checkpoint of the mirror, copied here by rank 0 and checked; None where there is none."""
        if self._mirror is None:
            return None
        if self._world.is_main and (name := self._mirror.newest()):
            staging = self.dir / f"{_STAGING}_{name}"
            self._mirror.fetch(name, staging)
            if (problem := check(staging, hashes=True)) is not None:
                raise CheckpointError(f"{self._mirror.url}/{name}: {problem}")
            os.replace(staging, self.dir / name)
        self._world.barrier()
        return self.latest()[0]

    def load(
        self, state: TrainState, path: Path, identity: dict[str, Any]
    ) -> tuple[Position, dict[str, Any]]:
        """Load on all ranks together, on any number of them; returns where the run stood, and the guard's memory.

        Raises CheckpointError where the checkpoint belongs to another model, dataset or seed.
        """
        record = json.loads((path / COMMIT).read_text())
        theirs, ours = _flat(record["identity"]), _flat(identity)
        different = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        if different:
            lines = [f"{k}: checkpoint {theirs.get(k)!r}, now {ours.get(k)!r}" for k in different]
            raise CheckpointError(
                f"{path} does not fit this run: {'; '.join(lines)}. Go on with what it was made with, or use another "
                "--run-dir"
            )
        with StateReader(path / STATE) as reader:
            state.restore(reader)
        return Position(**record["position"]), record["guard"]

    def _write(self, folder: Path, pieces: list[Any]) -> None:
        file, entries = write_pieces(folder, self._world.rank, pieces)
        part: dict[str, Any] = {"entries": entries, "kinds": [], "files": {}}
        if file is not None:
            part["kinds"] = list(pieces[0].values)
            part["files"] = {f"{STATE}/{file.name}": {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
            _fsync(file)
        _part(folder, self._world.rank).write_text(json.dumps(part))

    def _commit(self, pending: _Pending) -> None:
        folder = pending.staging / STATE
        parts = [_part(folder, rank) for rank in range(self._world.size)]
        written = [json.loads(part.read_text()) for part in parts]
        kinds = next(w["kinds"] for w in written if w["kinds"])
        index = write_index(folder, [e for w in written for e in w["entries"]], kinds, pending.adam_step)
        files = {name: entry for w in written for name, entry in w["files"].items()}
        files[f"{STATE}/{INDEX}"] = {"bytes": index.stat().st_size, "sha256": _sha256(index)}
        for part in parts:
            part.unlink()
        commit = pending.staging / COMMIT
        commit.write_text(json.dumps({**pending.record, "files": files}, indent=1))
        for path in (index, commit, folder, pending.staging):
            _fsync(path)
        if (
            pending.final.exists()
        ):  # damaged, or left by a run that was rewound: set aside, so that a kill loses neither
            os.replace(pending.final, self.dir / f"{_STAGING}_replaced_{pending.final.name}")
        os.replace(pending.staging, pending.final)
        _fsync(self.dir)

    def _prune(self) -> None:
        found = {int(p.name[5:]): p for p in _committed(self.dir)}
        for step in self._retention.superseded(found):
            (found[step] / COMMIT).unlink()  # first, so that a kill half-way leaves nothing that looks whole
            shutil.rmtree(found[step])
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


def check(path: Path, hashes: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Sizes always; contents only with ``hashes``, those of every
    n-th file from the i-th on where ``share`` is (i, n)."""
    try:
        files = json.loads((path / COMMIT).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"unreadable {COMMIT} ({error})"
    first, every = share
    for number, (name, expected) in enumerate(sorted(files.items())):
        file = path / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if hashes and number % every == first and _sha256(file) != expected["sha256"]:
            return f"{name} has changed since it was written (sha256)"
    return None


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.part.json"


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
