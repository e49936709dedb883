"""Writes synthetic scenes in the official raw layout of FLAIR-HUB."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from maestro_scale.datasets.flair_hub import reader as flair_hub
from maestro_scale.datasets.flair_hub.classes import COSIA_IGNORED, LPIS_1, LPIS_2, LPIS_3
from maestro_scale.datasets.flair_hub.metadata import FOLDER, SPLITS
from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.datasets.synthetic.output import Destination
from maestro_scale.datasets.synthetic.scene import Scene

DOMAINS = ("D012-2019", "D033-2021", "D060-2018", "D075-2020")
ZONES = ("AF-S1-27", "UU-S2-12", "NF-S1-3", "FA-S2-8", "AU-S1-15")
PATCHES_PER_ZONE = 100
SPLIT_COLUMNS = ("split_1", "split_2", "split_3", "split_4", "split_5", "split_flairchallenge")
HISTORICAL_YEARS = range(1950, 1960)
_NUM_CLASSES = 15
_EXTENT_M = flair_hub.FULL_SPEC.tile_m
# By index modulo ten: 70/10/20, every split taken within the first three tiles.
_PHASES = ("train", "test", "valid", "train", "train", "test", "train", "train", "train", "train")
_HEIGHT_M = (7.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2, 0.8, 0.0, 1.5, 11.0, 15.0, 2.0)  # by class
# Class → values of the three levels; every other class is background.
_CROPS = {8: ("grasses", "grasses", "grasses mixture"), 9: ("wheat", "wheat", "winter wheat"),
          10: ("maize", "maize", "maize"), 11: ("vineyard", "vineyard", "vineyard")}  # fmt: skip


@dataclass(frozen=True)
class Patch:
    """One patch: its id, location, split, and the acquisition dates of every sensor."""

    scene: Scene

    @property
    def key(self) -> str:
        """The patch id."""
        return f"{self.domain}_{self.zone}_{self._index_in_zone // 10}-{self._index_in_zone % 10}"

    @property
    def domain(self) -> str:
        """Department and year."""
        return DOMAINS[self.scene.index % len(DOMAINS)]

    @property
    def zone(self) -> str:
        """Zone within the domain; the last number increases, so that there is always another zone."""
        number = self.scene.index // len(DOMAINS) // PATCHES_PER_ZONE
        stem, _, last = ZONES[number % len(ZONES)].rpartition("-")
        return f"{stem}-{int(last) + 30 * (number // len(ZONES))}"

    @property
    def _index_in_zone(self) -> int:
        return self.scene.index // len(DOMAINS) % PATCHES_PER_ZONE

    @property
    def year(self) -> int:
        """Year of all sensors but the historical image."""
        return int(self.domain[-4:])

    @cached_property
    def dates(self) -> dict[str, list[str]]:
        """YYYYMMDD by sensor, named as in the metadata."""
        rng = self.scene.rng("dates")
        historical = date(int(rng.choice(HISTORICAL_YEARS)), 1, 1) + timedelta(int(rng.integers(150, 240)))
        return {
            "AERIAL": [self._stamp(int(rng.integers(160, 240)))],
            "SPOT": [self._stamp(int(rng.integers(120, 270)))],
            "AERIAL-RLT": [f"{historical:%Y%m%d}"],
            "SENTINEL2": [self._stamp(day) for day in self.days("s2")],
            "SENTINEL1-ASC": [self._stamp(day) for day in self.days("asc")],
            "SENTINEL1-DESC": [self._stamp(day) for day in self.days("des")],
        }

    def days(self, orbit: str) -> np.ndarray:
        """Days of the year of the zone's orbit, some of them missing in this patch."""
        rng = self.scene.rng(f"days-{orbit}"[-8:])
        step, missing = {"s2": (5, 0.05), "asc": (6, 0.02), "des": (6, 0.02)}[orbit]
        days = np.arange(1 + self.scene.index // PATCHES_PER_ZONE % step, 366, step)
        return days[rng.random(len(days)) >= missing]

    def phase(self, column: str) -> str | None:
        """The patch's part in a split; None for patches that are not in the challenge."""
        place = self.scene.index % 10
        if column == "split_flairchallenge":
            return _PHASES[place] if place < 8 else None
        turn = SPLIT_COLUMNS.index(column)
        return _PHASES[(place + turn) % 3 if place < 3 else 3 + (place - 3 + turn) % 7]

    @property
    def origin(self) -> tuple[float, float]:
        """West and north in metres (EPSG:2154)."""
        index = self.scene.index
        return 600_000 + _EXTENT_M * (index % 1000), 6_800_000 - _EXTENT_M * (index // 1000)

    def _stamp(self, day: int) -> str:
        return f"{date(self.year, 1, 1) + timedelta(days=int(day) - 1):%Y%m%d}"


def patches(tiles: int, seed: int) -> list[Patch]:
    """The patches that :func:`write` writes."""
    return [Patch(Scene(seed, index, _EXTENT_M, _NUM_CLASSES)) for index in range(tiles)]


def write(dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` tiles of FLAIR-HUB; DatasetError as :func:`write_variant`."""
    write_variant(dst, tiles, seed, "flair_hub", "{}.csv")


def write_flair2(dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` tiles of FLAIR#2; DatasetError as :func:`write_variant`."""
    write_variant(dst, tiles, seed, "flair2", "{}_flair2.csv")


def write_variant(dst: Path, tiles: int, seed: int, dataset: str, listing: str) -> None:
    """Write ``tiles`` tiles of ``dataset``; ``listing``: file name of a split's CSV, ``{}`` for the split.

    DatasetError if ``dst`` holds anything but (a part of) the same dataset.
    """
    if tiles < 1 or seed < 0:
        raise DatasetError(f"cannot write {tiles} tiles with seed {seed}: tiles starts at 1, seed at 0")
    target = Destination(dst, {"dataset": dataset, "tiles": tiles, "seed": seed})
    places = patches(tiles, seed)
    for patch in patches(tiles, seed):
        _write_patch(target, patch)
    _write_metadata(target, places)
    column = "split_flairchallenge" if dataset == "flair2" else "split_1"
    for split, phase in (("train", "train"), ("val", "valid"), ("test", "test")):
        keys = [patch.key for patch in places if patch.phase(column) == phase]
        target.write_text(listing.format(split), "".join(f"{line}\n" for line in ("patch_id", *keys)))


def _write_metadata(target: Destination, places: Sequence[Patch]) -> None:
    """The GeoPackages of dates and splits."""
    ids = np.array([patch.key for patch in places], object)
    outlines = [square(*patch.origin) for patch in places]
    for sensor, column in (
        *((s, "date") for s in ("AERIAL", "AERIAL-RLT", "SPOT")),
        *((s, "acquisition_dates") for s in ("SENTINEL2", "SENTINEL1-ASC", "SENTINEL1-DESC")),
    ):
        texts = [_text(patch.dates[sensor], column) for patch in places]
        columns = {"patch_id": ids, column: np.array(texts, object)}
        target.write(
            f"{FOLDER}/GLOBAL_{sensor}_MTD_DATES.gpkg",
            partial(write_gpkg, columns=columns, outlines=outlines),
        )
    phases = {c: np.array([patch.phase(c) for patch in places], object) for c in SPLIT_COLUMNS}
    target.write(
        f"{FOLDER}/{SPLITS}", partial(write_gpkg, columns={"patch_id": ids, **phases}, outlines=outlines)
    )


def _text(dates: Sequence[str], column: str) -> str:
    if column == "date":
        return dates[0]
    return json.dumps({str(i): int(day) for i, day in enumerate(dates, start=1)})


def write_gpkg(path: Path, columns: Mapping[str, np.ndarray], outlines: Sequence[bytes]) -> None:
    """Write a layer of patches with their outlines (:func:`square`)."""
    import pyogrio

    options = {
        "OGR_CURRENT_DATE": "2025-06-01T00:00:00.000Z"
    }  # without it, GDAL would write the current time
    before = {name: pyogrio.get_gdal_config_option(name) for name in options}
    pyogrio.set_gdal_config_options(options)
    try:
        pyogrio.raw.write(
            path,
            geometry=np.array(outlines, object),
            field_data=list(columns.values()),
            fields=list(columns),
            layer=path.stem.split("GLOBAL_")[-1],
            driver="GPKG",
            geometry_type="Polygon",
            crs="EPSG:2154",
            SPATIAL_INDEX="NO",
        )
    finally:
        pyogrio.set_gdal_config_options(before)


def square(west: float, north: float) -> bytes:
    """Well-known binary of a patch's outline."""
    east, south = west + _EXTENT_M, north - _EXTENT_M
    corners = ((west, north), (east, north), (east, south), (west, south), (west, north))
    return struct.pack("<BIII", 1, 3, 1, len(corners)) + b"".join(struct.pack("<dd", *c) for c in corners)


def _write_patch(target: Destination, patch: Patch) -> None:
    makers: dict[flair_hub.Product, tuple[Callable[[Patch], np.ndarray], float]] = {
        flair_hub.PRODUCTS["aerial"]: (_aerial, 0.2),
        flair_hub.PRODUCTS["dem"]: (_elevation, 0.2),
        flair_hub.PRODUCTS["s2"]: (lambda p: _sentinel2(p)[0], 10.24),
        flair_hub.S2_MASK: (lambda p: _sentinel2(p)[1], 10.24),
        flair_hub.PRODUCTS["s1_asc"]: (lambda p: _sentinel1(p, "asc"), 10.24),
        flair_hub.PRODUCTS["s1_des"]: (lambda p: _sentinel1(p, "des"), 10.24),
        flair_hub.PRODUCTS["spot"]: (_spot, 1.6),
        flair_hub.PRODUCTS["aerial_rlt"]: (_historical, 0.4),
        flair_hub.COSIA: (_cosia, 0.2),
        flair_hub.LPIS: (_lpis, 0.2),
    }
    _, zone, position = patch.key.split("_")
    for product, (make, resolution_m) in makers.items():
        domain = f"{patch.domain.partition('-')[0]}-195X" if product.own_year else patch.domain
        folder = f"{domain}_{product.name}"
        target.write(
            f"{folder}/{zone}/{folder}_{zone}_{position}.tif",
            partial(_write_tif, make=make, patch=patch, resolution_m=resolution_m),
        )


def _photo(patch: Patch, bands: Sequence[str], sensor: str, resolution_m: float) -> np.ndarray:
    day = date(*(int(p) for p in _split(patch.dates[sensor][0]))).timetuple().tm_yday
    return patch.scene.photo(day, bands, resolution_m)


def _split(stamp: str) -> tuple[str, str, str]:
    return stamp[:4], stamp[4:6], stamp[6:]


def _aerial(patch: Patch) -> np.ndarray:
    return np.rint(_photo(patch, ("R", "G", "B", "NIR"), "AERIAL", 0.2) * 255).astype(np.uint8)


def _spot(patch: Patch) -> np.ndarray:
    """uint16, with the low values of satellite images."""
    return np.rint(_photo(patch, ("R", "G", "B", "NIR"), "SPOT", 1.6) * 1500).astype(np.uint16)


def _historical(patch: Patch) -> np.ndarray:
    grey = _photo(patch, ("R", "G", "B"), "AERIAL-RLT", 0.4).mean(axis=0, keepdims=True)
    return np.rint(grey * 255).astype(np.uint8)


def _elevation(patch: Patch) -> np.ndarray:
    """(2, 512, 512) float32 metres: surface, and the terrain below it."""
    rng = patch.scene.rng("dem")
    cover = patch.scene.cover(0.2)
    terrain = np.float32(rng.uniform(5, 900)) + np.float32(rng.uniform(1, 12)) * patch.scene.relief(0.2)
    heights = np.array(_HEIGHT_M, np.float32)[cover] * rng.uniform(0.7, 1.3)
    rough = 1 + 0.2 * rng.standard_normal(cover.shape, np.float32)
    return np.stack([terrain + heights * rough, terrain]).astype(np.float32)


def _cosia(patch: Patch) -> np.ndarray:
    """The land cover map; in some tiles a corner has an ignored class."""
    rng = patch.scene.rng("ignored")
    label = patch.scene.cover(0.2)[None].copy()
    side = int(rng.integers(40, 160))
    if rng.random() < 0.3:
        label[:, :side, :side] = rng.choice(COSIA_IGNORED)
    return label


def _lpis(patch: Patch) -> np.ndarray:
    cover = patch.scene.cover(0.2)
    levels = []
    for level, names in enumerate((LPIS_1, LPIS_2, LPIS_3)):
        values = np.full(_NUM_CLASSES, names.index("background"), np.uint8)
        for k, crop in _CROPS.items():
            values[k] = names.index(crop[level])
        levels.append(values[cover])
    return np.stack(levels)


def _sentinel2(patch: Patch) -> tuple[np.ndarray, np.ndarray]:
    """(10·T, 10, 10) uint16 and (2·T, 10, 10) uint8 snow and cloud in percent."""
    days = patch.days("s2")
    snow, cloud = patch.scene.weather(days, 10.24)
    values = patch.scene.optical(days, flair_hub.S2_BANDS, 10.24, snow, cloud)
    mask = np.rint(np.stack([snow, cloud], axis=1) * 100).astype(np.uint8)
    return np.rint(values * 10_000).astype(np.uint16).reshape(-1, 10, 10), mask.reshape(-1, 10, 10)


def _sentinel1(patch: Patch, orbit: str) -> np.ndarray:
    """(2·T, 10, 10) float32 linear power, a few pixels at the swath's edge NaN or zero."""
    days = patch.days(orbit)
    power = patch.scene.radar(days, orbit, 10.24)
    rng = patch.scene.rng(f"edge-{orbit}")
    for value, chance in ((np.nan, 0.02), (0.0, 0.02)):
        for t in np.flatnonzero(rng.random(len(days)) < chance):
            power[t, :, int(rng.integers(10)), : int(rng.integers(1, 10))] = value
    return power.reshape(-1, 10, 10)


def _write_tif(path: Path, make: Callable[[Patch], np.ndarray], patch: Patch, resolution_m: float) -> None:
    import rasterio

    bands = make(patch)
    west, north = patch.origin
    profile = {
        "driver": "GTiff",
        "dtype": bands.dtype.name,
        "count": bands.shape[0],
        "height": bands.shape[1],
        "width": bands.shape[2],
        "crs": "EPSG:2154",
        "transform": rasterio.Affine(resolution_m, 0, west, 0, -resolution_m, north),
    }
    with new_raster(path, **profile) as raster:
        raster.write(bands)
