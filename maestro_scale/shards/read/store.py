"""Access to verified shards: local ones are read in place, remote ones are downloaded once per node.

A shard is verified (size, SHA-256, number of samples) before its first use. A remote shard is downloaded by parallel
range requests, since one connection to an object store is slower than a node's network. Whole shards are downloaded,
not single samples: an epoch uses every sample of a shard, and large requests are cheaper than many small ones.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.remote.retry import RetryPolicy, TransientError, call_with_retries
from maestro_scale.shards.errors import BadShard, ManifestError, StoreError, one_line
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.shards.locks import open_shared
from maestro_scale.shards.read.cache import Cache
from maestro_scale.shards.read.counters import CounterTotal, StoreCounters
from maestro_scale.shards.read.prefetch import Connections, Prefetcher, ordered_map
from maestro_scale.shards.read.shard import Shard
from maestro_scale.shards.storage import LocalStorage, RemoteStorage, open_storage

__all__ = ["BadShard", "Shard", "Store", "StoreCounters", "StoreError"]

_RANGE_BYTES = 8 * 1024 * 1024
_CONNECTIONS = 8  # parallel range requests of a store in a process
_NEEDED_NOW = -1  # before all shards that are prefetched, see Connections
_HASH_BYTES = 1024 * 1024
_SPACE_WAIT_S = 30.0
_OPEN_ATTEMPTS = 16
_DOWNLOADS = 3  # of one shard, if its SHA-256 or size differs


@dataclass(frozen=True)
class _Download:
    """How to download a shard. ``priority``: the download of this process with the lowest is read first."""

    cancel: threading.Event
    space_wait_s: float
    priority: int


class _WrongSize(Exception):
    """An object has another size than its shard; None: it is missing."""

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.size = size


class Store:
    """The shards of one dataset.

    ``url``: folder or fsspec URL of the dataset. ``cache_dir``: local folder shared by all processes of the node, for
    downloaded shards and records of verification. ``cache_bytes``: budget of the downloaded shards. A store can be
    pickled; a copy in another process, by pickle or fork, opens its own connections.
    """

    def __init__(self, url: str, cache_dir: Path, cache_bytes: int, retry: RetryPolicy | None = None) -> None:
        self.url = os.fspath(url)
        self.cache_dir = Path(cache_dir).expanduser()
        self.cache_bytes = cache_bytes
        self.retry = retry or RetryPolicy()
        self._total = CounterTotal()
        self._storage = open_storage(self.url, self.retry, self._total.add_retry)
        self._cache = Cache(self.cache_dir, cache_bytes, self._total)
        self._prefetcher: Prefetcher[ShardInfo] | None = None
        self._connections = Connections(_CONNECTIONS)
        self._prefetched = itertools.count()

    def __reduce__(self) -> tuple[type[Store], tuple[str, Path, int, RetryPolicy]]:
        return Store, (self.url, self.cache_dir, self.cache_bytes, self.retry)

    def prepare(self) -> None:
        """Create the folders of the cache; StoreError if that fails. Reading does so too, but later."""
        self._cache.prepare()

    @property
    def counters(self) -> StoreCounters:
        """Totals of this store in this process."""
        return self._total.total

    def shard(self, info: ShardInfo) -> Shard:
        """Open a shard, verified (size, SHA-256, number of samples) and pinned until it is closed.

        A damaged download is repeated once. BadShard if the shard is missing or differs from ``info``; StoreError if
        the storage cannot be reached, or the cache is full or cannot be written.
        """
        started = time.monotonic()
        try:
            for _ in range(_OPEN_ATTEMPTS):
                path, index = self.ensure(info)
                descriptor = self._open(path)
                # None: another process evicted it between ensure and open, which only the shared lock prevents.
                if descriptor is not None:
                    return Shard(self._storage.address(info.path), descriptor, index)
        finally:
            self._total.add(StoreCounters(wait_s=time.monotonic() - started))
        raise StoreError(
            f"{self.cache_dir}: shards are evicted as soon as they are fetched; raise data.cache_gib"
        )

    def read_keys(self, info: ShardInfo) -> tuple[str, ...]:
        """Keys of a shard's samples, in order. The shard is fetched only if it has neither been verified on this node
        nor has an index beside it. Raises as :meth:`shard`."""
        self._cache.prepare()
        index = self._cache.verified_index(self._path(info), info.sha256)
        if index is None:
            with suppress(FileNotFoundError, ManifestError):
                index = ShardIndex.read(self._storage, index_path(info.path))
        # An index beside a shard is not verified: it may be that of another shard.
        if index is None or not index.describes(info):
            _, index = self.ensure(info)
        return index.keys

    def prefetch(self, infos: Iterable[ShardInfo]) -> None:
        """Fetch and verify shards in the background, in this order. Replaces earlier requests that have not started.

        Errors are ignored here; they are raised when the shard itself is opened.
        """
        # After a fork the threads of the parent's prefetcher do not exist in this process.
        if self._prefetcher is None or self._prefetcher.pid != os.getpid():
            self._prefetcher = Prefetcher(self._prefetch_one, _num_ranges, _CONNECTIONS)
        self._prefetcher.replace(infos)

    def close(self) -> None:
        """Stop prefetching. Open shards stay open."""
        if self._prefetcher is not None and self._prefetcher.pid == os.getpid():
            self._prefetcher.stop()
        self._prefetcher = None

    def ensure(self, info: ShardInfo) -> tuple[Path, ShardIndex]:
        """Local path and index of a shard, which is downloaded and verified if necessary. Raises as :meth:`shard`."""
        return self._ensure(info, _Download(threading.Event(), _SPACE_WAIT_S, _NEEDED_NOW))

    def _ensure(self, info: ShardInfo, download: _Download) -> tuple[Path, ShardIndex]:
        self._cache.prepare()
        local = isinstance(self._storage, LocalStorage)
        path = self._path(info)
        index = self._cache.verified_index(path, info.sha256)
        if index is not None:
            self._total.add(StoreCounters(hits=1))
            return path, self._check_count(info, index)
        # Only one process of the node downloads or verifies a shard. The others wait here and find it done, which is
        # why the record is read again under the lock.
        with self._cache.lock(info.sha256):
            index = self._cache.verified_index(path, info.sha256)
            if index is None and (local or path.exists()):
                index = self._check_file(info, path, required=local)
            if index is None:
                index = self._fetch(info, path, download)
        return path, self._check_count(info, index)

    def _path(self, info: ShardInfo) -> Path:
        if isinstance(self._storage, LocalStorage):
            return self._storage.folder / info.path
        return self._cache.path(info.sha256)

    def _open(self, path: Path) -> int | None:
        if not isinstance(self._storage, LocalStorage):
            return open_shared(path)
        # Shards read in place are never evicted, so they need no lock; a shared file system may not have any.
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def _check_count(self, info: ShardInfo, index: ShardIndex) -> ShardIndex:
        if len(index.keys) != info.samples:
            cause = f"contains {len(index.keys)} samples, the manifest says {info.samples}"
            raise BadShard(self._storage.address(info.path), cause)
        return index

    def _check_file(self, info: ShardInfo, path: Path, required: bool) -> ShardIndex | None:
        """Verify an existing file. A bad one is an error if ``required``, otherwise it is deleted."""
        address = self._storage.address(info.path)
        try:
            size = path.stat().st_size
            sha256 = _hash_file(path) if size == info.bytes else ""
        except FileNotFoundError as error:
            raise BadShard(address, "is missing") from error
        except OSError as error:
            raise BadShard(address, f"cannot be read ({error.strerror})") from error
        if sha256 == info.sha256:
            return self._accept(info, path, path)
        if not required:
            self._cache.remove(info.sha256)
            return None
        raise BadShard(address, _mismatch(info, size, sha256))

    def _accept(self, info: ShardInfo, source: Path, path: Path) -> ShardIndex:
        """Build the index of a file with the right hash, move the file to ``path`` and record it as verified."""
        try:
            index = ShardIndex.from_tar(source, info.sha256)
        except ManifestError as error:
            raise BadShard(self._storage.address(info.path), one_line(error)) from error
        if source != path:
            os.replace(source, path)
        self._cache.mark_verified(path, index)
        return index

    def _prefetch_one(self, info: ShardInfo, cancel: threading.Event) -> None:
        # Without waiting for free space: a prefetch must not compete with the shards that are in use now.
        self._ensure(info, _Download(cancel, space_wait_s=0.0, priority=next(self._prefetched)))

    def _fetch(self, info: ShardInfo, path: Path, download: _Download) -> ShardIndex:
        cause = ""
        with (
            self._cache.reserve(info.sha256, info.bytes, download.space_wait_s) as part,
            _set_on_exit(download.cancel),
        ):
            # A transfer may be damaged by chance, by an unreliable network more than once.
            for attempt in range(_DOWNLOADS):
                if attempt:
                    self._total.add(StoreCounters(refetches=1))
                try:
                    sha256 = self._download(info, part, download)
                except _WrongSize as error:
                    cause = _mismatch(info, error.size, "")
                    continue
                if sha256 == info.sha256:
                    return self._accept(info, part, path)
                # Asked only now: the right bytes have the right size, and every request costs the store and time.
                cause = _mismatch(info, self._remote.size(info.path), sha256)
        raise BadShard(self._storage.address(info.path), f"{cause}; in each of {_DOWNLOADS} downloads")

    def _download(self, info: ShardInfo, part: Path, download: _Download) -> str:
        """Download into ``part`` by parallel range requests; returns the SHA-256 of the received bytes."""
        sha256 = hashlib.sha256()

        def read(start: int) -> bytes:
            return self._read_range(info, start, min(start + _RANGE_BYTES, info.bytes), download)

        try:
            # r+b: the file is already allocated at full size. Hashed while it arrives, to read it only once.
            with open(part, "r+b") as file:
                readers = min(_num_ranges(info), _CONNECTIONS)
                for data in ordered_map(read, range(0, info.bytes, _RANGE_BYTES), readers):
                    sha256.update(data)
                    file.write(data)
                    self._total.add(StoreCounters(downloaded_bytes=len(data)))
        except OSError as error:
            raise StoreError(f"{part}: cannot be written ({error.strerror})") from error
        self._total.add(StoreCounters(downloads=1))
        return sha256.hexdigest()

    def _connections_of_process(self) -> Connections:
        if self._connections.pid != os.getpid():
            self._connections = Connections(_CONNECTIONS)
        return self._connections

    def _read_range(self, info: ShardInfo, start: int, stop: int, download: _Download) -> bytes:
        connections = self._connections_of_process()

        def attempt() -> bytes:
            try:
                data = self._remote.read_range(
                    info.path, start, stop, download.cancel, lambda: connections.use(download.priority)
                )
            except FileNotFoundError as error:
                raise _WrongSize(None) from error
            if len(data) != stop - start:
                size = self._remote.size(info.path)
                if size != info.bytes:
                    raise _WrongSize(size)
                if len(data) > stop - start:
                    raise StoreError(
                        f"{self._storage.address(info.path)}: the server ignores range requests: copy the dataset to "
                        "a local folder, or to a server that supports them"
                    )
                raise TransientError(f"the response ended after {len(data)} of {stop - start} bytes")
            return data

        return call_with_retries(
            attempt, self.retry, self._storage.address(info.path), self._total.add_retry, download.cancel
        )

    @property
    def _remote(self) -> RemoteStorage:
        assert isinstance(self._storage, RemoteStorage)  # only remote shards are downloaded
        return self._storage


@contextmanager
def _set_on_exit(event: threading.Event) -> Iterator[None]:
    """Set ``event`` on exit: when one range request has failed, the retries of the others end as well."""
    try:
        yield
    finally:
        event.set()


def _num_ranges(info: ShardInfo) -> int:
    return -(-info.bytes // _RANGE_BYTES)


def _mismatch(info: ShardInfo, size: int | None, sha256: str) -> str:
    if size is None:
        return "is missing"
    if size != info.bytes:
        return f"has {size} bytes, the manifest says {info.bytes}"
    return f"has SHA-256 {sha256[:12]}…, the manifest says {info.sha256[:12]}…: damaged, or another shard"


def _hash_file(path: Path) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_HASH_BYTES):
            sha256.update(block)
    return sha256.hexdigest()
