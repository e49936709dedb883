"""Shard cache of a node: files named by SHA-256, within a byte budget, with least-recently-used eviction.

shards/<sha256>.tar      a verified shard; pinned by a shared lock while a process has it open
shards/<sha256>.part     an incomplete download, allocated at full size from the start
verified/<…>.json        record that a file in a certain state was verified, and its index; its mtime is the last use
locks/                   one lock per shard, held while it is downloaded, verified or evicted
index.sqlite             which of these files there are, see cache_index.py

All processes of a node share the folder, and any of them may be killed at any time. Hence: files are named by content,
so that two datasets never collide; a shard gets its final name only after verification; a download is counted in the
index, and its disk space allocated, before the first byte, so that concurrent downloads cannot exceed the budget
together; and locks are kernel locks, which end with their process. Pinned shards are never evicted. On Linux an evicted
file that is open would stay readable anyway, but its space would not be freed, so the budget would be exceeded
unnoticed.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.locks import Locked, file_lock, remove_unless_shared
from maestro_scale.shards.read.cache_index import CachedFile, CacheIndex, record_name
from maestro_scale.shards.read.counters import CounterTotal, StoreCounters

_SPACE_POLL_S = 0.1
_EVICTION_BATCH = 16


class CacheFullError(StoreError):
    """The budget is too small: shards in use fill it, or one shard exceeds it."""


@dataclass(frozen=True)
class Cache:
    """The cache folder. Every method is safe to call from many processes at once."""

    folder: Path
    budget_bytes: int
    total: CounterTotal

    def prepare(self) -> None:
        """Create the folders; StoreError if that fails."""
        try:
            for name in ("shards", "verified", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: the cache folder cannot be created ({error.strerror}); set data.cache_dir"
            ) from error

    def path(self, sha256: str) -> Path:
        """Path of a cached shard, whether or not it exists."""
        return self.folder / "shards" / f"{sha256}.tar"

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclusive lock of a shard (by SHA-256): only one process or thread at a time downloads or verifies it."""
        path = self._lock_path(name)
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(path))
            except OSError as error:
                raise StoreError(
                    f"{path}: cannot be locked ({error.strerror}); set data.cache_dir to a local disk"
                ) from error
            yield

    def verified_index(self, path: Path, sha256: str) -> ShardIndex | None:
        """The index of the file at ``path`` if it is unchanged since it was verified as ``sha256``; else None.

        Also updates the time of last use. "Unchanged" means same inode, size and times of modification and change:
        hashing 128 MB at every open would cost more than reading the samples.
        """
        record = self._record_path(path, sha256)
        try:
            index = ShardIndex.loads(record.read_bytes(), str(record))
            if index.plan != _file_state(path):
                return None
            _touch(record)
        except (OSError, ManifestError):
            return None
        return index

    def mark_verified(self, path: Path, index: ShardIndex) -> None:
        """Record that the file at ``path``, in its present state, was verified."""
        # The record uses the index format. Its ``plan``, which only the writer needs, holds the file state instead.
        content = ShardIndex(
            index.format_version,
            index.bytes,
            index.sha256,
            index.keys,
            index.offsets,
            index.sizes,
            plan=_file_state(path),
        )
        record = self._record_path(path, index.sha256)
        temporary = record.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(content.dumps())
            _touch(temporary)
            os.replace(temporary, record)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"{record}: cannot be written ({error.strerror})") from error

    @contextmanager
    def reserve(self, sha256: str, num_bytes: int, wait_s: float) -> Iterator[Path]:
        """Allocate a file of ``num_bytes`` to download into; deleted on exit unless it was renamed.

        The caller must hold :meth:`lock` of the shard. Waits up to ``wait_s`` for pinned shards to be released, then
        raises CacheFullError. StoreError if the disk is full.
        """
        if num_bytes > self.budget_bytes:
            raise CacheFullError(
                f"{self.folder}: the budget of {self.budget_bytes / 2**30:.2f} GiB is less than one shard of "
                f"{num_bytes / 2**30:.2f} GiB; raise data.cache_gib"
            )
        path = self.folder / "shards" / f"{sha256}.part"
        until = time.monotonic() + wait_s
        while not self._try_reserve(path, num_bytes):
            if time.monotonic() >= until:
                raise CacheFullError(
                    f"{self.folder}: shards in use fill the budget of {self.budget_bytes / 2**30:.2f} GiB, "
                    f"a shard of {num_bytes / 2**30:.2f} GiB does not fit; raise data.cache_gib"
                )
            time.sleep(_SPACE_POLL_S)
        try:
            yield path
        finally:
            self._release(path)

    def remove(self, sha256: str) -> None:
        """Delete a damaged shard. The caller must hold its lock."""
        self.path(sha256).unlink(missing_ok=True)
        self._record_path(self.path(sha256), sha256).unlink(missing_ok=True)
        self._index.drop(self.path(sha256).name)

    def _try_reserve(self, part: Path, num_bytes: int) -> bool:
        # Left by a killed process, since this one holds the shard's lock. Before the reservation replaces its row.
        part.unlink(missing_ok=True)
        while excess := self._index.reserve(part.name, num_bytes, self.budget_bytes):
            if not (self._remove_stale_partials(part) or self._evict(excess)):
                return False
        try:
            _allocate(part, num_bytes)
        except StoreError:
            self._index.drop(part.name)
            raise
        return True

    def _release(self, part: Path) -> None:
        """End a reservation: its file has become a shard, or is deleted."""
        try:
            part.unlink()
        except FileNotFoundError:
            self._settle(part)
        else:
            self._index.drop(part.name)

    def _settle(self, part: Path) -> None:
        """Correct the row of a download that is not there."""
        path = part.with_suffix(".tar")
        if path.exists():
            self._index.complete(part.name, path.name, self._last_use(path))
        else:
            self._index.drop(part.name)

    def _remove_stale_partials(self, mine: Path) -> bool:
        """Delete downloads of killed processes, those whose shard lock is free; whether there were any."""
        removed = False
        for name in self._index.parts():
            part = mine.with_name(name)
            if part == mine:
                continue
            try:
                with file_lock(self._lock_path(part.stem), wait=False):
                    self._release(part)
                    removed = True
            except Locked:
                continue
        return removed

    def _evict(self, num_bytes: int) -> bool:
        """Evict unpinned shards, least recently used first, until ``num_bytes`` are freed; whether any was.

        Without a lock that others wait for: deleting a large file takes milliseconds.
        """
        freed, last = 0, None
        while freed < num_bytes and (found := self._index.oldest(last, _EVICTION_BATCH)):
            for file in found:
                last = file
                # The index learns of uses here only, so that opening a shard writes nothing to it.
                last_use = self._last_use(self.folder / "shards" / file.name)
                if last_use > file.last_use:
                    self._index.set_last_use(file.name, last_use)
                    if last_use <= found[-1].last_use:  # it comes before others of these
                        break
                elif freed < num_bytes and self._try_evict(file):
                    freed += file.bytes
        return freed > 0

    def _try_evict(self, file: CachedFile) -> bool:
        """Evict a shard unless it is in use; whether it is gone."""
        path = self.folder / "shards" / file.name
        try:
            # The lock of the shard, so that nobody downloads it again between its removal and that of its row.
            with file_lock(self._lock_path(path.stem), wait=False):
                if remove_unless_shared(path):
                    self.total.add(StoreCounters(evictions=1))
                elif path.exists():
                    return False
                self._record_path(path, path.stem).unlink(missing_ok=True)
                self._index.drop(file.name)
        except Locked:
            return False
        return True

    @property
    def _index(self) -> CacheIndex:
        return CacheIndex(self.folder)

    def _lock_path(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    def _last_use(self, path: Path) -> int:
        try:
            return self._record_path(path, path.stem).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _record_path(self, path: Path, sha256: str) -> Path:
        return self.folder / "verified" / record_name(path, sha256)


def _touch(path: Path) -> None:
    # The kernel's own timestamps advance in steps of milliseconds: too coarse to order uses.
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _file_state(path: Path) -> str:
    status = path.stat()
    # The time of the last change too, which no program can set: copies and edits may keep the modification time.
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def _allocate(path: Path, num_bytes: int) -> None:
    """Create a file with all its blocks, so that a full disk is an error now and not in the middle of a download."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path.parent}: no space left for a shard of {num_bytes / 1e6:.0f} MB; free some space, or lower "
                "data.cache_gib"
            ) from error
        raise StoreError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        os.close(descriptor)
