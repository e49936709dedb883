"""Runs of cells are the set of cells that they are made of, in memory by their number."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from maestro_scale.datasets.scenes import cells as module
from maestro_scale.datasets.scenes.cells import CellRuns, connected
from maestro_scale.datasets.scenes.grid import Cell

CELLS = st.sets(st.builds(Cell, st.integers(-6, 6), st.integers(-6, 6)))


def by_row(cells):
    return sorted(cells, key=lambda c: (c.row, c.col))


@settings(max_examples=100, deadline=None)
@given(CELLS, st.integers(-8, 8), st.integers(-8, 8), st.integers(-2, 9), st.integers(-2, 9))
def test_runs_hold_the_cells(cells, row, col, height, width):
    runs = CellRuns.of_cells(cells)
    ordered = by_row(cells)
    assert (len(runs), list(runs), runs[:]) == (len(cells), ordered, tuple(ordered))
    assert [runs[n] for n in range(-len(runs), len(runs))] == ordered * 2
    rows, cols = range(row, row + height), range(col, col + width)
    hit = [n for n, cell in enumerate(ordered) if cell.row in rows and cell.col in cols]
    assert runs.within(rows, cols).tolist() == hit
    assert runs.count_within(rows, cols) == len(hit)


@settings(max_examples=100, deadline=None)
@given(CELLS, st.integers(1, 3))
def test_groups_are_apart_and_connected(cells, reach):
    groups = [list(group) for group in connected(CellRuns.of_cells(cells), reach)]
    assert sorted(cell for group in groups for cell in group) == sorted(cells)
    assert groups == sorted((by_row(group) for group in groups), key=min)

    def near(a, b):
        return max(abs(a.row - b.row), abs(a.col - b.col)) <= reach

    for group in groups:
        others = set(cells) - set(group)
        assert not any(near(a, b) for a in group for b in others)
        reached, left = [group[0]], set(group[1:])
        for cell in reached:
            found = {other for other in left if near(cell, other)}
            reached += found
            left -= found
        assert not left


def test_scenes_apart_are_groups_of_their_own():
    near = [Cell(0, 0), Cell(1, 0), Cell(3, 1)]
    far = [Cell(9, 9), Cell(9, 10)]
    assert [list(group) for group in connected(CellRuns.of_cells([*far, *near]), 2)] == [near, far]


def test_memory_is_by_rows_and_blocks_are_of_whole_rows(monkeypatch):
    monkeypatch.setattr(module, "_CELLS_AT_ONCE", 10)
    square = CellRuns.rectangle(7, 4)
    assert [len(cols) for cols, _ in square.blocks()] == [8, 8, 8, 4]
    assert list(square) == [Cell(col, row) for row in range(7) for col in range(4)]
    large = CellRuns.rectangle(3_000, 5_000)
    assert (len(large), large.runs.nbytes) == (15_000_000, 72_000)
    assert large[14_999_999] == Cell(4_999, 2_999)
    assert large.within(range(2_999, 4_000), range(4_998, 5_001)).tolist() == [14_999_998, 14_999_999]
    assert [cols.tolist() for cols, _ in CellRuns(np.empty((0, 3), np.int64)).blocks()] == []
