"""Exceptions of reading and writing shards. Every message is one line: what is wrong, where, and what to do."""

from __future__ import annotations

from maestro_scale.errors import MaestroError


class ShardsError(MaestroError):
    """Base class: a dataset in shards cannot be written or read."""


class ManifestError(ShardsError):
    """A manifest or an index is missing, malformed or from a newer version, or lacks a requested split."""


class CodecError(ShardsError):
    """A buffer is not a valid sample, or one of its fields cannot be encoded or decoded."""


class WriteError(ShardsError):
    """Shards cannot be written to the given destination."""


class StoreError(ShardsError):
    """The object store, the network or the cache failed, and retries did not help."""


class BadShard(StoreError):
    """A shard differs from its manifest entry. ``path``: its address; ``cause``: what is wrong."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: bad shard: {cause}")
        self.path = path
        self.cause = cause

    def __reduce__(self) -> tuple[type[BadShard], tuple[str, str]]:
        # Exceptions pickle by ``args`` (the message), which does not fit __init__; loader workers raise this one.
        return BadShard, (self.path, self.cause)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
