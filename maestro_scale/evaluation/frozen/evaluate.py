"""Scores of a frozen encoder on a dataset in shards: nearest neighbours, a linear and an attentive probe, fitted on
train, chosen on val, scored once on test."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maestro_scale.evaluation.benchmark import BATCH_SIZE, Benchmark, Provenance, build_result
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.features.baselines import Baseline
from maestro_scale.evaluation.features.cache import (
    FeatureCache,
    cached_features,
    concat_features,
    weights_digest,
)
from maestro_scale.evaluation.frozen.attentive import attentive_probe, concat_tokens
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.tasks.losses import target_loss_for
from maestro_scale.evaluation.tasks.subset import TRAIN, labelled_subset
from maestro_scale.evaluation.tasks.task import Task, task_for
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World

ATTENTIVE = "attentive"


def evaluate_frozen(
    model: Maestro | Baseline,
    benchmark: Benchmark,
    modes: Sequence[str] = ("knn", "probe"),
    provenance: Provenance | None = None,
    workers: int = 0,
    world: World | None = None,
    maps_dirs: Mapping[str, Path] | None = None,
    progress: ProgressFactory = no_progress,
) -> list[EvalResult]:
    """One result per mode, on rank 0; the other ranks help to encode and get none.

    ``maps_dirs``: by mode, where predictions of whole test tiles are written.

    ResultsError where the dataset has no target to score, ManifestError where a split is missing.
    """
    provenance = provenance or Provenance()
    manifest = Manifest.load(benchmark.shards)
    view, spec = model.view(benchmark.spec.name), encoder_spec(model, benchmark.spec)
    task = task_for(spec, benchmark.target)
    device = world.device if world else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    model = model.eval().to(device)
    weights = weights_digest(model)
    started = time.perf_counter()
    train, fraction = benchmark.train_split(manifest)

    def source(splits: Sequence[str]) -> Source:
        return Source(spec, manifest.shards_of(splits), store)

    def encode(name: str, kind: FeatureKind) -> FeatureCache:
        # By split in shards, not by its part here: folds are made of the same ones.
        data = manifest.digest_of((name,))
        key = repr(
            (kind.name, weights, view.dataset, data, spec.crop_m, task.num_crops, task.target, BATCH_SIZE)
        )
        rank, size = (world.rank, world.size) if world else (0, 1)
        return cached_features(
            benchmark.features_dir / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}",
            EvalLoader(source((name,)), BATCH_SIZE, rank, size, workers=workers, crops=task.num_crops),
            lambda batch: kind.extract(model, batch),
            task.labels,
            kind.dtype,
            device,
            world,
            progress,
        )

    def splits(kind: FeatureKind) -> list[FeatureCache]:
        found = []
        for role in (train, "val", "test"):
            stored = benchmark.stored_splits(role)
            whole = concat_features([encode(name, kind) for name in dict.fromkeys(stored)])
            if role == TRAIN and fraction < 1:  # encoded whole, for other fractions to share
                used = labelled_subset(source(stored), task.target, fraction, provenance.seed, world)
                whole = whole.take(np.flatnonzero(np.isin(whole.tiles, used)))
            found.append(whole)
        return found

    test = source(benchmark.stored_splits("test"))
    maps = {mode: TileMapWriter(path, test, task) for mode, path in (maps_dirs or {}).items()}
    kinds = {mode: _feature_kind(mode, task) for mode in modes}
    of_kind = {kind.name: splits(kind) for kind in {k.name: k for k in kinds.values()}.values()}
    if world is not None and not world.is_main:
        return []
    encode_s = time.perf_counter() - started
    results = []
    for mode in modes:
        started = time.perf_counter()
        fit = (
            partial(attentive_probe, target_loss_for(task), view)
            if mode == ATTENTIVE
            else task.classifiers[mode]
        )
        answer = fit(*of_kind[kinds[mode].name], provenance.seed, device)
        if mode in maps:
            for number, whole in enumerate(answer.tile_maps() if answer.tile_maps else ()):
                maps[mode].write(number, whole)
            maps[mode].close()
        timings = {"encode_s": encode_s, "fit_s": time.perf_counter() - started}
        results.append(build_result(benchmark, manifest, mode, task, answer, provenance, timings))
    return results


@dataclass(frozen=True)
class FeatureKind:
    """What is kept of every batch on disk: ``of`` (model, batch) as ``dtype``, under a ``name``."""

    name: str
    extract: Callable[[Maestro | Baseline, Batch], Tensor]
    dtype: str


def _feature_kind(mode: str, task: Task) -> FeatureKind:
    if mode == ATTENTIVE:
        return FeatureKind("tokens", concat_tokens, "float16")
    return FeatureKind("pooled", task.features, task.feature_dtype)
