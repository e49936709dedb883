"""Sections on targets: from rasters, vector files or tables."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    model_validator,
)

from maestro_scale.datasets.description.sections.fields import (
    BandSource,
    Metres,
    Name,
    Text,
    Texts,
    is_integer,
)
from maestro_scale.datasets.description.sections.images import ImageFiles
from maestro_scale.datasets.spec import TargetKind
from maestro_scale.strict_yaml.errors import ConflictError
from maestro_scale.strict_yaml.fields import Section, listed


class RasterTarget(ImageFiles):
    """An image of labels or numbers."""

    files: Text
    """As of a raster."""
    band: BandSource = 1
    """The band: number in its file from 1, or what stands for it."""
    _labels: frozenset[int] = PrivateAttr(frozenset())

    @property
    def band_sources(self) -> tuple[int | str, ...]:
        return (self.band,)

    @property
    def labels(self) -> frozenset[int]:
        return self._labels

    def with_labels(self, labels: frozenset[int]) -> RasterTarget:
        """The same section, with the values that are labels."""
        section = self.model_copy()
        section._labels = labels
        return section


class VectorTarget(Section):
    """Features with labels, rasterised: GeoPackage, GeoJSON, GeoParquet, Shapefile. Needs ``resolution_m``."""

    files: Text
    """Path or address below SRC; ``{key}`` where each tile has its own file."""
    layer: Text | None = None
    """Layer of a GeoPackage; null: its only one."""
    crs: Text | None = None
    """Coordinate system of a file that declares none, such as a Shapefile without its ``.prj``."""
    column: Text | None = None
    """Attribute with the label; null: the target has one class beside ``outside``, the features themselves."""
    all_touched: bool = False
    """Label every pixel that a feature touches, instead of those whose centre lies inside."""
    order: Text | None = None
    """Attribute by which features are drawn, the highest last, where they overlap; null: the order of the file."""


class TableTarget(Section):
    """A CSV or Parquet file with a row per tile, or tars in the layout of WebDataset with a member per tile."""

    file: Text
    """Path or address below SRC; of tars a pattern or braces, as of a raster: ``"train-{000..099}.tar"``."""
    key: Text | None = None
    """Column with the tile keys; null: the first column. Of tars null."""
    column: Text | None = None
    """Column with the label or the number (of several classes: separated by commas, semicolons or spaces). Of tars the
    suffix of a member with text, with the path in a JSON document: ``cls``, ``json/properties/crop``."""
    columns: Annotated[tuple[Text, ...], BeforeValidator(listed)] | None = None
    """Columns with the area shares of a multilabel target, in the order of the classes; null: called as the classes."""


class Target(Section):
    """What is to be predicted: exactly one of raster, vector, table, name and of says where it comes from."""

    kind: TargetKind
    """multilabel (shares of classes), segmentation (a class per pixel), classification (a class per tile), or
    regression (a number per tile or per pixel)."""
    classes: Texts = ()
    """Names of the classes; labels are their indices, from 0. Empty for regression."""
    values: dict[str, str | None] = Field(default_factory=dict)
    """Label in the source → name of the class, where labels are not the indices of ``classes`` (or, as text, their
    names); several labels may be one class; null: as if there were no label."""
    ignored: Texts = ()
    """Classes that do not count in losses and scores; the first one stands for pixels without a label."""
    raster: RasterTarget | None = None
    """Labels, or numbers, as images."""
    vector: VectorTarget | None = None
    """Labels, or numbers, as features that are rasterised."""
    table: TableTarget | None = None
    """Labels, or numbers, by tile."""
    name: Text | None = None
    """The label is a part of the path: the name of the part in the pattern of the first raster that has it, such as
    ``class`` of ``{class}/{key}.tif``."""
    of: Name | None = None
    """Multilabel: shares of the classes in this segmentation target."""
    resolution_m: Metres | None = None
    """Ground size of a pixel of a raster or vector target."""
    outside: Text | None = None
    """Vector: class of pixels outside of all features; null: they have no label."""
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multilabel: a class is positive where its share exceeds this."""
    units: Annotated[str, Field(max_length=40)] = ""
    """Regression: units of the numbers."""
    scale: float = 1.0
    """Regression: stored number = scale · number in the source."""

    @property
    def labels(self) -> dict[str, int | None]:
        """Label in the source, as text → index of its class; None for no label. By ``values``, else by index, and by
        the name of a class."""
        index = {name: i for i, name in enumerate(self.classes)}
        if not self.values:
            return {**{str(i): i for i in index.values()}, **index}
        found = {label: None if name is None else index[name] for label, name in self.values.items()}
        return found if all(map(is_integer, self.values)) else {**index, **found}

    @property
    def label_section(self) -> RasterTarget | None:
        """The images of labels or numbers, if the target is made of these, with the values that are labels."""
        if self.raster is None or self.kind == "regression":
            return self.raster
        return self.raster.with_labels(frozenset(int(label) for label in self.labels if is_integer(label)))

    @model_validator(mode="before")
    @classmethod
    def _text_keys(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("values"), dict):
            return {**data, "values": {str(k): v for k, v in data["values"].items()}}
        return data

    @model_validator(mode="after")
    def _check_source(self) -> Target:
        given = [n for n in ("raster", "vector", "table", "name", "of") if getattr(self, n) is not None]
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "says not where it comes from"
            raise ConflictError(((), f"{what}: give exactly one of raster, vector, table, name and of"))
        return self
