"""The order in which cells are read: strips of the grid, from west to east, as high as memory permits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from maestro_scale.datasets.scenes.grid import Box, Cell, Grid
from maestro_scale.datasets.scenes.images import Scene
from maestro_scale.datasets.scenes.series import SceneSeries

BUFFER_BYTES = 160 * 2**20
"""Most memory of the buffers of a process, as an estimate from the sizes of pixels and blocks."""

_MAX_HEIGHT = 64  # cells per column of a strip
_MAX_CELLS = 512  # of a run
_MIN_RUNS = 16  # of a small dataset: processes share out the runs
_MIN_BLOCKS = 4  # in the length of a run: those at its ends are read twice


def runs(cells: Sequence[Cell], series: Sequence[SceneSeries], grid: Grid) -> list[list[Cell]]:
    """The cells, each once, in runs; within a run column by column.

    The height of the strips adapts to the number of scenes that overlap, the sizes of their pixels and blocks.
    """
    rows = {row: list(group) for row, group in groupby(sorted(set(cells), key=_by_row), key=lambda c: c.row)}
    pending = sorted(rows)
    wanted = min(len(set(cells)) // _MIN_RUNS, _MAX_CELLS)
    columns = _MIN_BLOCKS * max((_block_columns(of, grid) for of in series), default=1)
    result: list[list[Cell]] = []
    while pending:
        height = _height([rows[r] for r in pending[:_MAX_HEIGHT]], series, grid)
        strip = [r for r in pending if r < pending[0] + height]
        pending = pending[len(strip) :]
        result += _segments(sorted(c for r in strip for c in rows[r]), height, max(wanted, columns * height))
    return result


def _block_columns(series: SceneSeries, grid: Grid) -> int:
    """Columns of cells that a block of the first image covers."""
    if not series.shots:
        return 1
    scene = series.shots[0].bands[0]
    width_m = (scene.box.east - scene.box.west) * min(scene.block[1] / scene.place.width, 1)
    return math.ceil(width_m / grid.stride_m)


def _by_row(cell: Cell) -> tuple[int, int]:
    return cell.row, cell.col


def _segments(strip: Sequence[Cell], height: int, most: int) -> list[list[Cell]]:
    """A strip in runs of at most ``most`` cells, or a column, cut between columns and at wide gaps."""
    segments: list[list[Cell]] = []
    for _, group in groupby(strip, key=lambda c: c.col):
        column = list(group)
        current = segments[-1] if segments else []
        if not current or column[0].col - current[-1].col > 2 * height or len(current) + len(column) > most:
            segments.append(column)
        else:
            current += column
    return segments


def _height(rows: Sequence[Sequence[Cell]], series: Sequence[SceneSeries], grid: Grid) -> int:
    """Cells per column whose buffers fit into memory, at the densest of a few places of the first row."""
    first = rows[0]
    probes = [first[len(first) * i // 5] for i in range(5)] if len(first) >= 5 else list(first)
    limit = rows[-1][0].row - first[0].row + 1
    height = 1
    while height < limit:
        taller = min(height + max(1, height // 4), limit)
        if max(_bytes(cell, taller, series, grid) for cell in probes) > BUFFER_BYTES:
            break
        height = taller
    return height


def _bytes(cell: Cell, height: int, series: Sequence[SceneSeries], grid: Grid) -> int:
    """Estimated memory of the buffers of a strip of ``height`` cells at the column of ``cell``."""
    box = grid.box(cell).union(grid.box(Cell(cell.col, cell.row + height - 1)))
    shots = (shot for of in series for shot in of.touching(box))
    return sum(_buffer_bytes(scene, box, grid) for shot in shots for scene in shot.scenes)


def _buffer_bytes(scene: Scene, box: Box, grid: Grid) -> int:
    # Pixels per metre from the bounds, which exist for a rotated image too.
    area = (scene.box.east - scene.box.west) * (scene.box.north - scene.box.south)
    per_m = (scene.place.width * scene.place.height / max(area, 1e-9)) ** 0.5
    height = max(min(box.north, scene.box.north) - max(box.south, scene.box.south), 0.0) * per_m
    width = min(grid.tile_m * per_m + scene.block[1], scene.place.width)
    return int(height * width * scene.pixel_bytes)
