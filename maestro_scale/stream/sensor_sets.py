"""Divides a source by the sensors that its tiles have, so that every batch has tiles of one set of sensors.

Training (:func:`divide`): each set becomes a source of its own, with an order of its own, and the steps of an epoch are
distributed over the sources by their numbers of steps (``loader.TrainLoader``). A set that is too small for one global
batch is completed with tiles of another set that have all its sensors, of which some are then not read; or read as a
set of which it has all sensors; or two such sets are joined, and read the sensors that both have; whichever leaves
fewer images unread. So no tile is left out, and none is used more than once per epoch. Which tiles these are follows
from the manifest, the sensors in use and the global batch alone.

Evaluation (:func:`runs`): consecutive shards of one set form a run, whose batches contain nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.shards.format.manifest import ShardInfo
from maestro_scale.stream.plan import SampleOrderError
from maestro_scale.stream.source import Source

Absent = tuple[str, ...]


def absent_sensors(spec: DatasetSpec, shard: ShardInfo) -> Absent:
    """The sensors of a resolved spec that the tiles of a shard lack. None, if all that they lack is not in use."""
    return tuple(s.name for s in spec.sensors if s.source in shard.absent) if shard.absent else ()


def readable(source: Source) -> tuple[Source, int]:
    """(the source without shards whose tiles have none of its sensors, number of tiles in these)."""
    return _without_shards(source, lambda absent: len(absent) == len(source.spec.sensors))


def complete(source: Source) -> tuple[Source, int]:
    """(the source with the tiles that have all of its sensors, number of the others)."""
    return _without_shards(source, lambda absent: len(absent) > 0)


def _without_shards(source: Source, is_left_out: Callable[[Absent], bool]) -> tuple[Source, int]:
    sets, of_shard = _absent_by_shard(source)
    left_out = np.array([is_left_out(absent) for absent in sets], bool)[of_shard]
    if not left_out.any():
        return source, 0
    kept = np.flatnonzero(~left_out)
    numbers = None if source.numbers is None else source.numbers.take(kept)
    num_samples = int(source.counts[left_out].sum())
    return replace(source, shards=source.table.take(kept), indices=numbers), num_samples


def _absent_by_shard(source: Source) -> tuple[list[Absent], np.ndarray]:
    """(sets of sensors of the source, (shards,) int64: the number of the set that the tiles of each shard lack)."""
    table = source.table
    sets = [tuple(s.name for s in source.spec.sensors if s.source in names) for names in table.absents]
    return sets, table.absent_ids


@dataclass(frozen=True)
class Division:
    """The sources of a training by set of sensors. ``lines``: what the user should know, without the dataset's name."""

    sources: tuple[Source, ...]
    lines: tuple[str, ...] = ()


def divide(source: Source, global_batch: int) -> Division:
    """``source`` by the sensors that its tiles have: complete tiles first, then in the order of the manifest.

    SampleOrderError where a set is smaller than ``global_batch`` and no other set can complete it.
    """
    source, left_out = readable(source)
    lines = []
    if left_out:
        lines.append(f"{left_out} tiles have none of the sensors in use and are left out")
    absents, of_shard = _absent_by_shard(source)
    if not any(
        absents[i] for i in np.unique(of_shard)
    ):  # also of a source without shards, which SampleOrder refuses
        return Division((source,), tuple(lines))
    sets: dict[Absent, list[_Part]] = {}
    for number, (absent, count) in enumerate(zip(of_shard.tolist(), source.counts.tolist(), strict=True)):
        sets.setdefault(absents[absent], []).append(_Part(number, 0, count))
    groups = [_Group(absent, parts) for absent, parts in sorted(sets.items(), key=lambda item: item[0] != ())]
    lines += _complete(groups, [s.name for s in source.spec.sensors], global_batch)
    return Division(tuple(_source(source, group) for group in groups), tuple(lines))


def runs(source: Source) -> Iterator[tuple[Absent, int]]:
    """(sensors that the tiles lack, number of samples) of consecutive shards whose tiles have the same sensors."""
    absent: Absent = ()
    samples = 0
    sets, of_shard = _absent_by_shard(source)
    for number, count in zip(of_shard.tolist(), source.counts.tolist(), strict=True):
        lacking = sets[number]
        if lacking != absent and samples:
            yield absent, samples
            samples = 0
        absent, samples = lacking, samples + count
    if samples:
        yield absent, samples


def proportional(source: Source, num_samples: int) -> np.ndarray:
    """(num_samples,) ascending numbers of samples, of each set of sensors in proportion to its tiles, and its first
    ones: with one set those that come first, which few shards hold. At most all."""
    by_set: dict[Absent, list[np.ndarray]] = {}
    first = 0
    for absent, count in runs(source):
        by_set.setdefault(absent, []).append(np.arange(first, first + count))
        first += count
    chosen, seen, taken = [], 0, 0
    for numbers in map(np.concatenate, by_set.values()):
        seen += len(numbers)
        wanted = min(num_samples, first) * seen // first
        chosen.append(numbers[: wanted - taken])
        taken = wanted
    return np.sort(np.concatenate(chosen)) if chosen else np.arange(0)


class _Part(NamedTuple):
    """The samples in use [start, stop) of a shard of the source, by its number."""

    shard: int
    start: int
    stop: int


@dataclass
class _Group:
    """Tiles that are read without the sensors ``absent``."""

    absent: Absent
    parts: list[_Part]

    @property
    def size(self) -> int:
        return sum(stop - start for _, start, stop in self.parts)

    def take_last(self, count: int) -> list[_Part]:
        """Remove the last ``count`` samples, and return them."""
        taken: list[_Part] = []
        while count:
            shard, start, stop = self.parts.pop()
            first = max(stop - count, start)
            taken.insert(0, _Part(shard, first, stop))
            if first > start:
                self.parts.append(_Part(shard, start, first))
            count -= stop - first
        return taken


def _complete(groups: list[_Group], sensors: Sequence[str], global_batch: int) -> list[str]:
    """Complete groups of less than a global batch, the smallest first; returns a line for each. Changes ``groups``."""
    lines = []
    while len(groups) > 1 and (small := min(groups, key=lambda g: g.size)).size < global_batch:
        ways = [*_loans(small, groups, global_batch), *_unions(small, groups, sensors, global_batch)]
        what = f"{small.size} tiles {_lacking(small.absent)}"
        if not ways:
            raise SampleOrderError(
                f"{what} are less than a global batch of {global_batch}, and no other tiles can complete it: lower "
                "train.global_batch, leave the sensors out of the mixture (sensors: {name: null}), or the tiles "
                "(incomplete: leave_out)"
            )
        *_, lender, other = min(ways, key=lambda way: way[:2])
        if lender is not None:
            missing = global_batch - small.size
            small.parts += lender.take_last(missing)
            unread = [name for name in small.absent if name not in lender.absent]
            lines.append(
                f"{what} are completed to a global batch with {missing} tiles whose {', '.join(unread)} are not read"
            )
        elif other is not None:
            absent = tuple(name for name in sensors if name in {*small.absent, *other.absent})
            if other.size < global_batch:
                lines.append(
                    f"{what} and {other.size} {_lacking(other.absent)} are less than a global batch: they are read "
                    f"together, without {', '.join(absent)}"
                )
            else:
                lines.append(
                    f"{what} are less than a global batch: they are read as those without {', '.join(absent)}"
                )
            other.parts, other.absent = sorted([*other.parts, *small.parts]), absent
            groups.remove(small)
            _join_equal(groups, other)
    return lines


def _lacking(absent: Absent) -> str:
    return f"without {', '.join(absent)}" if absent else "with all sensors"


_Way = tuple[int, int, "_Group | None", "_Group | None"]
"""(images that are not read, order, group that lends tiles, group to join)."""


def _loans(small: _Group, groups: Sequence[_Group], global_batch: int) -> Iterator[_Way]:
    """Groups that have all sensors of ``small``, and keep a global batch after they have completed that of it."""
    missing = global_batch - small.size
    for number, group in enumerate(groups):
        if {*group.absent} < {*small.absent} and group.size - missing >= global_batch:
            yield missing * (len(small.absent) - len(group.absent)), number, group, None


def _unions(
    small: _Group, groups: Sequence[_Group], sensors: Sequence[str], global_batch: int
) -> Iterator[_Way]:
    """Other small groups that share sensors with ``small``, and groups of any size of which it has all sensors."""
    for number, group in enumerate(groups):
        absent = {*group.absent, *small.absent}
        joins = group.size < global_batch or len(absent) == len(group.absent)
        if group is not small and joins and len(absent) < len(sensors):
            unread = sum(g.size * (len(absent) - len(g.absent)) for g in (group, small))
            yield unread, len(groups) + number, None, group


def _join_equal(groups: list[_Group], changed: _Group) -> None:
    """Join ``changed`` with the group of the same sensors, if there is one."""
    for group in groups:
        if group is not changed and group.absent == changed.absent:
            group.parts = sorted([*group.parts, *changed.parts])
            groups.remove(changed)
            return


def _source(source: Source, group: _Group) -> Source:
    """The tiles of a group. The store is a copy: its counters and its prefetching are of one source."""
    counts, indices = source.counts.tolist(), []
    for shard, start, stop in group.parts:
        known = range(counts[shard]) if source.indices is None else source.indices[shard]
        indices.append(known[start:stop])
    shards = source.table.take(np.array([part.shard for part in group.parts], np.int64))
    whole = source.indices is None and [len(i) for i in indices] == shards.samples.tolist()
    return replace(
        source,
        shards=shards,
        indices=None if whole else indices,
        absent=group.absent,
        store=copy.copy(source.store),
    )
