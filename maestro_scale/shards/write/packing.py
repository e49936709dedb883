"""Assignment of tiles to shards, and writing of one shard with its index."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import FORMAT_VERSION
from maestro_scale.shards.format.statistics import count_sample
from maestro_scale.shards.format.tar import TarWriter
from maestro_scale.shards.jobs import ReportFunction
from maestro_scale.shards.storage import Storage


@dataclass(frozen=True)
class WritePlan:
    """What is written for a split.

    ``digest`` covers everything that determines the bytes of its shards. A finished shard is only kept if its index
    records the same digest, so shards of different settings are never mixed.
    """

    spec: DatasetSpec
    split: str
    num_shards: int
    digest: str

    def shard_name(self, number: int) -> str:
        """File name of shard ``number``."""
        return f"{self.split}-{number:06d}.tar"


@dataclass(frozen=True)
class EncodedTile:
    """An encoded tile, or, with ``payload`` None, the reason why a tile is left out."""

    key: str
    payload: bytes | None
    notes: tuple[str, ...] = ()
    cause: str = ""
    kind: str = ""  # kind of the cause; left-out tiles are counted by it


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
) -> ShardIndex:
    """Write shard ``number`` of ``plan`` with its index. Both appear under their names only when complete."""
    name = plan.shard_name(number)
    tar = TarWriter(staging / f".{name}.{os.getpid()}.tmp")
    keys, offsets, sizes = [], [], []
    notes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    left_out: dict[str, str] = {}
    examples: dict[str, str] = {}
    try:
        for item in packed:
            if item.payload is None:
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
        index = ShardIndex(
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
        )
        # The index first: then every tar that exists has its index. A kill in between leaves an index without a tar,
        # which the next run treats as unfinished, since it compares the size of the tar.
        storage.write(index_path(name), index.dumps().encode())
        storage.publish(tar.path, name)
    except BaseException:  # also KeyboardInterrupt: the temporary file must not stay
        tar.discard()
        raise
    return index


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
