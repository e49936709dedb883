"""Scores of a frozen encoder on a dataset in shards: nearest neighbours and a linear probe, fitted on train, chosen on
val, scored once on test."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.bootstrap import bootstrap_interval
from maestro_scale.evaluation.features import Features, encode
from maestro_scale.evaluation.knn import knn
from maestro_scale.evaluation.labelled import Fit, Labelled
from maestro_scale.evaluation.metrics import MultilabelCounts, tile_counts, wf1
from maestro_scale.evaluation.probe import linear_probe
from maestro_scale.evaluation.results import EvalResult, ResultsError
from maestro_scale.model.maestro import Maestro
from maestro_scale.shards.manifest import Manifest
from maestro_scale.shards.store import Store
from maestro_scale.stream.evaluation import EvalLoader
from maestro_scale.stream.source import Source

MODES: dict[str, Callable[[Labelled, Labelled, np.ndarray], Fit]] = {"knn": knn, "probe": linear_probe}
SPLITS = ("train", "val", "test")
BATCH_SIZE = 32


@dataclass(frozen=True)
class Provenance:
    """Where an encoder comes from; goes into every result. ``step``: 0 for an untrained one."""

    step: int | None = None
    seed: int = 0
    recipe: Mapping[str, Any] | None = None


def evaluate_frozen(
    model: Maestro,
    shards: str,
    cache_dir: Path,
    modes: Sequence[str] = ("knn", "probe"),
    provenance: Provenance | None = None,
    workers: int = 0,
    cache_bytes: int = 100 * 2**30,
    device: torch.device | None = None,
) -> list[EvalResult]:
    """One result per mode. ResultsError where the dataset has no multilabel target or a split is missing."""
    provenance = provenance or Provenance()
    manifest = Manifest.load(shards)
    target = _multilabel(manifest, shards)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store = Store(shards, cache_dir, cache_bytes)
    started = time.perf_counter()
    features = {}
    for split in SPLITS:
        source = Source(
            manifest.spec,
            model.view(manifest.spec.name).sensors,
            manifest.spec.crop_m,
            manifest.of([split]),
            store,
        )
        # A tile larger than the crop is judged by its first crop; kNN and probe give one answer per tile.
        loader = EvalLoader(source, BATCH_SIZE, workers=workers, crops=1)
        features[split] = encode(model.eval().to(device), loader, device)
    encode_s = time.perf_counter() - started
    train, val, test = (_labelled(features[s], target) for s in SPLITS)
    results = []
    for mode in modes:
        started = time.perf_counter()
        fit = MODES[mode](train, val, test.features)
        fit_s = time.perf_counter() - started
        results.append(
            _result(
                manifest, mode, target, fit, test.labels, provenance, {"encode_s": encode_s, "fit_s": fit_s}
            )
        )
    return results


def _multilabel(manifest: Manifest, shards: str) -> Target:
    for target in manifest.spec.targets:
        if target.kind == "multilabel":
            return target
    raise ResultsError(f"{shards}: {manifest.spec.name} has no multilabel target, which kNN and probe need")


def _labelled(features: Features, target: Target) -> Labelled:
    return Labelled(features.vectors, features.targets[target.name] > target.threshold)


def _result(
    manifest: Manifest,
    mode: str,
    target: Target,
    fit: Fit,
    truth: np.ndarray,
    provenance: Provenance,
    timings: dict[str, float],
) -> EvalResult:
    counts = MultilabelCounts.of(fit.predicted, truth)
    present = counts.support > 0
    scores = counts.f1()
    return EvalResult(
        benchmark=manifest.spec.name,
        metric="wf1",
        mode=mode,
        value=counts.wf1(),
        per_class={
            name: float(score) if there else None
            for name, score, there in zip(target.classes, scores, present, strict=True)
        },
        interval=bootstrap_interval(wf1, tile_counts(fit.predicted, truth)),
        num_tiles=len(truth),
        seeds=(provenance.seed,),
        checkpoint_step=provenance.step,
        recipe=provenance.recipe,
        chosen=fit.chosen,
        timings=timings,
    )
