"""Write the embeddings of a split: a Parquet file per shard, or georeferenced images of the token grids per tile.

A file is renamed into place once it is complete, so the same command run again writes only what is missing. Ranks take
every n-th shard and need no communication. ``_embedding.json`` records what the files contain: embeddings of another
model are refused in the same folder. Each file names its shard and a digest of that record, since files can be copied
from another folder; one that does not match is written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor

from maestro_scale import untrusted
from maestro_scale.datasets import geoparquet
from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.escaping import file_name, ignores_case, printable
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.features.cache import weights_digest
from maestro_scale.evaluation.features.missing import tile_vector
from maestro_scale.evaluation.features.on_device import RecipePrecision, eval_precision, map_on_device
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.tile_maps import georeference
from maestro_scale.model.maestro import Maestro
from maestro_scale.output_folder import check_output
from maestro_scale.shards.format.codec import Sample
from maestro_scale.shards.format.fields import dates_field
from maestro_scale.shards.format.manifest import Manifest, ShardInfo
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.crops import CropGrid
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import write_atomically
from maestro_scale.unfinished import Unfinished

METADATA_FILE = "_embedding.json"  # readers of Parquet folders skip names with an underscore
INDEX_FILE = "index.jsonl"
"""In a folder of images: a line per image with ``file``, ``key``, ``crop`` and ``sensor``."""
_SHARD_KEY = (
    "maestro_scale.shard_sha256"  # in the metadata of a Parquet file, or a file in a folder of images
)

_RECORD_KEY = "maestro_scale.embedding_sha256"  # likewise

What = Literal["vector", "tokens"]
Day = tuple[int, int]
"""Year, day of the year."""
Format = Literal["parquet", "tiff"]


@dataclass(frozen=True)
class EmbeddingRows:
    """Embeddings ``arrays`` (N, …) of N crops, by name.

    ``keys``: of their tiles; ``origins``: of the tiles on the ground, None where the shards have none; ``crops`` (N,):
    number of the crop on its tile. ``first_days``, ``last_days``: of the images of the tiles.
    """

    keys: Sequence[str]
    origins: Sequence[GeoOrigin | None]
    crops: np.ndarray
    arrays: dict[str, np.ndarray]
    first_days: Sequence[Day | None]
    last_days: Sequence[Day | None]


@dataclass(frozen=True)
class EmbeddingWriter:
    """Embeds splits of a dataset. ``what``: a vector per crop, or each sensor's token grid; ``format``: of files.
    ``precision``: on a device other than the CPU, where it is always fp32 (``eval_precision``)."""

    model: Maestro
    store: Store
    manifest: Manifest
    what: What = "vector"
    format: Format = "parquet"
    batch_size: int = 32
    workers: int = 0
    precision: RecipePrecision = "auto"

    def __post_init__(self) -> None:
        if (self.what, self.format) == ("vector", "tiff"):
            raise EvaluationError("a vector is not an image: --format tiff needs --what tokens")

    def write(
        self,
        out: Path,
        split: str,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> int:
        """Write what is missing of this rank's share under ``out``; returns the number of crops written.

        Parquet: ``<shard>.parquet`` with columns ``key``, ``crop``, ``north_m``, ``west_m`` (upper left corner of the
        crop on its tile), ``crs``, ``x_m``, ``y_m`` (the same corner on the ground, null where the shards have no
        origin), ``first_date`` and ``last_date`` of the tile's images, a fixed-size list of float32 per array, its
        shape in the metadata of the field, and ``geometry``, the crop as a polygon (GeoParquet; null without origin, no
        such column without pyproj). TIFF: ``<shard>/<key>.<crop>.<sensor>.tif``, a COG with a band per channel, the
        mean over dates; the key is escaped (``escaping.file_name``), its original form is in the tag ``key`` of the
        image and in ``<shard>/index.jsonl``.
        Of tiles that lack sensors, a vector has the usual length (``features.missing``); token grids of these sensors
        are left out.
        ManifestError where there is no such split, EvaluationError where ``out`` holds embeddings of something else;
        BadShard, StoreError.
        """
        shards = self.manifest.shards_of([split])
        share = shards[rank::world]
        record = self._record()
        unfinished = Unfinished(out, file_name(split))
        unfinished.remove_abandoned()
        self._check_paths(out, shards)
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        # Files of earlier revisions name no record: then the one of the folder says what they contain.
        accepted = {digest, None} if _check_folder(out, record, unfinished) else {digest}
        todo = [shard for shard in share if not self._is_written(self._path(out, shard), shard, accepted)]
        done = 0
        if todo:
            source = self._source(todo)
            grid = CropGrid(source.spec)
            total = sum(s.samples for s in todo) * grid.num_crops
            for shard, rows in self._by_shard(source):
                self._save(self._path(out, shard), unfinished.new(), shard, rows, grid, digest)
                done += len(rows.keys)
                if progress:
                    progress(done, total, sum(a.nbytes for a in rows.arrays.values()))
        if all(self._is_written(self._path(out, shard), shard, accepted) for shard in shards):
            unfinished.remove()
        return done

    def _record(self) -> dict[str, str]:
        """What the files contain."""
        return {
            "dataset": self.manifest.spec.name,
            "what": self.what,
            "format": self.format,
            "weights": self._weights,
            "precision": eval_precision(self._device, self.precision),
            "spec": hashlib.sha256(repr(self.manifest.spec).encode()).hexdigest(),
        }

    def _check_paths(self, out: Path, shards: Sequence[ShardInfo]) -> None:
        """EvaluationError if ``out`` has no record and holds files of others that would be replaced: their names are
        chosen by the manifest."""
        if _read_record(out / METADATA_FILE) is not None:
            return
        check_output(out)
        for path in (self._path(out, shard) for shard in shards):
            if os.path.lexists(path) and not self._is_embedding(path):
                raise EvaluationError(
                    f"{path} exists, but {out} holds no embeddings (it has no {METADATA_FILE}): use another folder"
                )

    def _is_embedding(self, path: Path) -> bool:
        try:
            return self._sources(path)[0] is not None
        except (OSError, ValueError, pa.ArrowInvalid):
            return False

    def _is_written(self, path: Path, shard: ShardInfo, accepted: Set[str | None]) -> bool:
        """Whether the complete file of this shard exists; a shard with another sha256 is embedded again.

        ``accepted``: digests of the record.
        """
        try:
            sha256, record = self._sources(path)
        except (OSError, ValueError, pa.ArrowInvalid):
            return False
        return sha256 == shard.sha256 and record in accepted

    def _sources(self, path: Path) -> tuple[str | None, str | None]:
        """(SHA-256 of the shard, digest of the record) that a file, or a folder of images, names."""
        if self.format == "tiff":
            record = path / _RECORD_KEY
            return (path / _SHARD_KEY).read_text(), record.read_text() if record.exists() else None
        metadata = parquet.read_metadata(path).metadata or {}  # at the end: a truncated file has none
        sha256, digest = (metadata.get(key.encode()) for key in (_SHARD_KEY, _RECORD_KEY))
        return sha256 and sha256.decode(), digest and digest.decode()

    def _path(self, out: Path, shard: ShardInfo) -> Path:
        # With its folders: two shards of one name in different folders would replace each other's embeddings.
        suffix = ".parquet" if self.format == "parquet" else ""
        return out / file_name(shard.path.removesuffix(".tar"), suffix)

    def _source(self, shards: Sequence[ShardInfo]) -> Source:
        return Source(encoder_spec(self.model, self.manifest.spec), tuple(shards), self.store)

    def _by_shard(self, source: Source) -> Iterator[tuple[ShardInfo, EmbeddingRows]]:
        """Shards in order, each as soon as all of its crops are embedded. Batches span shards, so small
        shards do not make small batches."""
        pin = self._device.type != "cpu"
        loader = EvalLoader(source, self.batch_size, workers=self.workers, pin=pin)
        pending: list[dict[str, np.ndarray]] = []
        num_pending = 0
        shards = deque(source.shards)
        sources = {s.source for s in source.spec.sensors}
        for arrays in self._embed_batches(loader):
            pending.append(arrays)
            num_pending += len(next(iter(arrays.values())))
            while shards and num_pending >= (size := shards[0].samples * loader.num_crops):
                shard = shards.popleft()
                joined = {name: np.concatenate([p[name] for p in pending]) for name in pending[0]}
                with source.store.shard(shard) as tiles:
                    of_crops = [
                        row
                        for row in ((t.key, t.origin, *_days(t, sources)) for t in tiles)
                        for _ in range(loader.num_crops)
                    ]
                    keys, origins, first, last = zip(*of_crops, strict=True)
                crops = np.tile(np.arange(loader.num_crops), shard.samples)
                yield (
                    shard,
                    EmbeddingRows(
                        keys, origins, crops, {name: a[:size] for name, a in joined.items()}, first, last
                    ),
                )
                num_pending -= size
                # Nothing rather than empty arrays: the tiles of the next shard may have other sensors.
                pending = [{name: a[size:] for name, a in joined.items()}] if num_pending else []

    def _embed_batches(self, loader: EvalLoader) -> Iterator[dict[str, np.ndarray]]:
        def embed(batch: Batch) -> dict[str, Tensor]:
            if self.what == "vector":
                return {"vector": tile_vector(self.model, batch).float()}
            chosen = self.model.embed(batch).tokens
            return {name: t.float() for name, t in chosen.items()}

        for _, found in map_on_device(loader, embed, self._device, self.precision):
            # Copies, because they are kept until the shard is complete.
            yield {name: array.copy() for name, array in found.items()}

    @cached_property
    def _weights(self) -> str:
        return weights_digest(self.model)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _save(
        self, path: Path, partial: Path, shard: ShardInfo, rows: EmbeddingRows, grid: CropGrid, record: str
    ) -> None:
        sources = {_SHARD_KEY: shard.sha256, _RECORD_KEY: record}
        try:
            if self.format == "parquet":
                table = _table(rows, grid)
                weights = {geoparquet.WEIGHTS_KEY: self._weights}
                metadata = {**(table.schema.metadata or {}), **sources, **weights}
                parquet.write_table(table.replace_schema_metadata(metadata), partial)
            else:
                _write_images(partial, rows, grid)
                for name, digest in sources.items():
                    (partial / name).write_text(digest)
                shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                partial.unlink()
            raise


def _check_folder(out: Path, record: dict[str, str], unfinished: Unfinished) -> bool:
    """Record what the folder contains; every rank writes the same. Returns whether it was recorded before.

    EvaluationError if it holds something else.
    """
    path = out / METADATA_FILE
    recorded = _read_record(path)
    if recorded is None:
        path.unlink(missing_ok=True)  # damaged
        if _create(path, unfinished, json.dumps(record, indent=1)):
            return False
        recorded = _read_record(path) or {}  # another rank, or another job, was faster
    recorded.setdefault("precision", "fp32")  # of folders from before it was recorded
    differences = [f"{k} {recorded.get(k)}, now {v}" for k, v in record.items() if recorded.get(k) != v]
    if differences:
        raise EvaluationError(
            f"{out} holds embeddings of something else ({'; '.join(differences)}): use another folder"
        )
    return True


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        return untrusted.read_record(path) or None
    except (OSError, ValueError):
        return None


def _create(path: Path, unfinished: Unfinished, text: str) -> bool:
    """Create a file with its content at once; False if it exists, so that two jobs cannot both create it."""
    partial = unfinished.new()
    write_atomically(partial, text)
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return True


def _table(rows: EmbeddingRows, grid: CropGrid) -> pa.Table:
    """A row per crop."""
    corners = [grid.tiling(int(c)) for c in rows.crops]
    on_ground = list(zip(rows.origins, corners, strict=True))
    columns = {
        pa.field("key", pa.string()): pa.array(rows.keys),
        pa.field("crop", pa.int32()): pa.array(rows.crops.astype(np.int32)),
        pa.field("north_m", pa.float64()): pa.array([c.row_m for c in corners]),
        pa.field("west_m", pa.float64()): pa.array([c.column_m for c in corners]),
        pa.field("crs", pa.string()): pa.array([o and o.crs for o in rows.origins], pa.string()),
        pa.field("x_m", pa.float64()): pa.array(
            [o and o.west_m + c.column_m for o, c in on_ground], pa.float64()
        ),
        pa.field("y_m", pa.float64()): pa.array(
            [o and o.north_m - c.row_m for o, c in on_ground], pa.float64()
        ),
    }
    for name, days in (("first_date", rows.first_days), ("last_date", rows.last_days)):
        columns[pa.field(name, pa.date32())] = geoparquet.dates(days)
    for name, values in rows.arrays.items():
        flat = pa.FixedSizeListArray.from_arrays(values.ravel(), int(np.prod(values.shape[1:])))
        shape = "x".join(map(str, values.shape[1:]))
        columns[pa.field(name, flat.type, metadata={"shape": shape})] = flat
    table = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(list(columns)))
    if not geoparquet.can_place():
        return table
    squares = [
        None if o is None else geoparquet.square(o.shifted(c.column_m, c.row_m), grid.crop_m)
        for o, c in on_ground
    ]
    return geoparquet.with_geometry(table, squares, "Polygon")


def _write_images(folder: Path, rows: EmbeddingRows, grid: CropGrid) -> None:
    """A COG per crop and sensor, of the mean over dates."""
    try:
        import rasterio  # noqa: F401
    except ImportError:
        raise EvaluationError("--format tiff needs rasterio: pip install 'maestro-scale[datasets]'") from None
    folder.mkdir()
    ignore_case = ignores_case(folder)
    index: list[dict[str, object]] = []
    for name, tokens in rows.arrays.items():
        maps = tokens.mean(axis=1)  # (N, L, E)
        side = round(maps.shape[1] ** 0.5)
        cell_m = grid.crop_m / side
        for i, (key, origin, number, values) in enumerate(
            zip(rows.keys, rows.origins, rows.crops, maps, strict=True)
        ):
            corner = grid.tiling(int(number))
            file = file_name(key, f".{number}.{name}.tif", ignore_case)
            index.append({"file": file, "key": key, "crop": int(number), "sensor": name})
            with new_raster(
                folder / file,
                driver="COG",
                width=side,
                height=side,
                count=values.shape[1],
                dtype="float32",
                compress="deflate",
                **georeference(origin, cell_m, corner.row_m, corner.column_m),
            ) as image:
                image.write(values.T.reshape(-1, side, side))
                image.update_tags(
                    key=printable(key), first_date=_iso(rows.first_days[i]), last_date=_iso(rows.last_days[i])
                )
                image.descriptions = tuple(f"{name}_{band}" for band in range(values.shape[1]))
    # JSON escapes every character; the tag of an image cannot hold control characters.
    (folder / INDEX_FILE).write_text("".join(json.dumps(line) + "\n" for line in index))


def _days(sample: Sample, sources: Set[str]) -> tuple[Day, Day]:
    """The first and the last day of the tile's images of these modalities."""
    fields = [dates_field(name) for name in sources]
    rows = np.concatenate([sample.array(field) for field in fields if field in sample.names])
    days = [(int(year), int(day)) for year, day, _ in rows.tolist()]
    return min(days), max(days)


def _iso(day: Day | None) -> str:
    found = geoparquet.dates([day])[0].as_py()
    return "" if found is None else str(found.isoformat())
