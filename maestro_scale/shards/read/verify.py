"""Verification of a dataset in shards: every file, every sample, every field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from maestro_scale.datasets.spec import DatasetError, DatasetSpec
from maestro_scale.shards.errors import BadShard, CodecError, ManifestError, ShardsError, StoreError, one_line
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import check_fields
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.values import value_problems
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.progress import Progress, ProgressCounter
from maestro_scale.shards.read.shard import Shard
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import Storage, open_storage

_MAX_LISTED_SAMPLES = 5  # problems listed per shard; the others are only counted


def verify(url: str, workers: int = 1, progress: Progress | None = None) -> list[str]:
    """Check the dataset at ``url``; returns the problems, one line each, or an empty list.

    Checks the manifest; size, SHA-256, number of samples and index of each shard; key and every field of each sample
    against the spec; that keys are unique within a split, and that there are no shards beside those of the manifest.
    A remote shard is downloaded to a temporary folder. ``progress(samples done, total samples, bytes)``.
    """
    try:
        manifest = Manifest.load(url)
        problems = _unlisted_shards(open_storage(url), manifest)
        indexed = [_has_index(open_storage(url), info) for info in manifest.shards]
    except ShardsError as error:
        return [one_line(error)]
    tracker = ProgressCounter(0, sum(info.samples for info in manifest.shards), progress)
    work = _CheckShard(str(url), manifest.spec, index_expected=any(indexed))
    found: dict[int, tuple[list[str], tuple[str, ...]]] = {}
    try:
        found.update(run_jobs(work, manifest.shards, workers, tracker))
    except StoreError as error:
        return [*problems, one_line(error)]
    split_keys: dict[str, dict[str, str]] = {}
    for number, info in enumerate(manifest.shards):
        shard_problems, keys = found[number]
        problems += shard_problems
        seen = split_keys.setdefault(info.split, {})
        repeated = [key for key in keys if key in seen]
        if repeated:
            problems.append(
                f"{info.path}: sample {repeated[0]} is also in {seen[repeated[0]]} ({len(repeated)} repeated keys)"
            )
        seen.update(dict.fromkeys(keys, info.path))
    return problems


@dataclass(frozen=True)
class _CheckShard:
    """Job function of the worker processes: returns the problems of a shard, and its keys."""

    url: str
    spec: DatasetSpec
    index_expected: bool

    def __call__(self, info: ShardInfo, report: ReportFunction) -> tuple[list[str], tuple[str, ...]]:
        # A temporary cache, so that shards are verified again even if an earlier run has recorded them as verified.
        with TemporaryDirectory(prefix="maestro-scale-") as cache:
            store = Store(self.url, Path(cache), info.bytes)
            try:
                _, index = store.ensure(info)
                with store.shard(info) as shard:
                    problems = self._index_problems(info, index)
                    samples = [p for i in range(len(shard)) for p in _sample_problems(shard, i, self.spec)]
            except BadShard as error:
                return [f"{info.path}: {error.cause}"], ()
        report(info.samples, info.bytes)
        problems += [f"{info.path}: {p}" for p in samples[:_MAX_LISTED_SAMPLES]]
        if len(samples) > _MAX_LISTED_SAMPLES:
            problems.append(
                f"{info.path}: and {len(samples) - _MAX_LISTED_SAMPLES} more samples with problems"
            )
        return problems, index.keys

    def _index_problems(self, info: ShardInfo, index: ShardIndex) -> list[str]:
        name = index_path(info.path)
        try:
            sidecar = ShardIndex.loads(open_storage(self.url).read(name), name)
        except FileNotFoundError:
            return [f"{name}: is missing, although other shards have an index"] if self.index_expected else []
        except ManifestError as error:
            return [one_line(error)]
        if not sidecar.same_layout(index):
            return [f"{name}: does not describe {info.path} (keys, offsets or SHA-256 differ)"]
        return []


def _sample_problems(shard: Shard, i: int, spec: DatasetSpec) -> list[str]:
    try:
        sample: Sample = shard[i]
        fields = {name: sample.array(name) for name in sample.names}
        check_fields(sample.key, fields, spec)
        values = value_problems(fields, spec)
    except BadShard as error:
        return [error.cause]
    except (CodecError, DatasetError) as error:
        return [one_line(error)]
    return [f"tile {sample.key}: {'; '.join(values)}"] if values else []


def _unlisted_shards(storage: Storage, manifest: Manifest) -> list[str]:
    known = {info.path for info in manifest.shards}
    return [
        f"{name}: this shard is not in the manifest: its split is unfinished, or it is to be removed"
        for name in storage.list_names()
        if name.endswith(".tar") and name not in known
    ]


def _has_index(storage: Storage, info: ShardInfo) -> bool:
    return storage.size(index_path(info.path)) is not None
