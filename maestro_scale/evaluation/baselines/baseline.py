"""The common interface of baselines and MAESTRO in an evaluation: views of a dataset, token grids and embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maestro_scale.datasets.sensor_sets import split_name
from maestro_scale.datasets.spec import DatasetSpec, Sensor
from maestro_scale.model.config import DatasetView, ModelConfig
from maestro_scale.model.maestro import Embedding, Maestro
from maestro_scale.stream.batch import Batch


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline and the dataset it encodes; part of the key of its cached features."""

    kind: str
    view: DatasetView
    others: tuple[DatasetView, ...] = ()
    """As in ``ModelConfig``: further datasets. A baseline has none."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Baseline(nn.Module):
    """An encoder with the interface of Maestro: ``view``, ``encode``, ``embed``. One dataset, whatever its name.

    ``adaptation``: how bands, resolution and dates of the dataset are adapted to the encoder; stored in results.
    """

    config: BaselineConfig
    adaptation = ""
    encodes_each_sensor = True
    """Whether each sensor is encoded by itself, so that tiles may lack some."""
    code = ""
    """Digest of the code of an encoder of the user's own: part of what its cached features depend on."""

    def __init__(self, kind: str, spec: DatasetSpec) -> None:
        super().__init__()
        self.config = BaselineConfig(kind, DatasetView.of_spec(spec))

    def view(self, dataset: str) -> DatasetView:
        """The view of its only dataset."""
        return self.config.view

    def token_view(self) -> DatasetView:
        """As ``view``, with the sensors, rows and grids of the tokens that ``encode`` returns."""
        return self.config.view

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Token grids {sensor: (B, D, L, E)} of the sensors that the tiles have."""
        absent = split_name(batch.dataset)[1]
        return {
            s.name: self.tokens(s, batch.pixels[s.name])
            for s in self.config.view.sensors
            if s.name not in absent
        }

    def width_of(self, name: str) -> int:
        """E of a sensor's tokens."""
        sensor = next(s for s in self.config.view.sensors if s.name == name)
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        blank = torch.zeros(1, 1, len(sensor.bands), sensor.image_size, sensor.image_size, device=device)
        with torch.no_grad():
            return self.tokens(sensor, blank).shape[-1]

    def embed(self, batch: Batch) -> Embedding:
        """Token grids, and the concatenated means of each sensor's tokens."""
        tokens = self.encode(batch)
        return Embedding(tokens, torch.cat([t.mean(dim=(1, 2)) for t in tokens.values()], dim=1))

    def tokens(self, sensor: Sensor, pixels: Tensor) -> Tensor:
        """(B, D, C, H, W) raw pixels -> (B, D, L, E)."""
        raise NotImplementedError


class TrainableBaseline(Baseline):
    """A baseline that can be finetuned: its tokens have one ``width``."""

    width: int

    def check_trainable(self, modes: Collection[str]) -> None:
        """EvaluationError where the encoder cannot be trained in one of these modes (finetune, scratch)."""

    def reinitialised(self, seed: int) -> TrainableBaseline:
        """The same encoder with random initial weights. EvaluationError where it cannot be re-initialised."""
        raise NotImplementedError

    def prepared_for_training(self) -> TrainableBaseline:
        """A copy to be trained: the tokens depend on each of its parameters."""
        raise NotImplementedError


FrozenEncoder = Maestro | Baseline
"""What features can be computed with."""


def token_view(model: FrozenEncoder, dataset: str) -> ModelConfig | DatasetView:
    """The sensors, rows and grids of the tokens that ``model.encode`` returns for a dataset."""
    return model.token_view() if isinstance(model, Baseline) else model.view(dataset)


def token_sensor(like: Sensor, name: str, rows: int, grid: int) -> Sensor:
    """A sensor that describes token grids: ``rows`` of grid² tokens."""
    return dataclasses.replace(like, name=name, num_dates=rows, image_size=grid, patch=1)
