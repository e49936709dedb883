"""docs/backbone.md: its Python blocks run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import rasterio
import torch
from testkit.models import TINY

from maestro_scale.datasets.spec import Target
from maestro_scale.interop.export import write_model
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.write.from_arrays import Raster, describe

PAGE = Path(__file__).parents[1] / "docs" / "backbone.md"
SPEC = describe(
    "fields",
    60.0,
    [Raster("s2", ("B2", "B3", "B4", "B8"), 10.0, "int16", patch=2, divisor=5000.0, num_dates=1)],
    [Target("cover", "segmentation", ("field", "wood"), resolution_m=10.0)],
)


def write_models(folder: Path) -> None:
    config = ModelConfig(SPEC.sensors, TINY, SPEC.pos_grid, inter_depth=1, crop_m=60.0, dataset=SPEC.name)
    write_model(folder / "model", Maestro(config).initialise(0).state_dict(), config, {"step": 1})
    head = ModelConfig(
        SPEC.sensors,
        TINY,
        SPEC.pos_grid,
        inter_depth=1,
        ref_sensor="s2",
        heads=SPEC.targets,
        dataset=SPEC.name,
    )
    record = Finetuned(SPEC, "cover", "miou", "finetune", 1, 0.5, 0.5)
    state = Maestro(head, decodes=False).initialise(0).state_dict()
    write_model(folder / "finetuned", state, head, {"step": 1}, record)


def write_image(path: Path) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 4000, (4, 6, 6)).astype("int16")
    profile = {"driver": "GTiff", "width": 6, "height": 6, "count": 4, "dtype": "int16", "crs": "EPSG:2154"}
    with rasterio.open(path, "w", **profile, transform=rasterio.Affine(10, 0, 9e5, 0, -10, 6e6)) as image:
        image.write(pixels)
    return pixels


def test_the_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # of the decoder
    write_models(tmp_path)
    write_image(tmp_path / "s2.tif")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["embedding"].vector.shape == (1, 32)
    assert names["embedding"].tokens["s2"].shape == (1, 1, 9, 32)
    with rasterio.open(tmp_path / "map.tif") as image:
        assert (image.crs.to_epsg(), image.read(1).tolist()) == (2154, names["found"].values[0].tolist())
    assert names["vectors"].shape == (2, 32)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    training = blocks[-1].strip().splitlines()
    assert len(training) <= 20
