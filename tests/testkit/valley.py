"""A landscape of three classes, a small model that has learned them, and scenes and shards of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from maestro_scale.datasets.spec import GeoOrigin, Target
from maestro_scale.interop.export import write_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.from_arrays import Raster, describe, make_tile
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.tensors import tensors_batch
from testkit.models import TINY
from testkit.scene_files import write_scene

SIZE = 96  # pixels per side of a scene
WEST, NORTH, CRS = 499_200.0, 4_998_400.0, "EPSG:32631"
CLASSES = ("field", "void", "wood", "lake")
COUNTED = (0, 2, 3)
NOISE = 200  # so that a pixel is known by its surroundings only
SPEC = describe(
    "valley",
    480.0,
    [
        Raster(
            "s2",
            ("B2", "B3", "B4"),
            10.0,
            "int16",
            patch=2,
            divisor=3000.0,
            num_dates=1,
            mask_bands=("nodata",),
        )
    ],
    [Target("cover", "segmentation", CLASSES, ignored=(1,), resolution_m=10.0)],
    crop_m=160.0,
)
COLOURS = np.array([[600, 1500, 300], [900, 900, 250], [1500, 600, 200]], np.float64).T  # (class, band)
DESCRIPTION = """
name: valley
tile_m: 480
crop_m: 160
grid: {}
rasters:
  s2:
    files: "s2_{date:%Y%m%d}.tif"
    bands: [B2, B3, B4]
    resolution_m: 10
    dtype: int16
    series: true
    quantity: any
    sensor: {patch: 2, num_dates: 1, scale: {divisor: 3000.0}}
"""


def landscape(height: int, seed: int, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(bands (3, height, width) int16, classes (height, width)): the largest of three smooth random fields. ``width``:
    by default ``height``."""
    rng = np.random.default_rng(seed)
    shape = (height, width or height)
    fields = [gaussian_filter(rng.normal(size=shape), 5) for _ in COUNTED]
    kind = np.argmax(fields, axis=0)
    pixels = COLOURS[kind].transpose(2, 0, 1) + rng.normal(0, NOISE, (3, *shape))
    return pixels.clip(1, 4000).astype(np.int16), np.array(COUNTED)[kind]


@dataclass(frozen=True)
class Valley:
    """Where model, scene, description and shards are."""

    model: Path
    scene: Path
    description: Path
    shards: Path
    truth: np.ndarray


def train(model: Maestro, num_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels, truth = landscape(256, 1)
    rng = np.random.default_rng(0)
    classes = torch.from_numpy(np.searchsorted(COUNTED, truth))
    for _ in range(num_steps):
        corners = rng.integers(0, 256 - 16, (16, 2))
        x = np.stack([pixels[None, :, r : r + 16, c : c + 16] for r, c in corners])
        y = torch.stack([classes[r : r + 16, c : c + 16] for r, c in corners])
        batch = tensors_batch("valley", model.config.sensors, {"s2": torch.from_numpy(x)})
        loss = F.cross_entropy(model.head_outputs(batch)["cover"], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def make_valley(folder: Path, num_steps: int = 120, shape: tuple[int, int] = (SIZE, SIZE)) -> Valley:
    """``num_steps``: of training; after 120 the model is right for 99 % of the pixels. ``shape``: of the scene."""
    config = ModelConfig(
        SPEC.sensors,
        TINY,
        SPEC.pos_grid,
        inter_depth=1,
        ref_sensor="s2",
        heads=SPEC.targets,  # without crop_m, as a finetuning writes it: the extent is in the record
        dataset="valley",
    )
    model = Maestro(config, decodes=False).initialise(0)
    train(model, num_steps)
    record = Finetuned(SPEC, "cover", "miou", "finetune", max(num_steps, 1), 0.5, 0.5)
    write_model(folder / "model", model.state_dict(), config, {"step": num_steps}, record)
    pixels, truth = landscape(shape[0], 2, shape[1])
    write_scene(folder / "scene" / "s2_20200601.tif", pixels, WEST, NORTH, crs=CRS, nodata=0)
    (folder / "valley.yaml").write_text(DESCRIPTION)
    with Writer(str(folder / "shards"), SPEC, "test") as writer:
        for number, key in enumerate(("a/b", "../c", "d")):
            writer.add(tile(key, *landscape(48, 10 + number), number))
    return Valley(folder / "model", folder / "scene", folder / "valley.yaml", folder / "shards", truth)


def tile(key: str, pixels: np.ndarray, truth: np.ndarray, number: int):
    origin = GeoOrigin(CRS, WEST + 1000.0 * number, NORTH)
    made = make_tile(SPEC, key, {"s2": pixels[None]}, {"s2": ["2020-06-01"]}, targets={"cover": truth})
    return replace(made, origin=origin)
