"""A small segmentation benchmark in shards: fields of four classes with different colours, one class ignored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from maestro_scale.datasets.pastis_hd.reader import S2_BANDS
from maestro_scale.datasets.spec import DatasetSpec, Modality, Scale, Sensor, Target, Tile
from maestro_scale.datasets.synthetic.scene import Scene
from maestro_scale.interop.export import write_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.writer import Writer
from tests.testkit.models import TINY

FIELDS = DatasetSpec(
    name="fields",
    title="Fields",
    tile_m=60.0,
    crop_m=40.0,  # no divisor of the tile: crops overlap
    pos_grid=12,
    modalities=(
        Modality("aerial", ("R", "G", "B"), 2.5, 24, "uint8"),
        Modality("s2", ("B2", "B3"), 10.0, 6, "int16", series=True),
    ),
    targets=(
        Target(
            "cover", "segmentation", ("wood", "void", "meadow", "lake"), ignored=(1, 9), resolution_m=10.0
        ),
    ),
    sensors=(
        Sensor("aerial", "aerial", 16, 8, 1, (0, 1, 2), (3,), Scale("linear", 255.0), "aerial", "aerial"),
        Sensor("s2", "s2", 4, 1, 2, (0, 1), (2,), Scale("linear", 1000.0), "s2", "s2"),
    ),
    ref_sensor="s2",
)
AERIAL = np.array([[40, 120, 90, 30], [90, 120, 180, 60], [40, 120, 60, 180]])  # (band, class)
S2 = np.array([[300, 500, 800, 200], [700, 500, 500, 100]])
SPLITS = {"train": 20, "val": 7, "test": 11}


def field_tile(number: int) -> Tile:
    """Blocks of 20 m of one class each, sometimes void; a corner is 9, which is no class."""
    rng = np.random.default_rng(number)
    cover = np.kron(rng.integers(0, 4, (3, 3)), np.ones((2, 2), int)).astype(np.uint8)
    aerial = np.kron(AERIAL[:, cover], np.ones((4, 4))) + rng.normal(0, 8, (3, 24, 24))
    s2 = S2[:, cover] + rng.normal(0, 60, (4, 2, 6, 6))
    cover[0, 0] = 9
    when = np.array([[2020, day, 10] for day in (20, 110, 200, 290)], np.int16)
    return Tile(
        key=f"field-{number:03d}",
        arrays={"aerial": aerial.clip(0, 255).astype(np.uint8)[None], "s2": s2.astype(np.int16)},
        dates={"aerial": when[2:3], "s2": when},
        masks={},
        targets={"cover": cover},
        ref_date=when[2],
    )


@dataclass(frozen=True)
class Fields:
    """Where the benchmark and an untrained encoder for it are."""

    shards: Path
    model: Path

    def recipe(self, folder: Path) -> Path:
        """A recipe that evaluates on it."""
        path = folder / "fields.yaml"
        path.write_text(
            f"name: fields\ndata:\n  mixture: [{{dataset: fields, shards: {str(self.shards)!r}, split: train}}]\n"
            f"  cache_dir: {str(folder / 'cache')!r}\n  workers: 0\ntracking: {{enabled: false}}\n"
        )
        return path


@pytest.fixture(scope="session")
def fields(tmp_path_factory) -> Fields:
    """The benchmark's shards, and a small encoder that was never trained."""
    root = tmp_path_factory.mktemp("fields")
    first = 0
    for split, count in SPLITS.items():
        with Writer(str(root / "shards"), FIELDS, split) as writer:
            for number in range(first, first + count):
                writer.add(field_tile(number))
        first += count
    config = ModelConfig(
        sensors=FIELDS.sensors, size=TINY, pos_grid=12, inter_depth=1, ref_sensor="s2", dataset="fields"
    )
    write_model(root / "model", Maestro(config).initialise(0).state_dict(), config, {"step": 0})
    return Fields(root / "shards", root / "model")


NUM_DATES = 12
SCENES = DatasetSpec(
    name="scenes",
    title="Synthetic scenes through Sentinel-2 alone",
    tile_m=60.0,
    crop_m=60.0,
    pos_grid=12,
    modalities=(Modality("s2", S2_BANDS, 10.0, 6, "int16", series=True),),
    targets=(Target("species", "multilabel", tuple("abcde"), threshold=0.07),),
    sensors=(
        Sensor("s2", "s2", 6, 6, NUM_DATES, tuple(range(10)), (4, 4, 2), Scale("linear", 5000.0), "s2", "s2"),
    ),
)


def scene_tile(number: int) -> Tile:
    """A scene of five classes that differ in when they are green alone, on days without a cloud."""
    scene = Scene(11, number, 60.0, 5)
    step = 360 // NUM_DATES
    days = 1 + step * np.arange(NUM_DATES) + scene.rng("days").integers(0, step, NUM_DATES)
    clear = np.zeros((NUM_DATES, 6, 6), np.float32)
    values = scene.optical(days, S2_BANDS, 10.0, clear, clear)
    when = np.stack([np.full(NUM_DATES, 2020), days, np.full(NUM_DATES, 10)], axis=1).astype(np.int16)
    return Tile(
        key=f"scene-{number:04d}",
        arrays={"s2": np.rint(values * 10_000).astype(np.int16)},
        dates={"s2": when},
        masks={},
        targets={"species": scene.shares().astype(np.float32)},
        ref_date=when[0],
    )


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Shards of scenes: what there is to learn is in the course of the year, hidden under light, soil and season."""
    root, first = tmp_path_factory.mktemp("scenes"), 0
    for split, count in {"train": 800, "val": 100, "test": 500}.items():
        with Writer(str(root / "shards"), SCENES, split) as writer:
            for number in range(first, first + count):
                writer.add(scene_tile(number))
        first += count
    return root / "shards"
