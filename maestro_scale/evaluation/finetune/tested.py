"""Mode ``test``: a finetuned model on the test split, without training; repeats the score of the finetuning."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from maestro_scale.datasets.spec import Target
from maestro_scale.evaluation.benchmark import Benchmark, Provenance, build_result
from maestro_scale.evaluation.features.adapt import encoder_spec
from maestro_scale.evaluation.finetune.predictions import predict_split
from maestro_scale.evaluation.finetune.predictor import MaestroPredictor
from maestro_scale.evaluation.results import EvalResult, EvaluationError
from maestro_scale.evaluation.tasks.losses import TargetLoss, target_loss_for
from maestro_scale.evaluation.tasks.regression import LabelScale, RegressionMapTask, RegressionTask
from maestro_scale.evaluation.tasks.task import task_for
from maestro_scale.evaluation.tasks.tile_maps import TileMapWriter
from maestro_scale.model.finetuned import Finetuned
from maestro_scale.model.heads import Standardised
from maestro_scale.model.maestro import Maestro
from maestro_scale.recipe import Recipe
from maestro_scale.shards.read.store import Store
from maestro_scale.stream.source import Source
from maestro_scale.training.distributed import World

MODE = "test"


def evaluate_finetuned(
    model: Maestro,
    benchmark: Benchmark,
    recipe: Recipe,
    world: World,
    provenance: Provenance,
    maps_dir: Path | None = None,
) -> EvalResult | None:
    """The result of a finetuned model on the test split on rank 0; None on the other ranks.

    Sensors and crop are those that the model was finetuned with, whatever the recipe says. EvaluationError where it
    predicts another target than that of the benchmark.
    """
    started = time.perf_counter()
    known = model.finetuned
    assert known is not None  # Encoder.check refused other models
    if benchmark.target not in (None, known.target):
        raise EvaluationError(f"--target {benchmark.target}: the model predicts {known.target}")
    manifest = benchmark.load_manifest()
    spec = dataclasses.replace(benchmark.spec, crop_m=known.spec.crop_m, pos_grid=known.spec.pos_grid)
    spec = encoder_spec(model, spec)
    task = task_for(spec, known.target, benchmark.loss)
    check_target(known, task.target, spec.name)
    loss = _target_loss(model, task)
    network = MaestroPredictor(dataclasses.replace(model.config, others=()), loss)
    network.load_state_dict(model.state_dict())
    network.to(world.device).requires_grad_(False).eval()
    store = Store(benchmark.shards, benchmark.cache_dir, benchmark.cache_bytes)
    source = Source(spec, manifest.shards_of(benchmark.stored_splits("test")), store)
    maps = TileMapWriter(maps_dir, source, task) if maps_dir else None
    predictions = predict_split(network, source, world, recipe.data.workers, recipe.train.precision, maps)
    if maps is not None:
        maps.close()
    if not world.is_main:
        return None
    predictions = dataclasses.replace(
        predictions, chosen={"step": float(known.step), "validation": known.validation}
    )
    provenance = dataclasses.replace(provenance, trained_on=known.trained_on)
    timings = {"predict_s": time.perf_counter() - started}
    return build_result(benchmark, manifest, MODE, task, predictions, provenance, timings)


def check_target(known: Finetuned, target: Target, dataset: str) -> None:
    """EvaluationError unless ``target`` of a dataset is what the model was finetuned for."""
    learned = known.spec.target(known.target)
    if target != learned:
        raise EvaluationError(
            f"{dataset}: {target.name} has other classes, ignored values or resolution than the target that the model "
            f"was finetuned for ({learned.kind} of {len(learned.classes)} classes)"
        )


def _target_loss(model: Maestro, task: object) -> TargetLoss:
    """What turns logits into predictions and counts; of a regression with the mean and deviation in the head."""
    assert model.finetuned is not None
    loss = target_loss_for(task)  # type: ignore[arg-type]
    head = model.heads[model.finetuned.target]
    if isinstance(task, RegressionTask | RegressionMapTask):
        assert isinstance(head, Standardised)
        scale = LabelScale(_number(head.mean), _number(head.deviation))
        return dataclasses.replace(loss, scale=scale)  # type: ignore[type-var]
    return loss


def _number(value: torch.Tensor) -> float:
    return float(value)
