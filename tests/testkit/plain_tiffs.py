"""Synthetic tiles of the shipped datasets as plain folders of GeoTIFF files, each with its description.

``rewrite`` copies values as they are in the raw files: nothing is replaced, sorted or selected, so that a description
of the copy has to do what the shipped reader does.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyogrio
import rasterio

from maestro_scale import datasets
from maestro_scale.datasets.flair_hub.reader import LABELS, PRODUCTS, S2_MASK
from maestro_scale.strict_yaml.merge import dump_yaml

_TREESAT = {"s2": "sen-2", "s1_asc": "sen-1-asc", "s1_des": "sen-1-des"}
_PASTIS = {"s2": "S2", "s1_asc": "S1A", "s1_des": "S1D"}


def rewrite(name: str, src: Path, dst: Path, keys: Sequence[str], split: str = "train") -> Path:
    """Write the tiles ``keys`` of the raw dataset ``name`` in ``src`` to ``dst``; returns the path of a description."""
    dst.mkdir(parents=True)
    (dst / f"{split}.txt").write_text("\n".join(keys))
    makers = {
        "treesatai_ts": _treesat,
        "pastis_hd": _pastis,
        "s2_naip": _naip,
        "flair_hub": _flair,
        "flair2": _flair,
    }
    made = makers[name](name, src, dst, list(keys), split)
    spec = datasets.spec(name)
    quantities = {"s1": "backscatter_db" if name in ("pastis_hd", "s2_naip") else "backscatter_linear"}
    for modality in spec.modalities:
        raster = made["rasters"][modality.name]
        kind = {"s2": "reflectance", "dem": "elevation"}.get(modality.name, "image")
        raster |= {
            "bands": list(modality.bands),
            "resolution_m": modality.resolution_m,
            "dtype": modality.dtype,
            "series": modality.series,
            "nodata_mask": "nodata" in modality.mask_bands,  # stored as the shipped reader stores it
            "quantity": quantities["s1"] if modality.name.startswith("s1") else kind,
        }
    description = {
        "name": name,
        "tile_m": spec.tile_m,
        "crop_m": spec.crop_m,
        "splits": {"lists": {"file": "{split}.txt"}},
        **made,
    }
    path = dst / "description.yaml"
    path.write_text(dump_yaml(description))
    return path


def _treesat(name: str, src: Path, dst: Path, keys: list[str], split: str) -> dict[str, Any]:
    """A file per date; Sentinel-1 a file per date and band. Dates in names, labels in a table."""
    with (src / f"{split}.csv").open() as file:
        rows = {row["aerial_name"].removesuffix(".tif"): row for row in csv.DictReader(file)}
    with (dst / "labels.csv").open("w") as file:
        writer = csv.DictWriter(file, list(rows[keys[0]]))
        writer.writeheader()
        writer.writerows(rows[key] for key in keys)
    (dst / "aerial").mkdir()
    for key in keys:
        shutil.copy(src / "aerial" / f"{key}.tif", dst / "aerial")
        with h5py.File(src / "sentinel-ts" / rows[key]["sen_name"]) as file:
            for sensor, prefix in _TREESAT.items():
                for i, (values, product) in enumerate(
                    zip(file[f"{prefix}-data"], file[f"{prefix}-products"], strict=True)
                ):
                    where = f"{key}/{product.decode().split('_')[-5][:8]}_{i:03d}"
                    if sensor == "s2":
                        _write(dst / f"s2/{where}.tif", values)
                        _write(dst / f"s2/{where}_mask.tif", file["sen-2-masks"][i])
                    else:
                        for band, values_of_band in zip(("VV", "VH"), values, strict=True):
                            _write(dst / f"{sensor}/{where}_{band}.tif", values_of_band[None])
    mask = "s2/{key}/{date:%Y%m%d}_{n}_mask.tif"
    radar = "{key}/{date:%Y%m%d}_{n}_{band}.tif"
    return {
        "rasters": {
            "aerial": {
                "files": "aerial/{key}.tif",
                "window": [2, 2],
                "dates": {"from": "csv", "file": "labels.csv", "key": "aerial_name", "column": "aerial_date"},
            },
            "s2": {
                "files": "s2/{key}/{date:%Y%m%d}_{n}.tif",
                "masks": {
                    "snow": {"files": mask, "band": 1, "percent": True},
                    "cloud": {"files": mask, "band": 2, "percent": True},
                },
            },
            "s1_asc": {"files": f"s1_asc/{radar}"},
            "s1_des": {"files": f"s1_des/{radar}"},
        },
        "targets": {
            "species": {
                "kind": "multilabel",
                "threshold": 0.07,
                "classes": list(datasets.spec(name).targets[0].classes),
                "table": {"file": "labels.csv", "key": "aerial_name"},
            }
        },
    }


def _pastis(name: str, src: Path, dst: Path, keys: list[str], split: str) -> dict[str, Any]:
    """A file per date, named by day of the year; the metadata gives nothing but their dates."""
    meta, _, _, values = pyogrio.raw.read(src / "metadata.geojson", read_geometry=False)
    columns = dict(zip(meta["fields"], values, strict=True))
    rows = {str(key): i for i, key in enumerate(columns["ID_PATCH"])}
    for folder in ("spot", "labels"):
        (dst / folder).mkdir()
    for key in keys:
        spot = f"DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_{key}.tif"
        shutil.copy(src / spot, dst / f"spot/{key}.tif")
        _write(dst / f"labels/{key}.tif", np.load(src / f"ANNOTATIONS/TARGET_{key}.npy"))
        for sensor, code in _PASTIS.items():
            series = np.load(src / f"DATA_{code}/{code}_{key}.npy", mmap_mode="r")
            if series.dtype == np.float16:
                series = series.astype(np.float32)  # GeoTIFF has no float16 before GDAL 3.11
            days = _json_dates(columns[f"dates-{code}"][rows[key]])
            for i, (image, day) in enumerate(zip(series, days, strict=True)):
                when = np.datetime64(f"{day[:4]}-{day[4:6]}-{day[6:]}")
                number = (when - when.astype("datetime64[Y]").astype("datetime64[D]")).astype(int) + 1
                _write(dst / f"{sensor}/{day[:4]}/{key}_{number:03d}_{i:03d}.tif", image)
    series_files = {s: {"files": f"{s}/{{date:%Y}}/{{key}}_{{date:%j}}_{{n}}.tif"} for s in _PASTIS}
    crops, present = datasets.spec(name).targets
    return {
        "rasters": {
            "spot": {"files": "spot/{key}.tif", "dates": {"from": "constant", "date": "2019-07-01"}},
            **series_files,
        },
        "targets": {
            "crop_type": {
                "kind": "segmentation",
                "raster": {"files": "labels/{key}.tif"},
                "resolution_m": 10,
                "classes": list(crops.classes),
                "ignored": ["void"],
            },
            "crops_present": {"kind": "multilabel", "classes": list(present.classes), "of": "crop_type"},
        },
    }


def _naip(name: str, src: Path, dst: Path, keys: list[str], split: str) -> dict[str, Any]:
    """Stacks of dates with a text file of product names each, as the dataset comes; NAIP as PNG."""
    for folder in ("naip", "sentinel2", "sentinel1", "dates"):
        shutil.copytree(src / folder, dst / folder)

    def dates(sensor: str, part: int) -> dict[str, Any]:
        return {"from": "text", "file": f"dates/{sensor}/{{key}}.txt", "part": part}

    stack = {"axes": ["date", "band", "y", "x"]}
    return {
        "origin": "naip",  # a PNG says nothing, and the shipped reader does not ask the others
        "rasters": {
            "naip": {"files": "naip/{key}.png", "dates": dates("naip", -1)},
            "s2": {"files": "sentinel2/{key}_stacked.tif", "dates": dates("s2", -5), **stack},
            "s1": {"files": "sentinel1/{key}.tif", "dates": dates("s1", -5), **stack},
        },
    }


def _flair(name: str, src: Path, dst: Path, keys: list[str], split: str) -> dict[str, Any]:
    """Stacks of dates, with all dates of a tile in one cell of a table; keys of several names of the pattern."""
    products = {m.name: PRODUCTS[m.name] for m in datasets.spec(name).modalities}
    products |= {"mask": S2_MASK, "labels": LABELS["cosia"][0]}
    for folder, product in products.items():
        for key in keys:
            domain, zone, position = key.split("_")
            there = src / f"{domain}_{product.name}" / zone / f"{domain}_{product.name}_{zone}_{position}.tif"
            here = dst / folder / zone / f"{domain}_{zone}_{position}.tif"
            here.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(there, here)
        if folder not in ("dem", "mask", "labels"):
            meta, _, _, values = pyogrio.raw.read(
                src / f"GLOBAL_ALL_MTD/GLOBAL_{product.dates}_MTD_DATES.gpkg", read_geometry=False
            )
            with (dst / f"{folder}_dates.csv").open("w") as file:
                writer = csv.writer(file)
                writer.writerow(meta["fields"])
                writer.writerows(zip(*values, strict=True))
    axes = ["date", "band", "y", "x"]
    series = [m.name for m in datasets.spec(name).modalities if m.series]

    def files(folder: str) -> dict[str, Any]:
        return {"files": f"{folder}/{{zone}}/{{domain}}_{{zone}}_{{n}}.tif", "key": "{domain}_{zone}_{n}"}

    def dates(folder: str, column: str) -> dict[str, Any]:
        return {"dates": {"from": "csv", "file": f"{folder}_dates.csv", "key": "patch_id", "column": column}}

    rasters = {
        "aerial": {**files("aerial"), **dates("aerial", "date")},
        "dem": {**files("dem"), "dates": {"from": "reference"}, "sensor": {"elevation": True}},
        **{s: {**files(s), **dates(s, "acquisition_dates"), "axes": axes} for s in series},
    }
    rasters["s2"]["masks"] = {
        mask: {**files("mask"), "band": i, "axes": axes, "bands_per_date": 2, "percent": True}
        for i, mask in enumerate(("snow", "cloud"), start=1)
    }
    (target,) = datasets.spec(name).targets
    return {
        "rasters": rasters,
        "targets": {
            "cosia": {
                "kind": "segmentation",
                "raster": files("labels"),
                "resolution_m": 0.2,
                "classes": list(target.classes),
                "ignored": [target.classes[i] for i in target.ignored],
            }
        },
    }


def _json_dates(listed: Any) -> list[str]:
    import json

    entries = json.loads(listed)
    return [str(entries[i]) for i in sorted(entries, key=int)]


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(zip(("count", "height", "width"), values.shape, strict=True))
    with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, **profile) as file:
        file.write(values)
