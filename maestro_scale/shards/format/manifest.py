"""The manifest: a JSON file that describes a dataset in shards completely and is published last.

A shard counts only once the manifest lists it. So an interrupted write leaves unlisted files, which the next run keeps
or replaces, but never a dataset that looks complete and is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from maestro_scale import untrusted
from maestro_scale.datasets.spec import OMIT_DEFAULT, DatasetSpec
from maestro_scale.datasets.spec_check import spec_problems
from maestro_scale.errors import dotted, shorten
from maestro_scale.remote.retry import RetryPolicy
from maestro_scale.shards.errors import ManifestError, StoreError
from maestro_scale.shards.format.checksum import MANIFEST, read_manifest_bytes, sha256_hex
from maestro_scale.shards.format.compress import CODECS
from maestro_scale.shards.format.serialization import dump_json, from_builtins, to_builtins
from maestro_scale.shards.format.shard_table import ShardInfo, ShardTable
from maestro_scale.shards.storage import open_storage
from maestro_scale.untrusted.limits import TAR_MEMBERS

FORMAT_VERSION = 1
_DATA_VARIABLE = "MAESTRO_DATA"  # of the recipes that come with the package
# Reading the manifest is the first access to a dataset, so a wrong address or an unreachable server should fail within
# seconds, not after the minutes that a running job may wait.
CONNECT_RETRY = RetryPolicy(deadline_s=30.0, attempt_timeout_s=15.0)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT = re.compile(r"[A-Za-z0-9_-]{1,100}")
_MAX_SHARD_BYTES = 2**40
_MAX_PATH = 1000  # characters; object stores allow 1024 bytes
_PLAIN_PATH = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9_.-]{{0,{_MAX_PATH - 1}}}")
_MAX_LISTED_SPLITS = 30  # in messages


@dataclass(frozen=True)
class Manifest:
    """A dataset in shards: its spec and the files that contain it. The attributes are the JSON keys.

    ``shards``: a table where the manifest was mapped (``read.manifest_cache``).
    """

    format_version: int
    spec: DatasetSpec
    shards: tuple[ShardInfo, ...] | ShardTable
    notes: Mapping[str, int] = field(
        default_factory=dict
    )  # what was assumed, corrected or left out → number of tiles
    codec: str = "raw"
    created_with: Mapping[str, str] = field(default_factory=dict)  # package → version
    seed: int = 0  # of the order in which the samples were written
    examples: Mapping[str, str] = field(default_factory=dict)  # note → first tile or cause counted by it
    # Whether the tiles are synthetic scenes; None: unknown, as in manifests of earlier revisions.
    synthetic: bool | None = field(default=None, metadata=OMIT_DEFAULT)

    @classmethod
    def load(cls, url: str) -> Manifest:
        """Read the manifest of the dataset at ``url`` (folder or fsspec URL).

        ManifestError if there is none, or it is not the one that ``manifest.sha256`` beside it names.
        """
        data, where = read_manifest(url)
        return cls.loads(data, where)

    @classmethod
    def loads(cls, text: str | bytes, where: str = MANIFEST) -> Manifest:
        """Parse a manifest; ``where`` names it in error messages."""
        data = parse_versioned(text, where)
        try:
            manifest = from_builtins(cls, data)
            _check(manifest)
        except ManifestError as error:
            raise ManifestError(f"{where}: {error}") from error
        # Of the bytes that were read, which need not be those that dumps() would write.
        manifest.__dict__["digest"] = sha256_hex(text.encode() if isinstance(text, str) else text)
        return manifest

    def with_shards(self, shards: ShardTable, digest: str) -> Manifest:
        """The manifest that has these shards; ``digest``: of the bytes that it was read from."""
        manifest = replace(self, shards=shards)
        manifest.__dict__["digest"] = digest
        return manifest

    def dumps(self) -> str:
        """As JSON, one line per shard."""
        return dump_json(to_builtins(self), depth=2) + "\n"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the bytes of ``manifest.json`` as it was read, or of :meth:`dumps` if it was not read.

        Equal on all ranks of a job; checkpoints, results and models record it. It is what ``sha256sum`` prints, so that
        a record can be compared with a file without this project.
        """
        return sha256_hex(self.dumps().encode())

    @property
    def content_digest(self) -> str:
        """SHA-256 of spec and shards, without versions and notes: equal if and only if the data is."""
        return self._content_digest(self.shards)

    def digest_of(self, splits: Sequence[str]) -> str:
        """Like :attr:`content_digest`, of some splits only, so that adding another split does not change it."""
        return self._content_digest(self.shards_of(splits))

    def _content_digest(self, shards: Sequence[ShardInfo]) -> str:
        content = {
            "format_version": self.format_version,
            "spec": to_builtins(self.spec),
            "shards": ShardTable.of(shards).as_dicts(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the order in which they were written."""
        if isinstance(self.shards, ShardTable):
            return self.shards.splits
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def shards_of(self, splits: Sequence[str]) -> tuple[ShardInfo, ...] | ShardTable:
        """The shards of ``splits``, split by split. ManifestError if a split does not exist or none is given."""
        known = dict.fromkeys(self.splits)
        names = ", ".join([*known][:_MAX_LISTED_SPLITS]) or "none"
        names += ", …" if len(known) > _MAX_LISTED_SPLITS else ""
        for split in splits:
            if split not in known:
                raise ManifestError(
                    f"{self.spec.name} has no split {shorten(split)} in shards; there are: {names}"
                )
        if not splits:
            raise ManifestError(f"no split of {self.spec.name} was given; there are: {names}")
        wanted = tuple(dict.fromkeys(splits))
        if isinstance(self.shards, ShardTable):
            return self.shards.of_splits(wanted)
        by_split: dict[str, list[ShardInfo]] = {split: [] for split in wanted}
        for shard in self.shards:
            if shard.split in by_split:
                by_split[shard.split].append(shard)
        return tuple(s for split in wanted for s in by_split[split])


def read_manifest(url: str) -> tuple[bytes, str]:
    """(bytes of the manifest of the dataset at ``url``, its address). Raises as :meth:`Manifest.load`."""
    storage = open_storage(url, CONNECT_RETRY)
    where = storage.address(MANIFEST)
    try:
        data = read_manifest_bytes(storage)
    except FileNotFoundError as error:
        raise ManifestError(
            f"{where}: not found; write the dataset with `maestro-scale shard`, or check the path"
            f"{_path_hint(where)}"
        ) from error
    except StoreError as error:
        raise ManifestError(str(error)) from error
    return data, where


def parse_versioned(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object with a ``format_version`` that this code reads; ManifestError otherwise."""
    try:
        data = untrusted.load_json(text, limits=untrusted.MANIFEST)
    except untrusted.InputError as error:
        raise ManifestError(f"{where}: {error}; write it again") from None
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ManifestError(f"{where}: has no format_version; it is not a manifest of maestro-scale")
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"{where}: has format version {version}, this maestro-scale reads up to {FORMAT_VERSION}; "
            "upgrade it"
        )
    return data


def check_split_name(split: str) -> None:
    """ManifestError if ``split`` cannot be part of a file name."""
    if not _SPLIT.fullmatch(split):
        raise ManifestError(
            f"{shorten(split)} is not a split name; use at most 100 letters, digits, '_' and '-'"
        )


def check_spec(spec: DatasetSpec, where: str = "spec") -> None:
    """ManifestError, with the path of the first field that is wrong, where ``spec`` contradicts itself."""
    for path, reason in spec_problems(spec):
        raise ManifestError(f"{dotted((where, *path))}: {reason}")


def _path_hint(where: str) -> str:
    """For the path of a missing manifest: where it starts, and whether the variable of the recipes' data is set.

    Where it is not, recipes use ./data, and a shell turns ``$MAESTRO_DATA/NAME`` into ``/NAME``.
    """
    if where.endswith(f"/{MANIFEST}/{MANIFEST}"):
        return f"; give the folder that holds {MANIFEST}"
    if "://" in where:
        return ""
    above = Path(where).parent
    inside = sorted(path.parent.name for path in above.glob(f"*/{MANIFEST}"))
    if inside:
        return f"; {above} contains {', '.join(map(shorten, inside[:10]))}: give one of them"
    unset = "" if os.environ.get(_DATA_VARIABLE) else f"{_DATA_VARIABLE} is not set"
    if not os.path.isabs(where):
        return f" (relative to {os.getcwd()}{unset and f'; {unset}'})"
    return f" ({unset})" if unset and where.count("/") == 2 else ""  # /NAME/manifest.json


def _check(manifest: Manifest) -> None:
    check_spec(manifest.spec)
    if manifest.codec not in CODECS:
        raise ManifestError(f"codec: {shorten(manifest.codec)} is not one of {', '.join(CODECS)}")
    seen: set[str] = set()
    split = ""
    for i, shard in enumerate(manifest.shards):
        where = f"shards[{i}]"
        # The general rules cost ten times as much as this pattern, which nearly all paths match.
        if _PLAIN_PATH.fullmatch(shard.path) is None:
            _check_path(shard.path, where)
        # Without the suffix, because the names of indexes and embeddings do not have it.
        if (name := shard.path.removesuffix(".tar")) in seen:
            raise ManifestError(f"{where}.path: {shard.path} is listed twice, with or without .tar")
        seen.add(name)
        if shard.split != split or not i:
            check_split_name(split := shard.split)
        if not _SHA256.fullmatch(shard.sha256):
            raise ManifestError(
                f"{where}.sha256: {shorten(shard.sha256)} is not 64 lower-case hexadecimal digits"
            )
        if shard.bytes < 1 or shard.samples < 1:
            raise ManifestError(
                f"{where}: {shard.bytes} bytes, {shard.samples} samples; empty shards must not be listed"
            )
        if shard.samples > min(shard.bytes, TAR_MEMBERS) or shard.bytes > _MAX_SHARD_BYTES:
            raise ManifestError(
                f"{where}: {shard.samples} samples in {shard.bytes} bytes; a shard has at most {TAR_MEMBERS} samples "
                "and 1 TiB"
            )
        if shard.absent:
            _check_absent(shard, where, [m.name for m in manifest.spec.modalities])
    for note, count in manifest.notes.items():
        if count < 0:
            raise ManifestError(f"notes: {shorten(note)} is counted {count} times")


def _check_path(text: str, where: str) -> None:
    path = PurePosixPath(text)
    below = bool(text) and not path.is_absolute() and ".." not in path.parts and str(path) == text
    # Not printable: NUL ends a path in the system's calls, and a newline would forge a line of a log.
    if not below or not text.isprintable() or len(text) > _MAX_PATH:
        raise ManifestError(f"{where}.path: {shorten(text)} is not a path below the dataset's root")


def _check_absent(shard: ShardInfo, where: str, modalities: Sequence[str]) -> None:
    unknown = [name for name in shard.absent if name not in modalities]
    if unknown:
        raise ManifestError(f"{where}.absent: unknown modality {shorten(unknown[0])}")
    if list(shard.absent) != [name for name in modalities if name in shard.absent]:
        raise ManifestError(f"{where}.absent: list each modality once, in the order of spec.modalities")
    if len(shard.absent) == len(modalities):
        raise ManifestError(f"{where}.absent: lists every modality; a tile has at least one")
