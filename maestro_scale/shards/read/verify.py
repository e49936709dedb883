"""Verification of a dataset in shards: every file, every sample, every field.

The checks are those of training, in the same order and by the same functions: manifest and checksum file
(``Manifest.load``), the rules for the model's view of the data (``view_problems``), size, SHA-256 and members of each
shard (``Store``), and the layout of each sample from its header (``check_layouts``), before anything is decoded. The
values come last, field by field. So a malformed dataset takes no more memory here than a valid one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import DatasetError, DatasetSpec
from maestro_scale.datasets.spec_check import view_problems
from maestro_scale.errors import dotted, shorten
from maestro_scale.shards.errors import BadShard, CodecError, ManifestError, ShardsError, StoreError, one_line
from maestro_scale.shards.format.checksum import MANIFEST
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import check_classes, check_layouts
from maestro_scale.shards.format.index import ShardIndex, index_path
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.format.values import value_problems
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.progress import Progress, ProgressCounter
from maestro_scale.shards.read.shard import Shard
from maestro_scale.shards.read.store import Store
from maestro_scale.shards.storage import LocalStorage, Storage, open_storage
from maestro_scale.shards.temporary import temporary_folder

_MAX_LISTED_SAMPLES = 5  # problems listed per shard; the others are only counted
_ROLES = ("train", "val", "test")  # splits that must not share a tile


def verify(
    url: str,
    workers: int = 1,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Check the dataset at ``url``; returns the problems, one line each, or an empty list.

    Checks the manifest, with its checksum file if there is one, and whether the model can be trained on its spec; size,
    SHA-256, members and index of each shard; key and every field of each sample against the spec; that keys are unique
    within a split, and that there are no shards beside those of the manifest. A remote shard is downloaded to a
    temporary folder. ``progress(samples done, total samples, bytes)``. ``warn`` is called with a line for what is
    valid, but rarely intended: samples that both train and val or test contain.
    """
    try:
        manifest = Manifest.load(url)
        storage = open_storage(url)
        names = storage.list_names()
        problems = [f"spec.{dotted(path)}: {reason}" for path, reason in view_problems(manifest.spec)]
        problems += [] if manifest.shards else [f"{storage.address(MANIFEST)}: lists no shards"]
        problems += _unlisted_shards(names, manifest)
        indexed = _indexed_shards(storage, names, manifest)
    except ShardsError as error:
        return [one_line(error)]
    tracker = ProgressCounter(0, sum(info.samples for info in manifest.shards), progress)
    work = _CheckShard(str(url), manifest.spec, index_expected=indexed)
    found: dict[int, tuple[list[str], tuple[str, ...]]] = {}
    try:
        found.update(run_jobs(work, manifest.shards, workers, tracker))
    except StoreError as error:
        return [*problems, one_line(error)]
    split_keys: dict[str, dict[str, str]] = {}
    for number, info in enumerate(manifest.shards):
        shard_problems, keys = found[number]
        problems += shard_problems
        problems += _repeated_keys(info, keys, split_keys.setdefault(info.split, {}))
    for line in _shared_keys(split_keys):
        warn(line)
    return problems


def _repeated_keys(info: ShardInfo, keys: Sequence[str], paths: dict[str, str]) -> Iterator[str]:
    """Problems of keys that occur twice. ``paths``: of the split so far, {key: path of its shard}; extended."""
    repeated: list[str] = []
    where = ""
    for key in keys:
        if key in paths:
            where = where or ("twice in it" if paths[key] == info.path else f"also in {paths[key]}")
            repeated.append(key)
        paths[key] = info.path
    if repeated:
        yield f"{info.path}: sample {shorten(repeated[0])} is {where} ({len(repeated)} repeated keys)"


def _shared_keys(split_keys: dict[str, dict[str, str]]) -> Iterator[str]:
    """Splits that share tiles, by which a score would be measured on training data.

    A warning, since splits may overlap on purpose: folds of a cross-validation, or a part of the training labels.
    """
    for i, first in enumerate(_ROLES):
        for second in _ROLES[i + 1 :]:
            if shared := sorted(split_keys.get(first, {}).keys() & split_keys.get(second, {}).keys()):
                yield (
                    f"splits {first} and {second} share {len(shared)} samples (first: {shorten(shared[0])}): scores on "
                    f"{second} would be measured on tiles of {first}"
                )


@dataclass(frozen=True)
class _CheckShard:
    """Job function of the worker processes: returns the problems of a shard, and its keys."""

    url: str
    spec: DatasetSpec
    index_expected: bool

    def __call__(self, info: ShardInfo, report: ReportFunction) -> tuple[list[str], tuple[str, ...]]:
        storage = open_storage(self.url)
        if isinstance(storage, LocalStorage) and storage.size(info.path) is None:
            # Before a folder is created for it: a manifest may list 300,000 shards that do not exist.
            return [f"{info.path}: is missing"], ()
        # A temporary cache, so that shards are verified again even if an earlier run has recorded them as verified.
        with temporary_folder() as cache:
            store = Store(self.url, cache, info.bytes)
            try:
                path, index = store.ensure(info)
                with store.shard(info) as shard:
                    problems = [*_extra_content(info, path), *self._index_problems(info, index)]
                    numbers = range(len(shard))
                    samples = [p for i in numbers for p in _sample_problems(shard, i, self.spec, info.absent)]
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
            sidecar = ShardIndex.read(open_storage(self.url), name)
        except FileNotFoundError:
            return [f"{name}: is missing, although other shards have an index"] if self.index_expected else []
        except (ManifestError, StoreError) as error:
            return [one_line(error)]
        if not sidecar.same_layout(index):
            return [f"{name}: does not describe {info.path} (keys, offsets or SHA-256 differ)"]
        if sidecar.plan and sidecar.absent != info.absent:
            return [
                f"{name}: says that tiles lack {_listed(sidecar.absent)}, the manifest: {_listed(info.absent)}"
            ]
        return []


def _listed(modalities: Sequence[str]) -> str:
    """Modalities in a message."""
    return ", ".join(modalities) or "nothing"


def _extra_content(info: ShardInfo, path: Path) -> list[str]:
    """What the tar contains besides samples. Training would not read it, but whoever unpacks the tar would."""
    try:
        untrusted.list_tar(path, strict=True)
    except untrusted.InputError as error:
        return [f"{info.path}: {error}"]
    return []


def _sample_problems(shard: Shard, i: int, spec: DatasetSpec, absent: Sequence[str]) -> list[str]:
    try:
        sample: Sample = shard[i]
        layouts = {name: (sample.shape(name), str(sample.dtype(name))) for name in sample.names}
        check_layouts(sample.key, layouts, spec, absent)
        _ = sample.origin  # CodecError if it cannot be parsed
        fields = _Fields(sample)
        for target in spec.targets:
            check_classes(sample.key, fields, target)
        values = value_problems(fields, spec, is_stored=True)
    except BadShard as error:
        return [error.cause]
    except (CodecError, DatasetError) as error:
        return [one_line(error)]
    return [f"tile {sample.key}: {'; '.join(values)}"] if values else []


class _Fields(Mapping[str, np.ndarray]):
    """The fields of a sample, each decoded when it is read: all of them at once could exceed the memory."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def __getitem__(self, name: str) -> np.ndarray:
        return self._sample.array(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sample.names  # that of Mapping would decode the field

    def __iter__(self) -> Iterator[str]:
        return iter(self._sample.names)

    def __len__(self) -> int:
        return len(self._sample.names)


def _unlisted_shards(names: Sequence[str], manifest: Manifest) -> list[str]:
    known = {info.path for info in manifest.shards}
    return [
        f"{name}: this shard is not in the manifest: its split is unfinished, or it is to be removed"
        for name in names
        if name.endswith(".tar") and name not in known
    ]


def _indexed_shards(storage: Storage, names: Sequence[str], manifest: Manifest) -> bool:
    """Whether any shard has an index. Of shards in subfolders, which are not in ``names``, only the first is asked."""
    listed = set(names)
    paths = [index_path(info.path) for info in manifest.shards]
    below = next((path for path in paths if "/" in path), None)
    return any(path in listed for path in paths) or (below is not None and storage.size(below) is not None)
