"""Images in named arrays: what NetCDF, HDF5, Zarr and NumPy files have in common.

A format offers an :class:`ArrayStore`; :class:`ArrayFile` finds in it, by ``variable`` and ``axes`` of the description,
the images, their bands, keys, dates and place on the ground. Attributes have the meaning of the CF conventions
(cfconventions.org): ``_FillValue``, ``missing_value``, ``valid_range``, ``scale_factor``, ``add_offset``,
``grid_mapping``, ``units`` of times. Nothing but attributes and coordinates is read before a window is asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.sources.array_image import ArrayImage, ArrayStore, Placed, Reported, StoredArray
from maestro_scale.datasets.sources.georeference import Georeference, crs_of_attributes, spaced
from maestro_scale.datasets.sources.listing import list_files, some_names
from maestro_scale.datasets.sources.protocol import Date, ImageRef
from maestro_scale.datasets.sources.times import NO_DATE, read_dates, text_of
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.errors import did_you_mean, shorten

MAX_COORDINATE = 4_000_000
"""Elements of a coordinate, which is read as a whole: keys, dates, positions of pixels."""

_NAMES: Mapping[str, tuple[str, ...]] = {
    "y": ("y", "lat", "latitude", "northing", "row", "rows", "height"),
    "x": ("x", "lon", "longitude", "easting", "col", "column", "columns", "width"),
    "date": ("time", "date", "t", "dates", "times", "datetime", "valid_time"),
    "band": ("band", "bands", "channel", "channels", "wavelength", "c"),
}
"""Usual names of dimensions, in lower case, where ``axes`` is not given."""
_BY_NUMBER: Mapping[int, tuple[str, ...]] = {2: ("y", "x"), 3: ("band", "y", "x")}


def list_arrays(
    section: ImageFiles, src: str, open_file: Callable[[str, ImageFiles], AbstractContextManager[ArrayFile]]
) -> Iterator[ImageRef]:
    """As :meth:`.protocol.Source.list_images`; opens files only if each holds many tiles."""
    for ref in list_files(section, src):
        if "key" not in (section.axes or ()):
            yield ref
            continue
        with open_file(ref.address, section) as file:
            keys = file.keys(ref)
        for i, key in enumerate(keys):
            # Interned: each raster of a description lists the same keys, of which there may be millions.
            yield replace(ref, key=sys.intern(key), part=(i,))


class ArrayFile:
    """An open file (a :class:`.protocol.OpenFile`) whose arrays hold images.

    ``part`` of a reference: the index on the axis of the keys, if there is one, then that on the axis of the dates.
    """

    def __init__(self, store: ArrayStore, section: ImageFiles, variable: str | None = None) -> None:
        """``variable``: instead of that of the section."""
        self._store, self._section = store, section
        self._variable = section.variable if variable is None else variable
        self._coordinates: dict[str, np.ndarray] = {}
        self._placed: dict[str, Placed] = {}

    @property
    def store(self) -> ArrayStore:
        """All arrays of the file."""
        return self._store

    def keys(self, ref: ImageRef) -> list[str]:
        """Keys of the tiles along the axis of the keys. ``ref``: of the whole file."""
        array = self._arrays(ref)[0][0]
        count = array.size("key")
        assert count is not None
        name = self._section.keys
        if name is None:
            return [str(i) if ref.key is None else f"{ref.key}_{i}" for i in range(count)]
        values = self._coordinate(array, name, required=True)
        assert values is not None
        if values.shape[:1] != (count,):
            raise self._error(
                f"{name} has {values.shape[0] if values.ndim else 1} keys for {count} tiles", "wrong keys"
            )
        texts = [text_of(v) for v in values.reshape(count, -1)[:, 0].tolist()]
        if empty := sum(not t for t in texts):
            raise self._error(
                f"{name} has {empty} empty keys, the first at index {texts.index('')}", "wrong keys"
            )
        return texts

    def images(self, ref: ImageRef) -> Sequence[ImageRef]:
        """``ref``, or one reference per date."""
        with Reported(self._store):
            array = self._arrays(ref)[0][0]
            count = array.size("date")
            dates = self._dates(array, ref.part)
            if count is None:
                return [replace(ref, date=dates[0]) if dates else ref]
            refs = [replace(ref, part=(*ref.part, t)) for t in range(count)]
            return (
                [replace(r, date=d) for r, d in zip(refs, dates, strict=True)] if dates is not None else refs
            )

    def image(self, ref: ImageRef) -> ArrayImage:
        """One image."""
        with Reported(self._store):
            arrays = self._arrays(ref)
            array = arrays[0][0]
            for other, _ in arrays[1:]:
                if other.array.shape != array.array.shape or other.array.dtype != array.array.dtype:
                    raise self._error(
                        f"{other.name} is {other.array.dtype} {other.array.shape}, unlike {array.name}: "
                        f"{array.array.dtype} {array.array.shape}",
                        "bands differ",
                    )
            fixed = self._fixed(array, ref.part)
            dates = self._dates(array, ref.part[:1] if "key" in array.axes else ())
            date = None if dates is None else dates[fixed.get("date", 0)]
            place = self._georeference(array, fixed.get("key"))
            section = self._section
            return ArrayImage(self._store, arrays, fixed, place, date, section.unpack, section.labels)

    def georeference(self, name: str) -> Georeference:
        """Where an array lies that is of one place."""
        with Reported(self._store):
            return self._georeference(self._place(name), None)

    def _fixed(self, array: Placed, part: tuple[int | str, ...]) -> dict[str, int]:
        names = [axis for axis in ("key", "date") if axis in array.axes]
        if len(part) == len(names) - 1 and names[-1:] == ["date"] and array.size("date") == 1:
            part = (*part, 0)
        if len(part) != len(names):
            raise self._error(f"{array.name}: which of its {' and '.join(names)} is not said")
        fixed: dict[str, int] = {axis: int(i) for axis, i in zip(names, part, strict=True)}
        for axis, i in fixed.items():
            if not 0 <= i < (array.size(axis) or 0):
                raise self._error(f"{array.name} has {array.size(axis)} entries of {axis}, and no number {i}")
        return fixed

    def _arrays(self, ref: ImageRef) -> list[tuple[Placed, list[int | None]]]:
        """The arrays of an image, each with the indices of its bands on the axis of the bands."""
        wanted = [self._section.band_sources[i] for i in ref.bands]
        names = self._band_variables(wanted)
        if names is not None:
            arrays = [self._place(name) for name in names]
            for array in arrays:
                if array.size("band") not in (None, 1):
                    raise self._error(f"{array.name} has {array.size('band')} bands, expected one", "bands")
            return [(array, [None if array.size("band") is None else 0]) for array in arrays]
        array = self._place(self._variable or self._only_variable())
        return [(array, list(self._bands_of(array, wanted)))]

    def _band_variables(self, wanted: Sequence[int | str]) -> list[str] | None:
        """Names of the arrays if each band has its own; else None."""
        if self._variable is not None:
            if "{band}" not in self._variable:
                return None
            return [self._variable.replace("{band}", str(w)) for w in wanted]
        texts = [w for w in wanted if isinstance(w, str)]
        known = set(self._store.names())
        return texts if len(texts) == len(wanted) and known.issuperset(texts) else None

    def _only_variable(self) -> str:
        """The one array that can be an image: of at least two axes, and no coordinate."""
        found = []
        for name in self._store.names():
            array = self._store.find(name)
            if array is not None and len(array.shape) >= 2 and array.dtype.kind in "biuf":
                found.append(name)
        if len(found) > 1:  # coordinates of several dimensions are named by what refers to them
            found = [name for name in found if not self._is_coordinate(name)]
        if len(found) != 1:
            there = f"there are {some_names(found)}" if found else "there is none with images"
            raise self._error(f"which array has the images is not said: set variable ({there})", "variable")
        return found[0]

    def _is_coordinate(self, name: str) -> bool:
        last = name.rsplit("/", 1)[-1].lower().rstrip("_")
        return any(last in names for names in _NAMES.values())

    def _place(self, name: str) -> Placed:
        if name not in self._placed:
            array = self._store.find(name)
            if array is None:
                hint = did_you_mean(name, self._store.names())
                raise self._error(
                    f"has no array {shorten(name)}{hint}; set variable", "a variable is missing"
                )
            if array.dtype.kind not in "biuf":
                raise self._error(f"{name} is {array.dtype}, expected numbers", "variable")
            self._placed[name] = Placed(name, array, self._axes_of(name, array))
        return self._placed[name]

    def _axes_of(self, name: str, array: StoredArray) -> tuple[str, ...]:
        shape, names = array.shape, array.dimensions
        shown = f"{'×'.join(map(str, shape))}{f' ({chr(44).join(names)})' if names else ''}"
        axes: tuple[str, ...] | None = self._section.axes
        if axes is None and names is not None:
            axes = _axes_by_name(names)
        if axes is None:
            axes = _BY_NUMBER.get(len(shape))
        if axes is not None and len(axes) == len(shape) + 1 and "{band}" in (self._variable or ""):
            axes = tuple(a for a in axes if a != "band")
        if axes is None or len(axes) != len(shape) or not {"y", "x"}.issubset(axes):
            wanted = ", ".join(self._section.axes or ())
            problem = f"but axes are {wanted}" if wanted else "and which axis is which is not said"
            raise self._error(
                f"{name} is {shown}, {problem}; set axes, for example [date, band, y, x]", "axes"
            )
        return axes

    def _bands_of(self, array: Placed, wanted: Sequence[int | str]) -> Iterator[int | None]:
        count = array.size("band")
        if count is None:
            if len(wanted) != 1 or (isinstance(wanted[0], int) and wanted[0] != 1):
                raise self._error(f"{array.name} has one band, the description lists {list(wanted)}", "bands")
            yield None
            return
        names = self._band_names(array)
        texts = {_canonical(n): i for i, n in reversed(list(enumerate(names)))}
        named = [w for w in wanted if isinstance(w, str) and _canonical(w) in texts]
        in_order = not named and len(wanted) == count and all(isinstance(w, str) for w in wanted)
        for i, want in enumerate(wanted):
            if isinstance(want, int):
                if want > count:
                    raise self._error(f"{array.name} has {count} bands, so no band {want}", "bands")
                yield want - 1
            elif in_order:
                yield i
            elif _canonical(want) in texts:
                yield texts[_canonical(want)]
            else:
                known = f"called {some_names(names)}" if names else "without names"
                raise self._error(
                    f"{array.name} has {count} bands {known}, and none called {want}; say which by from: NUMBER",
                    "bands",
                )

    def _band_names(self, array: Placed) -> list[str]:
        dimension = array.dimension("band")
        values = None if dimension is None else self._coordinate(array, dimension)
        if values is None or values.ndim != 1 or len(values) != array.size("band"):
            return []
        return [text_of(v) for v in values.tolist()]

    def _dates(self, array: Placed, part: tuple[int | str, ...]) -> list[Date] | None:
        """Dates along the axis of the dates (or one), of the tile that ``part`` begins with; None: not in the file."""
        dates = self._section.dates
        if dates is not None and dates.from_ != "coordinate":
            return None
        name = dates.coordinate if dates else None
        candidates = [name] if name else [array.dimension("date"), *_NAMES["date"]]
        found = next(
            (n for n in candidates if n and self._coordinate(array, n) is not None and n != array.name), None
        )
        if found is None:
            if dates is None:
                return None
            wanted = name or "time or date"
            raise self._error(
                f"has no coordinate {wanted}; set dates.coordinate, or give dates otherwise", "no date"
            )
        values, attribute = self._coordinate(array, found), self._attribute(array, found)
        assert values is not None
        count, keys = array.size("date"), array.size("key")
        if keys is not None and values.ndim and len(values) == keys and (values.ndim == 2 or count != keys):
            values = values[int(part[0])]
        values = values.reshape(-1)
        if len(values) != (1 if count is None else count):
            if dates is None and count is None:
                return None  # those of other arrays of the file, such as a series beside one map of labels
            images = "one image" if count is None else f"{count} images"
            raise self._error(f"{found} has {len(values)} dates for {images}; set dates.coordinate", NO_DATE)
        where = f"{self._store.where}: {found}"
        format, piece = (dates.format, dates.part) if dates else (None, None)
        return read_dates(values, attribute, format, piece, where)

    def _coordinate(self, array: Placed, name: str, required: bool = False) -> np.ndarray | None:
        """The values of another array of the file, as they are stored; None if there is none."""
        full = self._store.beside(array.name, name)
        if full in self._coordinates:
            return self._coordinates[full]
        found = self._store.find(full)
        if found is None:
            if not required:
                return None
            hint = did_you_mean(name, self._store.names())
            raise self._error(f"has no array {shorten(name)}{hint}", "a variable is missing")
        if int(np.prod(found.shape)) > MAX_COORDINATE:
            raise self._error(f"{full} has {found.shape} elements, too many for a coordinate", "variable")
        with Reported(self._store):
            values = np.asarray(found.read(tuple(slice(0, n) for n in found.shape)))
        self._coordinates[full] = values
        return values

    def _attribute(self, array: Placed, name: str) -> Callable[[str], Any]:
        found = self._store.find(self._store.beside(array.name, name))
        return found.attribute if found is not None else lambda _: None

    def _georeference(self, array: Placed, key: int | None) -> Georeference:
        height, width = array.size("y"), array.size("x")
        mapping = self._grid_mapping(array)
        attribute = self._attribute(array, mapping) if mapping else lambda _: None
        crs = crs_of_attributes(attribute, self._store.where) or crs_of_attributes(
            array.array.attribute, self._store.where
        )
        if crs is None and mapping and (code := self._coordinate(array, mapping)) is not None:
            values = code[key] if key is not None and code.ndim else code
            if (
                np.ndim(values) == 0
                and np.asarray(values).dtype.kind in "iu"
                and 1024 <= int(values) <= 32767
            ):
                crs = f"EPSG:{int(values)}"
        rows = self._positions(array, "y", height, key)
        columns = self._positions(array, "x", width, key)
        return Georeference.of_positions(
            rows, columns, attribute("GeoTransform"), crs, (height or 0, width or 0)
        )

    def _grid_mapping(self, array: Placed) -> str | None:
        named = array.array.attribute("grid_mapping")
        # CF's extended form: "crs: x y".
        candidates = [str(named).split(":")[0].split(" ")[0]] if named else ["spatial_ref", "crs"]
        for name in candidates:
            if self._store.find(self._store.beside(array.name, name)) is not None:
                return name
        return None

    def _positions(
        self, array: Placed, axis: str, size: int | None, key: int | None
    ) -> tuple[float, float] | None:
        """First position and distance of the pixels' centres along an axis; None if the file does not say."""
        dimension = array.dimension(axis)
        names = [n for n in ([dimension] if dimension else list(_NAMES[axis][:4])) if n]
        if key is not None:  # each tile has positions of its own
            names = [f"{n}_" for n in names] + names
        for name in names:
            values = self._coordinate(array, name)
            if values is None or values.dtype.kind not in "iuf":
                continue
            if key is not None and values.ndim == 2 and len(values) > key:
                values = values[key]
            if values.ndim == 1 and len(values) == size and (found := spaced(values)) is not None:
                return found
        return None

    def _error(self, problem: str, kind: str = "cannot be read") -> DatasetError:
        return DatasetError(f"{self._store.where}: {problem}", kind)


def _axes_by_name(names: Sequence[str]) -> tuple[str, ...] | None:
    """What the dimensions are, by their usual names; None unless all are known and different."""
    axes = []
    for name in names:
        plain = name.rsplit("/", 1)[-1].lower()
        axes.append(next((axis for axis, known in _NAMES.items() if plain in known), None))
    if None in axes or len(set(axes)) != len(axes):
        return None
    return tuple(str(axis) for axis in axes)


def _canonical(name: str) -> str:
    """``B02`` and ``b2`` are the same band."""
    return re.sub(r"(?<=[a-z])0+(?=\d)", "", name.strip().lower())
