"""The manifest: all that is known of a dataset in shards, in one JSON file that is published last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.datasets.spec_check import spec_problems
from maestro_scale.errors import dotted
from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.serialization import dump_json, from_builtins, to_builtins
from maestro_scale.shards.retry import RetryPolicy
from maestro_scale.shards.storage import open_storage

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
# A wrong address or a server that is down shows here: nobody should wait for minutes to be told.
CONNECT_RETRY = RetryPolicy(deadline_s=30.0, attempt_timeout_s=15.0)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of a dataset."""

    path: str  # relative to the dataset's root, with forward slashes
    split: str
    bytes: int
    samples: int
    sha256: str  # of the whole file, in lower-case hexadecimal


@dataclass(frozen=True)
class Manifest:
    """A dataset in shards: what it is and which files hold it."""

    format_version: int
    spec: DatasetSpec
    shards: tuple[ShardInfo, ...]
    notes: Mapping[str, int] = field(default_factory=dict)  # what was assumed, mended, left out → tiles
    codec: str = "raw"
    created_with: Mapping[str, str] = field(default_factory=dict)  # package → version
    seed: int = 0  # of the order the samples were written in
    examples: Mapping[str, str] = field(default_factory=dict)  # note → the first tile, or cause, it counts

    @classmethod
    def load(cls, url: str) -> Manifest:
        """The manifest of the dataset at ``url`` (a folder or fsspec URL); ManifestError says what is wrong."""
        storage = open_storage(url, CONNECT_RETRY)
        where = storage.address(MANIFEST)
        try:
            text = storage.read(MANIFEST)
        except FileNotFoundError as error:
            raise ManifestError(
                f"{where}: not found; write the dataset with `maestro-scale shard`, or check the path"
            ) from error
        except StoreError as error:
            raise ManifestError(str(error)) from error
        return cls.loads(text, where)

    @classmethod
    def loads(cls, text: str | bytes, where: str = MANIFEST) -> Manifest:
        """The manifest in ``text``; ``where`` names it in errors."""
        data = parse_versioned(text, where)
        try:
            manifest = from_builtins(cls, data)
            _check(manifest)
        except ManifestError as error:
            raise ManifestError(f"{where}: {error}") from error
        return manifest

    def dumps(self) -> str:
        """As JSON, one line per shard."""
        return dump_json(to_builtins(self), depth=2) + "\n"

    @property
    def digest(self) -> str:
        """SHA-256 of what the data is: spec and shards, whatever wrote them."""
        return self._digest(self.shards)

    def digest_of(self, splits: Sequence[str]) -> str:
        """As :attr:`digest`, of some splits: it stays when another split is added."""
        return self._digest(self.shards_of(splits))

    def _digest(self, shards: tuple[ShardInfo, ...]) -> str:
        content = {
            "format_version": self.format_version,
            "spec": to_builtins(self.spec),
            "shards": to_builtins(shards),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order they were written."""
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def shards_of(self, splits: Sequence[str]) -> tuple[ShardInfo, ...]:
        """The shards of ``splits``, split by split. ManifestError if there is no such split."""
        known = self.splits
        for split in splits:
            if split not in known:
                names = ", ".join(known) or "none"
                raise ManifestError(f"{self.spec.name} has no split {split!r} in shards; there are: {names}")
        if not splits:
            raise ManifestError(f"no split of {self.spec.name} was named; there are: {', '.join(known)}")
        return tuple(s for split in dict.fromkeys(splits) for s in self.shards if s.split == split)


def parse_versioned(text: str | bytes, where: str) -> dict:
    """A JSON object with a ``format_version`` that this code knows; ManifestError otherwise."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{where}: is not JSON ({error}); write it again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(f"{where}: has no format_version; this is no manifest of ours")
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"{where}: has format version {version}, this maestro-scale reads up to {FORMAT_VERSION}; "
            "upgrade it"
        )
    return data


def check_split_name(split: str) -> None:
    """ManifestError if ``split`` cannot be part of a file name."""
    if not _SPLIT.fullmatch(split):
        raise ManifestError(f"{split!r} is no split name; use letters, digits, '_' and '-'")


def check_spec(spec: DatasetSpec, where: str = "spec") -> None:
    """ManifestError, with the path of the first field that is wrong, where ``spec`` contradicts itself."""
    for path, reason in spec_problems(spec):
        raise ManifestError(f"{dotted((where, *path))}: {reason}")


def _check(manifest: Manifest) -> None:
    check_spec(manifest.spec)
    if manifest.codec not in CODECS:
        raise ManifestError(f"codec: {manifest.codec!r} is none of {', '.join(CODECS)}")
    seen: set[str] = set()
    for i, shard in enumerate(manifest.shards):
        where = f"shards[{i}]"
        path = PurePosixPath(shard.path)
        if not shard.path or path.is_absolute() or ".." in path.parts or str(path) != shard.path:
            raise ManifestError(f"{where}.path: {shard.path!r} is no path below the dataset's root")
        if shard.path in seen:
            raise ManifestError(f"{where}.path: {shard.path} is listed twice")
        seen.add(shard.path)
        check_split_name(shard.split)
        if not _SHA256.fullmatch(shard.sha256):
            raise ManifestError(f"{where}.sha256: {shard.sha256!r} is not 64 lower-case hexadecimal digits")
        if shard.bytes < 1 or shard.samples < 1:
            raise ManifestError(
                f"{where}: {shard.bytes} bytes, {shard.samples} samples; list no empty shards"
            )
