"""What can go wrong with shards. Every message is one line: what, where, what to do."""

from __future__ import annotations

from maestro_scale.errors import MaestroError


class ShardsError(MaestroError):
    """A dataset in shards cannot be written or read."""


class ManifestError(ShardsError):
    """A manifest or an index is missing, malformed, from a newer version, or does not hold what was asked."""


class CodecError(ShardsError):
    """A buffer is not a sample, or a field of it cannot be encoded or decoded."""


class WriteError(ShardsError):
    """Shards cannot be written where they were asked for."""


class StoreError(ShardsError):
    """The object store, the network or the cache failed for good."""


class BadShard(StoreError):
    """A shard is not what the manifest says. ``path``: its address; ``cause``: what is wrong, in words."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{path}: bad shard: {cause}")
        self.path = path
        self.cause = cause

    def __reduce__(self) -> tuple:
        return BadShard, (self.path, self.cause)


def one_line(error: BaseException) -> str:
    """The message of an error on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
