"""What ``maestro-scale plan`` predicts for a recipe on one GPU of this kind."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_sections.bench import Bench
from benchmarks.gpu_sections.cases import specs_of
from maestro_scale.planning import Cluster, plan_cluster
from maestro_scale.recipe import Recipe
from maestro_scale.training.metrics.gpus import GPUS, find_gpu

_REHEARSED = "h100"


@dataclass(frozen=True)
class Estimate:
    """Memory of the GPU in bytes, and samples/s, for the recipe's ZeRO stage and micro-batch."""

    device_bytes: int
    samples_per_s: float


def estimate(bench: Bench, recipe: Recipe) -> Estimate | None:
    """The estimate; None if plan does not know this GPU."""
    gpu = gpu_key(bench)
    if gpu is None:
        return None
    plan = plan_cluster(recipe, specs_of(recipe), [None], Cluster(gpu, num_gpus=1, per_node=1))
    (layout,) = (
        x for x in plan.layouts if (x.stage, x.micro_batch) == (recipe.zero_stage, recipe.train.micro_batch)
    )
    return Estimate(layout.memory.device, recipe.train.global_batch / layout.time.total_s)


def gpu_key(bench: Bench) -> str | None:
    """The name of this GPU for ``--gpu`` of plan."""
    if not bench.device.is_gpu:
        return _REHEARSED
    found = find_gpu(bench.device.name)
    return next((name for name, gpu in GPUS.items() if gpu is found), None)
