"""The draft of a raster: the fields that it gets in a description, and notes on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from maestro_scale.datasets.describe.names import Family


@dataclass
class Note:
    """What the draft says about a key; ``assumed``: it is a guess."""

    text: str
    assumed: bool = False


@dataclass
class Mask:
    """A mask band: the fields of a ``MaskRule``, and the note on it."""

    rule: dict[str, object]
    note: Note


@dataclass
class RasterDraft:
    """The fields of a raster in a description; ``notes``: by field."""

    name: str
    files: str
    key: str | None
    bands: list[tuple[str, int | str]]
    resolution_m: float
    dtype: str
    found: str
    series: bool = False
    num_dates: int = 1
    num_bands: int = 0  # of a file, without an alpha channel
    side: int = 0
    extent_m: float = 0.0
    keys: frozenset[str] = frozenset()
    dates: str | dict[str, str] | None = None
    nodata: tuple[float, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    quantity: str = "any"
    divisor: float | None = None
    resampling: str = "bilinear"
    required: bool = True
    elevation: bool = False
    axes: tuple[str, ...] | None = None
    source: str | None = None
    variable: str | None = None
    exclude: tuple[str, ...] = ()
    key_source: str | None = None
    masks: dict[str, Mask] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    crs: frozenset[str] = frozenset()
    bounds: tuple[float, float, float, float] | None = None  # of all files that were opened, in the CRS
    family: Family | None = None
    patch: int = 1

    def assume(self, key: str, text: str) -> None:
        """Note that ``key`` is a guess."""
        self.notes[key] = Note(text, assumed=True)
