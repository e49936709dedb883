"""Writing of a split: :func:`write_shards` for raw datasets, :class:`Writer` for tiles from any Python code.

The bytes depend on the tiles, the seed and the settings, not on the number of workers, parts or interruptions.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, InRuns, LeftOut, RawDataset, Tile
from maestro_scale.shards.errors import WriteError, one_line
from maestro_scale.shards.format.codec import encode
from maestro_scale.shards.format.fields import absent_of
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.format.values import checked_tile
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.progress import Progress, ProgressCounter
from maestro_scale.shards.storage import open_storage
from maestro_scale.shards.write.destination import Destination, staging_folder
from maestro_scale.shards.write.from_arrays import DateLike, make_tile
from maestro_scale.shards.write.grouping import Absent, Group, group_keys, plan_shards, survey
from maestro_scale.shards.write.packing import (
    EncodedTile,
    PlannedShard,
    WritePlan,
    WrittenShard,
    write_shard,
)
from maestro_scale.shards.write.part import WHOLE_SPLIT, WriterPart
from maestro_scale.shards.write.spool import WriteSpooled, rounds, spooled

_PROBED_SAMPLES = 8  # their mean size determines the number of samples per shard
_PROBED_FAILURES = 200  # without one readable sample among them, the others are not tried
_PROBED_LEFT_OUT = 1000  # by a rule: so few are left that one shard holds them


def write_shards(
    dataset: RawDataset,
    dst: str,
    split: str,
    *,
    workers: int = 1,
    codec: str = "raw",
    shard_mb: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
    strict: bool = True,
    part: WriterPart = WHOLE_SPLIT,
    synthetic: bool | None = None,
) -> Manifest | None:
    """Write every tile of ``dataset`` as split ``split`` of the shards at ``dst`` (folder or fsspec URL).

    Shards that an earlier, interrupted call finished are kept. The manifest is published last; if one exists, the split
    is added to it. ``progress(samples done, total samples, bytes written)`` is called repeatedly. With
    ``strict=False``, tiles that cannot be read are left out, counted by kind in the manifest's notes, with the first
    example of each, and listed with their causes in the index. A strict call does not accept shards that an earlier one
    wrote without such tiles: it writes them again, or fails if they are published or belong to another part. A strict
    call also fails at the first value that is invalid though nothing declares it as nodata.

    ``part``: write only these shards, as one of several jobs with the same arguments, on any machines. The job that
    finds all shards finished publishes the manifest, which is the same as that of a single call; the others return
    None. If a part fails, call it again: it writes what is missing. If tiles or arguments changed between parts, the
    later one raises WriteError, which says what to call again. ``synthetic``: whether the tiles are synthetic scenes,
    as recorded in the manifest; None: unknown.

    Raises DatasetError for a tile that cannot be read, does not match its spec or has invalid values, WriteError if
    ``dst`` cannot be written or contains something else.
    """
    keys = dataset.keys()
    with Destination(dst, dataset.spec, split, codec, seed, part, synthetic) as destination:
        if len(set(keys)) < len(keys):
            raise WriteError(
                f"split {split}: {len(keys) - len(set(keys))} keys are repeated; make them unique"
            )
        groups = group_keys(survey(dataset, workers), seed)
        order = [key for group in groups for key in group.keys]
        planned = _plan_shards(dataset, groups, split, codec, shard_mb, strict)
        plan = destination.make_plan(order, planned, getattr(dataset, "settings", ""))
        finished = destination.finished_shards(plan, strict)
        sizes = {i: s.stop - s.start for i, s in enumerate(plan.shards) if part.includes(i)}
        missing = [i for i in sizes if i not in finished]
        tracker = ProgressCounter(
            sum(num for i, num in sizes.items() if i in finished), sum(sizes.values()), progress
        )
        work = _WriteShard(dataset, destination.url, plan, codec, strict)
        jobs = [(i, tuple(order[plan.shards[i].start : plan.shards[i].stop])) for i in missing]
        for number, index in _written(
            work, jobs, workers, shard_mb * 1_000_000, destination.staging, tracker
        ):
            finished[number] = index
        if part.count > 1:
            # List again: other parts may have finished shards in the meantime.
            finished = destination.finished_shards(plan, strict)
        if len(finished) == plan.num_shards:
            return destination.publish(plan, finished)
        destination.refuse_other_plans(plan)
        return None


class Writer:
    """Writes tiles from your own code, one split at a time::

        with Writer("shards/mine", spec, "train") as writer:
            for key, image, day in tiles:
                writer.add_arrays(key, {"s2": image}, {"s2": day})

    ``strict``: fail at the first value that is invalid though nothing declares it as nodata, instead of marking it.
    Tiles may be added in any order. They are encoded into a temporary file and, when the block ends, written shuffled,
    exactly as :func:`write_shards` would. If the block ends by an exception, nothing is written.
    """

    def __init__(
        self,
        dst: str,
        spec: DatasetSpec,
        split: str,
        *,
        codec: str = "raw",
        shard_mb: int = 128,
        seed: int = 0,
        synthetic: bool | None = None,
        strict: bool = False,
    ) -> None:
        self._strict = strict
        self._destination = Destination(dst, spec, split, codec, seed, synthetic=synthetic)
        self._spec, self._codec, self._seed = spec, codec, seed
        self._shard_bytes = shard_mb * 1_000_000
        self._spooled: dict[str, _Spooled] = {}

    def __enter__(self) -> Writer:
        self._destination.__enter__()
        # An unnamed file, so that nothing remains after a kill.
        self._spool = tempfile.TemporaryFile(dir=self._destination.staging)  # closed by __exit__
        return self

    def add(self, tile: Tile) -> None:
        """Add a tile; series that are not in chronological order are sorted, invalid values of rasters that store
        nodata are marked, and both is noted.

        DatasetError if it does not match the spec or has invalid values, WriteError if its key was added before.
        """
        tile = checked_tile(tile, self._spec, self._strict)
        if tile.key in self._spooled:
            raise WriteError(f"tile {tile.key} was added twice; keys are unique within a split")
        payload = encode(tile, self._codec)
        try:
            start = self._spool.seek(0, os.SEEK_END)
            self._spool.write(payload)
            self._spool.flush()
        except OSError as error:
            raise WriteError(
                f"{self._destination.staging}: the temporary file cannot be written ({error.strerror}); "
                "free some disk space"
            ) from error
        absent = absent_of(tile, self._spec)
        self._spooled[tile.key] = _Spooled(start, len(payload), (*tile.notes, *_absent_notes(absent)), absent)

    def add_arrays(
        self,
        key: str,
        arrays: Mapping[str, np.ndarray],
        dates: Mapping[str, DateLike | Sequence[DateLike]],
        *,
        masks: Mapping[str, np.ndarray] | None = None,
        targets: Mapping[str, Any] | None = None,
        ref_date: DateLike | None = None,
    ) -> None:
        """Add a tile given as arrays by raster; arguments of :func:`.from_arrays.make_tile`, raises as :meth:`add`."""
        self.add(make_tile(self._spec, key, arrays, dates, masks=masks, targets=targets, ref_date=ref_date))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            # On a full disk closing fails again, and its error would hide the first one.
            with suppress(OSError):
                self._spool.close()
            self._destination.__exit__(kind, error, trace)

    def _write(self) -> None:
        destination = self._destination
        groups = group_keys({key: tile.absent for key, tile in self._spooled.items()}, self._seed)
        order = [key for group in groups for key in group.keys]
        if not order:
            raise _nothing_readable(destination.split)
        planned = plan_shards(groups, lambda keys: _mean_bytes(self._read(keys)), self._shard_bytes)
        plan = destination.make_plan(order, planned)
        shards = destination.finished_shards(plan)
        for number, shard in enumerate(plan.shards):
            if number not in shards:
                packed = self._read(order[shard.start : shard.stop])
                shards[number] = write_shard(
                    destination.storage, destination.staging, plan, number, packed, _ignore_report
                )
        destination.publish(plan, shards)

    def _read(self, keys: Sequence[str]) -> Iterator[EncodedTile]:
        for key in keys:
            spooled = self._spooled[key]
            self._spool.seek(spooled.start)
            yield EncodedTile(key, self._spool.read(spooled.size), spooled.notes)


class _Spooled(NamedTuple):
    """A tile in the temporary file of a Writer; ``absent``: the modalities that it lacks."""

    start: int
    size: int
    notes: tuple[str, ...]
    absent: Absent


@dataclass(frozen=True)
class _WriteShard:
    """Job function of the writer processes; a job is a shard's number and its keys."""

    dataset: RawDataset
    dst: str
    plan: WritePlan
    codec: str
    strict: bool

    def __call__(self, job: tuple[int, tuple[str, ...]], report: ReportFunction) -> WrittenShard:
        number, keys = job
        absent = self.plan.shards[number].absent
        packed = _encode_each(self.dataset, keys, self.codec, self.strict, absent)
        with staging_folder(self.dst) as staging:
            return write_shard(open_storage(self.dst), staging, self.plan, number, packed, report)


def _plan_shards(
    dataset: RawDataset, groups: Sequence[Group], split: str, codec: str, shard_mb: int, strict: bool
) -> list[PlannedShard]:
    """WriteError if no tile of any group can be read, or none of the first few hundred of one."""
    failures: list[EncodedTile] = []
    absent = {group.keys[0]: group.absent for group in groups}
    num_empty = 0

    def mean_bytes(keys: Sequence[str]) -> float:
        nonlocal num_empty
        found: list[EncodedTile] = []
        mean = _mean_bytes(_encode_each(dataset, keys, codec, strict, absent[keys[0]]), found)
        num_failed = sum(not item.by_rule for item in found)
        if not mean and num_failed == _PROBED_FAILURES and len(found) < len(keys):
            # They are a random sample: to read all others would take hours, and tell nothing new.
            raise _nothing_readable(split, found, f"the first {len(found)} of {len(keys)}")
        num_empty += not mean and len(found) == len(keys)
        failures.extend(found)
        return mean

    shards = plan_shards(groups, mean_bytes, shard_mb * 1_000_000)
    if num_empty == len(groups):
        raise _nothing_readable(split, failures)
    return shards


def _written(
    work: _WriteShard,
    jobs: Sequence[tuple[int, tuple[str, ...]]],
    workers: int,
    shard_bytes: int,
    staging: Path,
    report: ReportFunction,
) -> Iterator[tuple[int, WrittenShard]]:
    """(number, shard) of each job, in order of completion."""
    if not isinstance(work.dataset, InRuns):
        for position, shard in run_jobs(work, jobs, workers, report):
            yield jobs[position][0], shard
        return
    keys_of = dict(jobs)
    for numbers in rounds([number for number, _ in jobs], shard_bytes, staging, work.dst):
        keys = [key for number in numbers for key in keys_of[number]]
        shards = work.plan.shards
        absent = {key: shards[n].absent for n in numbers if shards[n].absent for key in keys_of[n]}
        encode_tile = _Encode(work.dataset, work.codec, work.strict, absent)
        prefix = staging / f".{work.plan.shard_name(numbers[0])}.spool"
        with spooled(work.dataset, encode_tile, keys, prefix, workers, report) as tiles:
            later = [(number, tuple(tiles[key] for key in keys_of[number])) for number in numbers]
            for position, shard in run_jobs(WriteSpooled(work.dst, work.plan), later, workers, report):
                yield numbers[position], shard


def _encode_each(
    dataset: RawDataset, keys: Sequence[str], codec: str, strict: bool, absent: Absent
) -> Iterator[EncodedTile]:
    """``absent``: the modalities that these tiles lack."""
    encode_tile = _Encode(dataset, codec, strict, dict.fromkeys(keys, absent))
    yield from map(encode_tile, keys)


@dataclass(frozen=True)
class _Encode:
    """Reads and encodes one tile. ``absent``: the modalities that tiles lack, by key; others lack none."""

    dataset: RawDataset
    codec: str
    strict: bool
    absent: Mapping[str, Absent]

    def __call__(self, key: str) -> EncodedTile:
        try:
            tile = self._checked(key)
            notes = (*tile.notes, *_absent_notes(self.absent.get(key, ())))
            return EncodedTile(key, encode(tile, self.codec), notes)
        except LeftOut as rule:
            return EncodedTile(key, None, cause=one_line(rule), kind=rule.kind, by_rule=True)
        except DatasetError as error:
            if self.strict:
                raise
            return EncodedTile(key, None, cause=one_line(error), kind=error.kind)

    def _checked(self, key: str) -> Tile:
        spec, absent = self.dataset.spec, self.absent.get(key, ())
        tile = self.dataset.read(key)
        if tile.key != key:
            raise DatasetError(f"tile {key}: the reader returned tile {tile.key}; fix the reader")
        tile = checked_tile(tile, spec, self.strict)
        if (found := absent_of(tile, spec)) != absent:
            raise DatasetError(
                f"tile {key}: lacks {', '.join(found) or 'nothing'}, but was announced to lack "
                f"{', '.join(absent) or 'nothing'}; fix the reader",
                kind="other modalities than announced",
            )
        return tile


def _absent_notes(absent: Absent) -> Iterator[str]:
    if absent:
        yield f"lacks {', '.join(absent)}"


def _mean_bytes(packed: Iterator[EncodedTile], failures: list[EncodedTile] | None = None) -> float:
    """Mean size in a tar of the first few samples; 0 without any. Tiles without one are appended to ``failures``.

    A tile that a rule leaves out counts as 0 bytes: where most of a grid is empty, shards have more keys, not fewer
    bytes. One that cannot be read does not count: that is rare, and must not change the bounds of shards.

    An estimate from a few samples, so that shards have a fixed number of keys before any of them is written: then they
    can be written in parallel, and an interrupted run gets the same bounds again.
    """
    sizes = []
    num_by_rule = num_failed = 0
    for item in packed:
        if item.payload is not None:
            sizes.append(len(item.payload) + 1024)  # header, and padding to full blocks
        else:
            num_by_rule += item.by_rule
            num_failed += not item.by_rule
            if failures is not None:
                failures.append(item)
        if len(sizes) == _PROBED_SAMPLES or num_by_rule == _PROBED_LEFT_OUT:
            break
        if len(sizes) + num_failed == _PROBED_FAILURES:
            break
    return sum(sizes) / (len(sizes) + num_by_rule) if sizes else 0.0


def _nothing_readable(split: str, failures: Sequence[EncodedTile] = (), which: str = "") -> WriteError:
    """``which``: of the tiles were tried; empty: all. A line for each kind of failure, with the first example."""
    message = f"split {split}: none of {which or 'its'} tiles can be read, nothing is written"
    first = {item.kind: item.cause for item in reversed(failures)}
    counts = Counter(item.kind for item in failures)
    if len(counts) == 1:
        return WriteError(f"{message}; the first: {failures[0].cause}")
    lines = (f"  {num} tiles: {kind} (first: {first[kind]})" for kind, num in counts.most_common())
    return WriteError("\n".join((message, *lines)))


def _ignore_report(samples: int, num_bytes: int) -> None:
    """Ignore progress."""
