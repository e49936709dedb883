"""Scenes as the grid sees them: where the images of a source lie, and which of them were taken together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from maestro_scale.datasets.scenes.grid import Box
from maestro_scale.datasets.scenes.warp import Placement
from maestro_scale.datasets.sources.protocol import Date, ImageRef


@dataclass(frozen=True)
class Scene:
    """One image of a source on the ground: bands of a raster, a mask, or a label image.

    ``layer``: whose section of the description reads it. ``name``: for messages; relative to the source, so that it is
    the same on any machine. ``box``: its bounds in the CRS of the grid. ``block``: height and width of the blocks of
    the file in pixels.
    """

    layer: str
    ref: ImageRef
    name: str
    place: Placement
    dtype: str
    box: Box
    block: tuple[int, int] = (1, 1)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel in memory, over all bands, with a byte per value for whether it is valid."""
        return len(self.ref.bands) * (np.dtype(self.dtype).itemsize + 1)


@dataclass(frozen=True)
class Shot:
    """What was taken together: the files with the bands of a raster on one date, and its masks.

    ``name``: orders the shots of a mosaic; the same on any machine.
    """

    name: str
    date: Date | None
    bands: tuple[Scene, ...]
    masks: Mapping[str, Scene] = field(default_factory=dict)

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """All its images."""
        return (*self.bands, *self.masks.values())

    @property
    def box(self) -> Box:
        """The bounds of its bands."""
        box = self.bands[0].box
        for scene in self.bands[1:]:
            box = box.union(scene.box)
        return box
