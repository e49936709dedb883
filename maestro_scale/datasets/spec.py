"""Data classes of datasets: modalities, sensors, targets, dataset specs and tiles.

Nothing here reads a file. A :class:`DatasetSpec` is all that training needs to know about a dataset. It is stored in
the shard manifest, so a user's own dataset needs a manifest and no project code; field names are part of that format.

Shapes: T dates stored, D dates per sample, C bands, H×W pixels (row 0 is north), M mask channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from maestro_scale.errors import MaestroError

TargetKind = Literal["multilabel", "segmentation", "classification", "regression"]

NODATA = "nodata"
"""The mask band that marks invalid pixels, with 100 (others: 0). It is not a mask like the others: marked pixels count
neither in the selection of dates nor in the loss, and are filled in from other dates where they are input. Shards of
earlier revisions may have a mask band of percentages of this name: less than 100 is a mask like the others."""

MISSING_CLASS = -1
"""The stored value of a classification target where the label is missing."""

OMIT_DEFAULT = {"omit_default": True}
"""Metadata of a field that was added to the format: it is not written while it has its default, so that the digests of
manifests, checkpoints and models that were written before it existed do not change."""


@dataclass(frozen=True)
class Scale:
    """Scaling of raw values to network inputs; applied in the model, so that batches keep native dtypes.

    ``linear``: x / divisor.  ``log``: ln(max(x, 1e-10)) / divisor, for radar in linear power.
    """

    kind: Literal["linear", "log"] = "linear"
    divisor: float = 1.0


@dataclass(frozen=True)
class Modality:
    """One stored raster of a tile: (T, C, size, size), aligned with the other modalities of the tile."""

    name: str
    bands: tuple[str, ...]
    resolution_m: float
    size: int  # pixels per side; size * resolution_m is the tile's extent (up to the sensor's rounding)
    dtype: str  # numpy name of the native dtype, e.g. "uint8"
    series: bool = False  # True: T varies by tile and each date has an entry in Tile.dates
    mask_bands: tuple[
        str, ...
    ] = ()  # e.g. ("snow", "cloud"), uint8 0-100 per pixel; empty: no mask is stored. See NODATA
    # What the values are, of QUANTITY_KINDS (datasets/quantity.py); empty: not said. Not part of the repr: it is a key
    # of cached features, which do not depend on it.
    quantity: str = field(default="", repr=False, metadata=OMIT_DEFAULT)
    # Whether a tile may lack it. Said by a raw dataset; not stored: a manifest says what the tiles of a shard lack.
    optional: bool = field(default=False, repr=False, metadata=OMIT_DEFAULT)

    @property
    def nodata_band(self) -> int | None:
        """Index of the mask band that marks invalid pixels; None: the modality has none."""
        return self.mask_bands.index(NODATA) if NODATA in self.mask_bands else None


@dataclass(frozen=True)
class Sensor:
    """One input of the model: a modality, and its division into dates, pixels, patches and groups."""

    name: str
    source: str  # name of the Modality it reads
    image_size: int  # pixels per side of the model's input (nearest resize of the crop)
    patch: int  # pixels per patch side
    num_dates: int  # dates drawn per tile, one from each of this many equal bins
    bands: tuple[int, ...]  # indices into the modality's bands, in model order
    band_groups: tuple[
        int, ...
    ]  # sizes of the consecutive groups the targets are normalised over; sums to len(bands)
    scale: Scale
    group: str  # sensors of one group share one sequence in the encoder
    embed: str  # sensors of one embed share patch-embedding weights
    mask_threshold: float = 0.0  # a pixel is marked where any mask band exceeds this (percent)
    token_groups: tuple[
        int, ...
    ] = ()  # bands per token under `spectral: token`; empty: recipe/resolve.py:resolve_spec takes the band groups
    elevation: bool = False  # channel 1 becomes 30 * (channel 0 - channel 1), after scaling

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch

    @property
    def max_token_groups(self) -> int:
        """Token groups under ``spectral: token``; ``Batch.noise`` has numbers for this many."""
        return max(len(self.token_groups), 1)


@dataclass(frozen=True)
class Target:
    """A prediction target. ``multilabel``: (classes,) float32 area shares, positive where share > threshold.

    ``segmentation``: (H, W) uint8 class indices at ``resolution_m``; values in ``ignored`` are left
    out of losses and metrics. ``of``: for shares, the segmentation target they are computed from (by class names), so
    that they can be computed for a crop of a tile.
    ``classification``: (1,) int16 class index of the whole tile; ``MISSING_CLASS`` where the label is missing, which is
    left out of losses and metrics like the values in ``ignored``.
    ``regression``: float32 in ``units``, (1,) of the whole tile, or (H, W) where there is a ``resolution_m``. NaN is a
    missing value, which is left out of losses and metrics. ``classes`` is empty.
    """

    name: str
    kind: TargetKind
    classes: tuple[str, ...] = ()
    ignored: tuple[int, ...] = ()
    threshold: float = 0.0
    resolution_m: float | None = None
    of: str | None = None
    # Not part of the repr: it is a key of cached features, which do not depend on units.
    units: str = field(default="", repr=False, metadata=OMIT_DEFAULT)

    @property
    def is_map(self) -> bool:
        """Whether a tile has a label per pixel, rather than one for the whole tile."""
        return self.kind == "segmentation" or (self.kind == "regression" and self.resolution_m is not None)

    @property
    def num_outputs(self) -> int:
        """Number of predicted values: all classes but the ignored ones, or the one number of a regression."""
        if self.kind == "regression":
            return 1
        return sum(i not in self.ignored for i in range(len(self.classes)))


@dataclass(frozen=True)
class DatasetSpec:
    """All that training needs to know about a dataset: the stored data, and the preset of sensors and crop."""

    name: str
    title: str
    tile_m: float  # ground extent of a stored tile
    crop_m: float  # ground extent of a sample: of the crop that is cut from a tile
    pos_grid: int  # cells per side of the fine ground grid that positions are averaged from
    modalities: tuple[Modality, ...]
    targets: tuple[Target, ...]
    sensors: tuple[Sensor, ...]
    ref_sensor: str | None = None  # the sensor whose token grid maps are predicted on

    def modality(self, name: str) -> Modality:
        """The modality called ``name``; KeyError with the known names if there is none."""
        return _find(self.modalities, name, f"modality of {self.name}")

    def select(self, modalities: Sequence[str]) -> DatasetSpec:
        """The spec with these modalities only, in the order of the spec, and the sensors that read them.

        DatasetError for a modality that the dataset does not have, or if none is named.
        """
        known = [m.name for m in self.modalities]
        unknown = [name for name in modalities if name not in known]
        if unknown or not modalities:
            what = f"has no modality {unknown[0]!r}" if unknown else "needs at least one modality"
            raise DatasetError(f"{self.name}: {what}; there are: {', '.join(known)}")
        sensors = tuple(s for s in self.sensors if s.source in modalities)
        return replace(
            self,
            modalities=tuple(m for m in self.modalities if m.name in modalities),
            sensors=sensors,
            ref_sensor=self.ref_sensor if self.ref_sensor in {s.name for s in sensors} else None,
        )

    def stored(self) -> DatasetSpec:
        """The spec as a manifest has it: without ``Modality.optional``, so that a split in which no tile lacks anything
        has the same spec, whatever its reader would permit."""
        return replace(self, modalities=tuple(replace(m, optional=False) for m in self.modalities))

    def windowed(self, window_m: float) -> DatasetSpec:
        """The spec of tiles that are ``window_m`` metres wide. DatasetError unless that is at least the crop, at most
        the tile, and a multiple of the coarsest pixel."""
        coarsest_m = max(m.resolution_m for m in self.modalities)
        if not self.crop_m <= window_m <= self.tile_m or window_m % coarsest_m:
            raise DatasetError(
                f"{self.name}: a window of {window_m:g} m: use a multiple of {coarsest_m:g} from {self.crop_m:g} to "
                f"{self.tile_m:g}"
            )
        modalities = (replace(m, size=round(window_m / m.resolution_m)) for m in self.modalities)
        return replace(self, tile_m=window_m, modalities=tuple(modalities))

    def sensor(self, name: str) -> Sensor:
        """The sensor called ``name``; KeyError with the known names if there is none."""
        return _find(self.sensors, name, f"sensor of {self.name}")

    def target(self, name: str) -> Target:
        """The target called ``name``; KeyError with the known names if there is none."""
        return _find(self.targets, name, f"target of {self.name}")


@dataclass(frozen=True)
class GeoOrigin:
    """Upper left corner of a north-up tile in ``crs`` (``EPSG:2154``, or WKT), in metres.

    Stored in samples as JSON by field name: part of the shard format.
    """

    crs: str
    west_m: float
    north_m: float

    def shifted(self, east_m: float, south_m: float) -> GeoOrigin:
        """The origin moved by these distances."""
        return replace(self, west_m=self.west_m + east_m, north_m=self.north_m - south_m)


@dataclass(frozen=True)
class Tile:
    """One location with all its modalities, in native dtypes.

    ``arrays[modality]``: (T, C, H, W). ``dates[modality]``: (T, 3) int16 (year, day of year, hour).
    ``masks[modality]``: (T, M, H, W) uint8 0-100, only where the modality has mask bands.
    ``targets[name]``: as :class:`Target` says. ``ref_date``: (3,) int16, the date that time encodings are relative to.
    ``notes``: what the reader assumed or corrected, as text; counted in the manifest. ``origin``: None if the source
    has none. A tile that lacks an optional modality has no array, dates and mask of it; it has at least one modality.
    """

    key: str
    arrays: Mapping[str, np.ndarray]
    dates: Mapping[str, np.ndarray]
    masks: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]
    ref_date: np.ndarray
    notes: tuple[str, ...] = field(default=())
    origin: GeoOrigin | None = None


class RawDataset(Protocol):
    """A raw dataset on disk: random access to the tiles of one split. Must pickle (it travels to writer processes).

    One with optional modalities should also have ``absent(key) -> tuple[str, ...]``: those that the tile lacks, in the
    order of the spec, without reading it. Tiles that lack the same modalities are stored together, so the writer has
    to know before it writes the first shard; without this method it reads every tile twice.

    One whose tiles depend on more than spec and key should also have ``settings``, a text that differs if they do:
    shards that were written with other settings are not continued.
    """

    spec: DatasetSpec

    def keys(self) -> list[str]:
        """Sorted tile keys of the split."""
        ...

    def read(self, key: str) -> Tile:
        """One tile; raises :class:`DatasetError` that names file and cause."""
        ...


@runtime_checkable
class InRuns(Protocol):
    """What a :class:`RawDataset` may offer, too: an order in which its tiles are cheap to read."""

    def runs(self, keys: Sequence[str]) -> list[list[str]]:
        """These keys, each once, in groups that are cheap to read together, and in that order."""
        ...

    def run(self, keys: Sequence[str]) -> AbstractContextManager[None]:
        """Within it, the tiles of one of the groups are read, in its order."""
        ...


class DatasetError(MaestroError):
    """Raw data is missing or malformed; the message is one line: what, where and what to do.

    ``kind``: a category of the error; sharding counts skipped tiles by it.
    """

    def __init__(self, message: str, kind: str = "cannot be read") -> None:
        super().__init__(message)
        self.kind = kind


class LeftOut(DatasetError):
    """A rule of the dataset leaves the tile out: it is counted by kind, and no failure, even of a strict call."""


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Item = TypeVar("_Item", bound=_HasName)


def _find(items: Sequence[_Item], name: str, what: str) -> _Item:
    for item in items:
        if item.name == name:
            return item
    raise KeyError(f"no {what} is called {name!r}; there are: {', '.join(i.name for i in items)}")
