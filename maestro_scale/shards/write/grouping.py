"""The stored order of tiles that lack different modalities: those that lack the same ones are stored together.

Every shard has tiles of one set of modalities, so that a training step, whose tiles must be alike, reads a few shards
only, and the manifest says what they are. A split in which no tile lacks anything has one group, and the bytes that it
would have if no modality could be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetError, InRuns, RawDataset
from maestro_scale.shards.format.fields import absent_of
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.write.packing import PlannedShard, shard_bounds, shuffle_keys

_SURVEYED_TILES = 64  # per job

Absent = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Tiles that lack the same modalities, in the stored order."""

    absent: Absent
    keys: tuple[str, ...]


def group_keys(absent: Mapping[str, Absent], seed: int) -> list[Group]:
    """The tiles by the modalities that they lack, each group shuffled: complete tiles first, then by number of missing
    modalities and their names, so that the order does not depend on that of the keys."""
    groups: dict[Absent, list[str]] = {}
    for key, lacking in absent.items():
        groups.setdefault(lacking, []).append(key)
    order = sorted(groups, key=lambda lacking: (len(lacking), lacking))
    return [Group(lacking, tuple(shuffle_keys(groups[lacking], seed))) for lacking in order]


def plan_shards(
    groups: Sequence[Group], mean_bytes: Callable[[Sequence[str]], float], shard_bytes: int
) -> list[PlannedShard]:
    """The shards of all groups, one group after the other. ``mean_bytes``: of the samples of a group, by its keys."""
    shards: list[PlannedShard] = []
    first = 0
    for group in groups:
        bounds = shard_bounds(len(group.keys), mean_bytes(group.keys), shard_bytes)
        shards += [PlannedShard(first + start, first + stop, group.absent) for start, stop in bounds]
        first += len(group.keys)
    return shards


def survey(dataset: RawDataset, workers: int) -> dict[str, Absent]:
    """What each tile lacks, by key: as ``absent`` of the dataset says, else found by reading the tile.

    A tile that cannot be read counts as complete: its error is reported when it is to be written.
    """
    keys = dataset.keys()
    if not any(m.optional for m in dataset.spec.modalities):
        return dict.fromkeys(keys, ())
    if isinstance(dataset, InRuns):
        jobs = [tuple(run) for run in dataset.runs(keys)]
    else:
        jobs = [tuple(keys[i : i + _SURVEYED_TILES]) for i in range(0, len(keys), _SURVEYED_TILES)]
    found: dict[str, Absent] = {}
    for number, absent in run_jobs(_Survey(dataset), jobs, workers, _ignore_report):
        found.update(zip(jobs[number], absent, strict=True))
    return {key: found[key] for key in keys}


def absent_from(dataset: RawDataset, key: str) -> Absent:
    """What a tile lacks: as ``absent`` of the dataset says, else found by reading the tile, which may raise."""
    if not any(m.optional for m in dataset.spec.modalities):
        return ()
    said = getattr(dataset, "absent", None)
    absent = tuple(said(key)) if said else absent_of(dataset.read(key), dataset.spec)
    # A tile without any modality is no group of its own: it cannot be stored, as reading it will tell.
    return absent if len(absent) < len(dataset.spec.modalities) else ()


@dataclass(frozen=True)
class _Survey:
    """Job function of the writer processes."""

    dataset: RawDataset

    def __call__(self, keys: Sequence[str], report: ReportFunction) -> list[Absent]:
        with self.dataset.run(keys) if isinstance(self.dataset, InRuns) else nullcontext():
            return list(self._absent(keys))

    def _absent(self, keys: Iterable[str]) -> Iterator[Absent]:
        for key in keys:
            try:
                yield absent_from(self.dataset, key)
            except DatasetError:
                yield ()


def _ignore_report(samples: int, num_bytes: int) -> None:
    """Ignore progress: nothing is written yet."""
