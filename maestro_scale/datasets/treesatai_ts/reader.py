"""Reader of TreeSatAI-TS: tree genera in Germany, 50,381 tiles of 60 m (hub: IGNF/TreeSatAI-Time-Series).

Layout: ``aerial/{name}.tif``, ``sentinel-ts/{name}_{year}.h5``, and splits either as ``{split}.csv`` (the
MAESTRO release; ``{split}_filtered_{percent}.csv`` is a split of its own) or as
``split/{split}_filenames.lst`` with ``labels/TreeSatBA_v9_60m_multi_labels.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Scale, Sensor, Target, Tile
from maestro_scale.datasets.treesatai_ts import splits

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
AERIAL_FILE_PIXELS = 304
AERIAL_OFFSET = 2  # the 300 pixels from here cover the same 60 m as the Sentinel rasters


def _s1_sensor(name: str) -> Sensor:
    """Ascending and descending orbits share a group (one attention sequence), not their patch embeddings."""
    return Sensor(name, name, 6, 2, 4, (0, 1), (1, 1), Scale("log", 5), group="s1", embed=name)


SPEC = DatasetSpec(
    name="treesatai_ts",
    title="TreeSatAI-TS",
    tile_m=60.0,
    crop_m=60.0,
    pos_grid=96,
    modalities=(
        Modality("aerial", ("NIR", "R", "G", "B"), 0.2, 300, "uint8"),
        Modality("s2", S2_BANDS, 10.0, 6, "int16", series=True, mask_bands=("snow", "cloud")),
        Modality("s1_asc", ("VV", "VH"), 10.0, 6, "float32", series=True),
        Modality("s1_des", ("VV", "VH"), 10.0, 6, "float32", series=True),
    ),
    targets=(Target("species", "multilabel", splits.GENERA, threshold=0.07),),
    sensors=(
        Sensor(
            "aerial", "aerial", 300, 20, 1, (0, 1, 2, 3), (1, 3), Scale("linear", 255), "aerial", "aerial"
        ),
        Sensor("s2", "s2", 6, 2, 16, tuple(range(10)), (4, 4, 2), Scale("linear", 5000), "s2", "s2"),
        _s1_sensor("s1_asc"),
        _s1_sensor("s1_des"),
    ),
)

# Modality → (data, products) in the h5 file.
_SERIES = {
    "s2": ("sen-2-data", "sen-2-products"),
    "s1_asc": ("sen-1-asc-data", "sen-1-asc-products"),
    "s1_des": ("sen-1-des-data", "sen-1-des-products"),
}
_H5_NAMES = (*(name for pair in _SERIES.values() for name in pair), "sen-2-masks")


class Reader:
    """Random access to the tiles of one split (a :class:`~maestro_scale.datasets.spec.RawDataset`)."""

    def __init__(
        self, src: Path, entries: dict[str, splits.Entry], missing: raw.MissingFiles, spec: DatasetSpec = SPEC
    ) -> None:
        self.spec = spec
        self._src, self._entries, self._missing = src, entries, missing

    def keys(self) -> list[str]:
        """Sorted tile keys: the aerial file names without suffix."""
        return sorted(self._entries)

    def read(self, key: str) -> Tile:
        """One tile; DatasetError that names file and cause, KeyError if the split has no such tile."""
        entry = self._entries[key]
        self._missing.check(key)
        notes = list(entry.notes)
        wanted = {m.name for m in self.spec.modalities}
        arrays, dates, mask = _read_series(self._src / "sentinel-ts" / entry.sen_name, notes)
        ref_date = _ref_date(entry, dates["s2"], notes)
        dates["aerial"] = ref_date[None]
        origin = None
        if "aerial" in wanted:
            size = AERIAL_FILE_PIXELS
            path = self._src / "aerial" / entry.aerial_name
            image, origin = raw.read_georeferenced_tif(path, (4, size, size), "uint8")
            offset_m = AERIAL_OFFSET * SPEC.modality("aerial").resolution_m
            origin = origin and origin.shifted(offset_m, offset_m)
            inside = slice(AERIAL_OFFSET, AERIAL_OFFSET + SPEC.modality("aerial").size)
            # A copy, so that the image of 304 pixels can be freed.
            arrays["aerial"] = np.ascontiguousarray(image[None, :, inside, inside])
        return Tile(
            key=key,
            arrays={m: a for m, a in arrays.items() if m in wanted},
            dates={m: d for m, d in dates.items() if m in wanted},
            masks={"s2": mask} if "s2" in wanted else {},
            targets={"species": np.array(entry.shares, np.float32)},
            ref_date=ref_date,
            notes=tuple(notes),
            origin=origin,
        )


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> Reader:
    """The tiles of ``split`` ("train", "val", "test", "train_filtered_10", …) in folder ``src``.

    Raises DatasetError if a folder or the split is missing, if the split is empty or malformed, or if none of
    the files it names is there.
    """
    spec = SPEC if modalities is None else SPEC.select(modalities)
    src = Path(src)
    top = raw.list_folder(src)
    aerial = raw.list_folder(src / "aerial")
    sentinel = splits.SentinelNames(raw.list_folder(src / "sentinel-ts"))
    if f"{split}.csv" in top:
        listing = src / f"{split}.csv"
        entries = splits.from_csv(listing, sentinel)
    elif (src / "split" / f"{split}_filenames.lst").is_file():
        listing = src / "split" / f"{split}_filenames.lst"
        entries = splits.from_lst(src, listing, sentinel)
    else:
        found = sorted(n[:-4] for n in top if n.endswith(".csv"))
        found += sorted(p.name[: -len("_filenames.lst")] for p in src.glob("split/*_filenames.lst"))
        raise DatasetError(
            f"{src}: has no split {split!r} (neither {split}.csv nor split/{split}_filenames.lst); "
            f"splits found: {', '.join(dict.fromkeys(found)) or 'none'}"
        )
    if not entries:
        raise DatasetError(f"{listing}: the split is empty; fetch the file again or choose another split")
    by_key = {Path(e.aerial_name).stem: e for e in entries}
    if len(by_key) < len(entries):
        raise DatasetError(f"{listing}: names {len(entries) - len(by_key)} tiles twice; remove the repeats")
    missing = {}
    for key, entry in by_key.items():
        if entry.aerial_name not in aerial:
            missing[key] = f"aerial/{entry.aerial_name}"
        elif entry.sen_name not in sentinel.files:
            missing[key] = f"sentinel-ts/{entry.sen_name}"
    return Reader(src, by_key, raw.MissingFiles(src, listing, missing, len(by_key)), spec)


def _ref_date(entry: splits.Entry, s2_dates: np.ndarray, notes: list[str]) -> np.ndarray:
    """(3,) int16: the aerial date, or the first of July if the release does not give it."""
    if entry.aerial_date is not None:
        # pandas writes integer columns with missing values as floats: "20180501.0".
        day = entry.aerial_date.removesuffix(".0")
        return raw.calendar_dates([day], f"aerial_date of {entry.aerial_name}")[0]
    year = entry.year
    if year is not None:
        notes.append("aerial date not given: the first of July of the year in the h5 name is taken")
    else:
        notes.append(
            "aerial date not given, no year in the h5 name: the first of July of the S2 year is taken"
        )
        year = str(np.bincount(s2_dates[:, 0]).argmax())
    return raw.calendar_dates([f"{year}0701"], entry.sen_name)[0]


def _read_series(
    path: Path, notes: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Arrays (T, C, 6, 6) and dates (T, 3) by modality, and S2's mask (T, 2, 6, 6); appends to ``notes``."""
    content = raw.read_h5(path, _H5_NAMES)
    arrays, dates = {}, {}
    for modality, (data, products) in _SERIES.items():
        for name in (data, products):
            if name not in content:
                raise DatasetError(f"{path}: has no dataset {name!r}; fetch the file again")
        arrays[modality] = _checked(content[data], SPEC.modality(modality), f"{path}: {data}")
        dates[modality] = raw.product_dates(list(content[products]), -5, f"{path}: {products}")
        if len(dates[modality]) != len(arrays[modality]):
            raise DatasetError(
                f"{path}: {data} has {len(arrays[modality])} dates, {products} has {len(dates[modality])}; "
                "fetch the file again"
            )
    arrays["s2"], invalid, changed = raw.to_integers(arrays["s2"], "int16")
    if changed:
        notes.append("s2 has values that are not integers within int16: rounded and clipped")
    mask = _snow_cloud(content.get("sen-2-masks"), arrays["s2"].shape, f"{path}: sen-2-masks", notes)
    if invalid is not None:
        notes.append("s2 has NaN: stored as 0 and marked as cloud")
        mask[:, 1][invalid.any(axis=1)] = 100
    return arrays, dates, mask


def _checked(values: np.ndarray, modality: Modality, where: str) -> np.ndarray:
    expected = (len(modality.bands), modality.size, modality.size)
    if values.ndim != 4 or values.shape[1:] != expected or len(values) == 0:
        raise DatasetError(f"{where} has shape {values.shape}, expected (dates, *{expected}); fetch it again")
    return np.ascontiguousarray(values, np.float32)


def _snow_cloud(mask: np.ndarray | None, shape: tuple[int, ...], where: str, notes: list[str]) -> np.ndarray:
    num_dates, _, height, width = shape
    if mask is None:
        notes.append("no sen-2-masks: every S2 pixel is taken as clear")
        return np.zeros((num_dates, 2, height, width), np.uint8)
    if mask.ndim != 4 or mask.shape[1] < 2 or (len(mask), *mask.shape[2:]) != (num_dates, height, width):
        raise DatasetError(f"{where} has shape {mask.shape}, expected ({num_dates}, 2, {height}, {width})")
    if mask.shape[1] > 2:
        notes.append(f"sen-2-masks has {mask.shape[1]} channels: the first two are taken as snow and cloud")
        mask = mask[:, :2]
    if np.isnan(mask).any():
        notes.append("sen-2-masks has NaN: taken as marked")
        mask = np.nan_to_num(mask, nan=100.0)
    # Rounded up, so that a pixel with less than one percent of snow or cloud stays marked.
    return np.clip(np.ceil(mask), 0, 100).astype(np.uint8)
