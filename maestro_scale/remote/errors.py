"""Errors of stored data. Every message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

from maestro_scale.errors import MaestroError


class StorageError(MaestroError):
    """Base class: stored data cannot be read or written."""


class StoreError(StorageError):
    """The object store, the network or the cache failed, and retries did not help."""


class ConditionFailed(Exception):
    """A file was not written: it exists, or has changed, contrary to the condition of the write."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def check_limit(data: bytes, limit: int, where: str) -> bytes:
    """``data``, of which up to ``limit`` + 1 bytes were read. StoreError if it is larger than ``limit``."""
    if len(data) > limit:
        raise StoreError(f"{where}: is larger than {limit / 2**20:.3g} MiB, which no such file needs")
    return data
