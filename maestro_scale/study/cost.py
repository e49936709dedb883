"""Cost of a cell before it runs: steps, samples, seconds on this machine, GPU hours.

Seconds follow from FLOPs at the rate of finished cells of the same root, else of the recorded machine. GPU hours of a
pretraining are those of ``planning``; evaluations are added by their FLOPs at the same fraction of the peak.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetSpec, Target
from maestro_scale.evaluation.baselines.registry import UNTRAINED
from maestro_scale.evaluation.probes import dense, lr_grid
from maestro_scale.model.config import ModelConfig
from maestro_scale.model.cost import compute_cost, encoder_flops
from maestro_scale.planning import GPUS, Cluster, plan_cluster
from maestro_scale.recipe import Recipe, build_model_config
from maestro_scale.stream.crops import CropGrid
from maestro_scale.study.cells import TRAINED_MODES, Cell, Evaluation
from maestro_scale.study.config import SCRATCH, Data, Gpu
from maestro_scale.study.worker import is_trained, seconds_spent
from maestro_scale.training.dry_run import specs_and_sizes
from maestro_scale.training.stored_data import StoredData, num_steps

_CPU_FLOPS = 17e9
"""FLOP/s of one core in training: quickstart's step of 32 samples takes 0.2 s of one core."""
_STAGE_S = 6.0
"""Seconds of a stage without its FLOPs: process group, reading shards, fitting a probe of whole tiles."""


@dataclass(frozen=True)
class CellCost:
    """Cost of a whole cell. ``steps`` and ``samples``: of the pretraining, None where the length of an epoch is unknown
    because the shards cannot be read; ``flops``: training and evaluation; ``stages``: processes that are started."""

    steps: int | None
    samples: int | None
    train_flops: float
    evaluate_flops: float
    stages: int
    gpu_hours: float | None = None

    @property
    def flops(self) -> float:
        """FLOPs of training and evaluation."""
        return self.train_flops + self.evaluate_flops

    def seconds(self, flops_per_s: float) -> float:
        """Estimated duration at a rate."""
        return self.flops / flops_per_s + self.stages * _STAGE_S


def cell_costs(cells: Iterable[Cell], gpu: Gpu | None) -> list[CellCost]:
    """The cost of each cell. Computed once for cells that differ in the seed: a plan takes seconds."""
    known: dict[str, CellCost] = {}
    costs = []
    for cell in cells:
        recipes = [(e.mode, e.fraction, e.recipe) for e in cell.evaluations]
        key = repr(
            (cell.encoder, _without_seed(cell.recipe), [(m, f, _without_seed(r)) for m, f, r in recipes])
        )
        if key not in known:
            known[key] = cell_cost(cell, gpu)
        costs.append(known[key])
    return costs


def _without_seed(recipe: Recipe) -> str:
    return recipe.model_copy(update={"seed": 0}).model_dump_json()


def cell_cost(cell: Cell, gpu: Gpu | None) -> CellCost:
    """The cost of a cell, from its recipe."""
    specs, sizes = specs_of(cell.recipe, cell.data)
    steps = None if cell.encoder is not None else num_steps(cell.recipe, sizes)
    config = build_model_config(cell.recipe, specs)
    batch = cell.recipe.train.global_batch
    sample = compute_cost(config.for_dataset(config.views[0].dataset), cell.recipe.masking.ratio)
    train = sample.step_flops * batch * steps if steps else 0.0
    evaluate = _evaluation_flops(cell)
    stages = (cell.encoder is None) + len({(e.folder, e.fraction) for e in cell.evaluations})
    hours = None
    if gpu is not None:
        hours = evaluate / (GPUS[gpu.kind].tflops * 1e12 * gpu.mfu) / 3600
        if cell.encoder is None:
            cluster = Cluster(gpu.kind, 1, 1, gpu.mfu)
            planned = plan_cluster(cell.recipe, specs, sizes, cluster).gpu_hours(cluster)
            hours = None if planned is None else hours + planned
    samples = None if steps is None else steps * batch
    return CellCost(steps, samples, train, evaluate, stages, hours)


def measured_rate(cells: Iterable[tuple[Cell, CellCost]]) -> float:
    """FLOP/s of a cell: the median over finished cells with a pretraining, else that of the recorded machine."""
    rates = [
        cost.train_flops / spent
        for cell, cost in cells
        if cost.train_flops and is_trained(cell) and (spent := seconds_spent(cell).get("train", 0.0)) > 0
    ]
    return statistics.median(rates) if rates else _CPU_FLOPS


def specs_of(recipe: Recipe, data: Data) -> tuple[list[DatasetSpec], list[StoredData | None]]:
    """As ``specs_and_sizes``; size and number of tiles that cannot be read here are those of the study's file."""
    specs, sizes = specs_and_sizes(recipe)
    if data.window_m is not None:
        specs[0] = specs[0].windowed(data.window_m)
    if sizes[0] is None and data.tiles:
        count = sum(data.tiles.get(split, 0) for split in recipe.data.mixture[0].split)
        sizes[0] = StoredData(count, count * _bytes_per_sample(specs[0])) if count else None
    return specs, sizes


def _bytes_per_sample(spec: DatasetSpec) -> int:
    return sum(s.num_dates * len(s.bands) * spec.modality(s.source).size ** 2 * 2 for s in spec.sensors)


def _evaluation_flops(cell: Cell) -> float:
    """Of all evaluations; 0 for other encoders than ours, and where the number of tiles is unknown.

    Frozen modes of one protocol share the features.
    """
    if cell.encoder not in (None, *UNTRAINED, SCRATCH):
        return 0.0
    trained = [e for e in cell.evaluations if e.mode in TRAINED_MODES]
    frozen = [e for e in cell.evaluations if e.mode not in TRAINED_MODES]
    by_folder = {e.folder: e for e in frozen}
    features = sum(_feature_flops(e) for e in by_folder.values())
    return features + sum(map(_finetuning_flops, trained)) + sum(map(_probe_flops, frozen))


def _feature_flops(evaluation: Evaluation) -> float:
    """Of the forward passes over all crops."""
    spec, crops = _spec_and_crops(evaluation)
    return _flops_without_mask(evaluation.recipe, spec) * crops * sum(evaluation.data.tiles.values())


def _finetuning_flops(evaluation: Evaluation) -> float:
    """Of the steps, with backward passes, and of validations and test."""
    (spec, crops), recipe, tiles = _spec_and_crops(evaluation), evaluation.recipe, evaluation.data.tiles
    train = max(1, int(tiles.get("train", 0) * evaluation.fraction))
    steps = recipe.train.num_steps(max(1, train // recipe.train.global_batch))
    validated = tiles.get("val", 0) * min(recipe.evaluation.validations, steps)
    samples = 3 * steps * recipe.train.global_batch + crops * (validated + tiles.get("test", 0))
    return _flops_without_mask(recipe, spec) * samples


def _probe_flops(evaluation: Evaluation) -> float:
    """Of the linear maps from cells to pixels; 0 for other modes and labels of whole tiles, whose fit takes seconds."""
    spec, crops = _spec_and_crops(evaluation)
    target, ref = (
        _target(spec, evaluation.target),
        next((s for s in spec.sensors if s.name == spec.ref_sensor), None),
    )
    if evaluation.mode != "probe" or target is None or not target.is_map or ref is None:
        return 0.0
    cells = int(evaluation.data.tiles.get("train", 0) * evaluation.fraction) * crops * ref.grid**2
    batches = -(-cells // dense.BATCH_CELLS)
    steps = max(lr_grid.EPOCHS * batches, lr_grid.MIN_STEPS)
    width = _model_of(evaluation.recipe, spec).size.width * len(spec.sensors)
    multiplied = width * ref.patch**2 * target.num_outputs
    return 6.0 * len(dense.LEARNING_RATES) * steps * min(cells, dense.BATCH_CELLS) * multiplied


def _spec_and_crops(evaluation: Evaluation) -> tuple[DatasetSpec, int]:
    """The benchmark's spec, and the crops of a tile that are evaluated: all of them for a map, else one."""
    (spec, *_), _ = specs_of(evaluation.recipe, evaluation.data)
    target = _target(spec, evaluation.target)
    return spec, CropGrid(spec).num_crops if target is not None and target.is_map else 1


def _target(spec: DatasetSpec, name: str | None) -> Target | None:
    return spec.target(name) if name is not None else next(iter(spec.targets), None)


def _flops_without_mask(recipe: Recipe, spec: DatasetSpec) -> float:
    return float(encoder_flops(_model_of(recipe, spec)))


def _model_of(recipe: Recipe, spec: DatasetSpec) -> ModelConfig:
    """The model for the first dataset of the recipe alone."""
    first = recipe.data.model_copy(update={"mixture": recipe.data.mixture[:1]})
    return build_model_config(recipe.model_copy(update={"data": first}), [spec])
