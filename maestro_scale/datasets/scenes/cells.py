"""Sets of cells as runs of neighbours in the rows of the grid.

A scene is covered by few runs, one or two per row, so that planning needs memory by the side of a scene and not by its
area: single cells are computed where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from maestro_scale.datasets.scenes.grid import Cell

_CELLS_AT_ONCE = 100_000


class CellRuns(Sequence[Cell]):
    """Cells, each once, by row and column; their numbers are in this order.

    ``runs`` (K, 3) int64: row, first column, and the column after the last of each run, in this order.
    """

    def __init__(self, runs: np.ndarray) -> None:
        self.runs = runs
        self._rows, self._firsts, stops = np.ascontiguousarray(runs.T)
        self._starts = np.concatenate([[0], np.cumsum(stops - self._firsts)])

    @classmethod
    def of(cls, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> CellRuns:
        """Of columns and rows (N,) of cells, by row and column, in blocks of whole rows."""
        return cls(np.concatenate([np.empty((0, 3), np.int64), *(_runs(*block) for block in blocks)]))

    @classmethod
    def of_cells(cls, cells: Iterable[Cell]) -> CellRuns:
        """Of cells in any order."""
        ordered = sorted(set(cells), key=lambda c: (c.row, c.col))
        cols, rows = np.array(ordered, np.int64).reshape(-1, 2).T
        return cls.of([(cols, rows)])

    @classmethod
    def rectangle(cls, num_rows: int, num_cols: int) -> CellRuns:
        """The cells from (0, 0)."""
        rows = np.arange(num_rows, dtype=np.int64)
        return cls(np.stack([rows, np.zeros_like(rows), np.full_like(rows, num_cols)], axis=1))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, number: int) -> Cell: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Cell]: ...
    def __getitem__(self, number: int | slice) -> Cell | Sequence[Cell]:
        if isinstance(number, slice):
            cols, rows = self.at(np.arange(len(self))[number])
            return tuple(map(Cell, cols.tolist(), rows.tolist()))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        cols, rows = self.at(np.array([number % len(self)]))
        return Cell(int(cols[0]), int(rows[0]))

    def __iter__(self) -> Iterator[Cell]:
        for cols, rows in self.blocks():
            yield from map(Cell, cols.tolist(), rows.tolist())

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(columns, rows) of cells by their numbers."""
        run = np.searchsorted(self._starts, numbers, side="right") - 1
        return self._firsts[run] + (numbers - self._starts[run]), self._rows[run]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(columns, rows) of all cells, some at a time, in whole rows."""
        changes = np.flatnonzero(np.diff(self._rows)) + 1  # first runs of rows
        ends = [*self._starts[changes].tolist(), len(self)]
        first = 0
        for end, following in zip(ends, [*ends[1:], math.inf], strict=True):
            if end > first and following - first > _CELLS_AT_ONCE:
                yield self.at(np.arange(first, end))
                first = end

    def within(self, rows: range, cols: range) -> np.ndarray:
        """The numbers, ascending, of the cells in a rectangle of the grid."""
        starts, lengths = self._overlaps(rows, cols)
        before = np.concatenate([[0], np.cumsum(lengths)])
        found: np.ndarray = np.arange(before[-1]) + np.repeat(starts - before[:-1], lengths)
        return found

    def count_within(self, rows: range, cols: range) -> int:
        """How many cells are in a rectangle of the grid."""
        return int(self._overlaps(rows, cols)[1].sum())

    def _overlaps(self, rows: range, cols: range) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the first cells, numbers of cells) of the runs in a rectangle."""
        some = slice(*np.searchsorted(self._rows, [rows.start, max(rows.stop, rows.start)]))
        firsts, numbers = self._firsts[some], self._starts[:-1][some]
        left = np.maximum(firsts, cols.start)
        lengths = np.minimum(self.runs[some, 2], cols.stop) - left
        hit = lengths > 0
        return (numbers + left - firsts)[hit], lengths[hit]


def connected(cells: CellRuns, reach: int) -> list[CellRuns]:
    """Groups of cells of which none is nearer than ``reach`` rows and columns to another, by their first column and, of
    equal ones, row."""
    runs = cells.runs
    group_of = list(range(len(runs)))

    def root(number: int) -> int:
        while group_of[number] != number:
            group_of[number] = group_of[group_of[number]]
            number = group_of[number]
        return number

    for row in np.unique(runs[:, 0]).tolist():
        here = slice(*np.searchsorted(runs[:, 0], [row, row + 1]).tolist())
        near = slice(here.start, int(np.searchsorted(runs[:, 0], row + reach + 1)))
        firsts, stops = runs[near, 1], runs[near, 2]
        for number in range(here.start, here.stop):
            _, first, stop = runs[number].tolist()
            hits = np.flatnonzero((firsts < stop + reach) & (stops > first - reach))
            for other in (hits + near.start).tolist():
                group_of[root(other)] = root(number)
    roots = np.array([root(n) for n in range(len(runs))], np.int64)
    order = np.argsort(roots, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(roots[order])) + 1)
    groups = [CellRuns(runs[part]) for part in parts if len(part)]
    return sorted(groups, key=lambda group: min((first, row) for row, first, _ in group.runs.tolist()))


def _runs(cols: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(K, 3) of cells by row and column."""
    if not len(cols):
        return np.empty((0, 3), np.int64)
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(rows) != 0) | (np.diff(cols) != 1)]))
    ends = np.concatenate([begins[1:], [len(cols)]]) - 1
    return np.stack([rows[begins], cols[begins], cols[ends] + 1], axis=1).astype(np.int64)
