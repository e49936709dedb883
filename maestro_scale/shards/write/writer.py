"""Writes a split as shards: in parallel, resumable, the same bytes for any number of workers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from maestro_scale.datasets.spec import DatasetError, DatasetSpec, RawDataset, Tile
from maestro_scale.shards.errors import WriteError, one_line
from maestro_scale.shards.format.codec import encode
from maestro_scale.shards.format.fields import check_tile
from maestro_scale.shards.format.index import ShardIndex
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.progress import Progress, ProgressCounter
from maestro_scale.shards.storage import open_storage
from maestro_scale.shards.write.destination import Destination, staging_folder
from maestro_scale.shards.write.from_arrays import DateLike, make_tile
from maestro_scale.shards.write.packing import EncodedTile, WritePlan, shard_bounds, shuffle_keys, write_shard
from maestro_scale.shards.write.part import WHOLE_SPLIT, WriterPart

_PROBED_SAMPLES = 8  # their mean size decides how many samples a shard has


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
) -> Manifest | None:
    """Write every tile of ``dataset`` as split ``split`` of the shards at ``dst`` (folder or fsspec URL).

    Shards that an earlier, interrupted call finished are kept. The manifest is published last, and joins a
    manifest of other splits that is there. ``progress(samples done, samples in all, bytes written)`` is
    called as it goes. With ``strict=False`` tiles that cannot be read are left out, counted by kind in the
    manifest's notes, with the first example of each, and listed with their causes in the index.

    ``part``: write only its shards, as one of several jobs with the same arguments, on any machines. The one
    that finds all shards finished publishes the manifest, the same as a single call would; the others, and
    any part whose fellows have died, return None. A part called again writes what it lacks.

    Raises DatasetError for a tile that cannot be read or does not match its spec, WriteError if ``dst``
    cannot be written or holds something else.
    """
    keys = dataset.keys()
    with Destination(dst, dataset.spec, split, codec, seed, part) as destination:
        if len(set(keys)) < len(keys):
            raise WriteError(
                f"split {split}: {len(keys) - len(set(keys))} keys are there twice; make them unique"
            )
        order = shuffle_keys(keys, seed)
        mean_bytes = _mean_bytes(_encode_each(dataset, order, codec, strict), split)
        bounds = shard_bounds(len(order), mean_bytes, shard_mb * 1_000_000)
        plan = destination.make_plan(order, bounds)
        finished = destination.finished_shards(plan)
        mine = {i: stop - start for i, (start, stop) in enumerate(bounds) if part.includes(i)}
        missing = [i for i in mine if i not in finished]
        tracker = ProgressCounter(
            sum(num for i, num in mine.items() if i in finished), sum(mine.values()), progress
        )
        work = _WriteShard(dataset, destination.url, plan, codec, strict)
        jobs = [(i, tuple(order[slice(*bounds[i])])) for i in missing]
        for position, index in run_jobs(work, jobs, workers, tracker):
            finished[missing[position]] = index
        if part.count > 1:
            # Again, since other parts have gone on meanwhile.
            finished = destination.finished_shards(plan)
        return destination.publish(plan, finished) if len(finished) == len(bounds) else None


class Writer:
    """Writes tiles that you make yourself, one split at a time::

        with Writer("shards/mine", spec, "train") as writer:
            for key, image, day in mine:
                writer.add_arrays(key, {"s2": image}, {"s2": day})

    The order in which tiles are added does not matter: they are put aside in a temporary file and written,
    shuffle_keys, at the end, exactly as :func:`write_shards` would. Leaving the block by an exception writes
    nothing.
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
    ) -> None:
        self._destination = Destination(dst, spec, split, codec, seed)
        self._spec, self._codec, self._seed = spec, codec, seed
        self._shard_bytes = shard_mb * 1_000_000
        self._spooled: dict[str, tuple[int, int, tuple[str, ...]]] = {}

    def __enter__(self) -> Writer:
        self._destination.__enter__()
        # Nameless, so that a kill leaves nothing behind.
        self._spool = tempfile.TemporaryFile(dir=self._destination.staging)  # closed by __exit__
        return self

    def add(self, tile: Tile) -> None:
        """Take one tile; DatasetError if it does not match the spec, WriteError for a key that was there."""
        check_tile(tile, self._spec)
        if tile.key in self._spooled:
            raise WriteError(f"tile {tile.key} was added twice; keys are unique within a split")
        payload = encode(tile, self._codec)
        try:
            start = self._spool.seek(0, os.SEEK_END)
            self._spool.write(payload)
            self._spool.flush()
        except OSError as error:
            raise WriteError(
                f"{self._destination.staging}: tiles cannot be put aside ({error.strerror}); free some space"
            ) from error
        self._spooled[tile.key] = (start, len(payload), tile.notes)

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
        """As :meth:`add`, for a tile as :func:`.from_arrays.make_tile` makes it of arrays by raster."""
        self.add(make_tile(self._spec, key, arrays, dates, masks=masks, targets=targets, ref_date=ref_date))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            # On a full disk closing fails as writing did, and would hide why.
            with suppress(OSError):
                self._spool.close()
            self._destination.__exit__(kind, error, trace)

    def _write(self) -> None:
        destination = self._destination
        order = shuffle_keys(list(self._spooled), self._seed)
        bounds = shard_bounds(
            len(order), _mean_bytes(self._read(order), destination.split), self._shard_bytes
        )
        plan = destination.make_plan(order, bounds)
        shards = destination.finished_shards(plan)
        for number, (start, stop) in enumerate(bounds):
            if number not in shards:
                packed = self._read(order[start:stop])
                shards[number] = write_shard(
                    destination.storage, destination.staging, plan, number, packed, _no_report
                )
        destination.publish(plan, shards)

    def _read(self, keys: Sequence[str]) -> Iterator[EncodedTile]:
        for key in keys:
            start, size, notes = self._spooled[key]
            self._spool.seek(start)
            yield EncodedTile(key, self._spool.read(size), notes)


@dataclass(frozen=True)
class _WriteShard:
    """The work of a writer process; a job is a shard's number and keys."""

    dataset: RawDataset
    dst: str
    plan: WritePlan
    codec: str
    strict: bool

    def __call__(self, job: tuple[int, tuple[str, ...]], report: ReportFunction) -> ShardIndex:
        number, keys = job
        packed = _encode_each(self.dataset, keys, self.codec, self.strict)
        with staging_folder(self.dst) as staging:
            return write_shard(open_storage(self.dst), staging, self.plan, number, packed, report)


def _encode_each(dataset: RawDataset, keys: Sequence[str], codec: str, strict: bool) -> Iterator[EncodedTile]:
    for key in keys:
        try:
            tile = dataset.read(key)
            if tile.key != key:
                raise DatasetError(f"tile {key}: the reader gave tile {tile.key}; mend the reader")
            check_tile(tile, dataset.spec)
            yield EncodedTile(key, encode(tile, codec), tile.notes)
        except DatasetError as error:
            if strict:
                raise
            yield EncodedTile(key, None, cause=one_line(error), kind=error.kind)


def _mean_bytes(packed: Iterator[EncodedTile], split: str) -> float:
    """Mean size in a tar of the first few samples that can be read."""
    sizes, cause = [], ""
    for item in packed:
        cause = cause or item.cause
        if item.payload is not None:
            sizes.append(len(item.payload) + 1024)
        if len(sizes) == _PROBED_SAMPLES:
            break
    if not sizes:
        why = f"; the first: {cause}" if cause else ""
        raise WriteError(f"split {split}: has no tile that can be read, nothing is written{why}")
    return sum(sizes) / len(sizes)


def _no_report(samples: int, num_bytes: int) -> None:
    """For those who do not watch."""
