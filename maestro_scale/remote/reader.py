"""Files of an object store or a web server, read through fsspec."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from maestro_scale.remote.errors import ConditionFailed, StoreError, check_limit, one_line
from maestro_scale.remote.failures import advice, http_status, is_permanent, network_errors, no_answer_errors
from maestro_scale.remote.retry import RetryPolicy, TransientError, call_with_retries
from maestro_scale.remote.s3_client import S3Client
from maestro_scale.secrets_filter import has_credentials, scrub

_S3 = ("s3://", "s3a://")
_BEHIND_THE_END = 416  # the object ends before the range begins
_CONFLICT = (409, 412)  # S3: a concurrent request to the same object; the condition does not hold


class RemoteReader:
    """The objects below a prefix of an object store.

    It can be pickled. Each process creates its own client, since the event loop thread of s3fs does not survive a fork.
    ``on_retry`` is called for each retried request.
    """

    def __init__(self, url: str, retry: RetryPolicy, on_retry: Callable[[], None]) -> None:
        self.url = url.rstrip("/")
        self.retry = retry
        self._on_retry = on_retry
        self._lock = threading.Lock()
        self._clients: dict[int, tuple[Any, str]] = {}
        self._s3_clients: dict[int, S3Client] = {}

    def __reduce__(self) -> tuple[type[RemoteReader], tuple[str, RetryPolicy, Callable[[], None]]]:
        # Locks and clients do not pickle; the copy creates its own.
        return type(self), (self.url, self.retry, self._on_retry)

    def address(self, name: str = "") -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Content of a small object. FileNotFoundError if it is missing, StoreError if it cannot be read.

        ``limit``: most bytes; StoreError for a larger object, of which no more than that is transferred.
        """
        if limit is None:
            return self._read(name, None, None, None)
        return check_limit(self.read_range(name, 0, limit + 1), limit, self.address(name))

    def read_range(
        self,
        name: str,
        start: int,
        stop: int,
        cancel: threading.Event | None = None,
        connection: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> bytes:
        """Bytes [start, stop); fewer, or none, if the object ends before ``stop``. Raises as :meth:`read`.

        Setting ``cancel`` ends retries early. Each attempt, but not the wait between two, is made within
        ``connection()``.
        """
        try:
            return self._read(name, start, stop, cancel, connection)
        except StoreError as error:
            if http_status(error) == _BEHIND_THE_END:
                return b""
            raise

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

    def list_entries(self) -> list[tuple[str, bool]]:
        """Name, and whether it is a prefix, of what is directly below the prefix; empty if there is nothing."""
        path = self._path("").rstrip("/")
        try:
            entries = self._call("", "_ls", "ls", path, detail=True, **self._uncached)
        except FileNotFoundError:
            return []
        found = [(e["name"].rstrip("/"), e["type"] == "directory") for e in entries]
        return sorted((name.rsplit("/", 1)[-1], is_prefix) for name, is_prefix in found if name != path)

    @property
    def _uncached(self) -> dict[str, Any]:
        # fsspec's client for HTTP caches nothing, and passes other arguments on to the request.
        return {} if self.url.startswith(("http://", "https://")) else {"refresh": True}

    @property
    def _is_s3(self) -> bool:
        return self.url.startswith(_S3)

    def _read(
        self,
        name: str,
        start: int | None,
        stop: int | None,
        cancel: threading.Event | None,
        connection: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> bytes:
        path = self._path(name)
        timeout_s = self.retry.attempt_timeout_s

        def attempt(fs: Any) -> bytes:
            with connection():
                if self._is_s3:
                    return self._s3_client(fs).read(path, start, stop, timeout_s)
                return self._request(fs, "_cat_file", "cat_file", path, start=start, end=stop)

        return self._attempts(name, attempt, cancel)

    def _s3_client(self, fs: Any) -> S3Client:
        with self._lock:
            pid = os.getpid()
            if pid not in self._s3_clients:
                self._s3_clients[pid] = S3Client(fs)
            return self._s3_clients[pid]

    def _call(self, name: str, coroutine: str, method: str, path: str, **options: Any) -> Any:
        return self._attempts(name, lambda fs: self._request(fs, coroutine, method, path, **options))

    def _request(self, fs: Any, coroutine: str, method: str, path: str, **options: Any) -> Any:
        # fsspec's synchronous methods have no timeout, so async file systems are called by their coroutine.
        if not fs.async_impl:
            return getattr(fs, method)(path, **options)
        return self._run(fs, getattr(fs, coroutine)(path, **options))

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
            except no_answer_errors() as error:
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
        raise StoreError(
            f"{url}: cannot be opened ({one_line(error)}); give a folder, or an address such as s3://bucket/name"
        ) from error
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
