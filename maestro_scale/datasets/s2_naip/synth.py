"""Writes synthetic scenes in the official raw layout of S2-NAIP urban as MAESTRO reads it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np

from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.s2_naip.reader import FILES, FULL_SPEC, LANDSAT_BANDS, S2_BANDS
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.datasets.synthetic.output import Destination
from maestro_scale.datasets.synthetic.scene import Scene

YEARS = (2019, 2020, 2021)
ZONES = (32611, 32614, 32618)  # EPSG codes of UTM zones
_NUM_CLASSES = 15
_NUM_PARCELS = 24
_SEASON_DAYS = 75  # Sentinel images are within this many days of NAIP's date
# By index modulo ten: 70/10/20, every split taken within the first three tiles.
_SPLITS = ("train", "test", "val", "train", "train", "test", "train", "train", "train", "train")

_Make = Callable[[Scene, np.ndarray], np.ndarray]  # (scene, days) -> values of a series


def write(dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` tiles; DatasetError if ``dst`` holds anything but (a part of) the same dataset."""
    if tiles < 1 or seed < 0:
        raise DatasetError(f"cannot write {tiles} tiles with seed {seed}: tiles starts at 1, seed at 0")
    target = Destination(dst, {"dataset": "s2_naip", "tiles": tiles, "seed": seed})
    listed: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index in range(tiles):
        scene = Scene(seed, index, FULL_SPEC.tile_m, _NUM_CLASSES, _NUM_PARCELS)
        name = _name(index)
        acquired = _acquired(scene)
        target.write(FILES["naip"].image.format(name), partial(_write_naip, scene=scene, acquired=acquired))
        target.write_text(FILES["naip"].dates.format(name), _naip_product(scene, acquired) + "\n")
        for modality, make in (("s2", _sentinel2), ("s1", _sentinel1), ("landsat", _landsat)):
            days = _days(scene, modality, acquired)
            products = [_product(modality, scene, acquired.year, int(day)) for day in days]
            target.write_text(FILES[modality].dates.format(name), "".join(f"{p}\n" for p in products))
            target.write(
                FILES[modality].image.format(name),
                partial(_write_stack, make=make, scene=scene, days=days, name=name),
            )
        listed[_SPLITS[index % 10]].append(name)
    for split, names in listed.items():
        target.write_text(f"{split}.csv", "".join(f"{line}\n" for line in ("name", *names)))


def _name(index: int) -> str:
    """Zone, column and row, as tiles are named in the release."""
    return f"{ZONES[index % 3]}_{960 + index // 3 % 100}_{-6049 - index // 300}"


def _acquired(scene: Scene) -> date:
    """Acquisition date of the NAIP image, in summer."""
    rng = scene.rng("identity")
    return date(int(rng.choice(YEARS)), 1, 1) + timedelta(days=int(rng.integers(150, 215)))


def _days(scene: Scene, modality: str, acquired: date) -> np.ndarray:
    """Days of the year, in chronological order: 16–32 of Sentinel-2, 2–8 of Sentinel-1, 4 of Landsat."""
    rng = scene.rng(f"days-{modality}"[-8:])
    naip_day = acquired.timetuple().tm_yday
    span = np.arange(naip_day - _SEASON_DAYS, naip_day + _SEASON_DAYS)
    count = {"s2": int(rng.integers(16, 33)), "s1": int(rng.integers(2, 9)), "landsat": 4}[modality]
    return np.sort(rng.permutation(span)[:count])


def _sentinel2(scene: Scene, days: np.ndarray) -> np.ndarray:
    return _reflectance(scene, days, S2_BANDS)


def _landsat(scene: Scene, days: np.ndarray) -> np.ndarray:
    return _reflectance(scene, days, tuple(f"L{band[1:]}" for band in LANDSAT_BANDS))


def _reflectance(scene: Scene, days: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    """(T, C, 64, 64) uint16, reflectance times 10,000."""
    snow, cloud = scene.weather(days, 10.0, most=0.3)  # the release selected clear images
    values = scene.optical(days, bands, 10.0, snow, cloud)
    return np.clip(np.rint(values * 10_000), 0, 65_535).astype(np.uint16)


def _sentinel1(scene: Scene, days: np.ndarray) -> np.ndarray:
    """(T, 2, 64, 64) float32 decibels, with a few NaN and zeros at the edge."""
    rng = scene.rng("edges")
    decibels = (10 * np.log10(np.maximum(scene.radar(days, "asc", 10.0), 1e-6))).astype(np.float32)
    for value, chance in ((np.nan, 0.05), (0.0, 0.05)):
        for t in np.flatnonzero(rng.random(len(days)) < chance):
            decibels[t, :, int(rng.integers(64)), : int(rng.integers(1, 64))] = value
    return decibels


def _naip_product(scene: Scene, acquired: date) -> str:
    zone = scene.index % 3 + 11
    return f"m_{3_000_000 + scene.index}_ne_{zone}_060_{acquired:%Y%m%d}"


def _product(modality: str, scene: Scene, year: int, day: int) -> str:
    stamp = f"{date(year, 1, 1) + timedelta(days=day - 1):%Y%m%d}"
    if modality == "s2":
        return f"S2{'AB'[day % 2]}_MSIL1C_{stamp}T170901_N0207_R112_T14RNU_{stamp}T203931"
    if modality == "s1":
        return f"S1A_IW_GRDH_1SDV_{stamp}T005312_{stamp}T005337_{scene.index:06d}_{day:06X}_4331"
    return f"LC08_L1TP_026039_{stamp}_{year + 1}0829_02_T1"


def _write_naip(path: Path, scene: Scene, acquired: date) -> None:
    from rasterio.errors import NotGeoreferencedWarning

    warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # a PNG has no georeference
    naip = FULL_SPEC.modality("naip")
    photo = scene.photo(acquired.timetuple().tm_yday, naip.bands, naip.resolution_m)
    profile = {
        "driver": "PNG",
        "dtype": "uint8",
        "count": len(naip.bands),
        "height": naip.size,
        "width": naip.size,
        "zlevel": 1,
    }
    with new_raster(path, **profile) as raster:
        raster.write(np.rint(photo * 255).astype(np.uint8))


def _write_stack(path: Path, make: _Make, scene: Scene, days: np.ndarray, name: str) -> None:
    """Write (T, C, H, W) as bands of one GeoTIFF, date after date."""
    import rasterio

    values = make(scene, days)
    zone, column, row = (int(part) for part in name.split("_"))
    extent = FULL_SPEC.tile_m
    profile = {
        "driver": "GTiff",
        "dtype": values.dtype.name,
        "count": values.shape[0] * values.shape[1],
        "height": values.shape[2],
        "width": values.shape[3],
        "crs": f"EPSG:{zone}",
        "transform": rasterio.Affine(10, 0, column * extent, 0, -10, -row * extent),
    }
    with new_raster(path, **profile) as raster:
        raster.write(values.reshape(-1, *values.shape[2:]))
