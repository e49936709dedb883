"""A benchmark (a dataset in shards with splits and a target), and the result of predictions on its test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.evaluation.bootstrap import bootstrap_interval
from maestro_scale.evaluation.counts import TileCounts
from maestro_scale.evaluation.metrics import best_index
from maestro_scale.evaluation.results import Architecture, EvalResult
from maestro_scale.evaluation.tasks.protocol import DEFAULT_LOSS, LossSettings, Predictions, Task
from maestro_scale.evaluation.tasks.subset import TRAIN, train_split
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store

BATCH_SIZE = 32
"""Crops per forward pass. It is part of the key of cached features: kernels may round differently at another size."""


@dataclass(frozen=True)
class Provenance:
    """Where an encoder comes from; stored in every result. ``step``: 0 for an untrained one.

    ``encoder``: its name; ``trained_on``: datasets it was pretrained on; ``weights``, ``adaptation`` and
    ``architecture``: as in ``EvalResult``.
    """

    step: int | None = None
    seed: int = 0
    recipe: Mapping[str, Any] | None = None
    encoder: str = ""
    trained_on: tuple[str, ...] = ()
    weights: str = ""
    adaptation: str = ""
    architecture: Architecture | None = None


@dataclass(frozen=True)
class Benchmark:
    """A dataset in shards as a benchmark: where it is, which sensors and crop are used, what is predicted.

    ``spec``: resolved. ``target``: None for the dataset's first target. ``fraction``: of the training labels.
    ``splits``: by role (train, val, test) the splits in shards, where they have other names than the role;
    ``fold``: the number of the fold of a cross-validation that they form. ``manifest``: as the job has read it; None to
    read it when it is needed. ``loss``: of the modes that train with a loss.
    ``trains_on_incomplete``: whether a finetuning uses the training tiles that lack a sensor.
    """

    spec: DatasetSpec
    shards: str
    cache_dir: Path
    features_dir: Path
    cache_bytes: int = 100 * 2**30
    target: str | None = None
    fraction: float = 1.0
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fold: int | None = None
    manifest: Manifest | None = None
    loss: LossSettings = DEFAULT_LOSS
    trains_on_incomplete: bool = True

    def load_manifest(self) -> Manifest:
        """The manifest of the shards; read only once in a job, as a second reading could find another one."""
        return self.manifest or Manifest.load(self.shards)

    def stored_splits(self, split: str) -> tuple[str, ...]:
        """The splits in shards that a role consists of: itself, unless ``splits`` says otherwise."""
        return self.splits.get(split, (split,))

    def train_split(self, manifest: Manifest) -> tuple[str, float]:
        """As :func:`subset.train_split`; but a fraction of splits that ``splits`` gives for train is always sampled:
        the list of a release is of its own train split."""
        split, fraction = train_split(manifest, self.fraction)
        return (TRAIN, self.fraction) if TRAIN in self.splits else (split, fraction)

    def splits_by_role(self, manifest: Manifest) -> dict[str, tuple[str, ...]]:
        """{role: splits in shards} of training, validation and test."""
        train, _ = self.train_split(manifest)
        return {
            TRAIN: self.stored_splits(train),
            **{role: self.stored_splits(role) for role in ("val", "test")},
        }

    def test_keys(self, manifest: Manifest) -> tuple[str, ...]:
        """Keys of the test tiles, in the order in which they are predicted."""
        store = Store(self.shards, self.cache_dir, self.cache_bytes)
        return tuple(
            key for info in manifest.shards_of(self.stored_splits("test")) for key in store.read_keys(info)
        )


def build_result(
    benchmark: Benchmark,
    manifest: Manifest,
    mode: str,
    task: Task,
    predictions: Predictions,
    provenance: Provenance,
    timings: dict[str, float],
) -> EvalResult:
    """The result of a mode's predictions on the test split. EvaluationError if no label of it counts."""
    total = task.total(predictions.counts)
    value = float(task.statistic(total))
    best_index([value], "test")
    return EvalResult(
        benchmark=manifest.spec.name,
        metric=task.metric,
        mode=mode,
        target=task.target.name,
        units=task.target.units,
        synthetic=manifest.synthetic,
        value=value,
        per_class={
            name: None if np.isnan(score) else float(score)
            for name, score in zip(task.classes, task.per_class(total), strict=True)
        },
        interval=bootstrap_interval(task.statistic, predictions.counts),
        num_tiles=len(predictions.counts),
        confusion=predictions.confusion or task.confusion(total),
        scores={name: score for name, score in predictions.scores.items() if np.isfinite(score)},
        seeds=(provenance.seed,),
        folds=() if benchmark.fold is None else (benchmark.fold,),
        splits=benchmark.splits_by_role(manifest),
        datasets={manifest.spec.name: manifest.digest},
        encoder=provenance.encoder,
        weights=provenance.weights,
        trained_on=provenance.trained_on,
        adaptation=provenance.adaptation,
        architecture=provenance.architecture,
        checkpoint_step=provenance.step,
        recipe=provenance.recipe,
        chosen=predictions.chosen,
        timings=timings,
        fraction=benchmark.fraction,
        maps=predictions.maps,
        counts=TileCounts(benchmark.test_keys(manifest), predictions.counts),
    )
