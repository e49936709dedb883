"""Writes synthetic scenes in the official raw layout of PASTIS-HD."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np

from maestro_scale.datasets.pastis_hd.reader import (
    CLASSES,
    DATES,
    IMAGES,
    LABELS,
    S2_BANDS,
    SPEC,
    SPOT_DATE,
    VOID,
)
from maestro_scale.datasets.pastis_hd.splits import METADATA, NUM_FOLDS
from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.raw import day_dates
from maestro_scale.datasets.spec import DatasetError, GeoOrigin, Tile
from maestro_scale.datasets.synthetic.output import Destination
from maestro_scale.datasets.synthetic.scene import Scene

FIRST_ID = 10_000
S2_TILES = ("t30uxv", "t31tfj", "t31tfm", "t32ulu")
_CRS = "EPSG:2154"
_SEASON = date(2018, 9, 17)  # first day of the series
_S2_DAYS = (5, 81)  # days between overpasses, and number of overpasses
_S1_DAYS = (6, 67)
_CLOUDY = 0.35  # share of Sentinel-2 dates that the release leaves out
_SPOT_DAY = 182
_RES_M = 10.0
_NUM_PARCELS = 36
_FOLDS = (1, 5, 4, 2, 3)  # by index: every split is taken within the first three tiles


def write(dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` tiles; DatasetError if ``dst`` holds anything but (a part of) the same dataset."""
    if tiles < 1 or seed < 0:
        raise DatasetError(f"cannot write {tiles} tiles with seed {seed}: tiles starts at 1, seed at 0")
    target = Destination(dst, {"dataset": "pastis_hd", "tiles": tiles, "seed": seed})
    rows = []
    for index in range(tiles):
        scene = Scene(seed, index, SPEC.tile_m, VOID, _NUM_PARCELS)
        name = str(FIRST_ID + index)
        acquired = {modality: _acquired(scene, modality) for modality in DATES}
        target.write(IMAGES["spot"].format(name), partial(_write_spot, scene=scene))
        for modality, make in _SERIES.items():
            days = np.array([day.timetuple().tm_yday for day in acquired[modality]])
            target.write(
                IMAGES[modality].format(name),
                partial(_write_npy, make=partial(make, scene, days, modality)),
            )
        target.write(LABELS.format(name), partial(_write_npy, make=partial(_labels, scene)))
        rows.append((name, index, acquired))
    target.write(METADATA, lambda path: _write_metadata(path, rows))


class Windows:
    """The middle of ``tiles`` scenes, ``window_m`` metres wide, as a raw dataset that is not on disk.

    As large as a crop, they are as many independent tiles as a whole scene has crops, at the same cost. The scenes are
    those of ``write``; weather and noise are drawn for the window.
    """

    def __init__(self, tiles: int, seed: int, window_m: float) -> None:
        self.spec = SPEC.windowed(window_m)
        self._tiles, self._seed = tiles, seed

    def keys(self) -> list[str]:
        """Sorted tile ids."""
        return sorted(str(FIRST_ID + index) for index in range(self._tiles))

    def read(self, key: str) -> Tile:
        """One tile."""
        scene = Scene(self._seed, int(key) - FIRST_ID, SPEC.tile_m, VOID, _NUM_PARCELS, self.spec.tile_m)
        arrays, dates = {"spot": _spot(scene)[None]}, {"spot": np.array([SPOT_DATE], np.int16)}
        for modality, make in _SERIES.items():
            acquired = _acquired(scene, modality)
            days = np.array([day.timetuple().tm_yday for day in acquired])
            arrays[modality] = make(scene, days, modality)
            dates[modality] = day_dates(np.array(acquired, "datetime64[D]"))
        labels = _classes(scene)  # the void of `_labels` is along an edge of the scene
        present = np.bincount(labels.reshape(-1), minlength=len(CLASSES))[1:VOID] / labels.size
        west, north = _corner(scene.index)
        inwards = (SPEC.tile_m - self.spec.tile_m) / 2
        return Tile(
            key=key,
            arrays=arrays,
            dates=dates,
            masks={},
            targets={"crop_type": labels, "crops_present": present.astype(np.float32)},
            ref_date=np.array(SPOT_DATE, np.int16),
            origin=GeoOrigin(_CRS, west, north).shifted(inwards, inwards),
        )


def _acquired(scene: Scene, modality: str) -> list[date]:
    """Acquisition dates of a sensor over a season of thirteen months."""
    rng = scene.rng(f"d-{modality}")
    step, count = _S2_DAYS if modality == "s2" else _S1_DAYS
    days = int(rng.integers(step)) + step * np.arange(count)
    if modality == "s2":
        days = days[rng.random(count) >= _CLOUDY]
    return [_SEASON + timedelta(days=int(day)) for day in days]


def _sentinel2(scene: Scene, days: np.ndarray, modality: str) -> np.ndarray:
    """(T, 10, H, W) int16, reflectance times 10,000."""
    snow, cloud = scene.weather(days, _RES_M, most=0.5)  # the cloudiest dates are not in the release
    values = scene.optical(days, S2_BANDS, _RES_M, snow, cloud)
    return np.clip(np.rint(values * 10_000), 0, 32_767).astype(np.int16)


def _sentinel1(scene: Scene, days: np.ndarray, modality: str) -> np.ndarray:
    """(T, 3, H, W) float16 decibels: VV, VH and their difference."""
    decibels = 10 * np.log10(np.maximum(scene.radar(days, modality[3:], _RES_M), 1e-6))
    return np.concatenate([decibels, decibels[:, :1] - decibels[:, 1:]], axis=1).astype(np.float16)


def _labels(scene: Scene) -> np.ndarray:
    """(3, 128, 128) uint8: classes, void along one edge; the two channels of other tasks are 0."""
    rng = scene.rng("labels")
    semantic = _classes(scene)
    semantic[:, : int(rng.integers(0, 9))] = VOID
    empty = np.zeros_like(semantic)
    return np.stack([semantic, empty, empty])


_SERIES = {"s2": _sentinel2, "s1_asc": _sentinel1, "s1_des": _sentinel1}


def _classes(scene: Scene) -> np.ndarray:
    """(H, W) uint8: the class with the largest share of each pixel of 10 m."""
    return scene.fractions(_RES_M).argmax(axis=0).astype(np.uint8)


def _write_npy(path: Path, make: Callable[[], np.ndarray]) -> None:
    with open(path, "wb") as file:
        np.save(file, make())


def _corner(index: int) -> tuple[float, float]:
    """West and north of a tile, in Lambert-93."""
    return 400_000.0 + 2_000.0 * (index % 200), 6_900_000.0 - 2_000.0 * (index // 200)


def _spot(scene: Scene) -> np.ndarray:
    """(3, H, W) uint8."""
    spot = SPEC.modality("spot")
    return np.rint(scene.photo(_SPOT_DAY, spot.bands, spot.resolution_m) * 255).astype(np.uint8)


def _write_spot(path: Path, scene: Scene) -> None:
    import rasterio

    spot = SPEC.modality("spot")
    image = _spot(scene)
    west, north = _corner(scene.index)
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": len(image),
        "height": spot.size,
        "width": spot.size,
        "crs": _CRS,
        "transform": rasterio.Affine(1, 0, west, 0, -1, north),
        "interleave": "pixel",
    }
    with new_raster(path, **profile) as raster:
        raster.write(image)


def _write_metadata(path: Path, rows: list[tuple[str, int, dict[str, list[date]]]]) -> None:
    import pyogrio

    columns: dict[str, list] = {"id": [], "ID_PATCH": [], "TILE": [], "Fold": []}
    columns |= {column: [] for column in DATES.values()}
    for name, index, acquired in rows:
        columns["id"].append(name)
        columns["ID_PATCH"].append(int(name))
        columns["TILE"].append(S2_TILES[index // NUM_FOLDS % len(S2_TILES)])
        columns["Fold"].append(_FOLDS[index % NUM_FOLDS])
        for modality, column in DATES.items():
            days = {str(i): int(f"{day:%Y%m%d}") for i, day in enumerate(acquired[modality])}
            columns[column].append(json.dumps(days))
    pyogrio.raw.write(
        path,
        geometry=np.array([_outline(index) for _, index, _ in rows], object),
        field_data=[np.array(v, None if isinstance(v[0], int) else object) for v in columns.values()],
        fields=list(columns),
        layer="metadata",
        driver="GeoJSON",
        geometry_type="Polygon",
        crs=_CRS,
    )


def _outline(index: int) -> bytes:
    """The tile's square as well-known binary."""
    west, north = _corner(index)
    east, south = west + SPEC.tile_m, north - SPEC.tile_m
    ring = (west, north, east, north, east, south, west, south, west, north)
    return struct.pack("<BIII10d", 1, 3, 1, 5, *ring)
