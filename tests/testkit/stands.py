"""Stands of trees: tiles with one genus (classification), a biomass (regression) and a map of vigour (regression map).

The colour depends on the genus, its strength on the vigour; biomass is a function of both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from maestro_scale.datasets.spec import Target
from maestro_scale.shards import Raster, Writer, describe

GENERA = ("oak", "pine", "larch", "spruce")
BASE_T = np.array([100.0, 120.0, 180.0, 160.0])  # t/ha at full vigour
SPEC = describe(
    "stands",
    tile_m=60.0,
    crop_m=40.0,  # crops of a map overlap
    rasters=[Raster("s2", ("green", "red", "infrared"), 10.0, "int16", 1, divisor=1000.0, num_dates=4)],
    targets=[
        Target("genus", "classification", GENERA, ignored=(3,)),
        Target("biomass", "regression", units="t/ha"),
        Target("vigour", "regression", units="1", resolution_m=10.0),
    ],
)
SPLITS = {"train": 60, "val": 20, "test": 40}


def stand(number: int) -> dict:
    """Arguments of ``Writer.add_arrays``; every eighth label of a tile and one pixel of each map is missing."""
    rng = np.random.default_rng(number)
    genus = int(rng.integers(4))
    vigour = rng.uniform(0.4, 1.0) * (1 + 0.3 * np.linspace(-1, 1, 6))[:, None] * np.ones((6, 6))
    angle = 2 * np.pi * genus / 4
    colour = np.array([1.0, np.cos(angle), np.sin(angle)])[:, None, None] * vigour
    season = np.array([0.5, 1.0, 1.5, 1.0])[:, None, None, None]
    s2 = 1000 + 400 * season * colour + rng.normal(0, 10, (4, 3, 6, 6))
    shown = vigour.astype(np.float32)
    shown[0, 0] = np.nan
    missing = number % 8 == 0
    return {
        "key": f"stand-{number:03d}",
        "arrays": {"s2": s2.astype(np.int16)},
        "dates": {"s2": ["2020-01-20", "2020-04-20", "2020-07-20", "2020-10-20"]},
        "targets": {
            "genus": None if missing else GENERA[genus],
            "biomass": None if missing else float(BASE_T[genus] * vigour.mean()),
            "vigour": shown,
        },
    }


def write_stands(folder: Path) -> Path:
    """The three splits in shards."""
    first = 0
    for split, count in SPLITS.items():
        with Writer(str(folder), SPEC, split, synthetic=True) as writer:
            for number in range(first, first + count):
                writer.add_arrays(**stand(number))
        first += count
    return folder
