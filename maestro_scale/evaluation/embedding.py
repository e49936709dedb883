"""Embeddings of a whole split, written beside the shards they come from: a file per shard, or an image per tile.

Files appear whole or not at all, so that the same command again does what is missing; ranks take shards in turn and say
nothing to each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch

from maestro_scale.evaluation.results import ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.manifest import Manifest, ShardInfo
from maestro_scale.shards.store import Store
from maestro_scale.stream.crops import CropGrid
from maestro_scale.stream.evaluation import EvalLoader
from maestro_scale.stream.source import Source

What = Literal["vector", "tokens"]
Format = Literal["parquet", "tiff"]


@dataclass(frozen=True)
class Rows:
    """What the encoder makes of N crops. ``crops`` (N,): number of the crop on its tile; ``arrays`` (N, …) by name."""

    keys: Sequence[str]
    crops: np.ndarray
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Embedder:
    """How a split is embedded. ``what``: a vector per crop, or each sensor's token grid; ``format``: of the files."""

    model: Maestro
    store: Store
    manifest: Manifest
    what: What = "vector"
    format: Format = "parquet"
    batch_size: int = 32
    workers: int = 0

    def __post_init__(self) -> None:
        if (self.what, self.format) == ("vector", "tiff"):
            raise ResultsError("a vector is no image: --format tiff needs --what tokens")

    def write(
        self,
        out: Path,
        split: str,
        rank: int = 0,
        world: int = 1,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> int:
        """Write what is missing of this rank's share under ``out``; how many crops that were.

        Parquet: ``<shard>.parquet`` with columns ``key``, ``crop``, ``north_m``, ``west_m`` (the crop's upper left
        corner on its tile) and a fixed-size list of float32 per array, its shape in the field's metadata. TIFF:
        ``<shard>/<key>.<crop>.<sensor>.tif``, a band per channel, the mean over dates. ManifestError where there is no
        such split; BadShard, StoreError.
        """
        mine = self.manifest.of([split])[rank::world]
        todo = [shard for shard in mine if not self._path(out, shard).exists()]
        if not todo:
            return 0
        out.mkdir(parents=True, exist_ok=True)
        source = self._source(todo)
        grid = CropGrid(source.spec, source.sensors, source.crop_m)
        done, total = 0, sum(s.samples for s in todo) * grid.num_crops
        for shard, rows in self._by_shard(source):
            self._save(self._path(out, shard), rows, grid)
            done += len(rows.keys)
            if progress:
                progress(done, total, sum(a.nbytes for a in rows.arrays.values()))
        return done

    def _path(self, out: Path, shard: ShardInfo) -> Path:
        stem = out / Path(shard.path).stem
        return stem.with_suffix(".parquet") if self.format == "parquet" else stem

    def _source(self, shards: Sequence[ShardInfo]) -> Source:
        spec = self.manifest.spec
        return Source(spec, self.model.view(spec.name).sensors, spec.crop_m, tuple(shards), self.store)

    def _by_shard(self, source: Source) -> Iterator[tuple[ShardInfo, Rows]]:
        """Shards in order, each once all of its crops are embedded."""
        loader = EvalLoader(source, self.batch_size, workers=self.workers)
        pending: list[dict[str, np.ndarray]] = []
        held = 0
        shards = iter(source.shards)
        shard = next(shards)
        for arrays in self._embedded(loader):
            pending.append(arrays)
            held += len(next(iter(arrays.values())))
            while shard is not None and held >= (size := shard.samples * loader.num_crops):
                whole = {name: np.concatenate([p[name] for p in pending]) for name in pending[0]}
                with source.store.shard(shard) as opened:
                    keys = np.repeat(opened.keys, loader.num_crops).tolist()
                crops = np.tile(np.arange(loader.num_crops), shard.samples)
                yield shard, Rows(keys, crops, {name: a[:size] for name, a in whole.items()})
                pending, held = [{name: a[size:] for name, a in whole.items()}], held - size
                shard = next(shards, None)

    @torch.no_grad()
    def _embedded(self, loader: EvalLoader) -> Iterator[dict[str, np.ndarray]]:
        device = next(self.model.parameters()).device
        for batch in loader:
            embedding = self.model.embed(batch.to(device))
            chosen = {"vector": embedding.vector} if self.what == "vector" else embedding.tokens
            yield {name: t.float().cpu().numpy() for name, t in chosen.items()}

    def _save(self, path: Path, rows: Rows, grid: CropGrid) -> None:
        partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
        if self.format == "parquet":
            parquet.write_table(_table(rows, grid), partial)
        else:
            _write_images(partial, rows, grid)
        os.replace(partial, path)


def _table(rows: Rows, grid: CropGrid) -> pa.Table:
    corners = [grid.tiling(int(c)) for c in rows.crops]
    columns = {
        pa.field("key", pa.string()): pa.array(rows.keys),
        pa.field("crop", pa.int32()): pa.array(rows.crops.astype(np.int32)),
        pa.field("north_m", pa.float64()): pa.array([c.row_m for c in corners]),
        pa.field("west_m", pa.float64()): pa.array([c.column_m for c in corners]),
    }
    for name, values in rows.arrays.items():
        flat = pa.FixedSizeListArray.from_arrays(values.ravel(), int(np.prod(values.shape[1:])))
        shape = "x".join(map(str, values.shape[1:]))
        columns[pa.field(name, flat.type, metadata={"shape": shape})] = flat
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(list(columns)))


def _write_images(folder: Path, rows: Rows, grid: CropGrid) -> None:
    try:
        import rasterio
        from rasterio.transform import from_origin
    except ImportError:
        raise ResultsError("--format tiff needs rasterio: pip install 'maestro-scale[datasets]'") from None
    folder.mkdir()
    for name, tokens in rows.arrays.items():
        maps = tokens.mean(axis=1)  # (N, L, E)
        side = round(maps.shape[1] ** 0.5)
        cell_m = grid.crop_m / side
        for key, number, values in zip(rows.keys, rows.crops, maps, strict=True):
            corner = grid.tiling(int(number))
            # In metres from the tile's upper left corner: shards keep no coordinates.
            transform = from_origin(corner.column_m, -corner.row_m, cell_m, cell_m)
            with rasterio.open(
                folder / f"{key}.{number}.{name}.tif",
                "w",
                driver="GTiff",
                width=side,
                height=side,
                count=values.shape[1],
                dtype="float32",
                transform=transform,
                compress="deflate",
            ) as image:
                image.write(values.T.reshape(-1, side, side))
