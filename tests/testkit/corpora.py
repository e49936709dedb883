"""A few tiles of each public corpus that a description ships for, in the layout that the corpus is published in.

Written with the libraries that wrote the originals (xarray and zarr, h5py, pyarrow, rasterio, tarfile), at the original
sizes, from :func:`pixels`, so that tests compare what ``shard`` stores with values computed by hand. Each layout's
sources are cited in docs/corpora.md. Folder, file, member and variable names are those of the originals.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

S2_L2A = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
S2_L1C = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
CLOUDS = (0, 1, 2, 3, 4, 5, 6)  # of SEnSeIv2: land, water, snow, thin cloud, thick cloud, shadow, no data

TERRAMESH_TIMES = {"majortom": "2021-06-30T10:15:59", "ssl4eos12": "2020-05-03T02:07:17"}
SSL4EO_TIMES = ("2020-01-05T10:30:01", "2020-04-19T09:40:31", "2020-07-23T09:40:39", "2020-10-21T09:40:39")
SSL4EO_RADAR_TIMES = (
    "2020-01-07T05:00:00",
    "2020-04-18T05:00:00",
    "2020-07-25T05:00:00",
    "2020-10-19T05:00:00",
)


def pixels(tile: int, num_dates: int, num_bands: int, size: int) -> np.ndarray:
    """(T, C, size, size) int64: 1000 + 400 tile + 20 date + 30 band + (3 row + column) mod 50."""
    t, c, row, column = np.ogrid[:num_dates, :num_bands, :size, :size]
    return 1000 + 400 * tile + 20 * t + 30 * c + (3 * row + column) % 50


def decibels(tile: int, num_dates: int, num_bands: int, size: int) -> np.ndarray:
    """(T, C, size, size) float64: eighths of a dB from −2 to −22, exact in float16."""
    return -2 - (pixels(tile, num_dates, num_bands, size) % 160) / 8


def clouds(num_dates: int, size: int) -> np.ndarray:
    """(T, size, size) uint8 classes of SEnSeIv2: land, but for class t + 1 … 6 in columns 10 t + 10 … of row 5."""
    classes = np.zeros((num_dates, size, size), np.uint8)
    for t in range(num_dates):
        for i in CLOUDS[1:]:
            classes[t, 5, 10 * t + i] = i
    return classes


def elevation(tile: int, size: int) -> np.ndarray:
    """(1, 1, size, size) int64 metres: 100 + 50 tile + row − column."""
    row, column = np.ogrid[:size, :size]
    return (100 + 50 * tile + row - column)[None, None]


def zarr_zip(variables: Mapping[str, Any], coords: Mapping[str, Any], chunks: tuple[int, ...]) -> bytes:
    """A zip of a consolidated Zarr 2 group as xarray writes it. ``chunks``: of ``bands``."""
    import xarray

    dataset = xarray.Dataset(dict(variables), coords=dict(coords))
    encoding: dict[str, Any] = {"bands": {"chunks": chunks}}
    for name in ("time", "time_"):
        if name in dataset.variables and dataset[name].dtype.kind == "M":
            encoding[name] = {"units": "nanoseconds since 1970-01-01", "dtype": "int64"}
    file = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(file, "w") as archive:
        dataset.to_zarr(folder, zarr_format=2, consolidated=True, encoding=encoding)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return file.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def geotiff(values: np.ndarray, resolution_m: float, *, crs: str = "EPSG:32633", **profile: Any) -> bytes:
    """(C, H, W) as a GeoTIFF; tile 0's upper left corner at 500,000 E, 5,000,000 N."""
    from rasterio import Affine
    from rasterio.io import MemoryFile

    grid = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    grid |= {"crs": crs, "transform": Affine(resolution_m, 0, 500_000, 0, -resolution_m, 5_000_000)}
    with MemoryFile() as file:
        with file.open(driver="GTiff", dtype=values.dtype.name, **grid, **profile) as raster:
            raster.write(values)
        return bytes(file.read())


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _sample(bands: np.ndarray, names: Sequence[str], times: Sequence[str], tile: int, masked: bool) -> bytes:
    """One ``.zarr.zip`` of TerraMesh and of the WebDataset version of SSL4EO-S12 v1.1."""
    import xarray
    from rasterio.crs import CRS

    size = bands.shape[-1]
    variables: dict[str, Any] = {
        "bands": (("time", "band", "y", "x"), bands, {"grid_mapping": "spatial_ref"}),
        "center_lat": 45.0 + tile,
        "center_lon": 15.0,
    }
    if masked:
        variables["cloud_mask"] = (("time", "y", "x"), clouds(len(bands), size))
    coords = {
        "band": list(names),
        "time": np.array(times, "datetime64[ns]"),
        "x": 500_005.0 + 10 * np.arange(size),
        "y": 4_999_995.0 - 10 * np.arange(size),
        "sample": f"{tile:07d}_0",
        "spatial_ref": xarray.Variable((), 0, {"crs_wkt": CRS.from_epsg(32633).to_wkt()}),
    }
    return zarr_zip(variables, coords, (1, *bands.shape[1:]))


def write_terramesh(root: Path, split: str = "train", *, per_subset: int = 2) -> list[str]:
    """``{split}/{modality}/{subset}_shard_NNNNNN.tar``; samples of majortom have S1RTC, of ssl4eos12 S1GRD. → keys."""
    keys = []
    for subset, radar in (("majortom", "S1RTC"), ("ssl4eos12", "S1GRD")):
        members: dict[str, dict[str, bytes]] = {m: {} for m in ("S2L2A", radar, "DEM")}
        for _ in range(per_subset):
            tile, time = len(keys), [TERRAMESH_TIMES[subset]]
            keys.append(f"{subset}_{split}_{tile:07d}")
            member = f"{keys[-1]}.zarr.zip"
            optical = pixels(tile, 1, 12, 264).astype(np.int16)
            members["S2L2A"][member] = _sample(optical, S2_L2A, time, tile, masked=True)
            backscatter = decibels(tile, 1, 2, 264).astype(np.float16)
            members[radar][member] = _sample(backscatter, ("vv", "vh"), time, tile, masked=False)
            height = elevation(tile, 264).astype(np.int16)
            members["DEM"][member] = _sample(height, ("DEM",), ["1970-01-01"], tile, masked=False)
        for modality, samples in members.items():
            write_tar(root / split / modality / f"{subset}_shard_000001.tar", samples)
    return keys


def write_ssl4eo_s12(root: Path, split: str = "train", *, num_tiles: int = 2) -> list[str]:
    """The WebDataset version: ``{split}/{modality}/ssl4eos12_shard_NNNNNN.tar``, one ``.zarr.zip`` a place. → keys."""
    keys = [f"ssl4eos12_{split}_seasonal_data_{tile + 1:07d}" for tile in range(num_tiles)]
    members: dict[str, dict[str, bytes]] = {m: {} for m in ("S2L2A", "S1GRD", "DEM")}
    for tile, key in enumerate(keys):
        name = f"{key}.zarr.zip"
        optical = pixels(tile, 4, 12, 264).astype(np.int16)
        members["S2L2A"][name] = _sample(optical, S2_L2A, SSL4EO_TIMES, tile, masked=True)
        backscatter = decibels(tile, 4, 2, 264).astype(np.float16)
        members["S1GRD"][name] = _sample(backscatter, ("vv", "vh"), SSL4EO_RADAR_TIMES, tile, masked=False)
        height = elevation(tile, 264).astype(np.int16)
        members["DEM"][name] = _sample(height, ("DEM",), ["1970-01-01"], tile, masked=False)
    for modality, samples in members.items():
        write_tar(root / split / modality / "ssl4eos12_shard_000001.tar", samples)
    return keys


def write_ssl4eo_s12_zarr(root: Path, split: str = "train", *, num_tiles: int = 2) -> list[str]:
    """The Zarr version: ``{split}/{modality}/ssl4eos12_{split}_seasonal_data_N.zarr.zip`` of many places. → keys."""
    keys = [f"{80717 + tile:07d}" for tile in range(num_tiles)]
    times = {"S2L2A": SSL4EO_TIMES, "S1GRD": SSL4EO_RADAR_TIMES}
    values = {
        "S2L2A": np.stack([pixels(i, 4, 12, 264) for i in range(num_tiles)]).astype(np.int16),
        "S1GRD": np.stack([decibels(i, 4, 2, 264) for i in range(num_tiles)]).astype(np.float16),
    }
    for modality, names in (("S2L2A", S2_L2A), ("S1GRD", ("vv", "vh"))):
        stamps = np.broadcast_to(np.array(times[modality], "datetime64[ns]"), (num_tiles, 4))
        variables: dict[str, Any] = {
            "bands": (("sample", "time", "band", "y", "x"), values[modality]),
            "center_lat": ("sample", 45.0 + np.arange(num_tiles)),
            "center_lon": ("sample", np.full(num_tiles, 15.0)),
            "crs": ("sample", np.full(num_tiles, 32633)),
            "sample_id": (("sample", "time"), [[f"{key}_{t}" for t in range(4)] for key in keys]),
            "time_": (("sample", "time"), stamps),
            "x_": (("sample", "x"), np.tile(500_005.0 + 10 * np.arange(264), (num_tiles, 1))),
            "y_": (("sample", "y"), np.tile(4_999_995.0 - 10 * np.arange(264), (num_tiles, 1))),
        }
        if modality == "S2L2A":
            variables["cloud_mask"] = (("sample", "time", "y", "x"), np.stack([clouds(4, 264)] * num_tiles))
        coords = {"band": list(names), "sample": keys, "time": range(4), "x": range(264), "y": range(264)}
        chunks = (num_tiles, 1, len(names), 264, 264)
        file = root / split / modality / f"ssl4eos12_{split}_seasonal_data_000001.zarr.zip"
        write_file(file, zarr_zip(variables, coords, chunks))
    return keys


MAJOR_TOM_10M, MAJOR_TOM_20M = ("B02", "B03", "B04", "B08"), ("B05", "B06", "B07", "B8A", "B11", "B12")
MAJOR_TOM_60M = {"Core-S2L2A": ("B01", "B09"), "Core-S2L1C": ("B01", "B09", "B10")}
MAJOR_TOM_PRODUCTS = {
    "Core-S2L2A": "S2A_MSIL2A_20230119T161811_N0509_R111_T01CDJ_20230119T220000",
    "Core-S2L1C": "S2A_MSIL1C_20230119T161811_N0509_R111_T01CDJ_20230119T220000",
    "Core-S1RTC": "S1A_IW_GRDH_1SDV_20230121T053411_20230121T053436_046862_059E7A_rtc",
}


def write_major_tom(
    root: Path, dataset: str, *, cells: Sequence[str] = ("922D_249L", "454U_120R")
) -> list[str]:
    """``{dataset}/images/part_NNNNN.parquet``: a row a grid cell, bands as bytes of GeoTIFFs of their own resolution,
    one row a row group. → keys."""
    import pyarrow as pa
    from pyarrow import parquet

    (root / dataset / "images").mkdir(parents=True)
    product = MAJOR_TOM_PRODUCTS[dataset]
    date = next(part for part in product.split("_") if len(part) == 15 and part[8] == "T")
    stamp = f"{date[:4]}-{date[4:6]}-{date[6:8]}T{date[9:11]}:{date[11:13]}:{date[13:]}"
    rows = []
    for tile, cell in enumerate(cells):
        row: dict[str, Any] = {"product_id": product, "grid_cell": cell, "product_datetime": stamp}
        row["thumbnail"] = b""
        if dataset == "Core-S1RTC":
            linear = pixels(tile, 1, 2, 1068)[0].astype(np.float32) / 8192
            linear[0, 0, 0] = -32768  # its nodata
            for name, band in zip(("vv", "vh"), linear, strict=True):
                row[name] = geotiff(band[None], 10, nodata=-32768, compress="deflate")
        else:
            for names, meters in ((MAJOR_TOM_10M, 10), (MAJOR_TOM_20M, 20), (MAJOR_TOM_60M[dataset], 60)):
                values = pixels(tile, 1, len(names), 10_680 // meters)[0].astype(np.uint16)
                values[0, 0, 0] = 0  # nodata of Sentinel-2
                for name, band in zip(names, values, strict=True):
                    row[name] = geotiff(band[None], meters, compress="deflate")
            row["cloud_mask"] = geotiff(np.zeros((1, 1068, 1068), np.uint8), 10, compress="deflate")
        rows.append(row)
    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, root / dataset / "images" / "part_00001.parquet", row_group_size=1)
    return list(cells)


MMEARTH_BANDS = ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8A", "B8", "B9", "B10", "B11", "B12")
MMEARTH_DATES = ("2018-07-16", "2019-11-02", "2020-03-28")


def scene_classes(tile: int, size: int) -> np.ndarray:
    """(size, size) uint8: the classes 0 to 11 of Sentinel-2's scene classification; 255 in tile 1, which is L1C."""
    classes = np.arange(size * size).reshape(size, size) // 5 % 12
    return np.full_like(classes, 255, np.uint8) if tile == 1 else classes.astype(np.uint8)


def write_mmearth(
    root: Path, *, name: str = "data_1M_v001_64", size: int = 64, num_tiles: int = 3
) -> list[str]:
    """``{name}/{name}.h5`` with an axis of tiles, and JSON files. Tile 1 is L1C, the others L2A (no B10). → keys."""
    import h5py

    folder, keys = root / name, [str(4_000 + i) for i in range(num_tiles)]
    folder.mkdir(parents=True)
    with h5py.File(folder / f"{name}.h5", "w") as file:

        def store(dataset: str, values: np.ndarray) -> None:
            chunks = (1, *values.shape[1:])
            file.create_dataset(dataset, data=values, chunks=chunks, compression="gzip")

        optical = np.concatenate([pixels(i, 1, 13, size) for i in range(num_tiles)]).astype(np.uint16)
        optical[[i for i in range(num_tiles) if i != 1], 10] = 0  # B10 is not in L2A
        radar = np.concatenate([decibels(i, 1, 8, size) for i in range(num_tiles)]).astype(np.float32)
        radar[:, [2, 3, 6, 7]] = -np.inf  # HH, HV
        radar[2, 4:] = -np.inf  # no descending orbit
        store("sentinel2", optical)
        store("sentinel2_scl", np.stack([scene_classes(i, size)[None] for i in range(num_tiles)]))
        store("sentinel1", radar)
        heights = np.concatenate([elevation(i, size) for i in range(num_tiles)])
        store("aster", np.concatenate([heights, np.full_like(heights, 3)], axis=1).astype(np.int16))
        classes = np.arange(size * size).reshape(1, 1, size, size) % 10
        store("dynamic_world", np.repeat(classes, num_tiles, axis=0).astype(np.uint8))
        codes = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100, 255], np.uint8)
        store(
            "esa_worldcover",
            np.repeat(codes[np.arange(size * size).reshape(1, 1, size, size) % 12], num_tiles, 0),
        )
        meta = np.zeros(num_tiles, [("tile_id", "S100"), ("S2_type", "S10")])
        meta["tile_id"], meta["S2_type"] = keys, ["l1c" if i == 1 else "l2a" for i in range(num_tiles)]
        store("metadata", meta)
    info = {
        key: {
            "S2_DATE": MMEARTH_DATES[i],
            "S2_type": "l1c" if i == 1 else "l2a",
            "CRS": "EPSG:32721",
            "lat": -14.5,
            "lon": -57.0,
        }
        for i, key in enumerate(keys)
    }
    splits: dict[str, list[int]] = {"train": list(range(num_tiles)), "val": [], "test": []}
    for suffix, content in (("tile_info", info), ("splits", splits), ("band_stats", {})):
        (folder / f"{name}_{suffix}.json").write_text(json.dumps(content))
    return keys


COPERNICUS_S2 = ("20220322T171049_20220322T171812_T14TQP", "20221121T171609_20221121T171900_T14TQP")
COPERNICUS_S1 = (
    "S1A_IW_GRDH_1SDV_20220321T002142_20220321T002207_042417_050F04_C6B4",
    "S1A_IW_GRDH_1SDV_20221122T002150_20221122T002215_046004_058152_0B5F",
)


def write_copernicus_pretrain(root: Path) -> list[str]:
    """The raw GeoTIFFs of two local patches of a grid cell. The second one lacks Sentinel-1, and its first image of
    Sentinel-2 is larger by two rows and a column. → keys."""
    grid, patches = "0772176_-96.00_44.00", ("0865831_-95.92_43.96", "0865832_-95.95_43.99")
    for tile, patch in enumerate(patches):
        optical = pixels(tile, 2, 13, 264).astype(np.uint16)
        backscatter = decibels(tile, 2, 2, 264).astype(np.float32)
        for t in range(2):
            s2 = root / "s2_toa_mix" / "images" / grid / patch / f"{COPERNICUS_S2[t]}.tif"
            more = ((0, 0), (0, 2), (0, 1)) if (tile, t) == (1, 0) else 0
            write_file(s2, geotiff(np.pad(optical[t], more), 10, compress="deflate"))
            s1 = root / "s1_grd_utm" / "images" / grid / patch / f"{COPERNICUS_S1[t]}.tif"
            if tile == 0:
                write_file(s1, geotiff(backscatter[t], 10, compress="deflate"))
    return [f"{grid}/{patch}" for patch in patches]


def write_flair1_toy(root: Path, number: int = 1) -> dict[str, list[str]]:
    """``flair_{number}_toy_dataset`` of FLAIR#1 or FLAIR#2 (without the Sentinel-2 super-patches). → keys by split."""
    keys: dict[str, list[str]] = {"train": [], "test": []}
    row, column = np.ogrid[:512, :512]
    for tile, (split, zone) in enumerate(
        (("train", "D006_2020/Z10_UU"), ("train", "D004_2021/Z10_AU"), ("test", "D012_2019/Z13_AA"))
    ):
        top = root / f"flair_{number}_toy_dataset"
        name = f"flair_{number}_toy"
        image = np.stack([(20 * b + row + column + tile) % 256 for b in range(5)]).astype(np.uint8)
        label = (1 + (row // 8 + column // 8 + tile) % 19).astype(np.uint8)[None]
        code = f"{2993 + tile:06d}"
        lambert = {"crs": "EPSG:2154", "compress": "deflate"}
        write_file(top / f"{name}_aerial_{split}/{zone}/img/IMG_{code}.tif", geotiff(image, 0.2, **lambert))
        write_file(top / f"{name}_labels_{split}/{zone}/msk/MSK_{code}.tif", geotiff(label, 0.2, **lambert))
        keys[split].append(code)
    return keys


EUROSAT_CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)


def write_eurosat(root: Path) -> dict[str, list[str]]:
    """``EuroSAT_MS/{class}/{class}_{n}.tif`` as in Zenodo's EuroSAT_MS.zip, and lists of splits. → keys by split."""
    keys: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for tile, kind in enumerate(EUROSAT_CLASSES):
        for split, number in (("train", 1), ("val", 20), ("test", 301)):
            values = pixels(tile, 1, 13, 64)[0].astype(np.uint16) + number
            write_file(
                root / "EuroSAT_MS" / kind / f"{kind}_{number}.tif", geotiff(values, 10, compress="deflate")
            )
            keys[split].append(f"{kind}_{number}")
    for split, names in keys.items():
        (root / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    return keys
