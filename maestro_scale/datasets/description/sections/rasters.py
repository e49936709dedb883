"""Sections on rasters, and on the inputs of a model that they become."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from maestro_scale.datasets.description.sections.fields import Metres, Name, QuantityKind, Resampling, Text
from maestro_scale.datasets.description.sections.images import Bands, ImageFiles, MaskRule
from maestro_scale.strict_yaml.fields import Count, Section, listed


class SensorScale(Section):
    """How stored values become network inputs (datasets.spec.Scale)."""

    kind: Literal["linear", "log"] = "linear"
    """``linear``: x / divisor; ``log``: ln(max(x, 1e-10)) / divisor, for radar in linear power."""
    divisor: Annotated[float, Field(gt=0)] = 1.0
    """Divisor of the value: most scaled values should lie in 0 to 1."""


class SensorPreset(Section):
    """One input of the model (datasets.spec.Sensor); what is null follows from the raster. Recipes can change it."""

    patch: Count | None = None
    """Pixels per side of the square that becomes one token; it divides ``image_size``. Null: the divisor that gives the
    most tokens up to 20 a side."""
    num_dates: Count | None = None
    """Dates per sample, one from each of this many equal bins of the series. Null: 1, of a series 8."""
    image_size: Count | None = None
    """Pixels per side of the model's input, to which the crop is resized. Null: those of the crop."""
    bands: Annotated[tuple[Text, ...], BeforeValidator(listed)] | None = None
    """Names of the bands in the order of the model. Null: all."""
    band_groups: tuple[Count, ...] | None = None
    """Sizes of consecutive groups of similar bands, over which targets are normalised. Null: one group."""
    token_groups: tuple[Count, ...] = ()
    """Bands per token with model.spectral=token; empty: the band groups."""
    scale: SensorScale | None = None
    """How stored values become network inputs. Null: by the quantity (image 255, reflectance 10000, backscatter_db 20,
    backscatter_linear log 5, elevation 1000); needed for ``any``."""
    group: Text | None = None
    """Sensors of one group share one token sequence in the encoder. Null: the sensor's name."""
    embed: Text | None = None
    """Sensors of one embed share the weights of the patch embedding. Null: the sensor's name."""
    mask_threshold: Annotated[float, Field(ge=0, le=100)] = 0.0
    """A pixel is cloudy or snowy where any mask band exceeds this, in percent."""
    elevation: bool = False
    """Channel 1 becomes 30 · (channel 0 - channel 1) after scaling, for a surface and a terrain model."""


class FurtherSensor(SensorPreset):
    """A further input of the model from a raster that has a sensor of its own."""

    source: Name
    """The raster it reads."""


class Raster(ImageFiles):
    """One kind of image of a tile, stored as one modality."""

    files: Text
    """Path or address below SRC, as a pattern: ``{key}`` is the tile, ``{date}`` the date (``{date:%Y%j}``), ``{band}``
    the band, ``{split}`` the split; any other name, such as ``{orbit}``, stands for text that may differ. A name does
    not match ``/``; a name that occurs twice matches the same text. ``*`` matches text that does not matter."""
    bands: Bands
    """The bands to store, in order: names, or ``{name, from}`` where the file has other names or another order."""
    resolution_m: Metres
    """Ground size of a stored pixel. Without ``grid`` also that of the files."""
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"]
    """Numpy name of the stored type."""
    series: bool = False
    """Whether a tile has several images, each with its date."""
    scale: float = 1.0
    """Stored value = scale · value in the file + offset. A scale that the file declares is not applied (but see
    ``unpack``)."""
    offset: float = 0.0
    """See ``scale``: Sentinel-2 since processing baseline 04.00 needs -1000."""
    masks: dict[Name, MaskRule] = Field(default_factory=dict)
    """Mask bands by name, in order: ``cloud`` and ``snow`` are known to the selection of dates. Pixels that a rule
    called ``nodata`` marks are not measured, as if the file declared them so."""
    quantity: QuantityKind = "any"
    """What is measured: it determines which values are valid, and how invalid ones are stored."""
    valid: tuple[float | None, float | None] | None = None
    """Lowest and highest valid value, as stored, if another range than the quantity's applies."""
    nodata_mask: bool = True
    """Store which pixels are invalid, as mask band ``nodata``: these count neither in the selection of dates nor in the
    loss. false saves its space (a byte per pixel and date, without compression) where images have no gaps; invalid
    values are then stored as 0 or NaN."""
    resampling: Resampling = "bilinear"
    """How pixels are warped to the grid; masks and label images: nearest."""
    required: bool | None = None
    """Whether a tile without it is left out, and counted. false: the tile is stored with what it has. Null: as false,
    but it is an error if no tile has it, since then ``files`` is wrong; with ``grid`` as true."""
    sensor: SensorPreset | None = SensorPreset()
    """How the model uses it. null: it is stored only."""

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        return tuple(band.from_ for band in self.bands)
