"""Exclusion of other writers of a split, and of other publications: by file locks in folders, by leases elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from maestro_scale.shards import lease
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.lease import Lease, LeaseLost
from maestro_scale.shards.locks import Locked, file_lock, locks_unsupported
from maestro_scale.shards.storage import LocalStorage, Storage
from maestro_scale.shards.write.part import WriterPart

log = logging.getLogger(__name__)
_LOCK_CHECKS = 20
# Not ".manifest": a split may have that name, but its name cannot contain a dot.
_PUBLICATION = ".manifest.json"


class LostSplit(WriteError):
    """Another writer has taken over the split."""


class WriterLock:
    """Context manager: the right to write one split, or one part of it, at a destination.

    A writer of the whole split excludes all others, a part excludes equal parts and a writer of the whole. Entering
    raises WriteError if another writer has the right.
    """

    def __init__(self, storage: Storage, split: str, part: WriterPart) -> None:
        self._storage, self._split, self._part = storage, split, part
        self._uses_leases = False
        self._lease: Lease | None = None
        self._stack = ExitStack()

    def __enter__(self) -> WriterLock:
        with ExitStack() as stack:
            try:
                if isinstance(self._storage, LocalStorage):
                    self._uses_leases = not self._enter_file_locks(stack, self._storage.folder)
                else:
                    self._uses_leases = True
                if self._uses_leases:
                    self._enter_leases(stack)
            except Locked as error:
                raise WriteError(self._held_by_another(error)) from error
            except OSError as error:
                raise WriteError(
                    f"{self._storage.address()}: cannot be written ({error.strerror})"
                ) from error
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def check(self) -> None:
        """LostSplit if the right was lost: this process was stopped for longer than its lease."""
        if self._lease is None:
            return
        try:
            self._lease.check()
        except LeaseLost as error:
            raise LostSplit(
                f"{self._storage.address()}: this writer did not respond for {lease.LIFETIME_S:.0f} s, and another one "
                f"has taken over split {self._split!r}; nothing was published: run the command again if needed"
            ) from error

    def declare(self, plan: str) -> None:
        """State what this writer writes. WriteError if another part of the split is being written with another plan.

        Only needed with file locks: in a folder, shards of different plans have equal names.
        """
        if self._uses_leases or not isinstance(self._storage, LocalStorage):
            return
        own = self._storage.folder / self._name("lock")
        own.write_text(plan)
        for name in self._parts("lock"):
            path = self._storage.folder / name
            if path != own and not _has_equal_plan(path, plan):
                raise WriteError(
                    f"{self._storage.address()}: another part of split {self._split!r} is being written with other "
                    "tiles or settings; wait for it, and give all parts the same arguments"
                )

    @contextmanager
    def publication(self) -> Iterator[None]:
        """Exclude other publications at the same destination, of any split; waits for them."""
        if isinstance(self._storage, LocalStorage) and not self._uses_leases:
            with file_lock(self._storage.folder / f"{_PUBLICATION}.lock"):
                yield
            return
        publishing = Lease(self._storage, f"{_PUBLICATION}.lease")
        try:
            publishing.acquire(wait_s=5 * lease.LIFETIME_S)
        except Locked as error:
            raise WriteError(
                f"{self._storage.address()}: another writer is publishing for too long ({error}); run the same command "
                "again, finished shards are kept"
            ) from error

        try:
            yield
        finally:
            publishing.release()

    def other_writers(self) -> bool:
        """Whether there are locks or leases of other writers of this split."""
        names = {
            n
            for n in self._storage.list_names()
            if n.startswith(f".{self._split}.") and n.endswith((".lock", ".lease"))
        }
        return bool(names - {self._name("lock"), self._name("lease")})

    def _name(self, kind: str) -> str:
        part = f".part-{self._part.number}-of-{self._part.count}" if self._part.count > 1 else ""
        return f".{self._split}{part}.{kind}"

    def _conflicting(self, kind: str) -> list[str]:
        """Names of the locks or leases that exclude this writer, besides an equal one.

        Each kind of writer takes its own first and looks for those of the other kind then. With this order at least one
        of two writers that start at the same time finds the other.
        """
        if self._part.count > 1:
            return [f".{self._split}.{kind}"]
        return self._parts(kind)

    def _parts(self, kind: str) -> list[str]:
        prefix = f".{self._split}.part-"
        return [n for n in self._storage.list_names() if n.startswith(prefix) and n.endswith(f".{kind}")]

    def _enter_file_locks(self, stack: ExitStack, folder: Path) -> bool:
        """False if the file system has no locks."""
        try:
            stack.enter_context(file_lock(folder / self._name("lock"), wait=False))
        except OSError as error:
            if not locks_unsupported(error):
                raise
            (folder / self._name("lock")).unlink(missing_ok=True)
            log.warning(
                "%s: this file system has no file locks; leases protect the split from other writers instead",
                folder,
            )
            return False
        (folder / self._name("lock")).write_text("")  # it may be the file of a killed writer
        for name in self._conflicting("lock"):
            _require_unlocked(folder / name)
        return True

    def _enter_leases(self, stack: ExitStack) -> None:
        self._lease = stack.enter_context(Lease(self._storage, self._name("lease")))
        for name in self._conflicting("lease"):
            if Lease(self._storage, name).wait_until_free() is not None:
                self._storage.remove(name)  # of a writer that was killed

    def _held_by_another(self, error: Locked) -> str:
        message = f"{self._storage.address()}: another process is writing split {self._split!r}"
        if not self._uses_leases:
            return f"{message}; wait for it"
        return f"{message}: {error}; wait for it or, if it was killed, try again then"


def _has_equal_plan(path: Path, plan: str) -> bool:
    """Whether a lock file is free, or its holder has declared no plan or this one.

    Repeated, since a new holder first empties the file of a killed one.
    """
    for _ in range(_LOCK_CHECKS):
        try:
            if path.read_text() in ("", plan):
                return True
            with file_lock(path, wait=False):
                return True
        except FileNotFoundError:
            return True
        except Locked:
            time.sleep(0.1)
    return False


def _require_unlocked(path: Path) -> None:
    """Locked if a writer holds this lock. Repeated, since another process may hold it briefly for the same check."""
    for _ in range(_LOCK_CHECKS):
        try:
            with file_lock(path, wait=False):
                return
        except Locked:
            time.sleep(0.1)
    raise Locked(str(path))
