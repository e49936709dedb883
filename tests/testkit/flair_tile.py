"""FLAIR-HUB patches generated from formulas, so that readers can be tested against known values."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio

PATCH = "D012-2019_AF-S1-27_5-10"
NEIGHBOUR = "D012-2019_AF-S1-27_5-11"
AERIAL_DATES = {PATCH: "20190704", NEIGHBOUR: "20190705"}
S2_DATES = '{"1": 20190301, "2": 20190107, "3": 20191231}'  # the second before the first
S1_DATES = '{"2": 20190702, "1": 20190103}'  # numbered in reverse order


def aerial() -> np.ndarray:
    """(4, 512, 512) uint8 R, G, B, NIR: band b at row r, column c is (60 b + r + 2 c) mod 256."""
    r, c = np.mgrid[:512, :512]
    return np.stack([(60 * b + r + 2 * c) % 256 for b in range(4)]).astype(np.uint8)


def dem() -> np.ndarray:
    """(2, 512, 512) float32: the terrain rises by 1 m every 64 rows, the surface is 8 m above it."""
    terrain = np.broadcast_to(100 + np.arange(512)[:, None] / 64, (512, 512))
    return np.stack([terrain + 8, terrain]).astype(np.float32)


def stack(num_dates: int, num_bands: int) -> np.ndarray:
    """(T, C, 10, 10) int64: 3,000 date + 200 band + 10 row + column."""
    t, b, r, c = np.ogrid[:num_dates, :num_bands, :10, :10]
    return 3_000 * t + 200 * b + 10 * r + c


def snow_cloud() -> np.ndarray:
    """(3, 2, 10, 10) uint8: 7 % snow at date 0, row 1, column 2; 100 % cloud all over date 2."""
    mask = np.zeros((3, 2, 10, 10), np.uint8)
    mask[0, 0, 1, 2], mask[2, 1] = 7, 100
    return mask


def power() -> np.ndarray:
    """(2, 2, 10, 10) float32 linear: a NaN at date 0, VH, row 2, column 3; a zero at date 1, VV, row 0, column 0."""
    values = ((1 + stack(2, 2)) / 10_000).astype(np.float32)
    values[0, 1, 2, 3], values[1, 0, 0, 0] = np.nan, 0.0
    return values


def spot() -> np.ndarray:
    """(4, 64, 64) uint16: 1,000 band + 10 row + column."""
    b, r, c = np.ogrid[:4, :64, :64]
    return (1_000 * b + 10 * r + c).astype(np.uint16)


def panchromatic() -> np.ndarray:
    """(1, 256, 256) uint8: row."""
    return np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (1, 256, 256))


def cosia() -> np.ndarray:
    """(1, 512, 512) uint8: 19 stripes of 27 columns, value 0 to 18 from the west; the last is a column short."""
    return np.broadcast_to((np.arange(512) // 27).astype(np.uint8), (1, 512, 512))


def lpis() -> np.ndarray:
    """(3, 512, 512) uint8: 22, 30 and 45, except the first row: 1, 2 and 3."""
    values = np.empty((3, 512, 512), np.uint8)
    for band, (background, crop) in enumerate(((22, 1), (30, 2), (45, 3))):
        values[band], values[band, 0] = background, crop
    return values


def files() -> dict[str, np.ndarray]:
    """Bands by folder; a series has the bands of each date after those of the date before."""
    return {
        "D012-2019_AERIAL_RGBI": aerial(),
        "D012-2019_DEM_ELEV": dem(),
        "D012-2019_SENTINEL2_TS": stack(3, 10).astype(np.uint16).reshape(30, 10, 10),
        "D012-2019_SENTINEL2_MSK-SC": snow_cloud().reshape(6, 10, 10),
        "D012-2019_SENTINEL1-ASC_TS": power().reshape(4, 10, 10),
        "D012-2019_SENTINEL1-DESC_TS": power().reshape(4, 10, 10),
        "D012-2019_SPOT_RGBI": spot(),
        "D012-195X_AERIAL-RLT_PAN": panchromatic(),
        "D012-2019_AERIAL_LABEL-COSIA": cosia(),
        "D012-2019_ALL_LABEL-LPIS": lpis(),
    }


def path_of(src: Path, folder: str, patch: str = PATCH) -> Path:
    """Path of the file of ``patch``."""
    _, zone, position = patch.split("_")
    return src / folder / zone / f"{folder}_{zone}_{position}.tif"


def write_tif(path: Path, bands: np.ndarray, nodata: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    profile = {
        "driver": "GTiff",
        "count": count,
        "height": height,
        "width": width,
        "dtype": bands.dtype.name,
        "nodata": nodata,
        "crs": "EPSG:2154",
        "transform": rasterio.Affine(102.4 / width, 0, 650_000, 0, -102.4 / height, 6_700_000),
    }
    with rasterio.open(path, "w", **profile) as raster:
        for i, band in enumerate(bands, start=1):
            raster.write(band, i)


def write_gpkg(path: Path, columns: Mapping[str, list]) -> None:
    """A table whose geometry is a point, the same for every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    point = struct.pack("<BIdd", 1, 1, 650_000.0, 6_700_000.0)
    pyogrio.raw.write(
        path,
        geometry=np.array([point] * len(columns["patch_id"]), object),
        field_data=[np.array(values, object) for values in columns.values()],
        fields=list(columns),
        driver="GPKG",
        geometry_type="Point",
        crs="EPSG:2154",
    )


def write_dates(src: Path, sensor: str, dates: Mapping[str, str | None], column: str) -> None:
    """``GLOBAL_{sensor}_MTD_DATES.gpkg``."""
    path = src / "GLOBAL_ALL_MTD" / f"GLOBAL_{sensor}_MTD_DATES.gpkg"
    write_gpkg(path, {"patch_id": list(dates), column: list(dates.values())})


@pytest.fixture
def write_flair(tmp_path: Path) -> Callable[..., Path]:
    """Write patches of one zone into a folder and return it, with ``train.csv`` and ``train_flair2.csv``."""

    def write(patches: tuple[str, ...] = (PATCH,)) -> Path:
        src = tmp_path / "raw"
        for folder, bands in files().items():
            for patch in patches:
                write_tif(path_of(src, folder, patch), bands)
        write_dates(src, "AERIAL", {p: AERIAL_DATES.get(p, "20190706") for p in patches}, "date")
        write_dates(src, "SPOT", dict.fromkeys(patches, "20190812"), "date")
        write_dates(src, "AERIAL-RLT", dict.fromkeys(patches, "19550612"), "date")
        write_dates(src, "SENTINEL2", dict.fromkeys(patches, S2_DATES), "acquisition_dates")
        for orbit in ("ASC", "DESC"):
            write_dates(src, f"SENTINEL1-{orbit}", dict.fromkeys(patches, S1_DATES), "acquisition_dates")
        for name in ("train.csv", "train_flair2.csv"):
            (src / name).write_text("\n".join(["patch_id", *patches]) + "\n")
        return src

    return write
