"""Prediction of all areas of a source: chunks of maps, or rows of a table, shared by the ranks.

A *unit* is what one rank computes at a time: a chunk of a large map, or several small maps or groups of windows, with
batches of its own. Units, their batches and the order of all additions follow from the source and the options alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from torch import Tensor

from maestro_scale.datasets import geoparquet
from maestro_scale.datasets.cog import Bands, Part, write_cog
from maestro_scale.datasets.spec import GeoOrigin
from maestro_scale.escaping import printable
from maestro_scale.evaluation.features.on_device import RecipePrecision, eval_precision
from maestro_scale.evaluation.tasks.tile_maps import georeference
from maestro_scale.inference.blending import Blend
from maestro_scale.inference.folder import Folder, unpacked
from maestro_scale.inference.outputs import MapOutput, PointOutput, joined, resized
from maestro_scale.inference.source import Piece, Source
from maestro_scale.inference.windows import Area, Box, chunk_side
from maestro_scale.stream.batch import Batch

MEMORY_BYTES = {"cpu": 512 * 2**20, "cuda": 4 * 2**30}
"""Of the sums of a unit, on the device, whatever the size of the map."""
_POINTS = 4096  # windows of a unit of a table

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Run:
    """Where and how to compute. ``memory_bytes``: of the sums of a unit, None: as of
    ``MEMORY_BYTES``."""

    device: torch.device
    rank: int = 0
    world: int = 1
    batch_size: int = 8
    precision: RecipePrecision = "auto"
    memory_bytes: int | None = None

    @property
    def most_bytes(self) -> int:
        """Of the sums of a unit."""
        return self.memory_bytes or MEMORY_BYTES.get(self.device.type, MEMORY_BYTES["cpu"])


@dataclass(frozen=True)
class Chunk:
    """A part of the map of an area, which ``num_windows`` touch. ``number`` of ``count`` of the area."""

    area: int
    number: int
    count: int
    box: Box
    num_windows: int


@torch.no_grad()
def predict_maps(
    source: Source, output: MapOutput, folder: Folder, run: Run, progress: Progress | None = None
) -> tuple[int, tuple[str, ...]]:
    """Write what is missing of the maps; returns the number of windows that this rank has computed, and notes on the
    maps that it has written."""
    found = _Found("maps")
    paths = [[folder.file(i.folder, a.name, ".tif") for i in output.images] for a in source.areas]
    for image in output.images:
        (folder.path / image.folder).mkdir(exist_ok=True)
    num_done = 0
    large: dict[int, list[Chunk]] = {}
    units = []
    for unit in _units(source.areas, output.num_channels, run):
        if unit[0].count > 1:
            large.setdefault(unit[0].area, []).append(unit[0])
        units.append(unit)

    def is_done(unit: Sequence[Chunk]) -> bool:
        if unit[0].count > 1 and folder.part(unit[0].area, unit[0].number).exists():
            return True
        return all(path.exists() for chunk in unit for path in paths[chunk.area])

    todo = [unit for unit in units[run.rank :: run.world] if not is_done(unit)]
    total = sum(chunk.num_windows for unit in todo for chunk in unit)
    for unit in todo:
        for chunk, arrays, origin in _blended(source, output, unit, run):
            if chunk.count > 1:
                folder.write_part(folder.part(chunk.area, chunk.number), arrays)
            else:
                area = source.areas[chunk.area]
                for image, path, values in zip(output.images, paths[chunk.area], arrays, strict=True):
                    found.add(
                        area.name,
                        origin is None,
                        _write(folder, path, area, image.bands, [(0, 0, values)], origin),
                    )
            num_done += chunk.num_windows
            if progress:
                progress(num_done, total, 0)
    # Large maps: one rank puts the parts together, when the others have written theirs.
    for number, (index, chunks) in enumerate(large.items()):
        parts = [folder.part(index, c.number) for c in chunks]
        if number % run.world != run.rank:
            continue
        area = source.areas[index]
        if not all(path.exists() for path in paths[index]):
            folder.wait_for(parts, _Waiting(area.name))
            for i, (image, path) in enumerate(zip(output.images, paths[index], strict=True)):
                pieces = (
                    (c.box.top, c.box.left, unpacked(part, i, _shapes(output, c.box)))
                    for c, part in zip(chunks, parts, strict=True)
                )
                origin = source.origin(index)
                found.add(area.name, origin is None, _write(folder, path, area, image.bands, pieces, origin))
        folder.remove_parts(parts)
    if all(path.exists() for of_area in paths for path in of_area):
        folder.finish()
    return num_done, found.notes()


@torch.no_grad()
def predict_points(
    source: Source, output: PointOutput, folder: Folder, name: str, run: Run, progress: Progress | None = None
) -> tuple[int, tuple[str, ...]]:
    """Write ``<name>.parquet`` with a row per window: its tile, its place, its dates and what is predicted."""
    path = folder.file("", name, ".parquet")
    units = list(_point_units(source.areas))
    parts = [folder.part(0, number) for number in range(len(units))]
    num_done = 0
    notes: tuple[str, ...] = ()
    if path.exists():
        folder.finish()
        return 0, ()
    mine = [n for n in range(len(units))[run.rank :: run.world] if not parts[n].exists()]
    total = sum(len(windows) for n in mine for _, windows in units[n])
    for number in mine:
        tables = []
        for pieces, batch in _batches(source, units[number], run.batch_size):
            with _autocast(run):
                columns = output.columns(batch.to(run.device))
            tables.append(_rows(source, pieces, columns))
            num_done += len(batch)
            if progress:
                progress(num_done, total, 0)
        sink = pa.BufferOutputStream()
        table = pa.concat_tables(tables) if tables else pa.table({})
        parquet.write_table(table, sink)
        folder.write_part(parts[number], [np.frombuffer(sink.getvalue(), np.uint8)])
    if run.rank == 0:
        folder.wait_for(parts, _Waiting(name))
        notes = _write_table(folder, path, parts)
    if path.exists():  # also where this rank was late, and wrote parts that the table has
        folder.finish()
    return num_done, notes


def _units(areas: Sequence[Area], num_channels: int, run: Run) -> Iterator[list[Chunk]]:
    """Chunks of large maps, one by one; small maps in groups that fill a batch and fit into memory."""
    group: list[Chunk] = []
    held = 0
    for index, area in enumerate(areas):
        side = chunk_side(num_channels, area.side, run.most_bytes)
        boxes = area.chunks(side)
        chunks = [Chunk(index, n, len(boxes), box, area.count(box)) for n, box in enumerate(boxes)]
        if len(chunks) > 1:
            yield from ([c] for c in chunks)
            continue
        size = 4 * (num_channels + 1) * area.height * area.width
        full = sum(c.num_windows for c in group) >= run.batch_size
        if group and (full or held + size > run.most_bytes):
            yield group
            group, held = [], 0
        group.append(chunks[0])
        held += size
    if group:
        yield group


def _point_units(areas: Sequence[Area]) -> Iterator[list[tuple[int, range]]]:
    """Groups of (area, windows)."""
    group: list[tuple[int, range]] = []
    held = 0
    for index, area in enumerate(areas):
        every = range(len(area.windows))
        for first in range(0, len(every), _POINTS):
            part = every[first : first + _POINTS]
            if group and held + len(part) > _POINTS:
                yield group
                group, held = [], 0
            group.append((index, part))
            held += len(part)
    if group:
        yield group


Pieces = list[tuple[int, Piece]]


def _batches(
    source: Source, wanted: Sequence[tuple[int, np.ndarray | range]], batch_size: int
) -> Iterator[tuple[Pieces, Batch]]:
    """(areas and pieces, their batch) of windows; consecutive pieces of the same sensors are one batch."""

    held: Pieces = []
    for area, numbers in wanted:
        for piece in source.read(area, np.asarray(numbers), batch_size):
            size = sum(len(p.numbers) for _, p in held)
            sensors = held[0][1].batch.pixels.keys() if held else piece.batch.pixels.keys()
            if held and (size + len(piece.numbers) > batch_size or sensors != piece.batch.pixels.keys()):
                yield held, joined([p.batch for _, p in held])
                held = []
            held.append((area, piece))
    if held:
        yield held, joined([p.batch for _, p in held])


def _blended(
    source: Source, output: MapOutput, unit: Sequence[Chunk], run: Run
) -> Iterator[tuple[Chunk, list[np.ndarray], GeoOrigin | None]]:
    """(chunk, values of each image, origin of the area) of the chunks of a unit."""
    by_area = {chunk.area: chunk for chunk in unit}
    blends: dict[int, Blend] = {}
    origins: dict[int, GeoOrigin | None] = {}

    def blend_of(index: int) -> Blend:
        if index not in blends:
            blends[index] = Blend(
                by_area[index].box, output.num_channels, source.areas[index].side, run.device
            )
        return blends[index]

    wanted = [(chunk.area, source.areas[chunk.area].windows_of(chunk.box)) for chunk in unit]
    for pieces, batch in _batches(source, wanted, run.batch_size):
        with _autocast(run):
            values = output.values(batch.to(run.device))
        first = 0
        for index, piece in pieces:
            area = source.areas[index]
            origins[index] = piece.origin
            for k, number in enumerate(piece.numbers):
                if values is not None:
                    window = values[first + k]
                    _check_size(window, area)
                    invalid = resized(piece.invalid[k], area.side)
                    blend_of(index).add(window, *area.corner(number), invalid)
            first += len(piece.numbers)
    outside = getattr(source, "outside", None)
    for chunk in unit:
        mean, covered = blend_of(chunk.area).finish()
        del blends[chunk.area]
        if outside is not None and (beyond := outside(chunk.area, chunk.box)) is not None:
            covered &= ~torch.from_numpy(beyond).to(covered.device)
        origin = origins[chunk.area] if chunk.area in origins else source.origin(chunk.area)
        yield chunk, output.finish(mean, covered), origin


def _check_size(window: Tensor, area: Area) -> None:
    assert window.shape[-2:] == (area.side, area.side), (tuple(window.shape), area.side)


def _autocast(run: Run) -> Any:
    enabled = eval_precision(run.device, run.precision) == "bf16"
    return torch.autocast(run.device.type, torch.bfloat16, enabled=enabled)


def _shapes(output: MapOutput, box: Box) -> list[tuple[tuple[int, ...], str]]:
    return [((len(i.bands.names), box.height, box.width), i.bands.dtype) for i in output.images]


def _write(
    folder: Folder, path: Path, area: Area, bands: Bands, parts: Iterable[Part], origin: GeoOrigin | None
) -> bool:
    """Write a map; returns whether it has a valid pixel."""
    is_valid = False

    def watched() -> Iterator[Part]:
        nonlocal is_valid
        for row, column, values in parts:
            nodata = np.isnan(values) if values.dtype.kind == "f" else values == bands.nodata
            is_valid = is_valid or not nodata.all()
            yield row, column, values

    place, size = georeference(origin, area.resolution_m), (area.height, area.width)
    write_cog(path, bands, size, watched(), place, {"key": area.name}, folder.new_file(".tif"))
    return is_valid


class _Found:
    """Collects what the user should know about maps or rows of a table. ``what``: they are."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._unplaced: dict[str, None] = {}
        self._empty: dict[str, None] = {}

    def add(self, name: str, is_unplaced: bool, is_valid: bool) -> None:
        """A map, or a row."""
        if is_unplaced:
            self._unplaced[name] = None
        if not is_valid:
            self._empty[name] = None

    def notes(self) -> tuple[str, ...]:
        """A line for each that was found, with its first example."""
        texts = (
            (
                self._unplaced,
                "have no place and no CRS, because their files have none in metres on the ground (degrees and Web "
                "Mercator are not): reproject the files",
            ),
            (
                self._empty,
                "have no valid pixel: nothing is measured there (check nodata and masks of the files), or the "
                "area has the middle of no pixel",
            ),
        )
        return tuple(
            f"{len(found)} {self._what} {text}; the first: {next(iter(found))}"
            for found, text in texts
            if found
        )


def _rows(source: Source, pieces: Pieces, columns: dict[str, tuple[pa.DataType, list[Any]]]) -> pa.Table:
    """A row per window: key, place of its middle, dates, then the predicted columns."""
    keys, places, days = [], [], []
    for index, piece in pieces:
        area = source.areas[index]
        for number in piece.numbers:
            keys.append(area.name)
            middle_m = [(pixel + area.side / 2) * area.resolution_m for pixel in area.corner(number)]
            places.append(piece.origin and piece.origin.shifted(middle_m[1], middle_m[0]))
            days.append(piece.days)
    fixed = {
        "key": pa.array(keys, pa.string()),
        "first_date": geoparquet.dates([first for first, _ in days]),
        "last_date": geoparquet.dates([last for _, last in days]),
        "crs": pa.array([p and p.crs for p in places], pa.string()),
        "x_m": pa.array([p and p.west_m for p in places], pa.float64()),
        "y_m": pa.array([p and p.north_m for p in places], pa.float64()),
    }
    found = {name: pa.array(values, kind) for name, (kind, values) in columns.items()}
    return pa.table({**fixed, **found})


def _write_table(folder: Folder, path: Path, parts: Sequence[Path]) -> tuple[str, ...]:
    """Put the parts together; returns notes on the rows."""
    tables = [t for t in (parquet.read_table(part) for part in parts) if t.num_rows]
    table = pa.concat_tables(tables) if tables else pa.table({"key": pa.array([], pa.string())})
    if table.num_rows and geoparquet.can_place():
        rows = zip(*(table[name].to_pylist() for name in ("crs", "x_m", "y_m")), strict=True)
        shapes = [None if crs is None else geoparquet.point(GeoOrigin(crs, x, y)) for crs, x, y in rows]
        table = geoparquet.with_geometry(table, shapes, "Point")
    weights = {geoparquet.WEIGHTS_KEY: str(folder.record.get("model", ""))}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **weights})
    partial = folder.new_file()
    try:
        parquet.write_table(table, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if not table.num_rows:
        return ("no window has a valid pixel: the table is empty; check nodata and masks of the files",)
    found = _Found("tiles of the table")
    for key, crs in zip(table["key"].to_pylist(), table["crs"].to_pylist(), strict=True):
        found.add(key, crs is None, True)
    return found.notes()


class _Waiting:
    """Says once that parts of other ranks are missing."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, False

    def __call__(self, missing: int) -> None:
        if not self._said:
            self._said = True
            print(
                printable(f"{self._name}: waiting for {missing} parts of other ranks"),
                file=sys.stderr,
                flush=True,
            )
