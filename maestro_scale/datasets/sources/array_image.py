"""One image in the arrays of an open file, and what a storage format must offer for it."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maestro_scale.datasets.sources.georeference import Georeference
from maestro_scale.datasets.sources.packing import Packing
from maestro_scale.datasets.sources.protocol import Date, Pixels, Window
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import shorten


class StoredArray(Protocol):
    """An array of a file, of which parts are read on request."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def dimensions(self) -> tuple[str, ...] | None:
        """Names of the axes; None if the format has none."""

    def attribute(self, name: str) -> Any:
        """A number, text or list of these; None if there is no such attribute."""

    def read(self, index: tuple[int | slice, ...]) -> np.ndarray:
        """The elements at an index with an entry per axis; slices have a step of 1."""


class ArrayStore(Protocol):
    """An open file with arrays. All its methods raise DatasetError that names the file, or errors of :attr:`errors`."""

    where: str

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What the library raises for damaged data."""

    def names(self) -> Sequence[str]:
        """Names of the arrays, at most some thousands."""

    def find(self, name: str) -> StoredArray | None:
        """The array of this name; None if there is none. DatasetError if it must not be read."""

    def beside(self, name: str, other: str) -> str:
        """The name of the array that ``name`` refers to as ``other``: in its group, or in one of those above."""


@dataclass(frozen=True)
class Placed:
    """An array and its name, with what its axes are: key, date, band, y, x in its order."""

    name: str
    array: StoredArray
    axes: tuple[str, ...]

    def size(self, axis: str) -> int | None:
        return self.array.shape[self.axes.index(axis)] if axis in self.axes else None

    def dimension(self, axis: str) -> str | None:
        names = self.array.dimensions
        return names[self.axes.index(axis)] if names is not None and axis in self.axes else None


class ArrayImage:
    """A :class:`.protocol.Image` in arrays. Row 0 is the northernmost where the file says which way is north."""

    def __init__(
        self,
        store: ArrayStore,
        arrays: Sequence[tuple[Placed, list[int | None]]],
        fixed: Mapping[str, int],
        place: Georeference,
        date: Date | None,
        unpack: bool,
        labels: Container[float] = (),
    ) -> None:
        self._store, self._arrays, self._fixed, self._place = store, arrays, fixed, place
        self.date = date
        self._packings = [
            Packing.of(array.array.dtype, array.array.attribute, unpack, labels) for array, _ in arrays
        ]

    @property
    def count(self) -> int:
        return sum(len(bands) for _, bands in self._arrays)

    @property
    def height(self) -> int:
        return self._arrays[0][0].size("y") or 0

    @property
    def width(self) -> int:
        return self._arrays[0][0].size("x") or 0

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(p.dtype for p in self._packings))

    @property
    def crs(self) -> str | None:
        return self._place.crs

    @property
    def transform(self) -> tuple[float, float, float, float, float, float] | None:
        return self._place.transform

    def read(self, window: Window | None = None) -> Pixels:
        """Pixels, unpacked if the description says so, and those that attributes declare as missing."""
        window = window or Window(0, 0, self.height, self.width)
        values, invalid = [], []
        with Reported(self._store):
            for (array, bands), packing in zip(self._arrays, self._packings, strict=True):
                stored = self._read(array, bands, window)
                band_values, missing = packing.unpack(stored)
                values.append(band_values)
                invalid.append(np.zeros(stored.shape, bool) if missing is None else missing)
        joined = np.concatenate(values) if len(values) > 1 else values[0]
        marked = np.concatenate(invalid) if len(invalid) > 1 else invalid[0]
        return Pixels(joined, marked if marked.any() else None)

    def _read(self, array: Placed, bands: list[int | None], window: Window) -> np.ndarray:
        """(C, h, w) as stored."""
        row, column, height, width = window
        if self._place.flip_rows:
            row = self.height - row - height
        if self._place.flip_columns:
            column = self.width - column - width
        where: dict[str, int | slice] = dict(self._fixed)
        where["y"], where["x"] = slice(row, row + height), slice(column, column + width)
        numbers = [b for b in bands if b is not None]
        if not numbers:
            stored = self._ordered(array, where)[None]
        else:
            low, high = min(numbers), max(numbers) + 1
            # Bands of one chunk are decompressed together, so they are read together unless most are not wanted.
            if high - low <= 4 * len(numbers):
                stored = self._ordered(array, {**where, "band": slice(low, high)})[[b - low for b in numbers]]
            else:
                stored = np.stack([self._ordered(array, {**where, "band": b}) for b in numbers])
        stored = stored[:, ::-1] if self._place.flip_rows else stored
        stored = stored[:, :, ::-1] if self._place.flip_columns else stored
        return np.ascontiguousarray(stored)

    def _ordered(self, array: Placed, where: Mapping[str, int | slice]) -> np.ndarray:
        """The part of an array, with its axes in the order band, y, x."""
        found = np.asarray(array.array.read(tuple(where[axis] for axis in array.axes)))
        left = [axis for axis in array.axes if isinstance(where[axis], slice)]
        return found.transpose([left.index(axis) for axis in ("band", "y", "x") if axis in left])


class Reported:
    """Errors of the library in the block become a DatasetError that names the file."""

    def __init__(self, store: ArrayStore) -> None:
        self._store = store

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, self._store.errors) and not isinstance(error, DatasetError):
            cause = " ".join(str(error).split()) or type(error).__name__
            raise DatasetError(
                f"{self._store.where}: cannot be read ({shorten(cause, 200)}); fetch the file again"
            ) from error
