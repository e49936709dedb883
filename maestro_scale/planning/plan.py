"""Computes memory, communication, data rate and time of a recipe on a cluster, and the recommended layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from maestro_scale.datasets.spec import DatasetSpec
from maestro_scale.errors import MaestroError
from maestro_scale.model.cost import compute_cost
from maestro_scale.recipe import Recipe, build_model_config
from maestro_scale.training.footprint import Traffic, traffic
from maestro_scale.training.memory import USABLE_MEMORY, MemoryEstimator, StepMemory
from maestro_scale.training.metrics.gpus import GPUS, Gpu


class PlanningError(MaestroError):
    """The recipe cannot run on this cluster; the message says which values are valid."""


@dataclass(frozen=True)
class Cluster:
    """``num_gpus`` GPUs of one kind, ``per_node`` on each node; ``mfu``: achieved fraction of their peak FLOP/s."""

    gpu: str
    num_gpus: int
    per_node: int
    mfu: float

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise PlanningError(f"--gpu {self.gpu}: unknown; use one of {', '.join(GPUS)}")
        if self.num_gpus % min(self.per_node, self.num_gpus):
            raise PlanningError(
                f"--gpus {self.num_gpus} do not fill nodes of --per-node {self.per_node}: use a multiple of it"
            )
        if not 0 < self.mfu <= 1:
            raise PlanningError(f"--mfu {self.mfu:g}: must be above 0 and at most 1; 0.4 is typical")

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return math.ceil(self.num_gpus / self.per_node)


@dataclass(frozen=True)
class LayoutEstimate:
    """Memory and communication of a rank with one ZeRO stage and micro-batch."""

    stage: int
    micro_batch: int
    num_micro_batches: int
    memory: StepMemory
    traffic: Traffic
    fits: bool


@dataclass(frozen=True)
class ClusterPlan:
    """The plan of a recipe on a cluster.

    ``best``: the recommended layout, None if none fits. ``seconds``: None if the length of an epoch is unknown, because
    the shards cannot be read here. ``bytes_per_sample``: as stored, averaged over the mixture by weight.
    """

    parameters: int
    layouts: tuple[LayoutEstimate, ...]
    best: LayoutEstimate | None
    samples_per_s: float
    bytes_per_sample: float
    num_steps: int | None
    seconds: float | None

    def node_bytes_per_s(self, cluster: Cluster) -> float:
        """Data rate that the stream must sustain on each node."""
        return self.samples_per_s * self.bytes_per_sample / cluster.num_nodes

    def gpu_hours(self, cluster: Cluster) -> float | None:
        """GPU-hours of the training; None if its length is unknown."""
        return None if self.seconds is None else self.seconds * cluster.num_gpus / 3600


def plan_cluster(
    recipe: Recipe, specs: Sequence[DatasetSpec], stored: Sequence[tuple[int, int] | None], cluster: Cluster
) -> ClusterPlan:
    """Plan a recipe on a cluster.

    ``stored``: (number of samples, bytes) of the shards of each dataset of the mixture; None if they cannot be read.
    The size of a sample is then computed from its spec, with the number of dates that the model uses.

    Raises PlanningError if the number of ranks does not divide the recipe's global batch and lanes.
    """
    n, batch = cluster.num_gpus, recipe.train.global_batch
    if batch % n or recipe.data.lanes % n:
        raise PlanningError(
            f"{n} GPUs cannot share train.global_batch {batch} and data.lanes {recipe.data.lanes} evenly: set both to "
            f"multiples of {n}"
        )
    config = build_model_config(recipe, specs)
    estimator, gpu = MemoryEstimator(config, specs), GPUS[cluster.gpu]
    costs = [compute_cost(config.for_dataset(v.dataset), recipe.masking.ratio) for v in config.views]
    layouts = tuple(
        _layout(recipe, estimator, gpu, n, stage, micro)
        for stage in range(4)
        # Only micro-batches that divide a rank's share: all micro-batches of a step have the same size.
        for micro in (m for m in range(1, batch // n + 1) if (batch // n) % m == 0)
    )
    fitting = [x for x in layouts if x.fits]
    weights = [e.weight for e in recipe.data.mixture]
    flops = sum(c.step_flops * w for c, w in zip(costs, weights, strict=True)) / sum(weights)
    sizes = [
        size[1] / size[0] if size else _sample_bytes(spec) for size, spec in zip(stored, specs, strict=True)
    ]
    speed = n * gpu.tflops * 1e12 * cluster.mfu / flops
    steps = recipe.train.steps
    if steps is None and all(stored):
        steps = recipe.train.num_steps(sum(max(1, size[0] // batch) for size in stored if size))
    return ClusterPlan(
        parameters=estimator.parameters,
        layouts=layouts,
        # With the same MFU for all layouts, the one that communicates least is the fastest; among equal ones prefer
        # larger micro-batches (fewer kernel launches), then less memory.
        best=min(fitting, key=lambda x: (x.traffic.total, -x.micro_batch, x.memory.device), default=None),
        samples_per_s=speed,
        bytes_per_sample=sum(b * w for b, w in zip(sizes, weights, strict=True)) / sum(weights),
        num_steps=steps,
        seconds=None if steps is None else steps * batch / speed,
    )


def _layout(
    recipe: Recipe, estimator: MemoryEstimator, gpu: Gpu, n: int, stage: int, micro: int
) -> LayoutEstimate:
    variant = recipe.with_zero_stage(stage).with_micro_batch(micro)
    num_micro_batches = variant.num_micro_batches(n)
    memory = estimator.step(variant, n, "cuda")
    sent = traffic(estimator.parameters, n, variant.deepspeed_config(n, "cuda"), num_micro_batches)
    fits = memory.device <= USABLE_MEMORY * gpu.memory_bytes
    return LayoutEstimate(stage, micro, num_micro_batches, memory, sent, fits)


def _sample_bytes(spec: DatasetSpec) -> float:
    """Size of an uncompressed sample; a time series has as many dates as its sensor reads."""
    dates = {m.name: 1 for m in spec.modalities}
    for s in spec.sensors:
        dates[s.source] = max(dates[s.source], s.num_dates)
    item_bytes = {"uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2}
    return sum(dates[m.name] * len(m.bands) * m.size**2 * item_bytes.get(m.dtype, 4) for m in spec.modalities)
