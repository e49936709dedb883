"""Reconstructs one sample at an interval, for pictures of the training's progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maestro_scale.datasets.sensor_sets import split_name
from maestro_scale.datasets.spec import Sensor
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.embed import network_input, patchify, unpatchify
from maestro_scale.model.maestro import Maestro
from maestro_scale.model.masking import Mask, masks_by_sensor
from maestro_scale.model.targets import denormalise, masked_bands
from maestro_scale.stream.batch import Batch
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.observer import Observer, SensorView


class PicturesHook(Hook):
    """Gives the observers a reconstruction of the first sample of a step, every ``every`` steps of a dataset.

    ``bands``: by dataset in the mixture, the names of each sensor's bands.
    """

    def __init__(
        self,
        model: Maestro,
        bands: Mapping[str, Mapping[str, tuple[str, ...]]],
        observers: Sequence[Observer],
        every: int,
    ) -> None:
        self._model, self._bands, self._observers, self._every = model, bands, observers, every

    def after_step(self, step: FinishedStep) -> bool:
        """Reconstruct where it is due."""
        if step.data.dataset_step % self._every and not step.is_last:
            return False
        # On every rank: under ZeRO 3 the forward pass gathers parameters. Only rank 0 has observers.
        bands = self._bands[split_name(step.data.dataset)[0]]
        views = reconstruction_views(self._model, step.batches[0], step.inputs[0], bands)
        for observer in self._observers:
            observer.pictured(step.position.step, views)
        return False


@torch.no_grad()
def reconstruction_views(
    model: Maestro, batch: Batch, masks: dict[str, Mask], bands: Mapping[str, tuple[str, ...]]
) -> list[SensorView]:
    """Views of the batch's first sample. ``bands``: names of each sensor's bands. Collective under ZeRO 3."""
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
    bands: Mapping[str, tuple[str, ...]],
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
