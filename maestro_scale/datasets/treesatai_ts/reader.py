"""Reader of TreeSatAI-TS: tree genera in Germany, 50,381 tiles of 60 m (hub: IGNF/TreeSatAI-Time-Series).

Layout: ``aerial/{name}.tif``, ``sentinel-ts/{name}_{year}.h5``, and splits either as ``{split}.csv`` (the
MAESTRO release; ``{split}_filtered_{percent}.csv`` is a split of its own) or as
``split/{split}_filenames.lst`` with ``labels/TreeSatBA_v9_60m_multi_labels.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.fill import QUANTITIES, Series, clean_image, clean_series, percent
from maestro_scale.datasets.spec import (
    DatasetError,
    DatasetSpec,
    GeoOrigin,
    Modality,
    Scale,
    Sensor,
    Target,
    Tile,
)
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
        # A file may lack an orbit.
        Modality("s1_asc", ("VV", "VH"), 10.0, 6, "float32", series=True, optional=True),
        Modality("s1_des", ("VV", "VH"), 10.0, 6, "float32", series=True, optional=True),
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
_MASK = "sen-2-masks"
_MIN_IMAGES = 30  # to tell VV from VH by their means; the shortest of the real files has 60
_QUANTITIES = QUANTITIES[SPEC.name]


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

    def absent(self, key: str) -> tuple[str, ...]:
        """The orbits of Sentinel-1 that the file of a tile lacks, from its headers."""
        optional = [m.name for m in self.spec.modalities if m.optional]
        if not optional or self._missing.lacks(key):
            return ()  # a missing file is the error of reading the tile
        path = self._src / "sentinel-ts" / self._entries[key].sen_name
        lengths = raw.h5_lengths(path, [_SERIES[name][0] for name in optional])
        return tuple(name for name in optional if not lengths[_SERIES[name][0]])

    def read(self, key: str) -> Tile:
        """One tile; DatasetError that names file and cause, KeyError if the split has no such tile."""
        entry = self._entries[key]
        self._missing.check(key)
        notes = list(entry.notes)
        wanted = {m.name: m for m in self.spec.modalities}
        series = self._series(entry, [m for m in self.spec.modalities if m.series], notes)
        ref_date = self._ref_date(entry, series, notes)
        arrays = {name: s.values for name, s in series.items()}
        dates = {name: s.dates for name, s in series.items()}
        origin = None
        if "aerial" in wanted:
            arrays["aerial"], origin = self._aerial(entry, notes)
            dates["aerial"] = ref_date[None]
        return Tile(
            key=key,
            arrays=arrays,
            dates=dates,
            masks={name: s.mask for name, s in series.items() if s.mask is not None},
            targets={"species": np.array(entry.shares, np.float32)},
            ref_date=ref_date,
            notes=tuple(notes),
            origin=origin,
        )

    def _aerial(self, entry: splits.Entry, notes: list[str]) -> tuple[np.ndarray, GeoOrigin | None]:
        """(1, 4, 300, 300), and the origin of its upper left corner."""
        modality = SPEC.modality("aerial")
        path = self._src / "aerial" / entry.aerial_name
        file = raw.read_tif(path, (4, AERIAL_FILE_PIXELS, AERIAL_FILE_PIXELS), modality.dtype)
        inside = (slice(None), *[slice(AERIAL_OFFSET, AERIAL_OFFSET + modality.size)] * 2)
        declared = None if file.invalid is None else file.invalid[inside]
        # A copy, so that the image of 304 pixels can be freed.
        pixels = np.ascontiguousarray(file.values[inside])
        image = clean_image(pixels, modality, _QUANTITIES["aerial"], str(path), notes, declared)
        offset_m = AERIAL_OFFSET * modality.resolution_m
        return image[None], file.origin and file.origin.shifted(offset_m, offset_m)

    def _series(
        self, entry: splits.Entry, modalities: Sequence[Modality], notes: list[str]
    ) -> dict[str, Series]:
        """The time series by modality; appends to ``notes``."""
        path = self._src / "sentinel-ts" / entry.sen_name
        fields: dict[str, raw.Field] = {}
        optional = [_MASK, *(_SERIES[m.name][0] for m in modalities if m.optional)]
        optional += [_SERIES[m.name][1] for m in modalities if m.optional]
        for m in modalities:
            data, products = _SERIES[m.name]
            fields[data] = raw.Field("numbers", (None, len(m.bands), m.size, m.size))
            fields[products] = raw.Field("text", (None,))
            if m.mask_bands:
                fields[_MASK] = raw.Field("numbers", (None, None, m.size, m.size))
        content = raw.read_h5(path, fields, optional) if fields else {}
        series = {}
        for m in modalities:
            data, products = _SERIES[m.name]
            if m.optional and not len(content.get(data, ())):
                continue  # the tile lacks it
            if products not in content:
                raise DatasetError(f"{path}: has no dataset {products!r}; fetch the file again")
            values = content[data]
            dates = raw.product_dates(content[products].tolist(), -5, f"{path}: {products}")
            if not 0 < len(values) == len(dates):
                raise DatasetError(
                    f"{path}: {data} has {len(values)} dates, {products} has {len(dates)}; fetch the file again"
                )
            mask = None
            if m.mask_bands:
                mask = _snow_cloud(content.get(_MASK), len(values), m.size, f"{path}: {_MASK}", notes)
            series[m.name] = clean_series(
                values, dates, m, _QUANTITIES[m.name], f"{path}: {data}", notes, mask=mask
            )
            if m.bands == ("VV", "VH") and _mixes_polarisations(series[m.name].values):
                notes.append(f"{m.name} mixes VV and VH within its images: stored as it is")
        return series

    def _ref_date(self, entry: splits.Entry, series: Mapping[str, Series], notes: list[str]) -> np.ndarray:
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
            s2 = series.get("s2") or self._series(entry, [SPEC.modality("s2")], [])["s2"]
            year = str(np.bincount(s2.dates[:, 0]).argmax())
        return raw.calendar_dates([f"{year}0701"], entry.sen_name)[0]


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> Reader:
    """The tiles of ``split`` ("train", "val", "test", "train_filtered_10", …) in folder ``src``.

    Raises DatasetError if a folder or the split is missing, if the split is empty or malformed, or if none of
    the files it names is there.
    """
    spec = SPEC if modalities is None else SPEC.select(modalities)
    src = Path(src)
    modality_names = {m.name for m in spec.modalities}
    top = raw.list_folder(src)
    # Only files that are read must exist. The names of the h5 files are needed for the year of the reference date.
    has_aerial, has_series = "aerial" in modality_names, modality_names != {"aerial"}
    aerial = raw.list_folder(src / "aerial") if has_aerial else frozenset()
    folder = src / "sentinel-ts"
    sentinel = splits.SentinelNames(raw.list_folder(folder) if has_series or folder.is_dir() else frozenset())
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
        undated = (
            entry.aerial_date is None and entry.year is None
        )  # then the dates of Sentinel-2 give the year
        if has_aerial and entry.aerial_name not in aerial:
            missing[key] = f"aerial/{entry.aerial_name}"
        elif (has_series or undated) and entry.sen_name not in sentinel.files:
            missing[key] = f"sentinel-ts/{entry.sen_name}"
    return Reader(src, by_key, raw.MissingFiles(src, listing, missing, len(by_key)), spec)


def _mixes_polarisations(power: np.ndarray) -> bool:
    """Whether images (T, 2, H, W) of linear power have VV and VH in the wrong pixels.

    So in files of 2017 among the authors' test data (github.com/IGNF/MAESTRO at 932f0e3, tests/data): both bands hold
    pixels of both, in an order that changes between images. Cross-polarised backscatter of a ground is weaker, by 5 to
    7 dB in the files of 2019. In those of 2017 it is equally strong on average, up to 0.3 dB, and over 2 dB stronger in
    a quarter of all pixels. Both together, over many images, do not occur otherwise: speckle alone does it in 2 %.
    """
    if len(power) < _MIN_IMAGES:
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = 10 * np.log10(power[:, 0] / power[:, 1])
    difference = difference[np.isfinite(difference)]
    return bool(len(difference)) and abs(difference.mean()) < 1 and float((difference < -2).mean()) > 0.15


def _snow_cloud(
    mask: np.ndarray | None, num_dates: int, size: int, where: str, notes: list[str]
) -> np.ndarray:
    """(T, 2, size, size) uint8 in percent."""
    if mask is None:
        notes.append("no sen-2-masks: every S2 pixel is taken as clear")
        return np.zeros((num_dates, 2, size, size), np.uint8)
    if len(mask) != num_dates or mask.shape[1] < 2:
        raise DatasetError(
            f"{where} has shape {mask.shape}, expected ({num_dates}, 2, {size}, {size}); fetch the file again"
        )
    if mask.shape[1] > 2:
        notes.append(f"sen-2-masks has {mask.shape[1]} channels: the first two are taken as snow and cloud")
    return percent(mask[:, :2], _MASK, notes)
