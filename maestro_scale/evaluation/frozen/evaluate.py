"""Evaluation of a frozen encoder: kNN, a linear and an attentive probe, fitted on train, selected on val, scored once
on test."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.evaluation.baselines.baseline import Baseline, FrozenEncoder, token_view
from maestro_scale.evaluation.benchmark import BATCH_SIZE, Benchmark, Provenance, build_result
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.features.cache import (
    FeatureCache,
    cached_features,
    concat_features,
    weights_digest,
)
from maestro_scale.evaluation.features.missing import check_can_encode
from maestro_scale.evaluation.features.on_device import RecipePrecision, eval_precision
from maestro_scale.evaluation.frozen.attentive import attentive_probe, concat_tokens
from maestro_scale.evaluation.progress import ProgressFactory, no_progress
from maestro_scale.evaluation.results import EvalResult
from maestro_scale.evaluation.tasks.losses import needs_label_counts, target_loss_for
from maestro_scale.evaluation.tasks.protocol import Classifier, Predictions, Task
from maestro_scale.evaluation.tasks.subset import TRAIN, labelled_subset
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.shards.format.manifest import Manifest
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.source import Source
from maestro_scale.training.device import DeviceSetting, bind_process, use_device
from maestro_scale.training.distributed import World

ATTENTIVE = "attentive"


def evaluate_frozen(
    model: FrozenEncoder,
    benchmark: Benchmark,
    modes: Sequence[str] = ("knn", "probe"),
    provenance: Provenance | None = None,
    workers: int = 0,
    world: World | None = None,
    maps_dirs: Mapping[str, Path] | None = None,
    progress: ProgressFactory = no_progress,
    device_setting: DeviceSetting = "auto",
    precision: RecipePrecision = "auto",
) -> list[EvalResult]:
    """One result per mode, on rank 0; the other ranks only encode their share and return none.

    ``precision``: of the encoder on a device other than the CPU, where it is always fp32 (``eval_precision``).
    ``maps_dirs``: by mode, where predicted maps of the test tiles are written; a mode without one writes none.
    ``device_setting``: as ``train.device``, where there is no ``world`` with a device.

    EvaluationError where the dataset has no target to score, ManifestError where a split is missing.
    """
    provenance = provenance or Provenance()
    manifest = benchmark.load_manifest()
    spec = encoder_spec(model, benchmark.spec)
    task = task_for(spec, benchmark.target, benchmark.loss)
    device = world.device if world else use_device(bind_process(device_setting))
    model = model.eval().to(device)
    train_split, fraction = benchmark.train_split(manifest)
    splits = _Splits(
        model=model,
        weights=weights_digest(model),
        spec=spec,
        task=task,
        benchmark=benchmark,
        manifest=manifest,
        train_split=train_split,
        fraction=fraction,
        store=Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes),
        seed=provenance.seed,
        device=device,
        precision=precision,
        workers=workers,
        world=world,
        progress=progress,
    )
    check_can_encode(model, [splits.source(splits.stored(role)) for role in (train_split, "val", "test")])
    started = time.perf_counter()
    # Opened first: whatever makes maps impossible is reported before hours of encoding.
    test = splits.source(benchmark.stored_splits("test"))
    writers = {mode: TileMapWriter(path, test, task) for mode, path in (maps_dirs or {}).items()}
    kinds = {mode: _feature_kind(mode, task) for mode in modes}
    features = {kind.name: splits.features(kind) for kind in {k.name: k for k in kinds.values()}.values()}
    if world is not None and not world.is_main:
        return []
    encode_s = time.perf_counter() - started
    results = []
    for mode in modes:
        started = time.perf_counter()
        train, val, test_features = features[kinds[mode].name]
        classifier = _classifier(mode, task, model, spec)
        predictions = classifier(train, val, test_features, provenance.seed, device)
        if mode in writers:
            _write_maps(writers[mode], predictions)
        timings = {"encode_s": encode_s, "fit_s": time.perf_counter() - started}
        results.append(build_result(benchmark, manifest, mode, task, predictions, provenance, timings))
    return results


@dataclass(frozen=True)
class FeatureKind:
    """Features that are stored on disk: ``extract`` (model, batch) as ``dtype``. ``name``: part of the cache key."""

    name: str
    extract: Callable[[FrozenEncoder, Batch], Tensor]
    dtype: str


def _feature_kind(mode: str, task: Task) -> FeatureKind:
    if mode == ATTENTIVE:  # half precision, as all tokens are stored: 160 MB per tile of PASTIS-HD
        return FeatureKind("tokens", concat_tokens, "float16")
    return FeatureKind("pooled", task.features, task.feature_dtype)


def _classifier(mode: str, task: Task, model: FrozenEncoder, spec: DatasetSpec) -> Classifier:
    if mode != ATTENTIVE:
        return task.classifiers[mode]
    view, tokens = model.view(spec.name), token_view(model, spec.name)

    def fit(
        train: FeatureCache, val: FeatureCache, test: FeatureCache, seed: int, device: torch.device
    ) -> Predictions:
        counts = task.label_counts(np.asarray(train.labels)) if needs_label_counts(task) else None
        target_loss = target_loss_for(task, counts)
        return attentive_probe(target_loss, view, train, val, test, seed, device, tokens)

    return fit


def _write_maps(writer: TileMapWriter, predictions: Predictions) -> None:
    for number, tile_map in enumerate(predictions.tile_maps() if predictions.tile_maps else ()):
        writer.write(number, tile_map)
    writer.close()


@dataclass(frozen=True)
class _Splits:
    """Encodes the splits of a benchmark. ``spec``: with the sensors that ``model`` reads."""

    model: FrozenEncoder
    weights: str
    spec: DatasetSpec
    task: Task
    benchmark: Benchmark
    manifest: Manifest
    train_split: str
    fraction: float
    store: Store
    seed: int
    device: torch.device
    precision: RecipePrecision
    workers: int
    world: World | None
    progress: ProgressFactory

    def features(self, kind: FeatureKind) -> list[FeatureCache]:
        """Of train, val and test."""
        found = []
        for role in (self.train_split, "val", "test"):
            stored = self.benchmark.stored_splits(role)
            split = concat_features([self._encode(name, kind) for name in dict.fromkeys(stored)])
            # The whole split is encoded and a fraction read from it, so that all fractions share one cache.
            if role == TRAIN and self.fraction < 1:
                used = labelled_subset(
                    self.source(stored), self.task.target, self.fraction, self.seed, self.world
                )
                split = split.take(np.flatnonzero(np.isin(split.tiles, used)))
            found.append(split)
        return found

    def stored(self, role: str) -> tuple[str, ...]:
        """The splits in shards of a role."""
        return self.benchmark.stored_splits(role)

    def source(self, splits: Sequence[str]) -> Source:
        """The samples of some splits in shards."""
        return Source(self.spec, self.manifest.shards_of(splits), self.store)

    def _encode(self, split: str, kind: FeatureKind) -> FeatureCache:
        # Cached per split in shards, not per role: folds share the splits that they are made of. The inputs are
        # everything that determines the features; the digest of spec and shards stands for the data.
        inputs = {
            "features": kind.name,
            "weights": self.weights,
            "view": self.model.view(self.spec.name).dataset,
            "data": self.manifest.digest_of((split,)),
            "crop_m": self.spec.crop_m,
            "num_crops": self.task.num_crops,
            "target": repr(self.task.target),
            "batch_size": BATCH_SIZE,
            "precision": eval_precision(self.device, self.precision),
            "split": split,
        }
        # The name of the folder is that of earlier revisions, whose folders are thus replaced, not left behind.
        key: tuple[object, ...] = (*list(inputs.values())[:6], self.task.target, BATCH_SIZE)
        if inputs["precision"] != "fp32":
            key += (inputs["precision"],)
        if isinstance(self.model, Baseline) and self.model.code:
            inputs["code"] = self.model.code
        rank, size = (self.world.rank, self.world.size) if self.world else (0, 1)
        loader = EvalLoader(
            self.source((split,)),
            BATCH_SIZE,
            rank,
            size,
            workers=self.workers,
            pin=self.device.type != "cpu",
            crops=self.task.num_crops,
        )
        return cached_features(
            self.benchmark.features_dir / f"{split}-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}",
            inputs,
            loader,
            lambda batch: kind.extract(self.model, batch),
            self.task.labels,
            kind.dtype,
            self.device,
            self.precision,
            self.world,
            self.progress,
        )
