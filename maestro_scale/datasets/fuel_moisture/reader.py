"""Reader of the live fuel moisture series that Presto was evaluated on: 2,313 real pixels × 3 months, western USA.

Layout (github.com/nasaharvest/presto, MIT; data of Rao et al. 2020): ``s1_s2_era5_srtm.npy`` (N, 3, 18) with the
channels of ``CHANNELS``, ``month.npy`` (N, 3) 0 to 11, ``latlon.npy`` (N, 2), ``dynamic_world.npy`` (N, 3) class per
month, ``target.npy`` (N,) measured moisture in percent of the dry mass, ``is_test.npy`` (N,).

A tile is one pixel. ``test`` is the official split; ``train`` and ``val`` divide the rest by place: every fifth of the
sorted places is val, so that no place is in two splits (none is in the official train and test either).

Weather and terrain are stored twice: scaled for MAESTRO, whose bands of one sensor share one divisor, and in the units
that external encoders expect (``era5``, ``srtm``; sensors of ``FULL_SPEC`` only).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

from maestro_scale import untrusted
from maestro_scale.datasets.spec import (
    DatasetError,
    DatasetSpec,
    GeoOrigin,
    Modality,
    Scale,
    Sensor,
    Target,
    Tile,
)

# Order of Presto's `BANDS`, then NDVI. The last three of Sentinel-2 are B9, B11, B12: the correlation of channels 11
# and 12 is .95, that of 10 with both below .35.
S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B11", "B12")
_ERA5 = ("temperature_2m", "total_precipitation")
CHANNELS = ("VV", "VH", *S2_BANDS, *_ERA5, "elevation", "slope", "NDVI")
LAND_COVER = (
    "water",
    "trees",
    "grass",
    "flooded vegetation",
    "crops",
    "shrub and scrub",
    "built",
    "bare",
    "snow and ice",
)
TERCILES = ("low", "middle", "high")
SPLITS = ("train", "val", "test")

_YEAR = 2018  # the data has months only
_NOTE = f"the data has months without years: the year of the first is taken as {_YEAR}"
_VAL_EVERY = 5  # of the places that are not in test
_MAX_BYTES = 16 * 2**20  # of one file; the largest has 1 MB
_MAX_VALUE = 1e6  # of a channel or a label
_ZERO_CELSIUS_K = 273.15


def _sensor(name: str, bands: int, groups: tuple[int, ...], divisor: float, num_dates: int = 3) -> Sensor:
    return Sensor(
        name, name, 1, 1, num_dates, tuple(range(bands)), groups, Scale("linear", divisor), name, name
    )


def _series(name: str, bands: tuple[str, ...], dtype: str = "float32", series: bool = True) -> Modality:
    return Modality(name, bands, 10.0, 1, dtype, series=series)


FULL_SPEC = DatasetSpec(
    name="fuel_moisture",
    title="Live fuel moisture (pixel series)",
    tile_m=10.0,
    crop_m=10.0,
    pos_grid=1,
    modalities=(
        _series("s2", S2_BANDS, "uint16"),
        _series("s1", ("VV", "VH")),
        _series("weather", ("temperature_c", "precipitation_mm")),
        _series("terrain", ("elevation_100m", "slope_deg"), series=False),
        _series("era5", _ERA5),
        _series("srtm", ("elevation", "slope"), series=False),
    ),
    targets=(
        Target("land_cover", "classification", LAND_COVER),
        Target("moisture", "regression", units="% of dry mass"),
        Target("moisture_tercile", "classification", TERCILES),
    ),
    sensors=(
        _sensor("s2", 11, (3, 6, 2), 5000.0),
        _sensor("s1", 2, (2,), 20.0),
        _sensor("weather", 2, (2,), 20.0),
        _sensor("terrain", 2, (2,), 20.0, num_dates=1),
        _sensor("era5", 2, (2,), 1.0),
        _sensor("srtm", 2, (2,), 1.0, num_dates=1),
    ),
    ref_sensor="s2",
)
SPEC = replace(FULL_SPEC, sensors=FULL_SPEC.sensors[:4])


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> Reader:
    """Open ``split`` (train, val or test), see ``datasets.open_raw``."""
    spec = SPEC if modalities is None else FULL_SPEC.select(modalities)
    if split not in SPLITS:
        raise DatasetError(f"{spec.name} has no split {split!r}; there are: {', '.join(SPLITS)}")
    return Reader(Path(src), split, spec)


class Reader:
    """Random access to the pixels of one split (a :class:`~maestro_scale.datasets.spec.RawDataset`)."""

    def __init__(self, src: Path, split: str, spec: DatasetSpec) -> None:
        self.spec = spec
        values = _load(src, "s1_s2_era5_srtm", (None, 3, len(CHANNELS)))
        num = len(values)
        self._values = values.astype(np.float32)
        self._months = _load(src, "month", (num, 3), (0, 11)).astype(np.int64)
        self._latlon = _load(src, "latlon", (num, 2), (-180, 180))
        self._cover = _load(src, "dynamic_world", (num, 3), (0, len(LAND_COVER) - 1)).astype(np.int64)
        self._moisture = _load(src, "target", (num,)).astype(np.float32)
        is_test = _load(src, "is_test", (num,), (0, 1)).astype(bool)
        if is_test.all():
            raise DatasetError(
                f"{src}/is_test.npy: all {num} pixels are in test, so there are none for training"
            )
        # Of the official training part: a quantile of all labels would look at the test labels.
        self._terciles = np.quantile(self._moisture[~is_test], (1 / 3, 2 / 3))
        rows = np.flatnonzero(_split_of(self._latlon, is_test) == SPLITS.index(split))
        self._rows = {f"pixel-{row:04d}": int(row) for row in rows}

    def keys(self) -> list[str]:
        """``pixel-<row of the arrays>``."""
        return sorted(self._rows)

    def read(self, key: str) -> Tile:
        """One pixel."""
        row = self._rows[key]
        latitude, longitude = self._latlon[row].tolist()
        dates = _dates(self._months[row])
        arrays = {m.name: self._bands(row, m) for m in self.spec.modalities}
        return Tile(
            key=key,
            arrays=arrays,
            dates={m.name: dates if m.series else dates[:1] for m in self.spec.modalities},
            masks={},
            targets={
                "land_cover": np.array([_most_frequent(self._cover[row])], np.int16),
                "moisture": self._moisture[row : row + 1],
                "moisture_tercile": np.array([(self._moisture[row] > self._terciles).sum()], np.int16),
            },
            ref_date=dates[0],
            notes=(_NOTE,),
            origin=GeoOrigin("EPSG:4326", longitude, latitude),
        )

    def _bands(self, row: int, modality: Modality) -> np.ndarray:
        """(3 or 1, C, 1, 1)."""
        columns: dict[str, np.ndarray] = {name: self._values[row, :, i] for i, name in enumerate(CHANNELS)}
        columns["temperature_c"] = columns["temperature_2m"] - np.float32(_ZERO_CELSIUS_K)
        columns["precipitation_mm"] = 1000 * columns["total_precipitation"]
        columns["elevation_100m"] = columns["elevation"] / 100
        columns["slope_deg"] = columns["slope"]
        values = np.stack([columns[b] for b in modality.bands], axis=1)[:, :, None, None]
        if modality.dtype == "uint16":
            values = np.rint(values)
        return (values if modality.series else values[:1]).astype(modality.dtype)


def _load(
    src: Path,
    name: str,
    shape: tuple[int | None, ...],
    limits: tuple[float, float] = (-_MAX_VALUE, _MAX_VALUE),
) -> np.ndarray:
    """An array of numbers; DatasetError if it is missing, has another shape (None: any length) or a number that is not
    within ``limits``."""
    path = src / f"{name}.npy"
    try:
        array = np.asarray(untrusted.open_npy(path))
    except (OSError, untrusted.InputError) as error:
        raise DatasetError(
            f"{path}: cannot be read ({error}); see {FULL_SPEC.name} in docs/datasets.md"
        ) from error
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or array.dtype.kind not in "iuf" or array.nbytes > _MAX_BYTES:
        raise DatasetError(f"{path}: is {array.dtype} {array.shape}, expected numbers of shape {shape}")
    if not ((array >= limits[0]) & (array <= limits[1])).all():  # also of NaN
        raise DatasetError(f"{path}: has numbers outside {limits[0]:g} to {limits[1]:g}")
    return array


def _split_of(latlon: np.ndarray, is_test: np.ndarray) -> np.ndarray:
    """(N,) index into SPLITS."""
    places, place_of = np.unique(latlon[~is_test], axis=0, return_inverse=True)
    is_val = np.arange(len(places)) % _VAL_EVERY == _VAL_EVERY - 1
    split = np.full(len(latlon), SPLITS.index("test"))
    split[~is_test] = is_val[place_of.reshape(-1)]
    return split


def _most_frequent(classes: np.ndarray) -> int:
    """The class of most months; of equally frequent ones that of the latest month."""
    counts = np.bincount(classes, minlength=len(LAND_COVER))[classes]
    return int(classes[::-1][counts[::-1].argmax()])


def _dates(months: np.ndarray) -> np.ndarray:
    """(3, 3) int16: the middle of consecutive months, in a later year where they wrap around."""
    years = _YEAR + np.cumsum(np.diff(months, prepend=months[0]) < 0)
    days = [date(int(y), int(m) + 1, 15) for y, m in zip(years, months, strict=True)]
    return np.array([(d.year, d.timetuple().tm_yday, 12) for d in days], np.int16)
