"""Atomic checkpoints: staged, listed with sizes and hashes, committed by one rename.

Layout: ``checkpoints/step_00001234/`` contains the sharded state under ``state/`` and ``COMMIT.json``, which lists
every file with its size and sha256. A directory without a valid COMMIT.json is never loaded. Every rank writes its
own part from a copy, in the background; when all are done, rank 0 commits between two later steps. The file
``latest`` in the run directory names the newest checkpoint, so that a run whose checkpoints were lost does not
silently start over.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maestro_scale import untrusted
from maestro_scale.errors import MaestroError
from maestro_scale.interop.sharded_state import INDEX, StateReader, write_index, write_slices
from maestro_scale.shards.local_storage import fsync
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.commit import MARKER
from maestro_scale.training.checkpoint.identity import changed_arithmetic, differences
from maestro_scale.training.checkpoint.mirror import Mirror, step_of
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.distributed import World
from maestro_scale.training.run_dir import OUTCOME, write_atomically

LATEST = "latest"
STATE = "state"
_DAMAGED = "damaged"
_VISIBLE_TIMEOUT_S = 60.0  # until files of one node are visible on every other
_STAGING = ".staging"
_STEP = re.compile(r"step_\d{8,}")

log = logging.getLogger(__name__)


class CheckpointError(MaestroError):
    """A checkpoint is missing, damaged or of another run; the message names it and says what to do."""


@dataclass(frozen=True)
class Position:
    """The progress of a run. ``samples`` (consumed) is the position in the data; ``step`` counts optimizer steps, of
    which ``skipped_steps`` did not update the weights."""

    samples: int = 0
    step: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint stores besides tensors: the position, and the states of the guard and the hooks.

    ``guard`` None: there was no checkpoint.
    """

    position: Position
    guard: dict[str, Any] | None = None
    hooks: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointRecord:
    """What the marker of a checkpoint says of it."""

    position: Position
    identity: dict[str, Any]
    guard: dict[str, Any]
    hooks: dict[str, dict[str, Any]]


def read_record(folder: Path) -> CheckpointRecord:
    """The record in a committed checkpoint. ValueError if its marker is missing, damaged or malformed."""
    content = commit.read(folder)
    position = untrusted.from_builtins(Position, untrusted.field_of(content, dict, "position"))
    if min(vars(position).values()) < 0:
        raise untrusted.InputError("position: contains a negative number")
    hooks = untrusted.field_of(content, dict, "hooks") if "hooks" in content else {}
    for name in hooks:
        untrusted.field_of(hooks, dict, name)
    identity, guard = (untrusted.field_of(content, dict, name) for name in ("identity", "guard"))
    return CheckpointRecord(position, identity, guard, hooks)


@dataclass(frozen=True)
class _Pending:
    position: Position
    staging: Path
    final: Path
    record: dict[str, Any]
    adam_step: int
    written: Future[None]


class Checkpoints:
    """The checkpoints of one run directory. All ranks call ``begin``, ``commit`` and ``finish`` together."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        retention: Retention,
        mirror: Mirror | None = None,
        datasets: Mapping[str, str] | None = None,
    ) -> None:
        """``datasets``: {name: SHA-256 of its manifest}, recorded in each checkpoint."""
        self.dir = run_dir / "checkpoints"
        self._world, self._retention, self._mirror = world, retention, mirror
        self._datasets = dict(datasets or {})
        self._pending: _Pending | None = None
        self.on_commit: Callable[[Position], None] = lambda position: None
        """Called on every rank after a checkpoint was committed."""
        self._writer = ThreadPoolExecutor(1, "maestro-checkpoint")

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has begun and is not yet committed; the same on all ranks."""
        return self._pending is not None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._pending is not None and not self._pending.written.done()

    def begin(
        self,
        state: TrainState,
        position: Position,
        identity: dict[str, Any],
        guard: dict[str, Any],
        hooks: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        """Copy the state and start writing it. ``identity`` is checked on resume; ``guard`` and ``hooks``, plain JSON
        values, are returned by it.

        A kill at any moment leaves the previous checkpoint and, at worst, a staging directory that a later checkpoint
        removes.
        """
        self.finish()
        final = self.dir / f"step_{position.step:08d}"
        staging = self.dir / f"{_STAGING}_{final.name}"
        if self._world.is_main:
            shutil.rmtree(staging, ignore_errors=True)
            try:
                (staging / STATE).mkdir(parents=True)
            except OSError as error:
                raise self._unwritable(final, error) from error
        self._world.barrier()
        pieces, adam_step = state.pieces(), state.sharded.adam_step
        record = {"position": vars(position), "guard": guard, "identity": identity}
        if self._datasets:
            # A record only: the identity has the digest of the splits in use, which another split does not change.
            record["datasets"] = self._datasets
        if hooks:  # omitted if empty, as in checkpoints of earlier revisions
            record["hooks"] = hooks
        written = self._writer.submit(self._write, staging / STATE, pieces)
        self._pending = _Pending(position, staging, final, record, adam_step, written)

    def commit(self) -> None:
        """Publish the pending checkpoint, once no rank is ``busy``. CheckpointError if writing it failed."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.written.result()
            if self._world.is_main:
                self._commit(pending)
                if self._mirror is not None:
                    self._mirror.send(pending.final)
                self._prune()
        except OSError as error:
            raise self._unwritable(pending.final, error) from error
        self.on_commit(pending.position)

    def _unwritable(self, final: Path, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{final} cannot be written: {error.strerror or error}; the last committed checkpoint is kept, and the "
            "same command resumes from it"
        )

    def finish(self) -> None:
        """Wait for the pending checkpoint and publish it."""
        if self._pending is not None:
            self._pending.written.exception()
            self._world.barrier()
            self.commit()
            self._world.barrier()

    def close(self, alive: Callable[[], None] = lambda: None) -> None:
        """Publish the pending checkpoint and wait until it is mirrored; ``alive`` is called every second."""
        self.finish()
        if self._mirror is not None:
            self._mirror.wait(alive)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint with a valid marker and file sizes, or None; and the problems of newer ones."""
        return _newest(self.dir)

    def recorded_identity(self) -> dict[str, Any] | None:
        """The identity in the newest checkpoint here; None if there is none. A collective. The mirror's is checked by
        ``resume``."""
        found = None
        with suppress(ValueError):  # ``resume`` reads the same files, and decides what to do
            if self._world.is_main and (path := self.latest()[0]) is not None:
                found = read_record(path).identity
        return self._world.from_main(found)

    def check_identity(
        self, recorded: dict[str, Any], identity: dict[str, Any], path: Path | None = None
    ) -> None:
        """CheckpointError unless a checkpoint with the identity ``recorded`` (``path``, else the newest) continues a
        run with this one."""
        if difference := differences(recorded, identity):
            where = path or self.latest()[0]
            raise CheckpointError(
                f"{where} does not fit this run: {difference}. Resume with the values that it was written with, or "
                "use another directory"
            )

    def resume(self, state: TrainState, identity: dict[str, Any]) -> Resumed:
        """Load the newest intact checkpoint; a collective, on any number of ranks. The start of the run if nothing was
        ever saved.

        Damaged checkpoints are skipped with a warning and renamed. If there is none here, the mirror's newest is
        fetched. CheckpointError if the run had checkpoints and none is intact, if the checkpoint belongs to another
        model, dataset or seed, or if the mirror contains another run.
        """
        path, problems = self._newest_intact()
        for problem in problems:
            log.warning("checkpoint skipped: %s", problem)
        if self._mirror is not None and self._world.is_main:
            self._mirror.claim(identity, required=path is None)
        if path is None:
            path = self._fetch()
        if path is None:
            self._refuse_to_start_over(problems)
            return Resumed(Position())
        try:
            record = read_record(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}; remove it to resume from the one before") from None
        self.check_identity(record.identity, identity, path)
        if self._world.is_main and (change := changed_arithmetic(record.identity, identity)):
            log.warning("%s: %s", path.name, change)
        with StateReader(path / STATE) as reader:
            state.restore(reader)
        if self._world.is_main:
            self._rename_damaged(path)
        return Resumed(record.position, record.guard, record.hooks)

    def _newest_intact(self) -> tuple[Path | None, list[str]]:
        # The ranks share the work of hashing. Rank 0 lists the checkpoints: on a shared file system, each node may see
        # another state of the directory, and all ranks must load the same checkpoint.
        problems: list[str] = []
        names = ",".join(p.name for p in reversed(_committed(self.dir)))
        for name in filter(None, str(self._world.gather(names)[0]).split(",")):
            path, share = self.dir / name, (self._world.rank, self._world.size)
            mine = commit.problem(path) or commit.problem(path, hashes=True, share=share)
            problem = next(filter(None, self._world.gather(mine)), None)
            if problem is None:
                return path, problems
            problems.append(f"{name}: {problem}")
        return None, problems

    def _fetch(self) -> Path | None:
        """The newest intact checkpoint of the mirror, copied here by rank 0; None if there is none. CheckpointError
        on a rank where it does not become visible."""
        if self._mirror is None:
            return None
        fetched = ""
        for name in self._mirror.names() if self._world.is_main else ():
            staging = self.dir / f"{_STAGING}_{name}"
            self._mirror.fetch(name, staging)
            if (problem := commit.problem(staging, hashes=True)) is None:
                final = self.dir / name
                commit.publish(staging, final, self.dir / f"{_STAGING}_replaced_{name}")
                log.warning("%s was restored from %s", final, self._mirror.url)
                fetched = name
                break
            log.warning("checkpoint skipped: %s/%s: %s", self._mirror.url, name, problem)
        fetched = str(self._world.gather(fetched)[0])
        if not fetched:
            return None
        deadline = time.monotonic() + _VISIBLE_TIMEOUT_S
        while (problem := commit.problem(self.dir / fetched)) is not None:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.dir / fetched} is not visible here ({problem}): all nodes must share the run directory"
                )
            time.sleep(1)
        return self.dir / fetched

    def _refuse_to_start_over(self, problems: list[str]) -> None:
        pointer, outcome = self.dir.parent / LATEST, self.dir.parent / OUTCOME
        if problems:
            lost = f"{self.dir} contains no intact checkpoint ({problems[0]})"
        elif pointer.exists():
            name = pointer.read_text().strip()
            lost = f"{pointer} names the checkpoint {name}, but {self.dir} contains none"
        elif outcome.exists():
            lost = f"{outcome} says that the run ended with a checkpoint, but {self.dir} contains none"
        else:
            return
        raise CheckpointError(
            f"{lost}; refusing to start over in it: restore it, use another directory, or remove this one"
        )

    def _rename_damaged(self, loaded: Path) -> None:
        # Left in place, they would count towards ``checkpoint.keep`` and be the newest again at the next start.
        for path in _committed(self.dir):
            if step_of(path) > step_of(loaded):
                aside = self.dir / f"{_DAMAGED}_{path.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)

    def _write(self, folder: Path, pieces: list[Any]) -> None:
        file, entries = write_slices(folder, self._world.rank, pieces)
        part: dict[str, Any] = {"entries": entries, "kinds": [], "files": {}}
        if file is not None:
            part["kinds"] = list(pieces[0].values)
            part["files"] = {f"{STATE}/{file.name}": commit.entry(file)}
        _part(folder, self._world.rank).write_text(json.dumps(part))

    def _commit(self, pending: _Pending) -> None:
        folder = pending.staging / STATE
        parts = [_part(folder, rank) for rank in range(self._world.size)]
        written = [untrusted.read_record(part) for part in parts]
        kinds = next(w["kinds"] for w in written if w["kinds"])
        index = write_index(folder, [e for w in written for e in w["entries"]], kinds, pending.adam_step)
        files = {name: entry for w in written for name, entry in w["files"].items()}
        files[f"{STATE}/{INDEX}"] = commit.entry(index)
        for part in parts:
            part.unlink()
        fsync(folder)
        commit.commit(pending.staging, pending.record, files)
        # A checkpoint of this step may exist already: damaged, or of a run that was resumed at an earlier step.
        aside = self.dir / f"{_STAGING}_replaced_{pending.final.name}"
        commit.publish(pending.staging, pending.final, aside)
        write_atomically(self.dir.parent / LATEST, f"{pending.final.name}\n")

    def _prune(self) -> None:
        found = {step_of(p): p for p in _committed(self.dir)}
        unsent = self._mirror.unsent if self._mirror is not None else set()
        for step in self._retention.superseded(found):
            if found[step].name in unsent:
                continue  # removed after a later checkpoint
            (found[step] / MARKER).unlink()  # first, so that a kill in between leaves no valid marker
            shutil.rmtree(found[step])
        for stray in self.dir.iterdir():  # left by a kill
            incomplete = _STEP.fullmatch(stray.name) and not (stray / MARKER).exists()
            if incomplete or stray.name.startswith(_STAGING):  # only names that this class writes
                shutil.rmtree(stray, ignore_errors=True)


def newest(run_dir: Path) -> Path:
    """The newest checkpoint of a run whose files match their hashes; CheckpointError if there is none.

    A warning where a newer one is damaged: its score or its model would be taken for that of the whole run.
    """
    path, problems = _newest(run_dir / "checkpoints", hashes=True)
    if path is None:
        raise CheckpointError(
            f"{run_dir} contains no intact checkpoint{': ' + problems[0] if problems else _hint(run_dir)}"
        )
    if problems and os.environ.get("RANK", "0") == "0":  # every rank of an evaluation gets here
        log.warning(
            "%s: %s is used, since newer ones are damaged: %s", run_dir, path.name, "; ".join(problems)
        )
    return path


def _hint(run_dir: Path) -> str:
    """Why a folder has no checkpoint, where that is easily seen."""
    if not run_dir.exists():
        return ": it does not exist"
    if (run_dir / "config.json").exists():
        return ": it is an exported model"
    if _committed(run_dir):
        return f": it is the folder of checkpoints; give the run directory, {run_dir.parent}"
    if not (run_dir / "recipe.yaml").exists():
        return ": it is not a run directory"
    return ": the run has not saved one yet"


def load_position(path: Path) -> Position:
    """The position of a committed checkpoint."""
    return read_record(path).position


def _newest(folder: Path, hashes: bool = False) -> tuple[Path | None, list[str]]:
    problems: list[str] = []
    for path in reversed(_committed(folder)):
        problem = commit.problem(path, hashes)
        if problem is None:
            return path, problems
        problems.append(f"{path.name}: {problem}")
    return None, problems


def _committed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    steps = (p for p in folder.iterdir() if _STEP.fullmatch(p.name))
    return sorted((p for p in steps if (p / MARKER).exists()), key=step_of)


def _part(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank:05d}.part.json"
