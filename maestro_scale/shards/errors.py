"""Exceptions of reading and writing shards. Every message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

from maestro_scale.remote.errors import ConditionFailed, StorageError, StoreError, one_line

__all__ = [
    "BadShard",
    "CodecError",
    "ConditionFailed",
    "ManifestError",
    "ShardsError",
    "StoreError",
    "WriteError",
    "one_line",
]

ShardsError = StorageError
"""Base class: a dataset in shards cannot be written or read."""


class ManifestError(ShardsError):
    """A manifest or an index is missing, malformed or from a newer version, or lacks a requested split."""


class CodecError(ShardsError):
    """A buffer is not a valid sample, or one of its fields cannot be encoded or decoded."""


class WriteError(ShardsError):
    """Shards cannot be written to the given destination."""


class BadShard(StoreError):
    """A shard differs from its manifest entry. ``path``: its address; ``cause``: what is wrong."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: bad shard: {cause}")
        self.path = path
        self.cause = cause

    def __reduce__(self) -> tuple[type[BadShard], tuple[str, str]]:
        # Exceptions pickle by ``args`` (the message), which does not fit __init__; loader workers raise this one.
        return BadShard, (self.path, self.cause)
