"""Synthetic FLAIR-HUB: the official layout, every modality, deterministic in the seed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
from typer.testing import CliRunner

from maestro_scale import datasets
from maestro_scale.cli import app
from maestro_scale.shards.format.fields import check_tile

EVERYTHING = (
    "aerial",
    "dem",
    "s2",
    "s1_asc",
    "s1_des",
    "spot",
    "aerial_rlt",
    "cosia",
    "lpis_1",
    "lpis_2",
    "lpis_3",
)
TILES = 6


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("synth") / "flair_hub"
    done = CliRunner().invoke(app, ["synth", "flair_hub", str(dst), "--tiles", str(TILES), "--seed", "3"])
    assert done.exit_code == 0, done.output
    return dst


@pytest.mark.slow
def test_every_modality_and_target_of_every_split_reads(raw):
    labels = set()
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        reader = datasets.open_raw("flair_hub", raw, split, EVERYTHING)
        assert len(reader.keys()) == count
        for key in reader.keys():  # noqa: SIM118 # a method, not a mapping
            tile = reader.read(key)
            check_tile(tile, reader.spec)
            assert 60 <= len(tile.arrays["s2"]) <= 75
            assert all((np.diff(tile.dates[m][:, 1]) > 0).all() for m in ("s2", "s1_asc", "s1_des"))
            assert tile.dates["aerial_rlt"][0, 0] in range(1950, 1960)
            assert 0 < np.nanmedian(tile.arrays["s1_asc"]) < 1
            crop = np.isin(tile.targets["cosia"], (8, 9, 10, 11))
            named = tile.targets["cosia"] < 15
            np.testing.assert_array_equal((tile.targets["lpis_1"] != 22)[named], crop[named])
            labels |= set(np.unique(tile.targets["cosia"]).tolist())
    assert labels & {15, 16, 17, 18}
    sizes = [
        len(datasets.open_raw("flair_hub", raw, f"split_2_{p}").keys()) for p in ("train", "val", "test")
    ]
    assert sum(sizes) == TILES
    assert all(sizes)


def test_files_and_tables_have_the_real_layout(raw):
    reader = datasets.open_raw("flair_hub", raw, "train")
    domain, zone, position = reader.keys()[0].split("_")
    layout = {
        f"{domain}_AERIAL_RGBI": (4, 512, "uint8"),
        f"{domain}_DEM_ELEV": (2, 512, "float32"),
        f"{domain}_SPOT_RGBI": (4, 64, "uint16"),
        f"{domain}_AERIAL_LABEL-COSIA": (1, 512, "uint8"),
        f"{domain}_ALL_LABEL-LPIS": (3, 512, "uint8"),
        f"{domain[:4]}-195X_AERIAL-RLT_PAN": (1, 256, "uint8"),
    }
    for folder, (count, side, dtype) in layout.items():
        with rasterio.open(raw / folder / zone / f"{folder}_{zone}_{position}.tif") as raster:
            assert (raster.count, raster.height, raster.width) == (count, side, side)
            assert raster.dtypes[0] == dtype
            assert raster.crs.to_epsg() == 2154
            assert raster.bounds.right - raster.bounds.left == pytest.approx(102.4)
    with rasterio.open(next((raw / f"{domain}_SENTINEL2_TS" / zone).iterdir())) as raster:
        assert (raster.count % 10, raster.height, raster.dtypes[0]) == (0, 10, "uint16")
        assert raster.res == pytest.approx((10.24, 10.24))
    mtd = raw / "GLOBAL_ALL_MTD"
    table = pyogrio.read_arrow(mtd / "GLOBAL_SENTINEL2_MTD_DATES.gpkg", read_geometry=False)[1].to_pydict()
    assert set(table) == {"patch_id", "acquisition_dates"}
    dates = json.loads(table["acquisition_dates"][0])
    assert next(iter(dates)) == "1"
    assert all(isinstance(day, int) and len(str(day)) == 8 for day in dates.values())
    assert len(set(table["acquisition_dates"])) > 1
    info = pyogrio.read_info(mtd / "GLOBAL_ALL_MTD_SPLIT.gpkg")
    assert info["crs"] == "EPSG:2154"
    assert info["geometry_type"] == "Polygon"
    assert list(info["fields"]) == ["patch_id", *(f"split_{i}" for i in range(1, 6)), "split_flairchallenge"]


def test_the_same_seed_gives_the_same_bytes(raw, tmp_path):
    datasets.synth("flair_hub", tmp_path / "again", TILES, seed=3)
    content = {
        p.relative_to(raw): p.read_bytes()
        for p in raw.rglob("*")
        if p.is_file() and (p.suffix == ".gpkg" or "0-0" in p.name or p.suffix == ".csv")
    }
    assert len(content) > 40
    assert all((tmp_path / "again" / name).read_bytes() == data for name, data in content.items())
