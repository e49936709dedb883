"""Reader of FLAIR-HUB: land cover and crops, France, 241,100 tiles of 102.4 m (hub: IGNF/FLAIR-HUB).

Layout: a folder per domain and product, in it one per zone:
``D012-2019_AERIAL_RGBI/AF-S1-27/D012-2019_AERIAL_RGBI_AF-S1-27_5-10.tif`` is the patch D012-2019_AF-S1-27_5-10.
Dates and splits are in the GeoPackages of ``GLOBAL_ALL_MTD``; a ``{split}.csv`` with a column ``patch_id`` has
precedence. Only the top folder is listed, since there are 2.5 million files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from maestro_scale.datasets import raw
from maestro_scale.datasets.fill import QUANTITIES, Series, clean_image, clean_series, percent
from maestro_scale.datasets.flair_hub import classes
from maestro_scale.datasets.flair_hub.dates import Dates
from maestro_scale.datasets.flair_hub.metadata import FOLDER, Listing, list_split
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

S2_BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
_BYTES = Scale("linear", 255)
_NIR_R_G_B = (3, 0, 1, 2)


def _s1_sensor(name: str) -> Sensor:
    """Ascending and descending orbits share a group (one attention sequence), not their patch embeddings."""
    return Sensor(name, name, 10, 2, 4, (0, 1), (1, 1), Scale("log", 5), group="s1", embed=name)


FULL_SPEC = DatasetSpec(
    name="flair_hub",
    title="FLAIR-HUB",
    tile_m=102.4,
    crop_m=102.4,
    pos_grid=160,
    modalities=(
        Modality("aerial", ("R", "G", "B", "NIR"), 0.2, 512, "uint8"),
        Modality("dem", ("DSM", "DTM"), 0.2, 512, "float32"),
        Modality("s2", S2_BANDS, 10.24, 10, "uint16", series=True, mask_bands=("snow", "cloud")),
        Modality("s1_asc", ("VV", "VH"), 10.24, 10, "float32", series=True, optional=True),
        Modality("s1_des", ("VV", "VH"), 10.24, 10, "float32", series=True, optional=True),
        Modality("spot", ("R", "G", "B", "NIR"), 1.6, 64, "uint16", optional=True),
        Modality("aerial_rlt", ("PAN",), 0.4, 256, "uint8", optional=True),
    ),
    targets=(
        Target("cosia", "segmentation", classes.COSIA, ignored=classes.COSIA_IGNORED, resolution_m=0.2),
        Target("lpis_1", "segmentation", classes.LPIS_1, resolution_m=0.2),
        Target("lpis_2", "segmentation", classes.LPIS_2, resolution_m=0.2),
        Target("lpis_3", "segmentation", classes.LPIS_3, resolution_m=0.2),
    ),
    sensors=(
        Sensor("aerial", "aerial", 512, 16, 1, _NIR_R_G_B, (1, 3), _BYTES, "aerial", "aerial"),
        Sensor("dem", "dem", 512, 32, 1, (0, 1), (2,), Scale("linear", 1000), "dem", "dem", elevation=True),
        Sensor("s2", "s2", 10, 2, 16, tuple(range(10)), (4, 4, 2), Scale("linear", 5000), "s2", "s2"),
        _s1_sensor("s1_asc"),
        _s1_sensor("s1_des"),
        Sensor("spot", "spot", 128, 16, 1, (0, 1, 2), (3,), Scale("linear", 1000), "spot", "spot"),
        Sensor("aerial_rlt", "aerial_rlt", 256, 16, 1, (0,), (1,), _BYTES, "aerial_rlt", "aerial_rlt"),
    ),
    ref_sensor="aerial",
)


def select(full: DatasetSpec, names: Sequence[str]) -> DatasetSpec:
    """The spec ``full`` with these modalities and targets; with its first target if none is named."""
    targets = tuple(t for t in full.targets if t.name in names) or full.targets[:1]
    others = [name for name in names if name not in {t.name for t in full.targets}]
    return replace(full.select(others), targets=targets)


SPEC = select(FULL_SPEC, ("aerial", "dem", "s2", "s1_asc", "s1_des"))


@dataclass(frozen=True)
class Product:
    """One kind of file. ``dates``: sensor in the name of its metadata file. ``own_year``: its folder's year is not the
    domain's."""

    name: str
    dates: str
    own_year: bool = False


PRODUCTS = {
    "aerial": Product("AERIAL_RGBI", "AERIAL"),
    "dem": Product("DEM_ELEV", "AERIAL"),  # has no dates of its own
    "s2": Product("SENTINEL2_TS", "SENTINEL2"),
    "s1_asc": Product("SENTINEL1-ASC_TS", "SENTINEL1-ASC"),
    "s1_des": Product("SENTINEL1-DESC_TS", "SENTINEL1-DESC"),
    "spot": Product("SPOT_RGBI", "SPOT"),
    "aerial_rlt": Product("AERIAL-RLT_PAN", "AERIAL-RLT", own_year=True),
}
S2_MASK = Product("SENTINEL2_MSK-SC", "SENTINEL2")
COSIA = Product("AERIAL_LABEL-COSIA", "AERIAL")
LPIS = Product("ALL_LABEL-LPIS", "AERIAL")
LABELS = {"cosia": (COSIA, 0), "lpis_1": (LPIS, 0), "lpis_2": (LPIS, 1), "lpis_3": (LPIS, 2)}
_NUM_BANDS = {COSIA: 1, LPIS: 3}
_QUANTITIES = QUANTITIES[FULL_SPEC.name]
_PATCH_ID = re.compile(r"([A-Za-z0-9-]+)_([A-Za-z0-9-]+)_([A-Za-z0-9-]+)")
_ORIGINAL_FLAIR = re.compile(r"(?i)flair_(aerial|sen|labels)_.*|flair[-#_]?[12]([-_].*)?|D\d{3}_\d{4}")


@dataclass(frozen=True)
class Variant:
    """A benchmark on these files. ``lists``: patterns of a split's CSV; ``column``: split column in the metadata;
    ``assumed``: note on tiles of a split that was read from ``column`` for want of a CSV."""

    full: DatasetSpec
    preset: DatasetSpec
    lists: tuple[str, ...]
    column: str
    assumed: str = ""


FLAIR_HUB = Variant(FULL_SPEC, SPEC, ("{}.csv",), "split_1")


class Folders:
    """The folders of each domain's products, from the names in ``src``."""

    def __init__(self, src: Path, names: frozenset[str]) -> None:
        self._src, self._names = src, names
        self._own_year: dict[tuple[str, str], str] = {}
        for name in sorted(names):
            domain, _, product = name.partition("_")
            self._own_year[domain.partition("-")[0], product] = name

    def find(self, domain: str, product: Product) -> str | None:
        """Folder name; None if it is missing."""
        if product.own_year:
            return self._own_year.get((domain.partition("-")[0], product.name))
        name = f"{domain}_{product.name}"
        return name if name in self._names else None

    def path(self, key: str, product: Product) -> Path:
        """The file of patch ``key``."""
        found = _PATCH_ID.fullmatch(key)  # the id becomes a path, so it must not contain "/" or ".."
        if found is None:
            raise DatasetError(
                f"{key!r} is not a patch id such as D012-2019_AF-S1-27_5-10; fix the list", "not a patch id"
            )
        domain, zone, position = found.groups()
        folder = self.find(domain, product) or f"{domain}_{product.name}"
        return self._src / folder / zone / f"{folder}_{zone}_{position}.tif"


class Reader:
    """Random access to the tiles of one split (a :class:`~maestro_scale.datasets.spec.RawDataset`)."""

    def __init__(
        self,
        listing: Listing,
        folders: Folders,
        dates: dict[str, Dates],
        missing: raw.MissingFiles,
        spec: DatasetSpec,
    ) -> None:
        self.spec = spec
        self._listing, self._folders, self._dates, self._missing = listing, folders, dates, missing

    def keys(self) -> list[str]:
        """Sorted patch ids: domain, zone and position."""
        return list(self._listing.keys)

    def absent(self, key: str) -> tuple[str, ...]:
        """The modalities of which the release has no folder for the domain of a tile."""
        domain = key.partition("_")[0]
        return tuple(
            m.name
            for m in self.spec.modalities
            if m.optional and self._folders.find(domain, PRODUCTS[m.name]) is None
        )

    def read(self, key: str) -> Tile:
        """One tile, each series in chronological order; DatasetError that names file and cause."""
        self._missing.check(key)
        notes = list(self._listing.notes)
        acquired = self._acquired(key, notes)
        arrays: dict[str, np.ndarray] = {}
        dates: dict[str, np.ndarray] = {}
        masks: dict[str, np.ndarray] = {}
        absent = self.absent(key)
        for modality in self.spec.modalities:
            name = modality.name
            if name in absent:
                continue
            if modality.series:
                arrays[name], dates[name], mask = self._series(modality, key, notes)
                masks |= {} if mask is None else {name: mask}
            else:
                arrays[name] = self._image(modality, key, notes)[None]
                dates[name] = self._dates[PRODUCTS[name].dates].of(key, notes)[:1]
        for sensor in self.spec.sensors:
            if sensor.source not in absent and len(dates[sensor.source]) < sensor.num_dates:
                notes.append(f"{sensor.source} has fewer than {sensor.num_dates} dates: some are seen twice")
        labels, origin = self._labels(key, notes)
        return Tile(key, arrays, dates, masks, labels, acquired[0], tuple(notes), origin)

    def _acquired(self, key: str, notes: list[str]) -> np.ndarray:
        """(1, 3): acquisition date of the aerial image."""
        try:
            return self._dates["AERIAL"].of(key, notes)
        except DatasetError as error:
            # An unknown patch id has neither dates nor files: the missing file is the more useful error.
            path = self._folders.path(key, PRODUCTS[self.spec.modalities[0].name])
            if error.kind == "no dates" and not path.exists():
                raise raw.read_error(path, error) from error
            raise

    def _image(self, modality: Modality, key: str, notes: list[str]) -> np.ndarray:
        """(C, size, size)."""
        path = self._folders.path(key, PRODUCTS[modality.name])
        shape = (len(modality.bands), modality.size, modality.size)
        file = raw.read_tif(path, shape, modality.dtype)
        return clean_image(file.values, modality, _QUANTITIES[modality.name], str(path), notes, file.invalid)

    def _series(self, modality: Modality, key: str, notes: list[str]) -> Series:
        """(T, C, size, size), (T, 3) and, for Sentinel-2, (T, 2, size, size), sorted by date."""
        product = PRODUCTS[modality.name]
        dates = self._dates[product.dates].of(key, notes)
        path = self._folders.path(key, product)
        stack = self._stack(path, len(modality.bands), modality.size, len(dates))
        mask = None
        if modality.mask_bands:
            mask_path = self._folders.path(key, S2_MASK)
            percents = self._stack(mask_path, len(modality.mask_bands), modality.size, len(dates))
            mask = percent(percents.values, f"the mask of {modality.name}", notes)
            if percents.invalid is not None:
                mask = np.where(percents.invalid, np.uint8(100), mask)
        return clean_series(
            stack.values,
            dates,
            modality,
            _QUANTITIES[modality.name],
            str(path),
            notes,
            declared=stack.invalid,
            mask=mask,
        )

    def _stack(self, path: Path, num_bands: int, size: int, num_dates: int) -> raw.RasterFile:
        stack = raw.read_stack(path, num_bands, size)
        if len(stack.values) != num_dates:
            raise DatasetError(
                f"{path}: has {len(stack.values)} dates, the metadata lists {num_dates}; fetch both again",
                kind="dates do not fit",
            )
        return stack

    def _labels(self, key: str, notes: list[str]) -> tuple[dict[str, np.ndarray], GeoOrigin | None]:
        """(512, 512) uint8 by target, and the origin."""
        files: dict[Product, raw.RasterFile] = {}
        labels: dict[str, np.ndarray] = {}
        origin = None
        for target in self.spec.targets:
            product, band = LABELS[target.name]
            path = self._folders.path(key, product)
            size = FULL_SPEC.modality("aerial").size
            if product not in files:
                num_classes = max(
                    len(FULL_SPEC.target(t).classes) for t, (p, _) in LABELS.items() if p == product
                )
                files[product] = raw.read_tif(path, (_NUM_BANDS[product], size, size), "uint8", num_classes)
                origin = files[product].origin
            label, declared = files[product].values[band], files[product].invalid
            if declared is not None and declared[band].any():
                if not target.ignored:
                    raise DatasetError(
                        f"{path}: band {band + 1} has pixels that the file declares as nodata, and {target.name} has "
                        "no ignored class for them; leave the tile out",
                        kind="pixels without a label",
                    )
                notes.append(f"{target.name} has pixels that the file declares as nodata: stored as ignored")
                label = np.where(declared[band], np.uint8(target.ignored[0]), label)
            labels[target.name] = label
            if (highest := int(label.max())) >= len(target.classes):
                raise DatasetError(
                    f"{path}: band {band + 1} holds {highest}, {target.name} has values 0 to "
                    f"{len(target.classes) - 1}; fetch the file again",
                    kind="a label outside the list",
                )
        return labels, origin


def open_raw(
    src: Path, split: str, modalities: Sequence[str] | None = None, variant: Variant = FLAIR_HUB
) -> Reader:
    """The tiles of ``split`` in folder ``src``.

    ``split``: of ``{split}.csv``, or from the metadata: "train", "val" and "test" of split_1, "split_2_train",
    "split_flairchallenge_test", … ``modalities``: those to read, and targets ("lpis_1", … instead of "cosia");
    None for the preset's. Raises DatasetError if the split, the metadata or every folder of a product is
    missing, or if ``src`` is the original release of FLAIR#1 or FLAIR#2.
    """
    src = Path(src)
    spec = variant.preset if modalities is None else select(variant.full, modalities)
    names = raw.list_folder(src)
    _refuse_original(src, names)
    lists = [name.format(split) for name in variant.lists]
    listing = list_split(src, split, lists, variant.column, variant.assumed)
    products = [PRODUCTS[m.name] for m in spec.modalities]
    products += [S2_MASK] if any(m.mask_bands for m in spec.modalities) else []
    products += [LABELS[t.name][0] for t in spec.targets]
    folders = Folders(src, names)
    optional = {PRODUCTS[m.name] for m in spec.modalities if m.optional}
    missing = _find_missing(src, listing, folders, list(dict.fromkeys(products)), optional)
    sensors = dict.fromkeys(["AERIAL", *(PRODUCTS[m.name].dates for m in spec.modalities)])
    dates = {sensor: Dates.load(src, sensor, listing.keys) for sensor in sensors}
    return Reader(listing, folders, dates, missing, spec)


def _refuse_original(src: Path, names: frozenset[str]) -> None:
    original = sorted(name for name in names if _ORIGINAL_FLAIR.fullmatch(name))
    if original and FOLDER not in names:
        raise DatasetError(
            f"{src}: is an original release of FLAIR#1 or FLAIR#2 (it holds {original[0]}), whose folders and order "
            "of labels differ; fetch IGNF/FLAIR-HUB, of which FLAIR#2 is a subset"
        )


def _find_missing(
    src: Path, listing: Listing, folders: Folders, products: Sequence[Product], optional: Collection[Product]
) -> raw.MissingFiles:
    """The tiles of domains that lack a folder, other than of an ``optional`` product; DatasetError if a product has
    none at all."""
    domains = Counter(key.partition("_")[0] for key in listing.keys)
    lacking: dict[str, str] = {}
    for product in products:
        without = [domain for domain in domains if folders.find(domain, product) is None]
        if len(without) == len(domains):
            raise DatasetError(
                f"{src}: has no folder of {product.name} for any domain of {listing.path.name}, first "
                f"{without[0]}_{product.name}; check the path, or choose other modalities"
            )
        for domain in without if product not in optional else ():
            lacking.setdefault(domain, f"{domain}_{product.name}")
    files = {key: lacking[d] for key in listing.keys if (d := key.partition("_")[0]) in lacking}
    return raw.MissingFiles(src, listing.path, files, len(listing.keys), kind="a modality folder is missing")
