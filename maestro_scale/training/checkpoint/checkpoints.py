"""Atomic checkpoints: staged, listed with sizes and hashes, committed by one rename.

Layout: ``checkpoints/step_00001234/`` contains the sharded state under ``state/`` and ``COMMIT.json``, which lists
every file with its size and sha256. A directory without a valid COMMIT.json is never loaded. Every rank writes its
own piece from a copy, in the background; when all have, rank 0 publishes the checkpoint, in the background too. The
file ``latest`` in the run directory names the newest checkpoint, so that a run whose checkpoints were lost does not
silently start over.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from maestro_scale.interop.sharded_state import StateReader
from maestro_scale.training.checkpoint import commit
from maestro_scale.training.checkpoint.folder import (
    STATE,
    committed,
    newest_intact,
    prune,
    rename_damaged,
    replaced_of,
    staging_of,
)
from maestro_scale.training.checkpoint.identity import changed_arithmetic, differences
from maestro_scale.training.checkpoint.mirror import Mirror
from maestro_scale.training.checkpoint.pieces import share_of, write_index, write_piece
from maestro_scale.training.checkpoint.record import CheckpointError, Position, Resumed, read_record
from maestro_scale.training.checkpoint.retention import Retention
from maestro_scale.training.checkpoint.state import TrainState
from maestro_scale.training.distributed import World
from maestro_scale.training.run_dir import OUTCOME, write_atomically

LATEST = "latest"
_VISIBLE_TIMEOUT_S = 60.0  # until files of one node are visible on every other

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that has begun. ``task``: what this rank does for it now: it writes its piece, or, when
    ``publishing``, rank 0 publishes the checkpoint and the others do nothing."""

    position: Position
    final: Path
    record: dict[str, Any]
    adam_step: int
    task: Future[None]
    publishing: bool = False


class Checkpoints:
    """The checkpoints of one run directory. All ranks call ``begin``, ``advance`` and ``finish`` together."""

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
        """Whether this rank still works for the pending checkpoint."""
        return self._pending is not None and not self._pending.task.done()

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
        staging = staging_of(final)
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
        task = self._writer.submit(write_piece, staging / STATE, self._world.rank, pieces)
        self._pending = _Pending(position, final, record, adam_step, task)

    def advance(self) -> None:
        """Take the pending checkpoint one step on, once no rank is ``busy``: written, it is published; published, it is
        done. CheckpointError if that failed. Nothing here takes longer with more ranks."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.task.result()
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: what the ranks have written does not fit together
            raise self._unwritable(pending.final, error) from error
        if pending.publishing:
            self.on_commit(pending.position)
        else:
            publish = partial(self._publish, pending) if self._world.is_main else _nothing
            self._pending = replace(pending, task=self._writer.submit(publish), publishing=True)

    def _unwritable(self, final: Path, error: OSError | ValueError) -> CheckpointError:
        cause = getattr(error, "strerror", None) or error
        return CheckpointError(
            f"{final} cannot be written: {cause}; the last committed checkpoint is kept, and the "
            "same command resumes from it"
        )

    def finish(self) -> None:
        """Wait for the pending checkpoint and publish it."""
        if self._pending is None:
            return
        while self._pending is not None:
            wait([self._pending.task])
            self._world.barrier()
            self.advance()
        # A rank that could not publish has raised: the others must not continue as if it had.
        self._world.barrier()

    def close(self, alive: Callable[[], None] = lambda: None) -> None:
        """Publish the pending checkpoint and wait until it is mirrored; ``alive`` is called every second."""
        self.finish()
        if self._mirror is not None:
            self._mirror.wait(alive)

    def latest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint with a valid marker and file sizes, or None; and the problems of newer ones."""
        return newest_intact(self.dir)

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
            rename_damaged(self.dir, path)
        return Resumed(record.position, record.guard, record.hooks)

    def _newest_intact(self) -> tuple[Path | None, list[str]]:
        # The ranks share the work of hashing. Rank 0 lists the checkpoints: on a shared file system, each node may see
        # another state of the directory, and all ranks must load the same checkpoint.
        problems: list[str] = []
        names = [p.name for p in reversed(committed(self.dir))] if self._world.is_main else []
        for name in self._world.from_main(names):
            found = self._world.gather(self._problem_of_share(self.dir / name))
            problem = next(filter(None, found), None)
            if problem is None:
                return self.dir / name, problems
            problems.append(f"{name}: {problem}")
        return None, problems

    def _problem_of_share(self, path: Path) -> str | None:
        """What is wrong with the files of a checkpoint that this rank checks, of all that all ranks check."""
        try:
            files = commit.read(path)["files"]
        except ValueError as error:
            return str(error)
        share = share_of(list(files), self._world.rank, self._world.size)
        return commit.damage(path, {name: files[name] for name in share}, hashes=True)

    def _fetch(self) -> Path | None:
        """The newest intact checkpoint of the mirror, copied here by rank 0; None if there is none. CheckpointError
        on a rank where it does not become visible."""
        if self._mirror is None:
            return None
        fetched = ""
        for name in self._mirror.names() if self._world.is_main else ():
            final = self.dir / name
            staging = staging_of(final)
            self._mirror.fetch(name, staging)
            if (problem := commit.problem(staging, hashes=True)) is None:
                commit.publish(staging, final, replaced_of(final))
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

    def _publish(self, pending: _Pending) -> None:
        """Publish a checkpoint that all ranks have written, and remove the superseded ones."""
        staging = staging_of(pending.final)
        entries = write_index(staging / STATE, self._world.size, pending.adam_step)
        files = {f"{STATE}/{name}": entry for name, entry in entries.items()}
        commit.commit(staging, pending.record, files, version=commit.FORMAT_VERSION)
        # A checkpoint of this step may exist already: damaged, or of a run that was resumed at an earlier step.
        commit.publish(staging, pending.final, replaced_of(pending.final))
        write_atomically(self.dir.parent / LATEST, f"{pending.final.name}\n")
        if self._mirror is not None:
            self._mirror.send(pending.final)
        prune(self.dir, self._retention, self._mirror.unsent if self._mirror is not None else ())


def _nothing() -> None:
    """What ranks other than 0 do while rank 0 publishes."""
