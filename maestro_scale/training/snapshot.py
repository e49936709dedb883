"""One sample seen and reconstructed, for people to look at."""

from __future__ import annotations

import torch
from torch import Tensor

from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.embed import network_input, patchify, unpatchify
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, masks_by_sensor
from maestro_scale.model.targets import denormalise, masked_bands
from maestro_scale.stream.batch import Batch
from maestro_scale.training.observer import SensorView


@torch.no_grad()
def snapshot(
    model: Maestro, batch: Batch, masks: dict[str, Mask], bands: dict[str, tuple[str, ...]]
) -> list[SensorView]:
    """Views of the batch's first sample. ``bands``: names of each sensor's bands. Every rank must call it (ZeRO-3)."""
    config = model.view(batch.dataset)
    predictions = model.reconstruct(batch, masks)
    tokens = model.encode(batch.first())
    hidden = masks_by_sensor(config, masks)
    return [
        _view(config, s, batch, predictions[s.name], hidden[s.name], tokens[s.name], bands)
        for s in config.sensors
    ]


def _view(
    config: ModelConfig,
    sensor: Sensor,
    batch: Batch,
    prediction: Tensor,
    hidden: Tensor,
    tokens: Tensor,
    bands: dict[str, tuple[str, ...]],
) -> SensorView:
    pixels = network_input(sensor, batch.pixels[sensor.name][:1])
    patches = patchify(pixels, sensor.patch)
    guess = denormalise(config, sensor, prediction[:1].float(), patches)
    mask = masked_bands(config, sensor, hidden[:1]).expand_as(patches)
    return SensorView(
        name=sensor.name,
        bands=bands[sensor.name],
        pixels=pixels[0].cpu().numpy(),
        hidden=unpatchify(mask, sensor.patch)[0].any(dim=1).cpu().numpy(),
        reconstruction=unpatchify(torch.where(mask, guess, patches), sensor.patch)[0].cpu().numpy(),
        embedding=tokens[0].float().mean(dim=0).unflatten(0, (sensor.grid, sensor.grid)).cpu().numpy(),
    )
