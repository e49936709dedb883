"""Tiles that are cheap to read beside their neighbours: read in that order, written in the stored one.

The stored order is shuffled over the whole split, so consecutive samples of a shard lie anywhere in a scene, and
reading them so would decompress each block of a file once for every tile in it. A dataset that offers ``runs``
(:class:`InRuns`) is therefore read along its runs, several shards at once; the encoded tiles go to temporary files
beside the shards, from which the shards are then written. The bytes of the shards are the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from maestro_scale.datasets.spec import InRuns, RawDataset
from maestro_scale.shards.errors import WriteError
from maestro_scale.shards.jobs import ReportFunction, run_jobs
from maestro_scale.shards.storage import RemoteStorage, open_storage
from maestro_scale.shards.write.destination import staging_folder
from maestro_scale.shards.write.packing import EncodedTile, WritePlan, WrittenShard, write_shard

_FREE_SHARE = 0.8  # of the free space that temporary files may take


Encode = Callable[[str], EncodedTile]
"""Reads and encodes a tile of a dataset. Picklable."""


@dataclass(frozen=True)
class _Spooled:
    """Where an encoded tile is. ``without``: the tile without its bytes; a tile that is left out has no place."""

    without: EncodedTile
    path: Path | None = None
    start: int = 0
    size: int = 0

    def load(self) -> EncodedTile:
        """The tile with its bytes."""
        if self.path is None:
            return self.without
        with self.path.open("rb") as file:
            file.seek(self.start)
            payload = file.read(self.size)
        if len(payload) != self.size:
            raise WriteError(f"{self.path}: was changed while it was in use; run the same command again")
        return self.without.with_payload(payload)


def rounds(shards: Sequence[int], shard_bytes: int, staging: Path, dst: str) -> list[list[int]]:
    """The shards in groups whose tiles fit on the disk at once, beside the shards themselves where these are local."""
    free = shutil.disk_usage(staging).free * _FREE_SHARE
    if not isinstance(open_storage(dst), RemoteStorage):
        free -= len(shards) * shard_bytes
    at_once = max(1, int(free // shard_bytes))
    return [list(shards[i : i + at_once]) for i in range(0, len(shards), at_once)]


@contextmanager
def spooled(
    dataset: RawDataset,
    encode: Encode,
    keys: Sequence[str],
    prefix: Path,
    workers: int,
    report: ReportFunction,
) -> Iterator[Mapping[str, _Spooled]]:
    """The encoded tiles by key, read along the runs of the dataset; their files are removed at the end.

    ``prefix``: path of the files; the process is added.
    """
    assert isinstance(dataset, InRuns)
    work = _SpoolRun(dataset, encode, prefix)
    found: dict[str, _Spooled] = {}
    try:
        for _, tiles in run_jobs(work, dataset.runs(keys), workers, report):
            found.update(tiles)
        yield found
    finally:
        for path in prefix.parent.glob(f"{prefix.name}.*.tmp"):
            with suppress(OSError):
                path.unlink()


@dataclass(frozen=True)
class _SpoolRun:
    """Job function of the writer processes; a job is the keys of a run. Each process appends to a file of its own."""

    dataset: InRuns
    encode: Encode
    prefix: Path

    def __call__(self, job: Sequence[str], report: ReportFunction) -> dict[str, _Spooled]:
        path = self.prefix.with_name(f"{self.prefix.name}.{os.getpid()}.tmp")
        found = {}
        try:
            with path.open("ab") as file, self.dataset.run(job):
                for key in job:
                    tile = self.encode(key)
                    if tile.payload is None:
                        found[key] = _Spooled(tile)
                    else:
                        start = file.tell()
                        file.write(tile.payload)
                        found[key] = _Spooled(tile.with_payload(None), path, start, len(tile.payload))
                    report(1, found[key].size)
        except OSError as error:
            raise WriteError(
                f"{path}: cannot be written ({error.strerror}); free some disk space, or choose another folder"
            ) from error
        return found


@dataclass(frozen=True)
class WriteSpooled:
    """Job function of the writer processes; a job is a shard's number and its tiles, in the stored order."""

    dst: str
    plan: WritePlan

    def __call__(self, job: tuple[int, tuple[_Spooled, ...]], report: ReportFunction) -> WrittenShard:
        number, tiles = job
        with staging_folder(self.dst) as staging:
            packed = (tile.load() for tile in tiles)
            return write_shard(open_storage(self.dst), staging, self.plan, number, packed, _counted)


def _counted(samples: int, num_bytes: int) -> None:
    """Ignore progress: the tiles counted when they were read."""
