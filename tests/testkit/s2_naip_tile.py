"""S2-NAIP tiles generated from formulas, so that readers can be tested against known values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.errors import NotGeoreferencedWarning

TILE = "32612_960_-6049"
S2_PRODUCTS = [
    "S2B_MSIL1C_20200301T170901_N0209_R112_T14RNU_20200301T203931",
    "S2A_MSIL1C_20200229T170859_N0209_R112_T14RNU_20200229T203912",  # before the first: out of order
    "S2A_MSIL1C_20201231T170731_N0209_R112_T14RNU_20210101T191527",
]
S1_PRODUCTS = [
    "S1A_IW_GRDH_1SDV_20200103T005312_20200104T005337_030655_03834A_4331",
    "S1B_IW_GRDH_1SDV_20200702T005312_20200702T005337_022300_02A53B_C841",
]
LANDSAT_PRODUCTS = ["LC08_L1TP_026039_20200512_20200829_02_T1"]
NAIP_PRODUCT = "m_3008501_ne_16_060_20200704"


def naip_pixels() -> np.ndarray:
    """(4, 512, 512) uint8: band b at row r, column c is (60 b + r + 2 c) mod 256."""
    r, c = np.mgrid[:512, :512]
    return np.stack([(60 * b + r + 2 * c) % 256 for b in range(4)]).astype(np.uint8)


def stack(num_dates: int, num_bands: int) -> np.ndarray:
    """(T, C, 64, 64) int64: 10,000 date + 800 band + 10 row + column."""
    t, b, r, c = np.ogrid[:num_dates, :num_bands, :64, :64]
    return 10_000 * t + 800 * b + 10 * r + c


def decibels() -> np.ndarray:
    """(2, 2, 64, 64) float32 below zero, with a NaN at date 0, VH, row 2, column 3 and a zero at date 1, VV, 0, 0."""
    values = (-1 - stack(2, 2) / 1000).astype(np.float32)
    values[0, 1, 2, 3], values[1, 0, 0, 0] = np.nan, 0.0
    return values


def write_tif(path: Path, values: np.ndarray) -> None:
    """(T, C, H, W) as T·C bands, band after band of the first date, then of the second, …"""
    bands = values.reshape(-1, *values.shape[2:])
    profile = {"driver": "GTiff", "count": len(bands), "height": 64, "width": 64, "dtype": bands.dtype.name}
    profile |= {"crs": "EPSG:32612", "transform": rasterio.Affine(10, 0, 614_400, 0, -10, -3_871_360)}
    with rasterio.open(path, "w", **profile) as raster:
        for i, band in enumerate(bands, start=1):
            raster.write(band, i)


@pytest.fixture
def write_naip(tmp_path: Path) -> Callable[..., Path]:
    """Write tiles into a folder and return it; arguments replace their parts."""

    def write(names: tuple[str, ...] = (TILE,), s1: np.ndarray | None = None) -> Path:
        folders = (
            "naip",
            "sentinel2",
            "sentinel1",
            "landsat",
            *(f"dates/{m}" for m in ("naip", "s2", "s1", "landsat")),
        )
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)  # PNG has no georeference
        for name in names:
            profile = {"driver": "PNG", "dtype": "uint8", "count": 4, "height": 512, "width": 512}
            with rasterio.open(tmp_path / "naip" / f"{name}.png", "w", **profile) as raster:
                raster.write(naip_pixels())
            write_tif(tmp_path / "sentinel2" / f"{name}_stacked.tif", stack(3, 10).astype(np.uint16))
            write_tif(tmp_path / "sentinel1" / f"{name}.tif", decibels() if s1 is None else s1)
            write_tif(tmp_path / "landsat" / f"{name}_stacked.tif", stack(1, 11).astype(np.uint16))
            for folder, products in (
                ("naip", [NAIP_PRODUCT]),
                ("s2", S2_PRODUCTS),
                ("s1", S1_PRODUCTS),
                ("landsat", LANDSAT_PRODUCTS),
            ):
                (tmp_path / "dates" / folder / f"{name}.txt").write_text("\n".join(products) + "\n")
        (tmp_path / "train.csv").write_text("\n".join(["name", *names]) + "\n")
        return tmp_path

    return write
