"""Assignment of tiles to shards, and writing of one shard with its index."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.errors import ManifestError, WriteError
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import FORMAT_VERSION
from maestro_scale.shards.format.statistics import count_sample
from maestro_scale.shards.format.tar import TarWriter
from maestro_scale.shards.jobs import ReportFunction
from maestro_scale.shards.storage import RemoteStorage, Storage

HASH_DIGITS = 8  # of a tar's SHA-256 in its name


@dataclass(frozen=True)
class PlannedShard:
    """The samples [start, stop) of the stored order; ``absent``: the modalities that all of them lack."""

    start: int
    stop: int
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class WritePlan:
    """What is written for a split.

    ``digest`` covers everything that determines the bytes of its shards. A finished shard is only kept if its index
    records the same digest, so shards of different settings are never mixed.
    """

    spec: DatasetSpec
    split: str
    shards: tuple[PlannedShard, ...]
    digest: str

    @property
    def num_shards(self) -> int:
        """Number of shards, with those that turn out to be empty."""
        return len(self.shards)

    def shard_name(self, number: int, sha256: str = "") -> str:
        """File name of shard ``number``; with ``sha256`` of its content, the name that it has in object stores."""
        content = f"-{sha256[:HASH_DIGITS]}" if sha256 else ""
        return f"{self.split}-{number:06d}{content}.tar"


@dataclass(frozen=True)
class WrittenShard:
    """A finished shard: the name of its tar, and its index. A shard without keys has no tar."""

    name: str
    index: ShardIndex


@dataclass(frozen=True)
class EncodedTile:
    """An encoded tile, or, with ``payload`` None, the reason why a tile is left out.

    ``by_rule``: a rule of the dataset leaves it out, not a failure.
    """

    key: str
    payload: bytes | None
    notes: tuple[str, ...] = ()
    cause: str = ""
    kind: str = ""  # kind of the cause; left-out tiles are counted by it
    by_rule: bool = False

    def with_payload(self, payload: bytes | None) -> EncodedTile:
        """The tile with other bytes: those that it was stored without."""
        return replace(self, payload=payload)


def shuffle_keys(keys: Iterable[str], seed: int) -> list[str]:
    """The keys in a pseudo-random order, which is the order of the samples in the shards.

    Neighbouring tiles have neighbouring keys and are alike, so regions must be mixed across shards. Sorted first, so
    that the order depends on the set of keys and the seed alone. The raw Philox stream is used because numpy guarantees
    that it never changes, unlike ``Generator.permutation``.
    """
    ordered = sorted(keys)
    draws = np.random.Philox(key=seed).random_raw(len(ordered))
    return [ordered[i] for i in np.argsort(draws, kind="stable")]


def shard_bounds(num_samples: int, mean_bytes: float, shard_bytes: int) -> list[tuple[int, int]]:
    """[start, stop) of each shard in the order of samples; numbers of samples differ by at most one."""
    num_shards = min(num_samples, max(1, round(num_samples * mean_bytes / shard_bytes)))
    edges = [i * num_samples // num_shards for i in range(num_shards + 1)]
    return list(itertools.pairwise(edges))


def write_shard(
    storage: Storage,
    staging: Path,
    plan: WritePlan,
    number: int,
    packed: Iterable[EncodedTile],
    report: ReportFunction,
) -> WrittenShard:
    """Write shard ``number`` of ``plan`` with its index. Both appear under their names only when complete.

    In an object store, where no lock protects a name for certain, the name depends on the content: two writers with
    different content never write the same object.
    """
    tar = TarWriter(staging / f".{plan.shard_name(number)}.{os.getpid()}.tmp")
    try:
        index = _fill(tar, plan, plan.shards[number].absent, packed, report)
        name = plan.shard_name(number, index.sha256 if isinstance(storage, RemoteStorage) else "")
        if isinstance(storage, RemoteStorage) and _is_complete(storage, name, index):
            tar.discard()
            return WrittenShard(name, index)
        # The index first: then every tar that exists has its index. A kill in between leaves an index without a tar,
        # which the next run treats as unfinished, since it compares the size of the tar.
        storage.write(index_path(name), index.dumps().encode())
        if index.keys:
            storage.publish(tar.path, name)
        else:
            tar.discard()
    except BaseException:  # also KeyboardInterrupt: the temporary file must not stay
        tar.discard()
        raise
    return WrittenShard(name, index)


def _is_complete(storage: RemoteStorage, name: str, index: ShardIndex) -> bool:
    """Whether a tar of this name and content is there with an index of the same plan.

    WriteError if the name belongs to other content: two different shards with equal first digits of their hashes.
    """
    try:
        known = ShardIndex.read(storage, index_path(name))
    except (FileNotFoundError, ManifestError):
        return False
    if known.sha256 != index.sha256:
        raise WriteError(
            f"{storage.address(name)}: already belongs to another shard; remove it if it is not in the manifest"
        )
    return known.plan == index.plan and (not index.keys or storage.size(name) == index.bytes)


def _fill(
    tar: TarWriter,
    plan: WritePlan,
    absent: tuple[str, ...],
    packed: Iterable[EncodedTile],
    report: ReportFunction,
) -> ShardIndex:
    keys, offsets, sizes = [], [], []
    notes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    examples: dict[str, str] = {}
    for item in packed:
        if item.payload is None:
            if not item.by_rule:
                left_out[item.key] = item.cause
            note = f"left out: {item.kind}"
            notes[note] += 1
            examples.setdefault(note, item.cause)
            report(1, 0)
            continue
        keys.append(item.key)
        offsets.append(tar.add(item.key, item.payload))
        sizes.append(len(item.payload))
        notes.update(set(item.notes))
        for note in item.notes:
            examples.setdefault(note, item.key)
        counts.update(count_sample(Sample(item.payload), plan.spec))
        report(1, len(item.payload))
    return ShardIndex(
        format_version=FORMAT_VERSION,
        sha256=tar.finish(),
        bytes=tar.bytes,
        keys=tuple(keys),
        offsets=tuple(offsets),
        sizes=tuple(sizes),
        dataset=plan.spec.name,
        plan=plan.digest,
        notes=_sorted(notes),
        examples=dict(sorted(examples.items())),
        left_out=left_out,
        tally=_sorted(counts),
        absent=absent,
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
