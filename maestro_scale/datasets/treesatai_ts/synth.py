"""Writes synthetic scenes in the official raw layout of TreeSatAI-TS."""

from __future__ import annotations

import json
from datetime import date, timedelta
from functools import partial
from pathlib import Path

import numpy as np

from maestro_scale.datasets.raster_file import new_raster
from maestro_scale.datasets.spec import DatasetError
from maestro_scale.datasets.synthetic.output import Destination
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.datasets.treesatai_ts.splits import GENERA, LABELS_JSON

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
YEARS = (2017, 2018, 2019, 2020)
_EXTENT_M = 60.0
_MARGIN_M = 0.4  # the aerial file is 304 pixels of 0.2 m
# By index modulo ten: 70/10/20, every split taken within the first three tiles.
_SPLITS = ("train", "test", "val", "train", "train", "test", "train", "train", "train", "train")


def write(dst: Path, tiles: int, seed: int) -> None:
    """Write ``tiles`` tiles; DatasetError if ``dst`` holds anything but (a part of) the same dataset."""
    if tiles < 1 or seed < 0:
        raise DatasetError(f"cannot write {tiles} tiles with seed {seed}: tiles starts at 1, seed at 0")
    target = Destination(dst, {"dataset": "treesatai_ts", "tiles": tiles, "seed": seed})
    rows: dict[str, list[list[str]]] = {"train": [], "val": [], "test": []}
    labels = {}
    for index in range(tiles):
        scene = Scene(seed, index, _EXTENT_M, len(GENERA))
        shares = np.round(scene.shares(), 5)
        name, year, day = _identity(scene, shares)
        aerial, series = f"{name}.tif", f"{name}_{year}.h5"
        target.write(f"aerial/{aerial}", partial(_write_aerial, scene=scene, day=day))
        target.write(f"sentinel-ts/{series}", partial(_write_series, scene=scene, year=year))
        acquired = date(year, 1, 1) + timedelta(days=day - 1)
        rows[_SPLITS[index % 10]].append(
            [aerial, series, f"{acquired:%Y%m%d}", *(f"{s:.5g}" for s in shares)]
        )
        labels[aerial] = [
            [genus, float(f"{s:.5g}")] for genus, s in zip(GENERA, shares, strict=True) if s > 0
        ]
    target.write_text(LABELS_JSON, json.dumps(labels))
    for split, listed in rows.items():
        target.write_text(f"split/{split}_filenames.lst", "".join(f"{row[0]}\n" for row in listed))
    header = ",".join(["aerial_name", "sen_name", "aerial_date", *GENERA])
    for split, listed in rows.items():
        target.write_text(f"{split}.csv", "\n".join([header, *(",".join(row) for row in listed)]) + "\n")


def _identity(scene: Scene, shares: np.ndarray) -> tuple[str, int, int]:
    """File stem, year of the series and day of year of the aerial image."""
    rng = scene.rng("identity")
    year = int(rng.choice(YEARS))
    name = f"{GENERA[int(shares.argmax())]}_spec._{rng.integers(1, 9)}_{scene.index}_WEFL_NLF"
    return name, year, int(rng.integers(145, 186))


def _write_aerial(path: Path, scene: Scene, day: int) -> None:
    import rasterio

    image = np.rint(scene.photo(day, ("NIR", "R", "G", "B"), 0.2, _MARGIN_M) * 255).astype(np.uint8)
    west, north = 400_000 + 100 * (scene.index % 1000), 5_800_000 - 100 * (scene.index // 1000)
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 4,
        "height": image.shape[1],
        "width": image.shape[2],
        "crs": "EPSG:25832",
        "transform": rasterio.Affine(0.2, 0, west - _MARGIN_M, 0, -0.2, north + _MARGIN_M),
        "compress": "deflate",
        "zlevel": 1,
        "interleave": "pixel",
    }
    with new_raster(path, **profile) as raster:
        raster.write(image)


def _write_series(path: Path, scene: Scene, year: int) -> None:
    import h5py

    rng = scene.rng("series")
    data: dict[str, np.ndarray] = {}
    days = _overpasses(rng, year, step=5, missing=0.12)
    snow, cloud = scene.weather(days, 10.0)
    reflectance = scene.optical(days, S2_BANDS, 10.0, snow, cloud)
    data["sen-2-data"] = np.rint(reflectance * 10_000).astype(np.float32)
    data["sen-2-masks"] = np.rint(np.stack([snow, cloud], axis=1) * 100).astype(np.float32)
    data["sen-2-products"] = _products_s2(rng, year, days)
    for orbit, hour in (("asc", 17), ("des", 5)):
        days = _overpasses(rng, year, step=7, missing=0.08)
        power = scene.radar(days, orbit, 10.0)
        if orbit == "des":
            # As in the release: two slices of one pass overlap the tile, so a day comes twice.
            repeated = np.sort(
                np.concatenate([np.arange(len(days)), rng.permutation(len(days))[: len(days) // 5]])
            )
            days, power = days[repeated], power[repeated]
        _add_gaps(rng, power)
        data[f"sen-1-{orbit}-data"] = power
        data[f"sen-1-{orbit}-products"] = _products_s1(rng, year, days, hour)
    with h5py.File(path, "w") as file:
        for name, values in data.items():
            file[name] = values


def _overpasses(rng: np.random.Generator, year: int, step: int, missing: float) -> np.ndarray:
    """Days of the year of a regular orbit with missing dates."""
    last = 366 if year % 4 == 0 else 365
    days = np.arange(1 + int(rng.integers(step)), last + 1, step)
    return days[rng.random(len(days)) >= missing]


def _add_gaps(rng: np.random.Generator, power: np.ndarray) -> None:
    """Set a few pixels at the swath's edge to NaN or zero (in place), as in the real files."""
    num_dates, _, height, width = power.shape
    for value, chance in ((np.nan, 0.02), (0.0, 0.02)):
        for t in np.flatnonzero(rng.random(num_dates) < chance):
            power[t, int(rng.integers(2)), int(rng.integers(height)), : int(rng.integers(1, width))] = value


def _products_s2(rng: np.random.Generator, year: int, days: np.ndarray) -> np.ndarray:
    import h5py

    names = []
    for day, satellite in zip(days, rng.choice(["A", "B"], len(days)), strict=True):
        stamp = f"{date(year, 1, 1) + timedelta(days=int(day) - 1):%Y%m%d}"
        names.append(f"S2{satellite}_MSIL2A_{stamp}T103429_N0211_R108_T32UMD_{stamp}T134113".encode())
    return np.array(names, dtype=h5py.string_dtype("ascii"))


def _products_s1(rng: np.random.Generator, year: int, days: np.ndarray, hour: int) -> np.ndarray:
    import h5py

    names = []
    codes = rng.integers(0, 16**4, (len(days), 2))
    for i, (day, (orbit, code)) in enumerate(zip(days, codes, strict=True)):
        stamp = f"{date(year, 1, 1) + timedelta(days=int(day) - 1):%Y%m%d}T{hour:02d}"
        numbers = f"{orbit:06d}_{orbit:06X}_{code:04X}"
        names.append(f"S1{'AB'[i % 2]}_IW_GRDH_1SDV_{stamp}1656_{stamp}1721_{numbers}".encode())
    return np.array(names, dtype=h5py.string_dtype("ascii"))
