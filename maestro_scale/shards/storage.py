"""Storage backends with one interface: a local folder, or a prefix of an object store accessed through fsspec.

Both guarantee that readers see a file complete or not at all: locally by writing to a temporary name and renaming,
in an object store because a PUT or a completed multipart upload is atomic.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from maestro_scale.secrets_filter import has_credentials, scrub
from maestro_scale.shards.errors import StoreError, WriteError, one_line
from maestro_scale.shards.failures import advice, http_status, is_permanent, network_errors
from maestro_scale.shards.local_storage import ConditionFailed, LocalStorage, Snapshot, check_limit
from maestro_scale.shards.retry import RetryPolicy, TransientError, call_with_retries

_S3 = ("s3://", "s3a://")
_UPLOAD_PART_BYTES = 16 * 1024 * 1024
_CONFLICT = (409, 412)  # S3: a concurrent request to the same object; the condition does not hold


@dataclass
class _Conditions:
    """What was found out about the conditional writes of a store."""

    work: bool | None = None  # None: not tried yet
    quoted_tags: bool = True


class RemoteStorage:
    """A prefix in an object store.

    It can be pickled. Each process creates its own client, since the event loop thread of s3fs does not survive a fork.
    ``on_retry`` is called for each retried request.
    """

    def __init__(self, url: str, retry: RetryPolicy, on_retry: Callable[[], None]) -> None:
        self.url = url.rstrip("/")
        self.retry = retry
        self._on_retry = on_retry
        self._lock = threading.Lock()
        self._clients: dict[int, tuple[Any, str]] = {}
        self._conditions = _Conditions()

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, RetryPolicy, Callable[[], None]]]:
        # Locks and clients do not pickle; the copy creates its own.
        return RemoteStorage, (self.url, self.retry, self._on_retry)

    def address(self, name: str = "") -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Content of a small object. FileNotFoundError if it is missing, StoreError if it cannot be read.

        ``limit``: most bytes; StoreError for a larger object, of which no more than that is transferred.
        """
        if limit is None:
            return self._call(name, "_cat_file", "cat_file", self._path(name))
        return check_limit(self.read_range(name, 0, limit + 1), limit, self.address(name))

    @property
    def conditional(self) -> bool:
        """Whether the store is known to write an object only if a condition holds (If-None-Match, If-Match).

        The first :meth:`write_snapshot` finds it out.
        """
        return self._conditions.work is True

    def with_retry(self, retry: RetryPolicy) -> RemoteStorage:
        """The same storage with another retry policy."""
        other = RemoteStorage(self.url, retry, self._on_retry)
        other._conditions = self._conditions
        return other

    def read_snapshot(self, name: str) -> Snapshot:
        """Content of a small object, with its ETag and age if the store reports them. Raises as :meth:`read`."""
        if not self._is_s3:
            return Snapshot(self.read(name))
        path = self._path(name)

        async def get(fs: Any) -> Snapshot:
            bucket, key, _ = fs.split_path(path)
            response = await fs._call_s3("get_object", Bucket=bucket, Key=key)
            data = await response["Body"].read()
            date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
            age_s = None
            if date is not None:
                with suppress(ValueError):  # not a date
                    age_s = (parsedate_to_datetime(date) - response["LastModified"]).total_seconds()
            return Snapshot(data, response.get("ETag"), age_s)

        return self._attempts(name, lambda fs: self._run(fs, get(fs)))

    def write_snapshot(self, name: str, data: bytes, previous: Snapshot | None) -> str | None:
        """Write a small object on condition that it is still ``previous``, or does not exist if that is None.

        Returns the new ETag. ConditionFailed if the condition does not hold, which is only checked by a store that is
        :attr:`conditional`; others write in any case. After a lost response the repeated request may find its own
        result: the caller then reads the object.
        """
        if self._conditions.work is None and self._is_s3:
            return self._write_first_snapshot(name, data, previous)
        if not self.conditional:
            self.write(name, data)
            return None
        return self._put_if(name, data, previous)

    def _put_if(self, name: str, data: bytes, previous: Snapshot | None) -> str:
        if previous is None:
            return self._put(name, data, IfNoneMatch="*")
        assert previous.tag is not None  # every object of S3 has an ETag
        try:
            return self._put(name, data, IfMatch=self._tag(previous.tag))
        except ConditionFailed:
            if self._conditions.work is not None:
                raise
        return self._put(name, data, IfMatch=previous.tag.strip('"'))

    def _tag(self, tag: str) -> str:
        return tag if self._conditions.quoted_tags else tag.strip('"')

    def _put(self, name: str, data: bytes, **condition: str) -> str:
        path = self._path(name)

        async def put(fs: Any) -> str:
            # Not by fs.pipe_file: its mode="create" covers If-None-Match alone.
            bucket, key, _ = fs.split_path(path)
            response = await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
            return response["ETag"]

        try:
            return self._attempts(name, lambda fs: self._run(fs, put(fs)), conflicts=True)
        except FileNotFoundError as error:
            if "IfMatch" in condition:  # S3's response if there is no such object
                raise ConditionFailed(self.address(name)) from error
            raise self._no_bucket(name) from error
        except StoreError as error:
            raise WriteError(f"cannot write {one_line(error)}") from error

    def _write_first_snapshot(self, name: str, data: bytes, previous: Snapshot | None) -> str | None:
        """As :meth:`write_snapshot`, and find out whether the store has conditional writes, with the same object."""
        try:
            tag = self._put_if(name, data, previous)
        except WriteError as error:
            if http_status(error) not in (400, 501):
                raise
            self.write(name, data)
            self._conditions.work = False
            return None
        checked = self._check_conditions(name, data, tag)
        self._conditions.work = checked is not None
        return checked

    def _check_conditions(self, name: str, data: bytes, tag: str) -> str | None:
        """Whether conditions are observed: the new ETag of the object, which contains ``data``; None if they are not.

        Some stores ignore a condition, as does a botocore that does not know the argument. And some (Ceph's gateway)
        compare If-Match with the ETag without its quotes.
        """
        wrong = '"' + "0" * 32 + '"'
        # Twice: a writer that takes the lease for expired may have removed the object in between.
        if not any(self._refuses(name, data, IfNoneMatch="*") for _ in range(2)):
            return None
        if not self._refuses(name, data, IfMatch=wrong):
            return None
        for quoted in (True, False):
            self._conditions.quoted_tags = quoted
            with suppress(ConditionFailed):
                return self._put(name, data, IfMatch=self._tag(tag))
        try:
            unchanged = self.read_snapshot(name).tag == tag
        except FileNotFoundError:
            unchanged = False
        if not unchanged:  # nothing was found out: another writer was faster
            raise ConditionFailed(self.address(name))
        return None

    def _refuses(self, name: str, data: bytes, **condition: str) -> bool:
        try:
            self._put(name, data, **condition)
        except ConditionFailed:
            return True
        return False

    def read_range(self, name: str, start: int, stop: int, cancel: threading.Event | None = None) -> bytes:
        """Bytes [start, stop); shorter if the object ends before ``stop``. Raises as :meth:`read`.

        Setting ``cancel`` ends retries early.
        """
        return self._call(name, "_cat_file", "cat_file", self._path(name), cancel, start=start, end=stop)

    def size(self, name: str) -> int | None:
        """Size in bytes; None if there is no such object."""
        try:
            return self._call(name, "_info", "info", self._path(name), **self._uncached)["size"]
        except FileNotFoundError:
            return None

    def list_names(self) -> list[str]:
        """Sorted names of the objects and prefixes directly below the prefix; empty if there are none."""
        path = self._path("").rstrip("/")
        try:
            entries = self._call("", "_ls", "ls", path, detail=False, **self._uncached)
        except FileNotFoundError:
            return []
        return sorted(
            n for n in (e.rstrip("/").rsplit("/", 1)[-1] for e in entries if e.rstrip("/") != path) if n
        )

    def publish(self, source: Path, name: str) -> None:
        """Upload a local file, in parts if it is large, and delete it. The object appears complete or not at all."""
        # The client holds up to ten parts in memory: 160 MiB with these, 500 MiB with its default of 50 MiB.
        options = {"chunksize": _UPLOAD_PART_BYTES} if self._is_s3 else {}
        self._write(name, "put_file", str(source), self._path(name), **options)
        source.unlink()

    def write(self, name: str, data: bytes) -> None:
        """Upload a small object."""
        self._write(name, "pipe_file", self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove an object if it is there."""
        if self.size(name) is not None:
            self._write(name, "rm_file", self._path(name))

    def _write(self, name: str, method: str, *args: Any, **options: Any) -> None:
        try:
            # No timeout per attempt: uploading a shard over a slow network takes long. The client's connect and read
            # timeouts still end an attempt that makes no progress.
            self._attempts(name, lambda fs: getattr(fs, method)(*args, **options))
        except FileNotFoundError as error:
            raise self._no_bucket(name) from error
        except StoreError as error:
            raise WriteError(f"cannot write {one_line(error)}") from error

    def _no_bucket(self, name: str) -> WriteError:
        return WriteError(f"{self.address(name)}: cannot be written: no such bucket; create it first")

    @property
    def _uncached(self) -> dict[str, bool]:
        # fsspec's client for HTTP caches nothing, and passes other arguments on to the request.
        return {} if self.url.startswith(("http://", "https://")) else {"refresh": True}

    @property
    def _is_s3(self) -> bool:
        return self.url.startswith(_S3)

    def _call(
        self,
        name: str,
        coroutine: str,
        method: str,
        path: str,
        cancel: threading.Event | None = None,
        **options: Any,
    ) -> Any:
        def attempt(fs: Any) -> Any:
            # fsspec's synchronous methods have no timeout, so async file systems are called by their coroutine.
            if not fs.async_impl:
                return getattr(fs, method)(path, **options)
            return self._run(fs, getattr(fs, coroutine)(path, **options))

        return self._attempts(name, attempt, cancel)

    def _run(self, fs: Any, coroutine: Awaitable[Any]) -> Any:
        limited = asyncio.wait_for(coroutine, self.retry.attempt_timeout_s)
        return asyncio.run_coroutine_threadsafe(limited, fs.loop).result()

    def _attempts(
        self,
        name: str,
        action: Callable[[Any], Any],
        cancel: threading.Event | None = None,
        conflicts: bool = False,
    ) -> Any:
        """``action(client)``, repeated while it fails transiently; with ``conflicts``, HTTP 409 and 412 are
        ConditionFailed."""
        where = self.address(name)

        def attempt() -> Any:
            fs, _ = self._client()
            try:
                return action(fs)
            except FileNotFoundError as error:
                raise FileNotFoundError(where) from error
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise TransientError(f"no answer within {self.retry.attempt_timeout_s:.3g} s") from error
            except network_errors() as error:
                if conflicts and http_status(error) in _CONFLICT:
                    raise ConditionFailed(where) from error
                if is_permanent(error):
                    raise StoreError(f"{where}: refused ({one_line(error)}); {advice(error)}") from error
                raise TransientError(one_line(error)) from error

        return call_with_retries(attempt, self.retry, where, self._on_retry, cancel)

    def _path(self, name: str) -> str:
        return f"{self._client()[1]}/{name}"

    def _client(self) -> tuple[Any, str]:
        """This process's fsspec file system, and the path of the prefix in it."""
        with self._lock:
            if os.getpid() not in self._clients:
                self._clients[os.getpid()] = _connect(self.url, self.retry)
            # After a fork the parent's client stays referenced: closing it in the child would wait for its event loop
            # thread, which the child does not have.
            return self._clients[os.getpid()]


Storage = LocalStorage | RemoteStorage


def open_storage(
    url: str | os.PathLike, retry: RetryPolicy | None = None, on_retry: Callable[[], None] | None = None
) -> Storage:
    """The storage at ``url``; nothing is read yet. StoreError if the URL contains credentials."""
    folder = local_folder(url)
    if folder is not None:
        return LocalStorage(folder)
    if problem := credentials_in(os.fspath(url)):
        raise StoreError(problem)
    return RemoteStorage(os.fspath(url), retry or RetryPolicy(), on_retry or _ignore)


def credentials_in(url: str) -> str | None:
    """The error message for an s3:// URL that contains a user name or a password; None for any other URL."""
    if not url.startswith(_S3) or not has_credentials(url):
        return None
    return (
        f"{scrub(url)}: an s3:// address cannot carry credentials: remove them, and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use ~/.aws"
    )


def local_folder(url: str | os.PathLike) -> Path | None:
    """The folder that ``url`` names; None if it is a URL of another scheme. StoreError for a URL with one slash."""
    text = os.fspath(url)
    if text.startswith(("s3:/", "s3a:/", "gs:/", "file:/")) and "://" not in text:  # e.g. of a pathlib.Path
        raise StoreError(f"{text}: is not a URL, and would be a folder; write {text.replace(':/', '://', 1)}")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    return None if "://" in text else Path(text).expanduser()


def client_module(url: str | os.PathLike) -> str | None:
    """Name of the fsspec module that reads from ``url``; None for a folder.

    Importing it can take a second, so the loader imports it once for all workers.
    """
    if local_folder(url) is not None:
        return None
    from fsspec.registry import known_implementations

    known = known_implementations.get(os.fspath(url).split("://", 1)[0])
    return known["class"].rpartition(".")[0] if known else None


def _ignore() -> None:
    """Default ``on_retry``; a module-level function, because a lambda cannot be pickled."""


def _connect(url: str, retry: RetryPolicy) -> tuple[Any, str]:
    import fsspec

    is_s3 = url.startswith(_S3)
    options = _s3_options(retry) if is_s3 else {}
    try:
        fs = fsspec.filesystem(url.split("://", 1)[0], **options)
        path = fs._strip_protocol(url)
        if is_s3:
            # Retries are done by call_with_retries: s3fs neither counts its retries nor stops at a deadline.
            fs.retries = 1
            # Connect now, in one thread: otherwise the parallel range readers each create a session.
            fs.connect()
    except network_errors(ImportError, ValueError) as error:
        raise StoreError(f"{url}: cannot be opened ({one_line(error)})") from error
    return fs, path


def _s3_options(retry: RetryPolicy) -> dict[str, Any]:
    from botocore.config import Config

    config: dict[str, Any] = {
        "connect_timeout": min(10.0, retry.attempt_timeout_s),
        "read_timeout": retry.attempt_timeout_s,
        "retries": {"total_max_attempts": 1},
    }
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        # Shards have their own SHA-256. Not every S3-compatible store supports AWS's newer checksums, and older
        # botocore does not know the options.
        if name in Config.OPTION_DEFAULTS:
            config[name] = "when_required"
    # fsspec reuses a client with equal options within a process. The endpoint is passed explicitly so that a change of
    # the environment variable gives a new client. The listings cache is off: other jobs write to the same prefix.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return {"config_kwargs": config, "use_listings_cache": False, "endpoint_url": endpoint}
