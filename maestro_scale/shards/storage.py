"""Storage backends with one interface: a local folder, or a prefix of an object store accessed through fsspec.

Both guarantee that readers see a file complete or not at all: locally by writing to a temporary name and renaming,
in an object store because a PUT or a completed multipart upload is atomic.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maestro_scale.secrets_filter import has_credentials, scrub
from maestro_scale.shards.errors import StoreError, WriteError, one_line
from maestro_scale.shards.retry import RetryPolicy, TransientError, call_with_retries

_S3 = ("s3://", "s3a://")
_UPLOAD_PART_BYTES = 16 * 1024 * 1024


class LocalStorage:
    """A local or shared folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def address(self, name: str = "") -> str:
        """The full path of a file, for messages."""
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        """Content of a small file. FileNotFoundError if it is missing, StoreError if it cannot be read."""
        try:
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(self.address(name)) from error
        except OSError as error:
            raise StoreError(f"{self.address(name)}: cannot be read ({error.strerror})") from error

    def size(self, name: str) -> int | None:
        """Size in bytes; None if there is no such file."""
        try:
            return (self.folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"{self.address(name)}: cannot be read ({error.strerror})") from error

    def list_names(self) -> list[str]:
        """Sorted names of the files and folders directly inside; empty if the folder is missing."""
        try:
            return sorted(os.listdir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.address()}: cannot be listed ({error.strerror})") from error

    def publish(self, source: Path, name: str) -> None:
        """Move a complete file of the same file system to ``name``, atomically and durably."""
        try:
            # In this order: the data first, or a power cut after the rename could leave the final name on an empty
            # file; then the rename, which is atomic; then the folder, whose entry is only durable after its own fsync.
            fsync(source)
            os.replace(source, self.folder / name)
            fsync(self.folder)
        except OSError as error:
            raise WriteError(f"{self.address(name)}: cannot be written ({error.strerror})") from error

    def write(self, name: str, data: bytes) -> None:
        """Write a small file atomically."""
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(data)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(f"{self.address(name)}: cannot be written ({error.strerror})") from error
        self.publish(temporary, name)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        (self.folder / name).unlink(missing_ok=True)


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

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str, RetryPolicy, Callable[[], None]]]:
        # Locks and clients do not pickle; the copy creates its own.
        return RemoteStorage, (self.url, self.retry, self._on_retry)

    def address(self, name: str = "") -> str:
        """The URL of an object, for messages."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str) -> bytes:
        """Content of a small object. FileNotFoundError if it is missing, StoreError if it cannot be read."""
        return self._call(name, "_cat_file", "cat_file", self._path(name))

    def read_range(self, name: str, start: int, stop: int, cancel: threading.Event | None = None) -> bytes:
        """Bytes [start, stop); shorter if the object ends before ``stop``. Raises as :meth:`read`.

        Setting ``cancel`` ends retries early.
        """
        return self._call(name, "_cat_file", "cat_file", self._path(name), cancel, start=start, end=stop)

    def size(self, name: str) -> int | None:
        """Size in bytes; None if there is no such object."""
        try:
            return self._call(name, "_info", "info", self._path(name), refresh=True)["size"]
        except FileNotFoundError:
            return None

    def list_names(self) -> list[str]:
        """Sorted names of the objects and prefixes directly below the prefix; empty if there are none."""
        path = self._path("").rstrip("/")
        try:
            entries = self._call("", "_ls", "ls", path, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(
            n for n in (e.rstrip("/").rsplit("/", 1)[-1] for e in entries if e.rstrip("/") != path) if n
        )

    def publish(self, source: Path, name: str) -> None:
        """Upload a local file, in parts if it is large, and delete it. The object appears complete or not at all."""
        # The client holds up to ten parts in memory: 160 MiB with these, 500 MiB with its default of 50 MiB.
        options = {"chunksize": _UPLOAD_PART_BYTES} if self.url.startswith(_S3) else {}
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
            raise WriteError(
                f"{self.address(name)}: cannot be written: no such bucket; create it first"
            ) from error
        except StoreError as error:
            raise WriteError(f"cannot write {one_line(error)}") from error

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
            limited = asyncio.wait_for(getattr(fs, coroutine)(path, **options), self.retry.attempt_timeout_s)
            return asyncio.run_coroutine_threadsafe(limited, fs.loop).result()

        return self._attempts(name, attempt, cancel)

    def _attempts(
        self, name: str, action: Callable[[Any], Any], cancel: threading.Event | None = None
    ) -> Any:
        where = self.address(name)

        def attempt() -> Any:
            fs, _ = self._client()
            try:
                return action(fs)
            except FileNotFoundError as error:
                raise FileNotFoundError(where) from error
            except (asyncio.TimeoutError, TimeoutError) as error:
                raise TransientError(f"no answer within {self.retry.attempt_timeout_s:.0f} s") from error
            except _network_errors() as error:
                if _is_permanent(error):
                    raise StoreError(
                        f"{where}: refused ({one_line(error)}); check credentials and address"
                    ) from error
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
    """The folder that ``url`` names; None if it is a URL of another scheme."""
    text = os.fspath(url)
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
    except _network_errors(ImportError, ValueError) as error:
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


def _network_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """What a client raises, and ``others``. A function, so that the clients are only imported when one has failed."""
    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, EOFError, BotoCoreError, ClientError, aiohttp.ClientError, *others)


def _is_permanent(error: BaseException) -> bool:
    """Whether a retry would fail as well: no or wrong credentials, forbidden, malformed request.

    HTTP 408 and 429 and all 5xx are transient; 3xx is permanent, since it means a wrong region or endpoint.
    """
    from botocore.exceptions import (
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    if isinstance(
        error,
        (PermissionError, NoCredentialsError, ParamValidationError, PartialCredentialsError, ProfileNotFound),
    ):
        return True
    # s3fs translates client errors to OSError and keeps the original as the cause.
    response_error = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(response_error, ClientError):
        status = response_error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return 300 <= status < 500 and status not in (408, 429)
    return False


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
