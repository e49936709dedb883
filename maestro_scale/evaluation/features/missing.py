"""Features of tiles that lack sensors: pooled over the sensors that the tile has, in the layout of complete tiles.

Concatenated features have a slot per sensor. Where the tile lacks one, its slot gets the mean of the slots that the
tile has, so that the vector of a tile has its usual scale and direction; a slot of another width gets zeros. Nothing is
fitted, so the features of a tile depend on that tile alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from maestro_scale.datasets.sensor_sets import split_name
from maestro_scale.evaluation.baselines.baseline import Baseline, FrozenEncoder, token_view
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.sequences import sequences
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.sensor_sets import absent_sensors
from maestro_scale.stream.source import Source


def tile_vector(model: FrozenEncoder, batch: Batch) -> Tensor:
    """(B, F = S·E): the mean over each sensor's tokens, concatenated over sensors."""
    embedding = model.embed(batch)
    if not split_name(batch.dataset)[1]:
        return embedding.vector
    means = {name: tokens.mean(dim=(1, 2)) for name, tokens in embedding.tokens.items()}
    return torch.cat(list(filled(model, batch, means).values()), dim=-1)


def filled(model: FrozenEncoder, batch: Batch, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``parts`` (…, E) by sensor, completed with the sensors that the tiles of ``batch`` lack, in the model's order."""
    dataset, absent = split_name(batch.dataset)
    if not absent:
        return dict(parts)
    return completed(parts, {name: token_width(model, name) for name in token_order(model, dataset)})


def token_order(model: FrozenEncoder, dataset: str) -> list[str]:
    """The sensors in the order of the tokens that the model returns for complete tiles: those of a group follow each
    other."""
    view = token_view(model, dataset)
    if isinstance(view, ModelConfig):
        return [sensor.name for sequence in sequences(view) for sensor in sequence.sensors]
    return [sensor.name for sensor in view.sensors]


def completed(parts: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """``parts`` (…, E) of some sensors as those of all of ``widths``, {sensor: E}, in that order."""
    some = next(iter(parts.values()))
    mean = None
    if len({part.shape[-1] for part in parts.values()}) == 1:
        mean = torch.stack(list(parts.values())).mean(dim=0)
    whole: dict[str, Tensor] = {}
    for name, width in widths.items():
        if name in parts:
            whole[name] = parts[name]
        elif mean is not None and mean.shape[-1] == width:
            whole[name] = mean
        else:
            whole[name] = some.new_zeros(*some.shape[:-1], width)
    return whole


def token_width(model: FrozenEncoder, sensor: str) -> int:
    """E of a sensor's tokens."""
    return model.width_of(sensor) if isinstance(model, Baseline) else model.config.size.width


def check_can_encode(model: object, sources: Iterable[Source]) -> None:
    """EvaluationError where tiles of ``sources`` lack sensors and the encoder needs all of them."""
    if not isinstance(model, Baseline) or model.encodes_each_sensor:
        return
    for source in sources:
        for shard in source.shards:
            if absent := absent_sensors(source.spec, shard):
                raise EvaluationError(
                    f"{model.config.kind}: {source.spec.name} has tiles that lack {', '.join(absent)}, and this "
                    "encoder needs all of its sensors: leave these out (data.mixture[0].sensors: {name: null})"
                )
