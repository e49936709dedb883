"""Reading of cells: the series of all rasters, one cell at a time, in any order or in runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from maestro_scale.datasets.scenes.buffer import Opener, Windows
from maestro_scale.datasets.scenes.grid import Cell, Grid
from maestro_scale.datasets.scenes.runs import runs
from maestro_scale.datasets.scenes.series import SceneSeries, Series


class SceneReader:
    """Random access to the cells of scenes. Pickles: open files and buffers stay in the process that opened them."""

    def __init__(self, grid: Grid, series: Sequence[SceneSeries], opener: Opener) -> None:
        self.grid, self.series = grid, tuple(series)
        self._by_name = {of.raster.name: of for of in series}
        self._opener = opener
        self._windows: Windows | None = None

    def read(self, cell: Cell) -> dict[str, Series | None]:
        """The series of each raster over a cell; None where no image has enough valid pixels."""
        return {name: self.read_one(name, cell) for name in self._by_name}

    def read_one(self, name: str, cell: Cell) -> Series | None:
        """The series of one raster over a cell."""
        windows = self._open()
        windows.leave(self.grid.box(cell).west)
        return self._by_name[name].read(cell, windows)

    def runs(self, cells: Sequence[Cell]) -> list[list[Cell]]:
        """The cells in an order in which each block of a file is read about once, see :meth:`run`."""
        return runs(cells, self.series, self.grid)

    @contextmanager
    def run(self, cells: Sequence[Cell]) -> Iterator[None]:
        """Within it, :meth:`read` is fast for these cells, in this order: a run of :meth:`runs`."""
        boxes = [self.grid.box(cell) for cell in cells]
        south, north = min(b.south for b in boxes), max(b.north for b in boxes)
        with self._open().strip(south, north):
            yield

    def close(self) -> None:
        """Close the files that this process has opened."""
        if self._windows is not None:
            self._windows.close()
            self._windows = None

    def _open(self) -> Windows:
        if self._windows is None:
            self._windows = Windows(self._opener, self.grid.crs)
        return self._windows

    def __getstate__(self) -> Mapping[str, Any]:
        return {**self.__dict__, "_windows": None}
