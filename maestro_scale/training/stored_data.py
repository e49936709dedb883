"""What the shards of a recipe hold, from their manifests alone: numbers of tiles by set of sensors, and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.recipe import MixtureEntry, Recipe
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.stream.sensor_sets import Division, complete, divide
from maestro_scale.stream.source import Source


class StoredData(NamedTuple):
    """The tiles of one dataset of a mixture. ``parts``: their number by the sensors that they have, as training divides
    them for a global batch; empty: all are alike."""

    samples: int
    bytes: int
    parts: tuple[int, ...] = ()

    def steps_per_epoch(self, global_batch: int) -> int:
        """Steps of an epoch: each part has steps of its own, at least one."""
        return sum(max(1, count // global_batch) for count in self.parts or (self.samples,))


def num_steps(recipe: Recipe, stored: Sequence[StoredData | None]) -> int | None:
    """Steps of a training; None if it is given in epochs and the size of a dataset is unknown."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    known = [data for data in stored if data is not None]
    if len(known) < len(stored):
        return None
    return recipe.train.num_steps(sum(data.steps_per_epoch(recipe.train.global_batch) for data in known))


def stored_data(manifest: Manifest, entry: MixtureEntry, spec: DatasetSpec, global_batch: int) -> StoredData:
    """Of one dataset. ``spec``: resolved. SampleOrderError where a set of tiles is too small for a step."""
    source = source_of(manifest, entry, spec)
    stored_bytes = sum(s.bytes for s in source.shards)
    parts = () if not source.shards else divide(source, global_batch).sources
    return StoredData(sum(source.counts), stored_bytes, tuple(sum(part.counts) for part in parts))


def division_of(manifest: Manifest, entry: MixtureEntry, spec: DatasetSpec, global_batch: int) -> Division:
    """How training divides the tiles of one dataset by their sensors. SampleOrderError as of :func:`stored_data`."""
    return divide(source_of(manifest, entry, spec), global_batch)


def source_of(manifest: Manifest, entry: MixtureEntry, spec: DatasetSpec) -> Source:
    """The tiles in use of one dataset; they cannot be read."""
    source = Source(spec, manifest.shards_of(entry.split), cast(Any, None))
    return complete(source)[0] if entry.incomplete == "leave_out" else source
