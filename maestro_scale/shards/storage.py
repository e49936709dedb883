"""Storage backends with one interface: a local folder, or a prefix of an object store accessed through fsspec.

Both guarantee that readers see a file complete or not at all: locally by writing to a temporary name and renaming,
in an object store because a PUT or a completed multipart upload is atomic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from maestro_scale.remote.failures import http_status
from maestro_scale.remote.reader import RemoteReader, credentials_in, local_folder
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.errors import StoreError, WriteError, one_line
from maestro_scale.shards.local_storage import ConditionFailed, LocalStorage, Snapshot

_UPLOAD_PART_BYTES = 16 * 1024 * 1024


@dataclass
class _Conditions:
    """What was found out about the conditional writes of a store."""

    work: bool | None = None  # None: not tried yet
    quoted_tags: bool = True


class RemoteStorage(RemoteReader):
    """A prefix in an object store."""

    def __init__(self, url: str, retry: RetryPolicy, on_retry: Callable[[], None]) -> None:
        super().__init__(url, retry, on_retry)
        self._conditions = _Conditions()

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
