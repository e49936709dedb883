"""The training stream of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from maestro_scale.recipe import Recipe
from maestro_scale.stream.loader import TrainLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World


def train_loader(
    recipe: Recipe, sources: Sequence[Source], world: World, micro_batch: int
) -> tuple[TrainLoader, int]:
    """(the loader of this rank's share of the global batches, number of steps of the training)."""
    data, train = recipe.data, recipe.train
    stream = TrainLoader(
        sources=tuple(sources),
        seed=recipe.seed,
        lanes=data.lanes,
        global_batch=train.global_batch,
        micro_batch=micro_batch,
        rank=world.rank,
        world=world.size,
        workers=data.workers,
        window=data.shuffle_window,
        flips=data.flips,
        on_bad_shard=data.on_bad_shard,
        first_date=recipe.first_date,
        pin=world.device.type != "cpu",
    )
    return stream, train.num_steps(stream.steps_per_epoch)
