"""Reader of S2-NAIP urban: pretraining only, USA, 167,397 tiles of 640 m (hub: allenai/s2-naip).

Layout: ``naip/{id}.png``, ``sentinel2/{id}_stacked.tif``, ``sentinel1/{id}.tif``, ``landsat/{id}_stacked.tif``;
``dates/{naip,s2,s1,landsat}/{id}.txt`` with a product name per line; ``{split}.csv`` with a column ``name``
(``{split}_filtered_{percent}.csv`` is a split of its own).

NAIP is stored once and is the source of two sensors: ``aerial`` with all bands, ``spot`` with red, green and blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets import raw
from maestro_scale.datasets.fill import QUANTITIES, clean_image, clean_series
from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Scale, Sensor, Tile

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
LANDSAT_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B9", "B10", "B11")
_RGB = (0, 1, 2)
_BYTES = Scale("linear", 255)
_REFLECTANCE = Scale("linear", 5000)

FULL_SPEC = DatasetSpec(
    name="s2_naip",
    title="S2-NAIP urban",
    tile_m=640.0,
    crop_m=120.0,
    pos_grid=192,
    modalities=(
        Modality("naip", ("R", "G", "B", "NIR"), 1.25, 512, "uint8"),
        Modality("s2", S2_BANDS, 10.0, 64, "uint16", series=True),
        Modality("s1", ("VV", "VH"), 10.0, 64, "float32", series=True),
        Modality("landsat", LANDSAT_BANDS, 10.0, 64, "uint16", series=True),
    ),
    targets=(),
    sensors=(
        Sensor("aerial", "naip", 384, 16, 1, (3, 0, 1, 2), (1, 3), _BYTES, "aerial", "aerial"),
        Sensor("spot", "naip", 128, 16, 1, _RGB, (3,), _BYTES, "spot", "spot"),
        Sensor("s2", "s2", 12, 2, 16, tuple(range(10)), (4, 4, 2), _REFLECTANCE, "s2", "s2"),
        Sensor("s1", "s1", 12, 2, 4, (0, 1), (1, 1), Scale("linear", 20), "s1", "s1"),
        Sensor("landsat", "landsat", 12, 2, 4, tuple(range(11)), (11,), _REFLECTANCE, "landsat", "landsat"),
    ),
)
SPEC = FULL_SPEC.select(("naip", "s2", "s1"))


_QUANTITIES = QUANTITIES[FULL_SPEC.name]


@dataclass(frozen=True)
class Files:
    """File patterns of a modality. ``date_part``: index from the end of the date in a product name."""

    image: str
    dates: str
    date_part: int


FILES = {
    "naip": Files("naip/{}.png", "dates/naip/{}.txt", -1),
    "s2": Files("sentinel2/{}_stacked.tif", "dates/s2/{}.txt", -5),
    "s1": Files("sentinel1/{}.tif", "dates/s1/{}.txt", -5),
    "landsat": Files("landsat/{}_stacked.tif", "dates/landsat/{}.txt", -4),
}


class Reader:
    """Random access to the tiles of one split (a :class:`~maestro_scale.datasets.spec.RawDataset`)."""

    def __init__(self, src: Path, names: Sequence[str], missing: raw.MissingFiles, spec: DatasetSpec) -> None:
        self.spec = spec
        self._src, self._names, self._missing = src, sorted(names), missing

    def keys(self) -> list[str]:
        """Sorted tile ids: UTM zone, column and row."""
        return list(self._names)

    def read(self, key: str) -> Tile:
        """One tile, each series in chronological order; DatasetError that names file and cause."""
        self._missing.check(key)
        notes: list[str] = []
        naip_date = self._dates("naip", key)
        if len(naip_date) != 1:
            where = self._src / FILES["naip"].dates.format(key)
            raise DatasetError(
                f"{where}: has {len(naip_date)} products, expected 1; fetch the file again",
                "dates do not fit",
            )
        arrays, dates = {}, {}
        for modality in self.spec.modalities:
            if modality.series:
                arrays[modality.name], dates[modality.name] = self._series(modality, key, notes)
            else:
                shape = (len(modality.bands), modality.size, modality.size)
                path = self._src / FILES[modality.name].image.format(key)
                file = raw.read_tif(path, shape, modality.dtype)
                arrays[modality.name] = clean_image(
                    file.values, modality, _QUANTITIES[modality.name], str(path), notes, file.invalid
                )[None]
                dates[modality.name] = naip_date
        for sensor in self.spec.sensors:
            if len(dates[sensor.source]) < sensor.num_dates:
                notes.append(f"{sensor.source} has fewer than {sensor.num_dates} dates: some are seen twice")
        return Tile(key, arrays, dates, {}, {}, naip_date[0], tuple(notes))

    def _dates(self, modality: str, key: str) -> np.ndarray:
        files = FILES[modality]
        path = self._src / files.dates.format(key)
        try:
            products = untrusted.read_bytes(path).split()
        except (OSError, ValueError) as error:
            raise raw.read_error(path, error) from error
        if not products:
            raise DatasetError(
                f"{path}: is empty, so the tile has no dates; fetch the file again", "no dates"
            )
        return raw.product_dates(products, files.date_part, str(path))

    def _series(self, modality: Modality, key: str, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(T, C, size, size) and (T, 3), sorted by date; appends to ``notes``."""
        dates = self._dates(modality.name, key)
        path = self._src / FILES[modality.name].image.format(key)
        stack = raw.read_stack(path, len(modality.bands), modality.size)
        if len(stack.values) != len(dates):
            listed = FILES[modality.name].dates.format(key)
            raise DatasetError(
                f"{path}: has {len(stack.values)} dates, {listed} lists {len(dates)}; fetch both again",
                kind="dates do not fit",
            )
        series = clean_series(
            stack.values,
            dates,
            modality,
            _QUANTITIES[modality.name],
            str(path),
            notes,
            declared=stack.invalid,
        )
        return series.values, series.dates


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> Reader:
    """The tiles of ``split`` in folder ``src``; ``modalities``: None for the preset's, all but Landsat.

    Raises DatasetError if a folder or the split is missing, if the split is empty or malformed, or if none of
    its tiles has its files.
    """
    src = Path(src)
    spec = SPEC if modalities is None else FULL_SPEC.select(modalities)
    names = _names(src, split)
    needed = {"naip": FILES["naip"].dates}  # the reference date is NAIP's, whatever modalities are read
    missing: dict[str, str] = {}
    patterns = [*needed.values()]
    for modality in spec.modalities:
        patterns += [FILES[modality.name].image, FILES[modality.name].dates]
    for pattern in dict.fromkeys(patterns):
        folder, _, file = pattern.rpartition("/")
        there = raw.list_folder(src / folder)
        for name in names:
            if file.format(name) not in there:
                missing.setdefault(name, pattern.format(name))
    return Reader(src, names, raw.MissingFiles(src, src / f"{split}.csv", missing, len(names)), spec)


def _names(src: Path, split: str) -> list[str]:
    path = src / f"{split}.csv"
    top = raw.list_folder(src)
    if path.name not in top:
        found = ", ".join(sorted(n[:-4] for n in top if n.endswith(".csv"))) or "none"
        raise DatasetError(f"{src}: has no split {split!r} ({path.name}); splits found: {found}")
    columns, rows = raw.read_csv(path)
    if "name" not in columns:
        raise DatasetError(f"{path}: has no column 'name' but {', '.join(columns)}; fetch the file again")
    names = [row[columns["name"]].strip() for row in rows]
    if not names:
        raise DatasetError(f"{path}: the split is empty; fetch the file again or choose another split")
    if len(set(names)) < len(names):
        raise DatasetError(f"{path}: names {len(names) - len(set(names))} tiles twice; remove the repeats")
    return names
