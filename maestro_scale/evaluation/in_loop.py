"""Scores the encoder while it pretrains: a hook of the trainer, on a small fixed part of a benchmark.

Every ``evaluation.every_steps`` steps the fp32 weights of the encoder are gathered into a copy. Each rank encodes its
share of the samples, and rank 0 fits kNN and a linear probe on train. Scores on val become ``eval/knn`` and
``eval/probe`` in metrics.jsonl and MLflow; the test split is never read. The full evaluation is ``evaluate.py``.

The copy is outside of DeepSpeed: ranks have different numbers of batches, and under ZeRO 3 a forward pass of the
trained model is collective. Nothing is drawn and nothing of the training changes, so its losses and weights are bitwise
those of a run without this hook.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.evaluation.benchmark import BATCH_SIZE
from maestro_scale.evaluation.features.adapt import adapt_encoder, encoder_spec
from maestro_scale.evaluation.features.cache import FeatureCache
from maestro_scale.evaluation.features.on_device import map_on_device
from maestro_scale.evaluation.results import EvaluationError
from maestro_scale.evaluation.tasks.protocol import Task
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe, RecipeError, resolve_spec
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.batch import Batch
from maestro_scale.stream.eval_loader import EvalLoader
from maestro_scale.stream.sensor_sets import proportional, readable
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World
from maestro_scale.training.engine import Engine
from maestro_scale.training.hooks.hook import FinishedStep, Hook
from maestro_scale.training.hooks.manifests import ManifestHook
from maestro_scale.training.manifests import ManifestMonitor, UsedDataset, compare_manifests, load_manifests
from maestro_scale.training.run_dir import finite
from maestro_scale.training.watchdog import Watchdog

log = logging.getLogger(__name__)

CLASSIFIERS = ("knn", "probe")
SPLITS = ("train", "val")


def evaluation_hooks(
    recipe: Recipe, world: World, model: Maestro, watchdog: Watchdog, datasets: Sequence[UsedDataset]
) -> Callable[[Engine], Sequence[Hook]]:
    """The hooks that ``evaluation.every_steps`` asks for, to be built once the engine exists.

    ``model``: before DeepSpeed partitions it. ``datasets``: of the mixture, whose manifests are not read a second time,
    because they could have changed. RecipeError where there is no benchmark to score, and
    EvaluationError or ManifestError where it lacks a target or a split: before any time is spent.
    """
    if not recipe.evaluation.every_steps:
        return lambda engine: ()
    benchmark, resolved = _benchmark(recipe, datasets, world)
    monitor = ManifestMonitor([] if benchmark in datasets else [benchmark])
    compare_manifests(world, monitor.datasets)
    samples = _Samples(recipe, model, world, benchmark, resolved)
    samples.encoder.to(world.device)
    every = recipe.evaluation.every_steps
    return lambda engine: [
        InLoopEvaluationHook(engine, samples, world, watchdog, every),
        ManifestHook(monitor, world),
    ]


class InLoopEvaluationHook(Hook):
    """Adds ``eval/knn``, ``eval/probe`` and ``eval/delay_s`` to the line of every ``every``-th step.

    A score is None where it is undefined, e.g. where no label of val counts; the log says why.
    """

    def __init__(
        self,
        engine: Engine,
        samples: _Samples,
        world: World,
        watchdog: Watchdog,
        every: int,
    ) -> None:
        self._engine, self._samples = engine, samples
        self._world, self._watchdog, self._every = world, watchdog, every

    @torch.no_grad()
    def after_step(self, step: FinishedStep) -> bool:
        """Score where it is due."""
        if step.position.step % self._every:
            return False
        started = time.perf_counter()
        # Also of a rank without a batch: else the watchdog would report the rank that waits as the one that hangs.
        self._watchdog.note(step.position.step, "evaluating")
        samples = self._samples
        self._engine.sharded.gather_into(samples.encoder, self._world, samples.shared)

        def on_batch() -> None:
            self._watchdog.note(step.position.step, "evaluating")

        train, val = (samples.encode(split, on_batch) for split in SPLITS)
        scores = [0.0] * len(CLASSIFIERS)
        if self._world.is_main:
            scores = [samples.score(name, train, val) for name in CLASSIFIERS]
        # Also the barrier at which the other ranks wait for rank 0; every rank needs the same names and numbers.
        scores = self._world.sums(scores)
        pairs = zip(CLASSIFIERS, scores, strict=True)
        step.metrics.update({f"eval/{name}": finite(score) for name, score in pairs})
        step.metrics["eval/delay_s"] = time.perf_counter() - started
        return False


class _Samples:
    """The encoder copy and the first samples of train and val, which shards hold in shuffled order; where tiles lack
    sensors, the first of each set of sensors, in proportion.

    ``shared``: names of the parameters that the copy takes from the trained model.
    """

    def __init__(
        self, recipe: Recipe, model: Maestro, world: World, benchmark: UsedDataset, resolved: DatasetSpec
    ) -> None:
        self.encoder, self.shared = _encoder_copy(model, resolved)
        spec = encoder_spec(self.encoder, resolved)
        self._task: Task = task_for(spec)
        self._world, self._workers, self._seed = world, recipe.data.workers, recipe.seed
        self._precision = recipe.train.precision
        store = Store(benchmark.url, Path(recipe.data.cache_dir), int(recipe.data.cache_gib * 2**30))
        self._loaders: dict[str, EvalLoader] = {}
        for split in SPLITS:
            # Of tiles that have none of the sensors there is nothing to score, as there is nothing to train on.
            source, _ = readable(Source(spec, benchmark.manifest.shards_of((split,)), store))
            crops = EvalLoader(source, BATCH_SIZE, crops=self._task.num_crops).num_crops
            num_tiles = min(-(-recipe.evaluation.num_crops // crops), int(source.counts.sum()))
            self._loaders[split] = EvalLoader(
                source.select_samples(proportional(source, num_tiles)),
                BATCH_SIZE,
                world.rank,
                world.size,
                workers=self._workers,
                pin=world.device.type != "cpu",
                crops=self._task.num_crops,
            )

    def encode(self, split: str, on_batch: Callable[[], None]) -> FeatureCache:
        """Features and labels of a split on all ranks; a collective."""
        loader, device = self._loaders[split], self._world.device
        features, labels = [], []

        def encode(batch: Batch) -> dict[str, Tensor]:
            on_batch()
            return {"features": self._task.features(self.encoder, batch).float()}

        for batch, found in map_on_device(loader, encode, device, self._precision):
            features.append(found["features"].copy())
            labels.append(self._task.labels(batch))
        num_rows = loader.num_samples * loader.num_crops
        tiles = np.arange(num_rows) // loader.num_crops
        gathered = [self._gather(parts, loader.first_row, num_rows) for parts in (features, labels)]
        return FeatureCache(gathered[0].astype(self._task.feature_dtype), gathered[1], tiles)

    def score(self, name: str, train: FeatureCache, val: FeatureCache) -> float:
        """The task's metric on val of a classifier that is fitted on train and selected on val; NaN: undefined."""
        fit = self._task.classifiers[name]
        try:
            predictions = fit(train, val, val, self._seed, self._world.device)
        except (EvaluationError, ValueError) as error:  # no label counts, or a feature is not finite
            # Only rank 0 fits: an exception here would leave the other ranks in a collective and end the training.
            log.warning("eval/%s is undefined: %s", name, error)
            return float("nan")
        return float(self._task.statistic(self._task.total(predictions.counts)))

    def _gather(self, parts: list[np.ndarray], first: int, num_rows: int) -> np.ndarray:
        """Rows of all ranks, (num_rows, …). Each row is one rank's and zero elsewhere, so a sum is exact."""
        # A rank may have no row, and then knows neither shape nor type: rank 0 has one whenever there is any.
        own = (parts[0].shape[1:], parts[0].dtype.str) if parts else ((), "")
        shape, dtype = self._world.from_main(own)
        whole = np.zeros((num_rows, *shape), np.float64)
        if parts:
            rows = np.concatenate(parts)
            whole[first : first + len(rows)] = rows
        return self._world.sum_on_host(whole).astype(dtype)


def _benchmark(
    recipe: Recipe, datasets: Sequence[UsedDataset], world: World | None
) -> tuple[UsedDataset, DatasetSpec]:
    """(dataset, resolved spec): ``evaluation.shards``, else the first dataset of the mixture with a target; a
    collective."""
    shards = recipe.evaluation.shards
    for i, (entry, dataset) in enumerate(zip(recipe.data.mixture, datasets, strict=True)):
        spec = dataset.manifest.spec
        if entry.shards == shards or (shards is None and spec.targets):
            return dataset, resolve_spec(spec, entry, i, recipe.model.spectral)
    if shards is not None:
        (manifest,) = load_manifests([shards], Path(recipe.data.cache_dir), world)
        extra = UsedDataset(f"evaluation.shards ({manifest.spec.name})", shards, manifest, SPLITS)
        # Other shards of a dataset of the mixture: the encoder reads them as it was trained, with that entry's sensors.
        for i, entry in enumerate(recipe.data.mixture):
            if entry.dataset == manifest.spec.name:
                return extra, resolve_spec(manifest.spec, entry, i, recipe.model.spectral)
        return extra, manifest.spec
    raise RecipeError(
        "evaluation.every_steps: no dataset of data.mixture has a target to score: set evaluation.shards to a "
        "benchmark, or every_steps to 0"
    )


def _encoder_copy(model: Maestro, spec: DatasetSpec) -> tuple[Maestro, list[str]]:
    """(an encoder of ``spec``, without decoder; names of the parameters it shares with ``model``)."""
    adapted, _ = adapt_encoder(model, spec)
    # On a CPU it computes in fp32: a kernel chosen for bf16 (model.attention) may not run. No gradient, so no
    # recomputation.
    config = dataclasses.replace(
        adapted.config.for_dataset(spec.name), attention="auto", checkpointing="none"
    )
    encoder = Maestro(config)
    # Not strict: the trained model also has the modules of other datasets.
    encoder.load_state_dict(adapted.state_dict(), strict=False)
    unused: Any
    for unused in (encoder.to_decoder, encoder.mask_token, encoder.decoders, encoder.to_pixels):
        unused.clear()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shared = [name for name, p in encoder.named_parameters() if shapes.get(name) == p.shape]
    return encoder.requires_grad_(False).eval(), shared
