"""Sidecar index of a shard: key, offset and size of each sample, and what the writer recorded about the shard.

The index lets a reader fetch one sample by a range request, and gives :mod:`..read.summary` its counts, without
downloading the tar. Training does not depend on it: the store builds its own index from the tar that it has verified,
so a dataset written by other tools works without one.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from maestro_scale import untrusted
from maestro_scale.datasets.spec import OMIT_DEFAULT
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.manifest import FORMAT_VERSION, ShardInfo, parse_versioned
from maestro_scale.shards.format.serialization import dump_json, from_builtins, to_builtins
from maestro_scale.shards.format.tar import member_key, scan
from maestro_scale.shards.storage import Storage


@dataclass(frozen=True)
class ShardIndex:
    """Content of ``<split>-000000.index.json``; the attributes are the JSON keys.

    The first six describe the tar; the others are added by the writer.
    """

    format_version: int
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    offsets: tuple[int, ...]  # of the payloads, from the start of the tar
    sizes: tuple[int, ...]
    dataset: str = ""
    plan: str = ""  # digest of everything that determines the split's bytes (Destination.make_plan)
    notes: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)  # key → why the tile could not be read
    tally: Mapping[str, int] = field(default_factory=dict)  # counts of classes and dates, see .statistics
    examples: Mapping[str, str] = field(default_factory=dict)  # note → first tile or cause counted by it
    absent: tuple[str, ...] = field(default=(), metadata=OMIT_DEFAULT)  # modalities that all its tiles lack

    @classmethod
    def loads(cls, text: str | builtins.bytes, where: str) -> ShardIndex:
        """Parse an index. ManifestError, naming ``where``, if it is invalid."""
        data = parse_versioned(text, where)
        try:
            index = from_builtins(cls, data)
            index._check()
        except ManifestError as error:
            raise ManifestError(f"{where}: {error}") from error
        return index

    @classmethod
    def read(cls, storage: Storage, name: str) -> ShardIndex:
        """Read and parse an index. FileNotFoundError if there is none; StoreError; ManifestError if it is invalid."""
        return cls.loads(storage.read(name, untrusted.MANIFEST.bytes), storage.address(name))

    @classmethod
    def from_tar(cls, path: Path, sha256: str) -> ShardIndex:
        """Build the index from the headers of a tar. ManifestError if a member is not named ``<key>.safetensors``."""
        members = scan(path)
        keys = tuple(member_key(name) for name, _, _ in members)
        offsets, sizes = tuple(m[1] for m in members), tuple(m[2] for m in members)
        return cls(FORMAT_VERSION, path.stat().st_size, sha256, keys, offsets, sizes)

    def dumps(self) -> str:
        """As JSON, one entry per line."""
        return dump_json(to_builtins(self), depth=1) + "\n"

    def shard_info(self, path: str, split: str) -> ShardInfo:
        """The manifest entry of this shard."""
        return ShardInfo(path, split, self.bytes, len(self.keys), self.sha256, self.absent)

    def describes(self, info: ShardInfo) -> bool:
        """Whether it is the index of this file. What the tiles lack is known to an index of the writer only."""
        return (self.bytes, self.sha256, len(self.keys)) == (info.bytes, info.sha256, info.samples)

    def same_layout(self, other: ShardIndex) -> bool:
        """Whether both describe the same samples at the same offsets of the same file."""
        return (
            (self.bytes, self.sha256) == (other.bytes, other.sha256)
            and self.keys == other.keys
            and self.offsets == other.offsets
            and self.sizes == other.sizes
        )

    def _check(self) -> None:
        if not len(self.keys) == len(self.offsets) == len(self.sizes):
            counts = f"{len(self.keys)} keys, {len(self.offsets)} offsets, {len(self.sizes)} sizes"
            raise ManifestError(f"lists differ in length ({counts})")
        for key, offset, size in zip(self.keys, self.offsets, self.sizes, strict=True):
            if offset < 0 or size < 0 or offset + size > self.bytes:
                raise ManifestError(f"sample {key} ends at byte {offset + size} of {self.bytes}")
        for name, numbers in (("notes", self.notes), ("tally", self.tally)):
            if min(numbers.values(), default=0) < 0:
                raise ManifestError(f"{name}: contains a negative number")


def index_path(shard_path: str) -> str:
    """Path of the index that belongs to a shard's path."""
    return f"{shard_path.removesuffix('.tar')}.index.json"
