"""Array views over memory-mapped features: several arrays as one, and some rows of an array. Nothing is copied until
rows are read, because the features of a split may be larger than memory.

Shapes: M crops; the axes after the first are those of the stored arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np
from numpy.typing import DTypeLike

FeatureArray = Union[np.ndarray, "ConcatArray", "RowSubset"]
Index = slice | np.ndarray | tuple[np.ndarray, ...]
"""A slice of rows, row numbers, or (rows, positions on further axes) paired as numpy pairs index arrays."""


class ConcatArray:
    """Arrays (M_i, …) as one array (M, …); reading rows copies them."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __init__(self, parts: Sequence[FeatureArray]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(p) for p in parts])
        self.shape, self.dtype = (int(self._ends[-1]), *parts[0].shape[1:]), parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Index) -> np.ndarray:
        if isinstance(key, slice):
            key = np.arange(len(self))[key]
        rows, *rest = key if isinstance(key, tuple) else (key,)
        part_of = np.searchsorted(self._ends, rows, side="right")
        values = np.empty((len(rows), *self.shape[1 + len(rest) :]), self.dtype)
        for i, part in enumerate(self._parts):
            in_part = part_of == i
            first = self._ends[i] - len(part)
            index = (rows[in_part] - first, *(r[in_part] for r in rest))
            values[in_part] = part[index]
        return values

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(p) for p in self._parts]).astype(dtype or self.dtype, copy=False)


class RowSubset:
    """Rows ``rows`` of an array (M, …) as an array; indexed as :class:`ConcatArray`."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __init__(self, array: FeatureArray, rows: np.ndarray) -> None:
        self._array, self._rows = array, rows
        self.shape, self.dtype = (len(rows), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Index) -> np.ndarray:
        rows, *rest = key if isinstance(key, tuple) else (key,)
        index = (self._rows[rows], *rest)
        return self._array[index]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return self._array[self._rows].astype(dtype or self.dtype, copy=False)
