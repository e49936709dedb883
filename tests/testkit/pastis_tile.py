"""PASTIS-HD tiles generated from formulas, so that readers can be tested against known values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

TILE = "10000"
S2_DAYS = (20180924, 20181231, 20200229)
S1A_DAYS = (20180902, 20180902)
S1D_DAYS = (20190103, 20181203)  # out of order


def series(num_dates: int, num_bands: int) -> np.ndarray:
    """(T, C, 128, 128) int64: 10,000 date + 700 band + 5 row + column."""
    t, b, r, c = np.ogrid[:num_dates, :num_bands, :128, :128]
    return 10_000 * t + 700 * b + 5 * r + c


def decibels() -> np.ndarray:
    """(2, 3, 128, 128) float16: VV -1 - date - row / 128, VH four below, and their difference, 4."""
    vv = -1 - np.arange(2)[:, None, None] - np.mgrid[:128, :128][0] / 128
    return np.stack([vv, vv - 4, np.full_like(vv, 4)], axis=1).astype(np.float16)


def spot_pixels() -> np.ndarray:
    """(3, 1280, 1280) uint8: band b at row r, column c is (50 b + r + 2 c) mod 256."""
    r, c = np.mgrid[:1280, :1280]
    return np.stack([(50 * b + r + 2 * c) % 256 for b in range(3)]).astype(np.uint8)


def labels() -> np.ndarray:
    """(3, 128, 128) uint8: meadow in rows 0–31, sorghum in 32–63, void at column 127, else background."""
    semantic = np.zeros((128, 128), np.uint8)
    semantic[:32], semantic[32:64] = 1, 18
    semantic[:, 127] = 19
    return np.stack([semantic, np.full_like(semantic, 77), np.full_like(semantic, 200)])


def metadata(names: tuple[str, ...], as_text: bool = False, **changes: object) -> dict:
    """A geojson as the hub has it, a tile per fold in turn; dates as objects, or as JSON in a string."""
    features = []
    for i, name in enumerate(names):
        dates = {"dates-S2": S2_DAYS, "dates-S1A": S1A_DAYS, "dates-S1D": S1D_DAYS}
        days = {k: {str(n): d for n, d in enumerate(v)} for k, v in dates.items()}
        properties = {"Fold": i % 5 + 1, "ID_PATCH": int(name), "TILE": "t30uxv", "N_Parcel": 67}
        properties |= {k: json.dumps(v) if as_text else v for k, v in days.items()} | changes
        square = [[[0, 0], [1280, 0], [1280, 1280], [0, 0]]]
        geometry = {"type": "Polygon", "coordinates": square}
        features.append({"type": "Feature", "id": name, "properties": properties, "geometry": geometry})
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::2154"}}
    return {"type": "FeatureCollection", "crs": crs, "features": features}


@pytest.fixture
def write_pastis(tmp_path: Path) -> Callable[..., Path]:
    """Write tiles into a folder and return it."""

    def write(names: tuple[str, ...] = (TILE,)) -> Path:
        for folder in (
            "DATA_S2",
            "DATA_S1A",
            "DATA_S1D",
            "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019",
            "ANNOTATIONS",
        ):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            np.save(tmp_path / f"DATA_S2/S2_{name}.npy", series(3, 10).astype(np.int16))
            np.save(tmp_path / f"DATA_S1A/S1A_{name}.npy", decibels())
            np.save(tmp_path / f"DATA_S1D/S1D_{name}.npy", decibels())
            np.save(tmp_path / f"ANNOTATIONS/TARGET_{name}.npy", labels())
            spot = tmp_path / f"DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_{name}.tif"
            profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 1280, "width": 1280}
            profile |= {"crs": "EPSG:2154", "transform": rasterio.Affine(1, 0, 4e5, 0, -1, 6.9e6)}
            with rasterio.open(spot, "w", **profile) as raster:
                raster.write(spot_pixels())
        (tmp_path / "metadata.geojson").write_text(json.dumps(metadata(names)))
        return tmp_path

    return write
