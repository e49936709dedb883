"""The training samples of a fraction of the labels: the list that the release ships, else a stratified sample."""

from __future__ import annotations

import numpy as np
import torch

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.fraction import stratified_sample
from maestro_scale.evaluation.tasks.protocol import Task
from maestro_scale.evaluation.tasks.regression import NUM_LABEL_SUMS
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.stream.source import OpenShards, Source
from maestro_scale.training.distributed import World

TRAIN = "train"
_NUM_BINS = 10  # that the values of a regression are stratified by


def train_split(manifest: Manifest, fraction: float) -> tuple[str, float]:
    """(split to train on, fraction of it to use): all of ``train_filtered_<percent>``, the list that the release ships,
    where the shards have it; else that fraction of ``train``. EvaluationError unless 0 < fraction <= 1."""
    if not 0 < fraction <= 1:
        raise EvaluationError(f"a fraction of {fraction:g}: give one above 0 and at most 1, 0.1 for 10 %")
    official = f"{TRAIN}_filtered_{100 * fraction:.12g}"
    return (official, 1.0) if official in manifest.splits else (TRAIN, fraction)


def labelled_subset(
    source: Source, target: Target, fraction: float, seed: int, world: World | None = None
) -> np.ndarray:
    """Ascending numbers, in manifest order, of the samples in a stratified fraction; the same on all ranks.

    Only rank 0 reads the labels of the split; the others receive its choice.
    """
    if fraction == 1:
        return np.arange(sum(source.counts))
    used = np.zeros(sum(source.counts))
    if world is None or world.is_main:
        used[stratified_sample(class_weights(source, target), fraction, seed)] = 1
    if world is not None:
        used = np.array(world.sums(used.tolist()))
    return np.flatnonzero(used)


def class_weights(source: Source, target: Target) -> np.ndarray:
    """(samples, classes) weights for the stratification: pixels of each class in a tile, 0 or 1 where labels are of
    whole tiles. Ignored and missing values have no weight. A regression is stratified by deciles of the means
    of tiles."""
    shards = OpenShards(source, source.store.cache_bytes // 2)
    counted = [i for i, _ in enumerate(target.classes) if i not in target.ignored]
    try:
        rows: list[np.ndarray] = []
        for number in range(shards.num_samples):
            label = shards.sample(*shards.locate(number)).array(f"target.{target.name}")
            if target.kind == "multilabel":
                rows.append(label > target.threshold)
            elif target.kind == "regression":
                known = label[~np.isnan(label)]
                rows.append(known.mean(dtype=np.float64, keepdims=True) if known.size else np.array([np.nan]))
            elif target.kind == "classification":
                rows.append(label == np.array(counted))
            else:
                rows.append(np.bincount(label.reshape(-1), minlength=256)[counted])
        weights = np.array(rows, np.float64)
        return _by_decile(weights[:, 0]) if target.kind == "regression" else weights
    finally:
        shards.close()


def _by_decile(values: np.ndarray) -> np.ndarray:
    """(samples, 10) 0 or 1: the tenth of the values that each belongs to; none where it is NaN."""
    known = ~np.isnan(values)
    decile = np.full(len(values), -1)
    order = np.argsort(values[known], kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    decile[known] = rank * _NUM_BINS // max(len(order), 1)
    return (decile[:, None] == np.arange(_NUM_BINS)).astype(np.float64)


def read_label_counts(source: Source, task: Task, world: World | None = None) -> np.ndarray:
    """``Task.label_counts`` of every sample of ``source``, on all ranks; only rank 0 reads the labels."""
    total = np.zeros(len(task.classes) or NUM_LABEL_SUMS)
    if world is None or world.is_main:
        shards = OpenShards(source, source.store.cache_bytes // 2)
        try:
            for number in range(shards.num_samples):
                stored = shards.sample(*shards.locate(number)).array(f"target.{task.target.name}")
                values = torch.from_numpy(np.array(stored[None]))
                total += task.label_counts(task.encode_labels(values).numpy())
        finally:
            shards.close()
    return total if world is None else np.array(world.sums(total.tolist()))
