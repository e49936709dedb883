"""A network's predictions on a whole split: every tile once, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.benchmark import BATCH_SIZE
from maestro_scale.evaluation.features.on_device import RecipePrecision, map_on_device
from maestro_scale.evaluation.finetune.predictor import Predictor
from maestro_scale.evaluation.tasks.first_maps import FirstMaps
from maestro_scale.evaluation.tasks.protocol import Predictions
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World


def predict_split(
    network: Predictor,
    source: Source,
    world: World,
    workers: int,
    precision: RecipePrecision,
    tile_maps: TileMapWriter | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predictions of ``network`` for every tile of ``source``, on all ranks; a collective.

    ``precision``: as in ``eval_precision``. ``tile_maps``: also write the map of every tile. ``on_batch`` is called
    before each batch.
    """
    loss = network.target_loss
    # Whole tiles in a batch, as many as fit.
    size = loss.num_crops * max(BATCH_SIZE // loss.num_crops, 1)
    loader = EvalLoader(
        source,
        size,
        world.rank,
        world.size,
        workers=workers,
        pin=world.device.type != "cpu",
        crops=loss.num_crops,
    )
    tiles = np.zeros((loader.num_samples, *loss.tile_shape))
    is_number = loss.task.target.kind == "regression"
    maps = FirstMaps(loader.num_samples, "float32" if is_number else "uint8")
    tile = loader.first_row // loss.num_crops

    def predict(batch: Batch) -> dict[str, Tensor]:
        on_batch()
        return {"predicted": loss.predict(network.logits(batch))}

    for batch, found in map_on_device(loader, predict, world.device, precision):
        predicted, labels = found["predicted"], loss.task.labels(batch)
        part = loss.per_tile(predicted, labels)
        maps.add(tile, loss.first_maps(predicted, labels))
        tiles[tile : tile + len(part)] = part
        if tile_maps is not None:
            for number, whole in enumerate(loss.tile_maps(predicted), tile):
                tile_maps.write(number, whole)
        tile += len(part)
    # Every tile belongs to one rank and is zero on the others, so the sum is exact.
    predictions = loss.predictions(world.sum(torch.from_numpy(tiles).to(world.device)).cpu().numpy())
    return replace(predictions, maps=maps.gather(world))
