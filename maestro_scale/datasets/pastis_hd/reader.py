"""Reader of PASTIS-HD: crops in France, 2,433 tiles of 1280 m, in five folds (hub: IGNF/PASTIS-HD).

Layout: ``DATA_S2/S2_{id}.npy``, ``DATA_S1A/S1A_{id}.npy``, ``DATA_S1D/S1D_{id}.npy``, SPOT and labels as in
``IMAGES`` and ``LABELS``; ``metadata.geojson`` with the fold and the dates of every tile. Splits are the folds, see
:mod:`maestro_scale.datasets.pastis_hd.splits`, or ``{split}.csv`` with a column ``image`` where that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.fill import QUANTITIES, clean_image, clean_series
from maestro_scale.datasets.pastis_hd import splits
from maestro_scale.datasets.spec import DatasetError, DatasetSpec, Modality, Scale, Sensor, Target, Tile

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
S1_BANDS = ("VV", "VH", "VV-VH")
CLASSES = (
    "background", "meadow", "soft winter wheat", "corn", "winter barley", "winter rapeseed", "spring barley",
    "sunflower", "grapevine", "beet", "winter triticale", "winter durum wheat", "fruits, vegetables, flowers",
    "potatoes", "leguminous fodder", "soybeans", "orchard", "mixed cereal", "sorghum", "void",
)  # fmt: skip
VOID = 19
SPOT_DATE = (2019, 182, 0)  # 1 July 2019, as in the authors' code; the release gives the year only


def _s1_sensor(name: str) -> Sensor:
    """Ascending and descending orbits share a group (one attention sequence), not their patch embeddings."""
    return Sensor(name, name, 16, 2, 4, (0, 1), (1, 1), Scale("linear", 20), group="s1", embed=name)


SPEC = DatasetSpec(
    name="pastis_hd",
    title="PASTIS-HD",
    tile_m=1280.0,
    crop_m=160.0,
    pos_grid=256,
    modalities=(
        Modality("spot", ("R", "G", "B"), 1.0, 1280, "uint8"),
        Modality("s2", S2_BANDS, 10.0, 128, "int16", series=True),
        Modality("s1_asc", S1_BANDS, 10.0, 128, "float16", series=True),
        Modality("s1_des", S1_BANDS, 10.0, 128, "float16", series=True),
    ),
    targets=(
        Target("crop_type", "segmentation", CLASSES, ignored=(VOID,), resolution_m=10.0),
        Target("crops_present", "multilabel", CLASSES[1:VOID], of="crop_type"),
    ),
    sensors=(
        Sensor("spot", "spot", 160, 16, 1, (0, 1, 2), (3,), Scale("linear", 255), "spot", "spot"),
        Sensor("s2", "s2", 16, 2, 16, tuple(range(10)), (4, 4, 2), Scale("linear", 10_000), "s2", "s2"),
        _s1_sensor("s1_asc"),
        _s1_sensor("s1_des"),
    ),
    ref_sensor="s2",
)

IMAGES = {
    "spot": "DATA_SPOT/PASTIS_SPOT6_RVB_1M00_2019/SPOT6_RVB_1M00_2019_{}.tif",
    "s2": "DATA_S2/S2_{}.npy",
    "s1_asc": "DATA_S1A/S1A_{}.npy",
    "s1_des": "DATA_S1D/S1D_{}.npy",
}
LABELS = "ANNOTATIONS/TARGET_{}.npy"
DATES = {"s2": "dates-S2", "s1_asc": "dates-S1A", "s1_des": "dates-S1D"}


_QUANTITIES = QUANTITIES[SPEC.name]


class Reader:
    """Random access to the tiles of one split (a :class:`~maestro_scale.datasets.spec.RawDataset`)."""

    def __init__(
        self,
        src: Path,
        names: Sequence[str],
        entries: splits.Entries,
        missing: raw.MissingFiles,
        spec: DatasetSpec,
    ) -> None:
        self.spec = spec
        self._src, self._names, self._missing = src, sorted(names), missing
        self._entries = {name: entries[name] for name in names if name in entries}

    def keys(self) -> list[str]:
        """Sorted tile ids."""
        return list(self._names)

    def read(self, key: str) -> Tile:
        """One tile, each series in chronological order; DatasetError that names file and cause."""
        self._missing.check(key)
        notes: list[str] = []
        arrays, dates, origin = {}, {}, None
        for modality in self.spec.modalities:
            name = modality.name
            if modality.series:
                arrays[name], dates[name] = self._series(modality, key, notes)
            else:
                shape = (len(modality.bands), modality.size, modality.size)
                path = self._src / IMAGES[name].format(key)
                file = raw.read_tif(path, shape, modality.dtype)
                arrays[name] = clean_image(
                    file.values, modality, _QUANTITIES[name], str(path), notes, file.invalid
                )[None]
                origin = file.origin
                dates[name] = np.array([SPOT_DATE], np.int16)
        for sensor in self.spec.sensors:
            if len(dates[sensor.source]) < sensor.num_dates:
                notes.append(f"{sensor.source} has fewer than {sensor.num_dates} dates: some are seen twice")
        labels = self._labels(key)
        present = np.bincount(labels.reshape(-1), minlength=len(CLASSES))[1:VOID] / labels.size
        return Tile(
            key=key,
            arrays=arrays,
            dates=dates,
            masks={},
            targets={"crop_type": labels, "crops_present": present.astype(np.float32)},
            ref_date=np.array(SPOT_DATE, np.int16),
            notes=tuple(notes),
            origin=origin,
        )

    def _labels(self, key: str) -> np.ndarray:
        """(128, 128) uint8: the first of three channels; the others belong to other tasks."""
        path = self._src / LABELS.format(key)
        labels = raw.read_npy(path, (3, 128, 128), "uint8")[0]
        if labels.max() > VOID:
            raise DatasetError(
                f"{path}: holds the class {labels.max()}, known are 0 to {VOID}; fetch the file again",
                "a label outside the list",
            )
        return labels

    def _series(self, modality: Modality, key: str, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(T, C, 128, 128) and (T, 3), sorted by date; appends to ``notes``."""
        dates = splits.dates(self._src, self._entries, key, DATES[modality.name])
        path = self._src / IMAGES[modality.name].format(key)
        values = raw.read_npy(path, (None, len(modality.bands), modality.size, modality.size), modality.dtype)
        if len(values) != len(dates):
            raise DatasetError(
                f"{path}: has {len(values)} dates, {splits.METADATA} lists {len(dates)}; fetch both again",
                "dates do not fit",
            )
        series = clean_series(values, dates, modality, _QUANTITIES[modality.name], str(path), notes)
        if modality.bands == S1_BANDS:
            # The difference VV-VH may be 0, but is unknown where one of the two is.
            unknown = np.isnan(series.values[:, :2]).any(axis=1)
            if unknown.any():
                series.values[:, 2][unknown] = np.nan
        return series.values, series.dates


def open_raw(src: Path, split: str, modalities: Sequence[str] | None = None) -> Reader:
    """The tiles of ``split`` in folder ``src``; ``modalities``: those to read, None for all.

    Raises DatasetError if a folder, the metadata or the split is missing, if the split is empty or malformed, or if
    none of its tiles has its files.
    """
    src = Path(src)
    spec = SPEC if modalities is None else SPEC.select(modalities)
    entries = splits.read_metadata(src, [DATES[m.name] for m in spec.modalities if m.name in DATES])
    listing, names = splits.names(src, split, entries)
    missing: dict[str, str] = {}
    for pattern in (*(IMAGES[m.name] for m in spec.modalities), LABELS):
        folder, _, file = pattern.rpartition("/")
        there = raw.list_folder(src / folder)
        for name in names:
            if file.format(name) not in there:
                missing.setdefault(name, pattern.format(name))
    return Reader(src, names, entries, raw.MissingFiles(src, listing, missing, len(names)), spec)
