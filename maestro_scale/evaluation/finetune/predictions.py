"""A network's predictions on a whole split: every tile once, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from maestro_scale.evaluation.benchmark import BATCH_SIZE
from maestro_scale.evaluation.finetune.predictor import Predictor
from maestro_scale.evaluation.tasks.first_maps import FirstMaps
from maestro_scale.evaluation.tasks.task import Predictions
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World


@torch.no_grad()
def predict_split(
    network: Predictor,
    source: Source,
    world: World,
    workers: int,
    tile_maps: TileMapWriter | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Predictions:
    """Predictions of ``network`` for every tile of ``source``, on all ranks; a collective.

    ``tile_maps``: also write the map of every tile. ``on_batch`` is called before each batch.
    """
    loss = network.target_loss
    # Whole tiles in a batch, as many as fit.
    size = loss.num_crops * max(BATCH_SIZE // loss.num_crops, 1)
    loader = EvalLoader(source, size, world.rank, world.size, workers=workers, crops=loss.num_crops)
    tiles = np.zeros((loader.num_samples, *loss.tile_shape))
    tile, maps = loader.first_row // loss.num_crops, FirstMaps(loader.num_samples)
    for batch in loader:
        on_batch()
        logits, labels = network.logits(batch.to(world.device)), loss.task.labels(batch)
        part = loss.per_tile(logits, labels)
        maps.add(tile, loss.first_maps(logits, labels))
        tiles[tile : tile + len(part)] = part
        if tile_maps is not None:
            for number, whole in enumerate(loss.tile_maps(logits), tile):
                tile_maps.write(number, whole)
        tile += len(part)
    # Every tile belongs to one rank and is zero on the others, so the sum is exact.
    predictions = loss.predictions(world.sum(torch.from_numpy(tiles).to(world.device)).cpu().numpy())
    return replace(predictions, maps=maps.gather(world))
