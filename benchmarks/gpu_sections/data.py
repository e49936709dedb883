"""Synthetic shards and mock batches: no raw data, no reader, no network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from maestro_scale import datasets
from maestro_scale.datasets.spec import DatasetSpec, Modality, Target, Tile
from maestro_scale.shards.write.writer import Writer
from maestro_scale.stream.loader import Step
from maestro_scale.stream.mock import mock_batch
from maestro_scale.stream.source import Source
from maestro_scale.training.run_dir import write_atomically

_NUM_CLASSES = 4  # of the labels that the pixels depend on
_NUM_DATES = 20


def write_synthetic(folder: Path, dataset: str, splits: dict[str, int]) -> Path:
    """Shards of ``dataset`` in full size with ``splits`` {name: number of tiles}; kept if they exist."""
    asked = json.dumps(splits, sort_keys=True)
    where = folder / f"{dataset}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    done = where.with_suffix(".done")
    if not done.exists():
        spec = datasets.spec(dataset)
        for number, (split, num_tiles) in enumerate(splits.items()):
            with Writer(str(where), spec, split, shard_mb=16) as writer:
                for i in range(num_tiles):
                    writer.add(synthetic_tile(spec, f"{split}-{i:05d}", seed=1_000_000 * number + i))
        write_atomically(done, asked)
    return where


def synthetic_tile(spec: DatasetSpec, key: str, seed: int) -> Tile:
    """A tile whose pixels depend on its labels, so that a model can learn from it and a probe can predict them."""
    rng = np.random.default_rng(seed)
    kind = int(rng.integers(_NUM_CLASSES))
    arrays, dates, masks = {}, {}, {}
    for m in spec.modalities:
        num_dates = _NUM_DATES if m.series else 1
        days = np.sort(rng.choice(np.arange(1, 360), num_dates, replace=False))
        dates[m.name] = np.stack([[2020, day, 10] for day in days]).astype(np.int16)
        arrays[m.name] = _pixels(m, num_dates, kind, rng)
        if m.mask_bands:
            masks[m.name] = np.zeros((num_dates, len(m.mask_bands), m.size, m.size), np.uint8)
    return Tile(
        key=key,
        arrays=arrays,
        dates=dates,
        masks=masks,
        targets={t.name: _labels(spec, t, kind) for t in spec.targets},
        ref_date=np.array([2020, 200, 0], np.int16),
    )


def _pixels(m: Modality, num_dates: int, kind: int, rng: np.random.Generator) -> np.ndarray:
    """A level per class and band, a gradient over the tile, and noise."""
    shape = (num_dates, len(m.bands), m.size, m.size)
    levels = np.random.default_rng(kind).uniform(0.2, 0.8, (1, len(m.bands), 1, 1))
    ramp = np.linspace(-0.1, 0.1, m.size)[None, None, None, :] * rng.choice([-1, 1])
    values = (levels + ramp + rng.normal(0, 0.05, shape).astype(np.float32)).clip(0.01, 1)
    if np.issubdtype(np.dtype(m.dtype), np.integer):
        return (values * min(np.iinfo(m.dtype).max, 3000)).astype(m.dtype)
    return values.astype(m.dtype)


def _labels(spec: DatasetSpec, target: Target, kind: int) -> np.ndarray:
    if target.kind == "multilabel":
        shares = np.zeros(len(target.classes), np.float32)
        shares[kind % len(target.classes)] = 1.0
        return shares
    if not target.is_map:
        value = kind % len(target.classes) if target.kind == "classification" else kind
        return np.full((1,), value, np.int16 if target.kind == "classification" else np.float32)
    resolution_m = target.resolution_m or spec.modalities[0].resolution_m
    side = round(spec.tile_m / resolution_m)
    if target.kind == "regression":
        return np.full((side, side), kind, np.float32)
    return np.full((side, side), kind % len(target.classes), np.uint8)


class MockStream:
    """Steps of one mock batch, in page-locked memory: a training without the cost of loading.

    Has the methods of :class:`~maestro_scale.stream.loader.TrainLoader` that a trainer calls.
    """

    def __init__(
        self, source: Source, name: str, micro_batch: int, num_micro_batches: int, pin: bool
    ) -> None:
        self._batch = mock_batch(source, name, micro_batch, pin)
        self._num_micro_batches, self._name = num_micro_batches, name
        self.sources = {name: source}

    def steps(self, samples: int, num_steps: int) -> Iterator[Step]:
        """Steps from the position ``samples`` to the end of the training."""
        global_batch = len(self._batch) * self._num_micro_batches
        for step in range(samples // global_batch + 1, num_steps + 1):
            batches = (self._batch,) * self._num_micro_batches
            yield Step(step, 0, step * global_batch, self._name, step, batches, {})

    def close(self) -> None:
        """Nothing to close."""
