"""Summary of a dataset in shards: shards, samples, bytes, classes and dates per split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.statistics import count_sample, parse_counts
from maestro_scale.shards.read.prefetch import ordered_map
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import Storage, open_storage
from maestro_scale.shards.temporary import temporary_folder

_REQUESTS = 16  # for indices, at a time


@dataclass(frozen=True)
class SplitSummary:
    """One split.

    ``classes[target][name]``: number of samples (multilabel, classification) or pixels (segmentation) with that class;
    of a regression the numbers of values called ``value`` and ``missing``.
    ``months[modality]``: number of dates in January, …, December.
    ``absent``: number of samples by the modalities that they lack; one entry, of those that lack none, if all are
    complete.
    """

    split: str
    num_shards: int
    num_samples: int
    num_bytes: int
    classes: Mapping[str, Mapping[str, int]]
    months: Mapping[str, tuple[int, ...]]
    absent: Mapping[tuple[str, ...], int] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A dataset in shards: its manifest and the summary of each split."""

    manifest: Manifest
    splits: tuple[SplitSummary, ...]


def summarize(url: str) -> Summary:
    """Summarize the dataset at ``url``. ManifestError or StoreError if it cannot be read.

    Counts come from the indices if those contain them, as written by maestro-scale; other shards are read completely.
    """
    manifest = Manifest.load(url)
    storage = open_storage(url)
    splits = []
    for split in manifest.splits:
        shards = manifest.shards_of([split])
        counts: Counter[str] = Counter()
        # Many at once: over a network each takes as long as its answer needs to arrive.
        for info, tally in zip(
            shards, ordered_map(lambda i: _tally(storage, url, i), shards, _REQUESTS), strict=True
        ):
            counts.update(_count(url, info, manifest.spec) if tally is None else tally)
        classes, months = parse_counts(counts, manifest.spec)
        num_samples, num_bytes = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        absent: Counter[tuple[str, ...]] = Counter()
        for info in shards:
            absent[info.absent] += info.samples
        splits.append(SplitSummary(split, len(shards), num_samples, num_bytes, classes, months, absent))
    return Summary(manifest, tuple(splits))


def _tally(storage: Storage, url: str, info: ShardInfo) -> Mapping[str, int] | None:
    """The counts in the index of a shard; None if it has none."""
    name = index_path(info.path)
    try:
        index = ShardIndex.read(storage, name)
    except FileNotFoundError:
        return None
    if index.sha256 != info.sha256:
        raise ManifestError(
            f"{storage.address(name)}: is the index of another shard; run `maestro-scale verify {url}`"
        )
    return index.tally or None


def _count(url: str, info: ShardInfo, spec: DatasetSpec) -> Mapping[str, int]:
    """The counts of a shard that has to be read."""
    counts: Counter[str] = Counter()
    with temporary_folder() as cache, Store(url, cache, 2 * info.bytes).shard(info) as shard:
        for sample in shard:
            counts.update(count_sample(sample, spec))
    return counts
