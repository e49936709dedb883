"""Sections on splits."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
    model_validator,
)

from maestro_scale.datasets.description.sections.fields import Metres, Name, Text, Texts
from maestro_scale.strict_yaml.errors import ConflictError
from maestro_scale.strict_yaml.fields import Section


class SplitLists(Section):
    """A file per split that names its tiles."""

    file: Text
    """Path below SRC with ``{split}``: a text file with a key per line, or a CSV or Parquet file."""
    column: Text | None = None
    """Column of the CSV; null: the first."""


class SplitColumn(Section):
    """A table with the split of every tile."""

    file: Text
    """CSV, Parquet or GeoPackage below SRC."""
    key: Text | None = None
    """Column with the tile keys; null: the first."""
    column: Text = "split"
    """Column with the splits."""


class SplitBlocks(Section):
    """Square blocks of ground that are drawn to splits, with a distance between splits; needs ``grid``, or files with
    coordinates. The draw depends on the seed and the place of a block only, so it is the same on any machine."""

    size_m: Metres
    """Side of a block."""
    fractions: dict[Name, Annotated[float, Field(gt=0, le=1)]]
    """Fraction of the blocks by split; they add up to 1."""
    distance_m: Annotated[float, Field(ge=0)] = 0.0
    """Tiles nearer than this to a tile of another split are left out (of the split with the larger fraction)."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draw."""


class Splits(Section):
    """Which tiles are in which split: at most one of lists, column and blocks. ``{split}`` in the patterns of files
    needs neither. Without any, all tiles are in the split ``train``."""

    lists: SplitLists | None = None
    """A file per split."""
    column: SplitColumn | None = None
    """A table with the split of every tile."""
    blocks: SplitBlocks | None = None
    """Drawn by blocks of ground."""
    names: dict[Name, Texts] = Field(default_factory=dict)
    """Split → what it is called in files, folders or columns, where that differs: ``{val: [valid, validation]}``."""

    @model_validator(mode="after")
    def _check_one(self) -> Splits:
        given = [n for n in ("lists", "column", "blocks") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ConflictError(((given[1],), f"excludes {given[0]}: keep one"))
        return self
