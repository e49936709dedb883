"""What a dataset in shards holds, from the small fields alone: shards, samples, bytes, classes, dates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.errors import ManifestError
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.statistics import count_sample, parse_counts
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import Storage, open_storage


@dataclass(frozen=True)
class SplitSummary:
    """One split. ``classes[target][name]``: samples with it (multilabel) or pixels of it (segmentation).

    ``months[modality]``: dates in January, …, December.
    """

    split: str
    num_shards: int
    num_samples: int
    num_bytes: int
    classes: Mapping[str, Mapping[str, int]]
    months: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Summary:
    """A dataset in shards."""

    manifest: Manifest
    splits: tuple[SplitSummary, ...]


def summarize(url: str) -> Summary:
    """The summary of the dataset at ``url``; ManifestError or StoreError if it cannot be read.

    Our writer leaves the counts in the indices, so that only those are read; shards without are read whole.
    """
    manifest = Manifest.load(url)
    storage = open_storage(url)
    splits = []
    for split in manifest.splits:
        shards = manifest.shards_of([split])
        tally: Counter[str] = Counter()
        for info in shards:
            tally.update(_shard_counts(storage, url, info, manifest.spec))
        classes, months = parse_counts(tally, manifest.spec)
        num_samples, num_bytes = sum(s.samples for s in shards), sum(s.bytes for s in shards)
        splits.append(SplitSummary(split, len(shards), num_samples, num_bytes, classes, months))
    return Summary(manifest, tuple(splits))


def _shard_counts(storage: Storage, url: str, info: ShardInfo, spec: DatasetSpec) -> Mapping[str, int]:
    name = index_path(info.path)
    try:
        index = ShardIndex.loads(storage.read(name), storage.address(name))
    except FileNotFoundError:
        index = None
    if index is not None and index.sha256 != info.sha256:
        raise ManifestError(
            f"{storage.address(name)}: is the index of another shard; run `maestro-scale verify {url}`"
        )
    if index is not None and index.tally:
        return index.tally
    tally: Counter[str] = Counter()
    with TemporaryDirectory(prefix="maestro-scale-") as cache:
        shard = Store(url, Path(cache), 2 * info.bytes).shard(info)
        for i in range(len(shard)):
            tally.update(count_sample(shard[i], spec))
        shard.close()
    return tally
