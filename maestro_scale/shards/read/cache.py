"""The shards that a node keeps: files named by their SHA-256, within a byte budget, least recently used out.

shards/<sha256>.tar      verified before it got this name; pinned by a shared lock while it is open
shards/<sha256>.part     being downloaded; its full size is taken from the budget (and the disk) at the start
verified/<…>.json        which state of which file was verified, with its index; its mtime is the last use
locks/                   held while a shard is fetched or verified
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.locks import Locked, file_lock, remove_unless_shared
from maestro_scale.shards.read.counters import CounterTotal, StoreCounters

_SPACE_POLL_S = 0.1


class CacheFullError(StoreError):
    """The shards in use fill the budget."""


@dataclass(frozen=True)
class Cache:
    """The cache folder. Every method may run in many processes at once, and any of them may be killed."""

    folder: Path
    budget_bytes: int
    total: CounterTotal

    def prepare(self) -> None:
        """Make the folders; StoreError if they cannot be made."""
        try:
            for name in ("shards", "verified", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: the cache cannot be made here ({error.strerror}); set data.cache_dir"
            ) from error

    def path(self, sha256: str) -> Path:
        """Where a shard is or will be."""
        return self.folder / "shards" / f"{sha256}.tar"

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Only one process or thread at a time fetches or verifies ``name``."""
        path = self.folder / "locks" / f"{name}.lock"
        with ExitStack() as stack:
            try:
                stack.enter_context(file_lock(path))
            except OSError as error:
                raise StoreError(
                    f"{path}: cannot be locked ({error.strerror}); set data.cache_dir to a local disk"
                ) from error
            yield

    def verified_index(self, path: Path, sha256: str) -> ShardIndex | None:
        """The index of the file at ``path`` if its present state was verified as ``sha256``; notes the use."""
        marker = self._marker(path, sha256)
        try:
            index = ShardIndex.loads(marker.read_bytes(), str(marker))
            if index.plan != _file_state(path):
                return None
            _touch(marker)
        except (OSError, ManifestError):
            return None
        return index

    def mark_verified(self, path: Path, index: ShardIndex) -> None:
        """Note that the present state of the file at ``path`` was verified."""
        # In place of the plan, which only the writer needs, stands the state.
        content = ShardIndex(
            index.format_version,
            index.bytes,
            index.sha256,
            index.keys,
            index.offsets,
            index.sizes,
            plan=_file_state(path),
        )
        marker = self._marker(path, index.sha256)
        temporary = marker.with_suffix(f".{os.getpid()}.tmp")
        try:
            temporary.write_text(content.dumps())
            _touch(temporary)
            os.replace(temporary, marker)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(f"{marker}: cannot be written ({error.strerror})") from error

    @contextmanager
    def reserve(self, sha256: str, num_bytes: int, wait_s: float) -> Iterator[Path]:
        """A file of ``num_bytes`` to download into, within the budget; deleted at the end unless renamed.

        Hold :meth:`lock` of the shard. Waits ``wait_s`` for shards in use to be let go; then CacheFullError.
        StoreError if the disk is full.
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
                    f"a shard of {num_bytes / 2**30:.2f} GiB has no room; raise data.cache_gib"
                )
            time.sleep(_SPACE_POLL_S)
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def remove(self, sha256: str) -> None:
        """Delete a shard that is found to be damaged. Hold its lock."""
        self.path(sha256).unlink(missing_ok=True)
        self._marker(self.path(sha256), sha256).unlink(missing_ok=True)

    def _try_reserve(self, part: Path, num_bytes: int) -> bool:
        with self.lock("budget"):
            part.unlink(missing_ok=True)  # of a process that was killed: we hold the shard's lock
            self._remove_stale_partials(part)
            if not self._evict_until_free(num_bytes):
                return False
            _allocate(part, num_bytes)
        return True

    def _remove_stale_partials(self, mine: Path) -> None:
        for part in (self.folder / "shards").glob("*.part"):
            if part == mine:
                continue
            try:
                with file_lock(self.folder / "locks" / f"{part.stem}.lock", wait=False):
                    part.unlink(missing_ok=True)
            except Locked:
                continue

    def _evict_until_free(self, num_bytes: int) -> bool:
        """Evict shards that nobody has open, least recently used first, until ``num_bytes`` fit; do they?"""
        sizes = {}
        for path in (self.folder / "shards").iterdir():
            try:
                sizes[path] = path.stat().st_size
            except FileNotFoundError:
                continue
        excess = sum(sizes.values()) + num_bytes - self.budget_bytes
        tars = sorted((p for p in sizes if p.suffix == ".tar"), key=self._last_use)
        for path in tars:
            if excess <= 0:
                break
            if remove_unless_shared(path):
                self._marker(path, path.stem).unlink(missing_ok=True)
                self.total.add(StoreCounters(evictions=1))
                excess -= sizes[path]
        return excess <= 0

    def _last_use(self, path: Path) -> int:
        try:
            return self._marker(path, path.stem).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def _marker(self, path: Path, sha256: str) -> Path:
        place = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
        return self.folder / "verified" / f"{sha256}-{place}.json"


def _touch(path: Path) -> None:
    # The time that the kernel puts by itself has steps of some milliseconds: too coarse to order uses.
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _file_state(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"


def _allocate(path: Path, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path.parent}: no space left for a shard of {num_bytes / 1e6:.0f} MB; free some, or lower "
                "data.cache_gib"
            ) from error
        raise StoreError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        os.close(descriptor)
