"""One TreeSatAI-TS tile generated from formulas, so that readers can be tested against known values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio

from maestro_scale.datasets.treesatai_ts.splits import GENERA

TILE = "Fagus_spec._3_7_WEFL_NLF"
S2_PRODUCTS = [
    b"S2A_MSIL2A_20200229T104431_N0211_R008_T32UMD_20200301T115449",
    b"S2B_MSIL2A_20201231T103429_N0211_R108_T32UMD_20210101T134113",
    b"S2B_MSIL2A_20210101T104429_N0211_R008_T32UMD_20210102T134409",
]
S1_PRODUCTS = [
    b"S1A_IW_GRDH_1SDV_20200103T054940_20200103T055005_025309_02CCD2_4331",
    b"S1A_IW_GRDH_1SDV_20200103T054945_20200103T055010_025309_02CCD2_C841",
]


def aerial_pixels() -> np.ndarray:
    """(4, 304, 304) uint8: band b at row r, column c is (60 b + r + 2 c) mod 256."""
    r, c = np.mgrid[:304, :304]
    return np.stack([(60 * b + r + 2 * c) % 256 for b in range(4)]).astype(np.uint8)


def h5_content() -> dict[str, np.ndarray]:
    """S2 value: 1000 date + 100 band + 10 row + column; S1 the same over 10,000, with a NaN and a zero."""
    t, b, r, c = np.ogrid[:3, :10, :6, :6]
    s2 = (1000 * t + 100 * b + 10 * r + c).astype(np.float32)
    s1 = s2[:2, :2] / 10_000
    s1[0, 1, 2, 3], s1[1, 0, 0, 0] = np.nan, 0.0
    mask = np.zeros((3, 2, 6, 6), np.float32)
    mask[1, 0, 5, 0], mask[2, 1, 0, 5] = 40, 100
    return {
        "sen-2-data": s2,
        "sen-2-masks": mask,
        "sen-2-products": np.array(S2_PRODUCTS, h5py.string_dtype("ascii")),
        "sen-1-asc-data": s1,
        "sen-1-asc-products": np.array(S1_PRODUCTS, h5py.string_dtype("ascii")),
        "sen-1-des-data": s1 * 2,
        "sen-1-des-products": np.array(S1_PRODUCTS, h5py.string_dtype("ascii")),
    }


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    header = ["aerial_name", "sen_name", "aerial_date", *GENERA]
    shares = {"Fagus": "0.75", "Picea": "0.125"}
    lines = [",".join(header)]
    lines += [",".join([a, s, "20200704", *(shares.get(g, "0.0") for g in GENERA)]) for a, s in rows]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def write_tile(tmp_path: Path) -> Callable[..., Path]:
    """Write the tile into a folder and return the folder; arguments replace its parts."""

    def write(
        h5: dict[str, np.ndarray] | None = None,
        sen_name: str = f"{TILE}_2020.h5",
        pixels: np.ndarray | None = None,
    ) -> Path:
        pixels = aerial_pixels() if pixels is None else pixels
        for folder in ("aerial", "sentinel-ts"):
            (tmp_path / folder).mkdir(exist_ok=True)
        bands, height, width = pixels.shape
        profile = {"driver": "GTiff", "dtype": "uint8", "count": bands, "height": height, "width": width}
        profile |= {"crs": "EPSG:25832", "transform": rasterio.Affine(0.2, 0, 4e5, 0, -0.2, 5.8e6)}
        with rasterio.open(tmp_path / "aerial" / f"{TILE}.tif", "w", **profile) as raster:
            raster.write(pixels)
        with h5py.File(tmp_path / "sentinel-ts" / sen_name, "w") as file:
            for name, values in (h5_content() if h5 is None else h5).items():
                file[name] = values
        write_csv(tmp_path / "train.csv", [(f"{TILE}.tif", f"{TILE}_2020.h5")])
        return tmp_path

    return write
